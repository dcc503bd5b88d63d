"""What mkdocs and mkdocstrings need to know of this repository; `mkdocs.yml` names both.

`on_files` and `on_page_markdown` are hooks of mkdocs, and [`Docstrings`] is an extension of Griffe, which reads the package for
mkdocstrings.
"""

import ast
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parent.parent
SHOWN = ("*.md", "docs/**/*.md", "docs/**/*.png", "recipes/**/*.md", "recipes/**/*.yaml", "examples/**/*.*")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Takes pages, and the files that they link to, from where they stand in the repository: so a link leads to the same place
    on the site as on GitHub."""
    own = sorted({path.relative_to(ROOT).as_posix() for shown in SHOWN for path in ROOT.glob(shown) if path.is_file()})
    kept = [file for file in files if file.src_dir != config.docs_dir]  # of the theme
    added = [File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in own]
    return Files(kept + added)


def on_page_markdown(markdown: str, **kwargs) -> str:
    """GitHub wants a bar in the code of a table escaped; here it would be shown with its backslash."""
    return re.sub(r"`[^`\n]*\\\|[^`\n]*`", lambda code: code[0].replace("\\|", "|"), markdown)


class Docstrings(griffe.Extension):
    """Reads docstrings as they are written here: in Hugging Face's format, and an option's help as its docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = "\n".join(map(_line, obj.docstring.value.splitlines()))

    def on_attribute_instance(self, *, node: ast.AST, attr: griffe.Attribute, **kwargs) -> None:
        call = getattr(node, "value", None)
        if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "option":
            default, help = call.args
            attr.docstring = griffe.Docstring(ast.literal_eval(help), parent=attr)
            attr.value = ast.unparse(default)


def _line(line: str) -> str:
    """A line of a docstring in Google's format: links that are none of Markdown, and types without their marks."""
    line = re.sub(r"\[`~?([\w.]+)`\]", r"`\1`", line)
    if re.fullmatch(r"\s+[\w, *]+ \(.*\):", line):  # name (`type`, *optional*):
        return line.replace("`", "").replace("*optional*", "optional")
    return re.sub(r"^(\s+)`([^`]+)`: ", r"\1\2: ", line)  # of what is returned or raised
