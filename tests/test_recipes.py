"""Every recipe: its keys and values, the table that explains them, and its one command at a size that takes seconds."""

import importlib.util
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from trl import ModelConfig, TrlParser

from trl_quietstar import QuietStarConfig, QuietStarForCausalLM
from trl_quietstar.cli import DataArguments, main

from .tiny import sums
from .training import saved_model


FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
EXPLAINED = [path for path in RECIPES if path.stem != "demo"]  # docs/results.md explains that one
# what to run, where it goes and what is seen of it, and not how it is trained
NO_METHOD = {
    *("model_name_or_path", "dataset_name", "dataset_config", "dataset_streaming", "column_mapping", "output_dir"),
    *(
        "eval_strategy",
        "eval_steps",
        "max_eval_samples",
        "eval_size",
        "load_best_model_at_end",
        "logging_steps",
        "log_thoughts",
    ),
    *("save_steps", "save_total_limit", "branch_batch_size"),
}
PARTS = (DataArguments, QuietStarConfig, ModelConfig)
SUGGESTED = re.compile(r"`(--\w+ [^`]*)`")
ROW = re.compile(r"^\|[^|]*\| `(\w+)` \| `([^|]*)` \|[^|]*\|$", re.MULTILINE)

# Small enough for a test; the rest of a recipe is its own
SMALLER = {
    "thought_length": 3,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "save_steps": 2,
    "max_length": 64,
}
STAGES = {"0": {"thought_length": 3, "talk_length": 2}, "1": {"nll_coefficient": 0.0, "distillation_coefficient": 1.0}}
SMALLER_STILL = {
    "fast_quietstar": {"curriculum": json.dumps(STAGES)},
    "iss007": {"eval_steps": 1, "save_steps": 1},
    "lora": {"eval_steps": 1, "anti_theater_steps": 2},
    "qa": {"min_thought_length": 1},
    "qlora": {"eval_steps": 1},
    "sft_control": {"eval_steps": 1, "thought_length": 1},
    "rlp": {"thought_stop_string": "1"},
    "latro": {"thought_stop_string": "1"},
    "verifree": {"thought_stop_string": "1"},
    "rlpr": {"thought_stop_string": "1"},
    "jepo": {"thought_stop_string": "1"},
}
OFTEN = ("qa", "quietstar", "fast_quietstar", "iss007", "qlora", "rlp", "rlpr", "jepo", "sft_control")
NEEDS = {"iss007": "pytorch_optimizer", "qlora": "bitsandbytes"}
# what the recipes' data sets on the Hub hold beside the columns that are read
BESIDE = {
    "AI-MO/NuminaMath-CoT": {"source": "olympiads", "messages": [{"role": "user", "content": "Why?"}]},
    "TIGER-Lab/WebInstruct-verified": {
        "answer_type": "Integer",
        "category": "Mathematics",
        "difficulty": "Primary School",
    },
    "open-web-math/open-web-math": {"url": "", "date": "", "metadata": "{}"},
}


def of_name(path: Path) -> str:
    return path.stem


def parsed(path: Path, *flags: str) -> dict:
    """All fields under a recipe, and flags beside it."""
    parts = TrlParser(PARTS).parse_args_and_config(["--config", str(path), *flags])
    return {name: value for part in parts for name, value in vars(part).items()}


@pytest.mark.parametrize("path", EXPLAINED, ids=of_name)
def test_flags_that_a_page_suggests_go_with_its_recipe(path):
    """Each combination that a page names in its text is taken; one that contradicts the recipe would be refused."""
    for flags in SUGGESTED.findall(path.with_suffix(".md").read_text()):
        names = parsed(path, *(words := shlex.split(flags)))
        assert all(word.removeprefix("--") in names for word in words if word.startswith("--"))


def table(path: Path) -> dict:
    """Fields and values of the table beside a recipe."""
    return {name: yaml.safe_load(value) for name, value in ROW.findall(path.with_suffix(".md").read_text())}


@pytest.mark.parametrize("path", RECIPES, ids=of_name)
def test_recipes_hold_known_keys_and_good_values(path, monkeypatch, tmp_path):
    """Every recipe parses into the dataclasses, and each of its numbers arrives."""
    monkeypatch.chdir(tmp_path)
    values = parsed(path)
    for name, value in yaml.safe_load(path.read_text()).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert values[name] == value, name
        else:
            assert name in values or name == "env", name


@pytest.mark.parametrize("path", EXPLAINED, ids=of_name)
def test_the_table_is_the_recipe(path, monkeypatch, tmp_path):
    """Each value of the table is the recipe's, or the default where it has none; each of the method's in the recipe is in the
    table."""
    monkeypatch.chdir(tmp_path)
    recipe, values, rows = yaml.safe_load(path.read_text()), parsed(path), table(path)
    assert len(rows) > 10 and len(ROW.findall(path.with_suffix(".md").read_text())) == len(rows)
    for name, value in rows.items():
        assert (recipe[name] if name in recipe else values[name]) == value, name
    assert set(recipe) - set(rows) <= NO_METHOD


