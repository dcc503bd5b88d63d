"""What the documentation names is there: linked files and headings, modules, metrics, fields and their values; and its tables are whole."""

import importlib
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments
from trl import ModelConfig

from trl_quietstar import QuietStarConfig
from trl_quietstar.cli.commands import COMMANDS
from trl_quietstar.config import CHOICES, LIMITS
from trl_quietstar.rules import check_choice, check_limits

from .layout import ORDER


ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.md"), *ROOT.glob("examples/*.ipynb")]
)
SOURCE = "\n".join(path.read_text() for path in sorted(ROOT.glob("trl_quietstar/**/*.py")))
RECIPES = ("quietstar", "fast_quietstar", "rlp", "latro", "verifree", "rlpr", "jepo", "iss007")
# of the machine, the data and the files, not of the method
NOT_METHOD = {
    *("model_name_or_path", "dataset_name", "dataset_config", "dataset_streaming", "column_mapping", "output_dir"),
    *(
        "max_eval_samples",
        "eval_size",
        "logging_steps",
        "curriculum",
        "branch_batch_size",
        "save_steps",
        "save_total_limit",
        "load_best_model_at_end",
        "eval_strategy",
    ),
}


def prose(page: Path) -> str:
    """A page's Markdown without its code blocks; of a notebook, its Markdown cells."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path, level: str = "#+") -> list[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(rf"^{level} (.+)$", prose(page), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Every link to a file of the project has a file, and every anchor a heading."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_list_of_contents_has_every_section(page):
    """Where there is a list before the first section."""
    before = prose(page).split("\n## ")[0]
    listed = re.findall(r"\]\(#([\w-]+)\)", "".join(re.findall(r"^ *- .*$", before, flags=re.MULTILINE)))
    assert not listed or set(anchors(page, "##")) <= set(listed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_whole(page):
    """A row is one line, with as many cells as the row above it; a line break within would end the table."""
    lines = prose(page).splitlines()
    for line, following in zip(lines, lines[1:], strict=False):
        if line.startswith("|"):
            assert line.endswith("|") and (not following or following.startswith("|")), line
            cells, others = (len(re.findall(r"(?<!\\)\|", row)) for row in (line, following))
            assert not following or cells == others, following


def may_be_given(name: str, value: str) -> bool:
    """Whether an option, if it is one with limits or choices, takes a value."""
    try:
        if name in CHOICES:
            check_choice(name, yaml.safe_load(value), CHOICES[name])
        if name in LIMITS:
            check_limits(name, yaml.safe_load(value), LIMITS[name])
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_values_of_options_may_be_given(page):
    """Each `name: value` and `name=value` in code style, and each in a block of YAML."""
    given = re.findall(r"`(\w+)(?:: |=)([^`]+)`", prose(page))
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        given += re.findall(r"^(\w+): (.+)$", block, flags=re.MULTILINE)
    refused = [pair for pair in given if not may_be_given(*pair)]
    clients = [("temperature", "0")] if page.name == "serving.md" else []  # a client's, not ours
    assert [pair for pair in refused if pair not in clients] == []
    assert not may_be_given("top_p", "1.5") and not may_be_given("reward_type", "foo")  # it can fail


def test_our_commands_and_their_flags_are_there():
    """Each `trl-quietstar COMMAND`, and each of its flags: a field of an option or a word of the package."""
    known = {field.name for field in (*fields(TrainingArguments), *fields(ModelConfig))} | set(
        re.findall(r"\w+", SOURCE)
    )
    pages = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    found = re.findall(
        r"(?:^|`|-m |bin/)(?:trl-quietstar|trl_quietstar\.cli) (\w+)(.*?)(?:`|#|$)", pages, re.MULTILINE
    )
    assert len(found) > 50
    for command, rest in found:
        assert command in (*COMMANDS, "COMMAND"), command
        for flag in re.findall(r"--([a-z][\w-]*)", rest):
            assert flag.replace("-", "_") in known, f"trl-quietstar {command} --{flag}"


def test_extras_are_those_of_the_package():
    """Each `trl-quietstar[extra]`, on pages and in error messages."""
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", section, flags=re.MULTILINE))
    text = SOURCE + "".join(page.read_text() for page in PAGES)
    named = {name for group in re.findall(r"trl-quietstar\[([\w,]+)\]", text) for name in group.split(",")}
    assert len(named) > 5 and named <= extras


def test_targets_of_make_are_there():
    """Each `make target`, in code style or in a command."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(), re.MULTILINE)}
    assert len(named) > 5 and named <= targets


def test_the_reference_shows_what_is_there():
    """Each object of the page, and each of the members that it chooses; a name that is missing would be left out in silence."""
    page = (ROOT / "docs" / "reference.md").read_text()
    for path, options in re.findall(r"^::: ([\w.]+)\n((?: .*\n)*)", page, flags=re.MULTILINE):
        module, name = path.rsplit(".", 1)
        shown = getattr(importlib.import_module(module), name)
        for member in "".join(re.findall(r"members: \[(.*)\]", options)).replace(",", " ").split():
            assert hasattr(shown, member), f"{path}.{member}"


