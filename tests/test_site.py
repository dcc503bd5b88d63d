"""The site of the documentation, and what stands around the package: workflow, templates, container, citation."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parent.parent
PLACEHOLDER = "OWNER/trl-quietstar"


def pages() -> set[str]:
    """All pages of the repository, by their paths."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.md")]
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_the_site_has_every_page():
    """Each once; a page that nobody can find is not there."""
    named = re.findall(r"^ +- .*: ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert set(named) == pages() and len(named) == len(set(named))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly: a broken link, a page left out or a docstring that cannot be read is an error."""
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module, reason="needs `pip install trl-quietstar[docs]`")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_fetches_nothing(site):
    """Fonts, scripts, styles and pictures are its own."""
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*?\ssrc=[\"']?(?:https?:)?//[^\s>]*", text)
        loaded += re.findall(
            r"<link[^>]*?rel=[\"']?(?:stylesheet|preconnect|icon)[^>]*?href=[\"']?(?:https?:)?//[^\s>]*", text
        )
        assert not loaded, page
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style


def test_the_site_can_be_searched_for_options_and_recipes(site):
    """Options with their help, methods, and the pages of recipes."""
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    texts = {entry["location"]: entry["text"] for entry in entries}
    option = texts["docs/reference/#trl_quietstar.config.QuietStarConfig.thought_length"]
    assert "Number of tokens in a thought" in option
    assert "docs/reference/#trl_quietstar.training.evaluation.EvaluationTrainer.validate_thoughts" in texts
    assert {"recipes/lora/", "docs/usage/", "docs/faq/#out-of-memory"} <= texts.keys()


def test_code_on_the_site_has_no_marks_of_github(site):
    """Bars in the code of tables; and types of arguments without marks."""
    assert "<code>&lt;|startthought|&gt;</code>" in (site / "docs/usage/index.html").read_text()
    reference = (site / "docs/reference/index.html").read_text()
    assert "*optional*" not in reference and "[`" not in reference and "`</" not in reference


def test_templates_and_workflow_are_read_by_github():
    """They are YAML with the keys that GitHub asks for; the workflow runs what is run here."""
    (jobs,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert [step["run"] for step in jobs["steps"] if "run" in step] == [".ci/run", "make docs"]
    for form in ("bug", "feature"):
        content = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text())
        assert {"name", "description", "body"} <= content.keys()
        assert all(part["type"] in ("markdown", "textarea") for part in content["body"])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert f'__version__ = "{citation["version"]}"' in (ROOT / "trl_quietstar/__init__.py").read_text()


def test_the_container_copies_what_is_there():
    """Each file and folder; and each target of `make` is one."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    assert "." in copied and not [name for name in copied if not (ROOT / name).exists()]
    makefile = (ROOT / "Makefile").read_text()
    assert 'CMD ["make", "train"]' in lines
    for target in ("train", "demo-data", "$(VENV)/demo"):
        assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE)


def test_the_address_that_is_not_known_stands_where_contributors_are_told():
    """One command fills it in."""
    command = next(x for x in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if x.startswith("sed -i"))
    told = set(command.split("' ")[1].split())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("needs a clone")
    texts = [name for name in tracked if name.endswith((".md", ".cff", ".yml", ".toml", ".ipynb", ".py"))]
    holding = {name for name in texts if PLACEHOLDER in (ROOT / name).read_text()}
    assert holding - {"CONTRIBUTING.md", "tests/test_site.py"} == told