def test_no_row_of_a_table_is_missed():
    """All rows below a table's head have a field and a value, or they would not be compared."""
    for path in EXPLAINED:
        head = "| paper's hyperparameter | field | value | source |\n| --- | --- | --- | --- |\n"
        rows = path.with_suffix(".md").read_text().split(head)[1].split("\n\n")[0].splitlines()
        assert all(ROW.match(row) for row in rows), path


@pytest.mark.parametrize("path", EXPLAINED, ids=of_name)
def test_links_of_a_page_lead_somewhere(path):
    """Files that a page refers to exist, and its one command names the recipe."""
    page = path.with_suffix(".md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", page):
        assert (FOLDER / target).exists(), target
    assert f"train --config recipes/{path.name}\n" in page
    assert f"python -m benchmarks.learning --recipe recipes/{path.name}`" in page
    assert f"train --config recipes/{path.name}\n" in path.read_text()


def data_file(folder: Path, columns: list[str], beside: dict) -> str:
    """JSON lines of texts, or of questions and answers in the columns that a recipe reads, with other columns beside them."""
    rows = [{"text": text} for text in sums()[:24]]
    if columns:
        rows = [dict(zip(columns, text.split("is", 1), strict=True)) for text in sums()[:24]]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps({**beside, **row}) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "path",  # the others train in as few steps by `make test-all`: their parts are those of these
    [path if path.stem in OFTEN else pytest.param(path, marks=pytest.mark.slow) for path in EXPLAINED],
    ids=of_name,
)
def test_a_recipe_trains(path, tmp_path):
    """Its one command, with flags that make it small, and the columns of its data: every number logged is finite, gradients are not
    0, and what was saved loads."""
    if path.stem in NEEDS and importlib.util.find_spec(NEEDS[path.stem]) is None:
        pytest.skip(f"needs {NEEDS[path.stem]}")
    recipe = yaml.safe_load(path.read_text())
    model, out = saved_model(tmp_path / "model"), tmp_path / "out"
    is_text = recipe["dataset_name"] == "open-web-math/open-web-math"
    columns = [] if is_text else list(recipe.get("column_mapping", ("question", "answer")))[:2]
    data = data_file(tmp_path, columns, BESIDE.get(recipe["dataset_name"], {}))
    flags = {**SMALLER, **SMALLER_STILL.get(path.stem, {}), "model_name_or_path": model, "dataset_name": data}
    flags |= {"output_dir": out, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    if "eval_strategy" in recipe:
        flags |= {"eval_dataset_name": data, "max_eval_samples": 2}
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    assert main(["train", "--config", str(path), *argv]) == 0
    state = json.loads((out / "checkpoint-2/trainer_state.json").read_text())
    numbers = [x for entry in state["log_history"] for x in entry.values() if isinstance(x, (int, float))]
    assert state["global_step"] == 2 and all(math.isfinite(x) for x in numbers)
    norms = [entry["grad_norm"] for entry in state["log_history"] if "grad_norm" in entry]
    assert len(norms) == 2 and max(norms) > 0
    thoughts = [entry["rl/num_thoughts"] for entry in state["log_history"] if "rl/num_thoughts" in entry]
    assert all(number == 0 for number in thoughts) == (recipe["thought_positions"] == "none")
    QuietStarForCausalLM.from_pretrained(out)
    if "muon_learning_rate" in recipe:
        saved = torch.load(out / "checkpoint-2/optimizer.pt")
        assert [group["initial_lr"] for group in saved["param_groups"]] == [5e-4] * 5
        assert "grokfast" in saved["state"]


def test_the_demo_trains(tmp_path, capsys):
    """Its command on a tiny model and a few of its sums: it ends with both accuracies before and after, and says what was
    taught."""
    rows = [{"prompt": f" {a}+2-1=", "completion": str(a + 1), "thought": f"{a}+2={a + 2}-1 ="} for a in range(7)]
    rows += [{"prompt": f" {a}-3+4=", "completion": str(a + 1), "thought": None} for a in range(3, 8)]
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test.write_text('{"prompt": " 9-8+7=", "completion": "8"}\n')
    flags = {"model_name_or_path": saved_model(tmp_path / "model"), "dataset_name": train, "eval_dataset_name": test}
    flags |= {"output_dir": tmp_path / "out", "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True}
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    assert main(["train", "--config", str(FOLDER / "demo.yaml"), *argv]) == 0
    printed = capsys.readouterr().out
    for phrase in ("exact match without thoughts", "exact match with thoughts", "before", "after"):
        assert phrase in printed
    assert "7 of 12 training rows held a written thought" in " ".join(printed.split())