def test_the_method_stands_where_its_page_says():
    """Each `module.name` of the page is in the package."""
    files = [path.relative_to(ROOT) for path in ROOT.glob("trl_quietstar/**/*.py") if path.stem != "__init__"]
    modules = {path.stem: ".".join(path.with_suffix("").parts) for path in files}
    names = set(re.findall(rf"`((?:{'|'.join(modules)})\.[A-Za-z_][\w.]*)`", prose(ROOT / "docs" / "method.md")))
    names = {name for name in names if not name.endswith((".py", ".md", ".json"))}
    assert len(names) > 30
    for name in names:
        module, *parts = name.split(".")
        found = importlib.import_module(modules[module])
        for part in parts:
            assert hasattr(found, part) or part in getattr(found, "__annotations__", {}), name
            found = getattr(found, part, None)


NAMING = "bad_input choosing faq loggers method reliability rollouts scaling"  # pages that name fields and metrics of ours alone


@pytest.mark.parametrize("page", NAMING.split())
def test_fields_and_metrics_are_the_real_ones(page):
    """Each name in code style with an underscore, and each metric, occurs in the package or is a field of the Trainer."""
    known = {field.name for field in (*fields(TrainingArguments), *fields(QuietStarConfig))}
    for code in re.findall(r"`([^`]+)`", prose(ROOT / "docs" / f"{page}.md")):
        for metric in re.findall(r"\brl/(\w+)", code):
            metric = metric.removeprefix("anti_theater_")
            assert f'"{metric}"' in SOURCE or f"rl/{metric}" in SOURCE, code
        if re.fullmatch(r"[a-z]+(_[a-z]+)+", code):
            name = re.sub(r"^eval_|_(low|high)$", "", code)  # of an evaluation; the bounds of an interval
            assert code in known or re.search(rf"\b({code}|{name})\b", SOURCE), code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_on_a_page_are_there(page):
    """Files of the repository, in code style or in commands, but for those that a command makes."""
    named = re.findall(
        r"\b(?:tests|benchmarks|examples|recipes|docs|trl_quietstar)/[\w/.-]+\.(?:py|yaml|md|css|js|txt)\b",
        page.read_text(),
    )
    assert {name for name in named if not (ROOT / name).exists()} <= {"recipes/NAME.yaml", "recipes/NAME.md"}


def test_the_map_names_what_is_there():
    """Every path on the page of the architecture exists, and its table has every room, in the order of imports."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    paths = {code for code in re.findall(r"`([\w/.]+)`", page) if "/" in code or code.endswith(".py")}
    missing = {code for code in paths if not any((root / code).exists() for root in (ROOT, ROOT / "trl_quietstar"))}
    assert missing == {"rl/name", "recipes/NAME.yaml", "recipes/NAME.md"}
    rooms = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", page, flags=re.MULTILINE)
    assert tuple(rooms) == ORDER


def shown(value) -> str:
    """A value as the table has it; strings that are read as text, in code style."""
    if isinstance(value, (bool, type(None))):
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, (int, float)):
        return f"{value:g}"
    if isinstance(value, list):
        return " to ".join(map(shown, value))
    return value if value.isidentifier() else f"`{value}`"


def table_of(recipes: dict[str, dict]) -> list[str]:
    """The rows of the table: each field that a recipe sets, its values in the order of stages, or the default in italics."""
    order = [*QuietStarConfig.__annotations__, *(field.name for field in fields(QuietStarConfig))]  # thinking first
    used = {name for recipe in recipes.values() for name in recipe} - NOT_METHOD
    stages = {key: recipe.get("curriculum", {}).values() for key, recipe in recipes.items()}
    used |= {name for changes in stages.values() for stage in changes for name in stage}
    defaults = {field.name: field.default for field in fields(QuietStarConfig)}
    rows = []
    for name in sorted(used, key=order.index):
        cells = []
        for key, recipe in recipes.items():
            values = [recipe[name]] if name in recipe else []
            values += [stage[name] for stage in stages[key] if name in stage]
            if values and name not in recipe and name not in next(iter(stages[key])):
                values.insert(0, defaults[name])
            values = [value for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
            cells.append(", then ".join(map(shown, values)) if values else f"*{shown(defaults[name])}*")
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return rows


def test_the_table_of_hyperparameters_has_the_recipes_values():
    """Row by row, defaults included; a field that a recipe sets is never left out."""
    recipes = {name: yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text()) for name in RECIPES}
    wanted = table_of(recipes)
    page = (ROOT / "docs" / "hyperparameters.md").read_text()
    written = [line for line in page.splitlines() if line.startswith("| `")]
    assert written == wanted, "The table of docs/hyperparameters.md should be:\n" + "\n".join(wanted)
