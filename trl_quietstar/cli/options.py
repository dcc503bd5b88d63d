"""The options of a command, read from the source of the dataclasses that define them.

To import these takes ten seconds, most of it PyTorch's and Transformers'; to read them takes a tenth of one. What is read is a
field's name, type, default and help, and the comment that heads its section.
"""

import ast
import functools
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ..settings import QuietStarSettings
from .commands import HELP, Command, Source


# a comment of a few words on a line of its own, as `# Thoughts` or `# --- Logging ---`
HEADING = re.compile(r"    # (?:--- )?([A-Z][\w &-]*?\w)(?: ---)?$")


class Option(NamedTuple):
    """A field as its source has it: the default is None also where it is computed, and there are choices only where they are
    listed."""

    name: str
    section: str
    kind: str
    default: Any
    choices: tuple[str, ...]
    help: str


def options_of(command: Command) -> list[Option]:
    """All fields that a command's parser takes; of those that one class takes over from another, the default of the former. Those
    of a file that is not there, as another release may have moved it, are left out."""
    found: dict[str, Option] = {}
    for source in command.sources:
        for option in _fields(source):
            before = found.get(option.name)
            if before is None:
                found[option.name] = option
            elif source.kind is None:  # of a parent of the class that came first, or of what stands between the two
                in_place = before.section == source.title or before.section.startswith(f"{source.title}: ")
                found[option.name] = option._replace(section=before.section) if in_place else before
    return [
        option._replace(
            default=command.defaults.get(option.name, option.default), help=HELP.get(option.name, option.help)
        )
        for option in found.values()
    ]


def is_used(command: Command, option: Option) -> bool:
    """Whether a command heeds an option. What is deprecated is heeded, but not shown."""
    if command.used is not None and not command.used & {option.name, option.section}:
        return False
    return option.name not in command.unused


def is_deprecated(option: Option) -> bool:
    """Whether help should not lead to an option, by its own words."""
    return option.help.startswith("Deprecated") or "(Deprecated)" in option.help


@functools.cache
def _fields(source: Source) -> tuple[Option, ...]:
    package, _, rest = source.file.partition("/")
    spec = find_spec(package)
    path = Path(*(spec.submodule_search_locations or ("",) if spec else ("",)), rest)
    if not path.is_file():
        return ()
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    return tuple(
        _option(node, _section(lines, kind.lineno, node.lineno, source.title, package))
        for kind in ast.parse(text).body
        if isinstance(kind, ast.ClassDef) and source.kind in (None, kind.name)
        for node in kind.body
        if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("ClassVar")
    )


def _section(lines: list[str], start: int, end: int, title: str, package: str) -> str:
    """The heading above a field, within its class."""
    headings = [match[1] for match in map(HEADING.match, lines[start : end - 1]) if match]
    if not headings:
        return title
    return headings[-1] if package == "trl_quietstar" else f"{title}: {headings[-1]}"


def _option(node: ast.AnnAssign, section: str) -> Option:
    parts: dict[str, Any] = {}
    if isinstance(node.value, ast.Call):  # of `field`, or of a function of ours with a default and a help
        parts = dict(zip(("default", "help"), node.value.args, strict=False))
        parts |= {keyword.arg: keyword.value for keyword in node.value.keywords if keyword.arg}
    elif node.value is not None:
        parts = {"default": node.value}
    metadata = parts.get("metadata")
    if isinstance(metadata, ast.Dict):
        parts |= {_value(key): value for key, value in zip(metadata.keys, metadata.values, strict=True)}
    choices, annotation = _value(parts.get("choices")), node.annotation
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        assert isinstance(annotation.slice, ast.Tuple)  # a type and its notes
        for note in annotation.slice.elts[1:]:
            if isinstance(note, ast.Call) and ast.unparse(note.func) == "Choices":
                choices = [_value(choice) for choice in note.args]
        annotation = annotation.slice.elts[0]
    listed = tuple(choices) if choices and None not in choices else ()
    name, kind = ast.unparse(node.target), ast.unparse(annotation)
    words = str(_value(parts.get("help")) or "").replace("%%", "%")
    return Option(name, section, kind, _value(parts.get("default")), listed, " ".join(words.split()))


def _value(node: ast.expr | None) -> Any:
    """What an expression is, if that can be said without running code; None otherwise."""
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "SAVED":
        return getattr(QuietStarSettings, node.attr)
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
