"""`trl-quietstar check`: what a run would be, before it is started; and its short form at the start of `train`."""

import json
import subprocess
import sys

import pytest
import yaml

from trl_quietstar.cli import main, preview
from trl_quietstar.cli.check import judged
from trl_quietstar.training.preflight import Found

from .commands import recipe_in, run
from .training import saved_model


QUESTIONS = [{"prompt": f"{a} plus {b} is", "completion": f" {a + b} ."} for a in range(4) for b in range(4)]


def small_recipe(folder, rows, **changes) -> list[str]:
    """Writes a small recipe and its data; returns the arguments by which the command reads it."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        **recipe_in(folder),
        "dataset_name": str(data),
        "thought_positions": "prompt_end",
        "talk_length": "completion",
    }
    recipe = {**recipe, "gradient_accumulation_steps": 2, "save_strategy": "steps", **changes}
    del recipe["eval_dataset_name"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["check", "--config", str(folder / "recipe.yaml"), "--max_steps", "5"]


def check(folder, capsys, rows=QUESTIONS, **changes) -> str:
    """What the command prints for a small recipe."""
    assert main(small_recipe(folder, rows, **changes)) == 0
    return " ".join(capsys.readouterr().out.split())


def test_what_a_run_would_be(tmp_path, capsys):
    """Fields, rows, thoughts, time and memory; and nothing is left where the run would write."""
    printed = check(tmp_path, capsys, score_pattern=r"\d+")
    assert "thought_positions='prompt_end'" in printed and "max_steps=5" in printed and "bf16" not in printed
    assert printed.count("Row ") == 3 and "Row 0 of 16:" in printed and "1 place for a thought (◆)" in printed
    assert "0 plus 0 is◆ 0 ." in printed and "rewards look at ' 0'" in printed
    assert (
        "of 64 thoughts raise" not in printed and "% of 32 thoughts raise" in printed
    )  # all positions that there are
    assert "A step of 8 rows takes about" in printed and "; 5 steps" in printed and "GB at most" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_of_several_processes_speaks(tmp_path):
    """As a launcher starts them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "trl_quietstar.cli", *small_recipe(tmp_path, QUESTIONS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for once in ("Set: ", "Row 0 of 16", "thoughts raise", "A step of 16 rows takes"):
        assert done.stdout.count(once) == 1, once


def test_written_thoughts_are_shown(tmp_path, capsys):
    """In their places."""
    rows = [{**row, "thought": "1 2"} for row in QUESTIONS[:8]] + [{**row, "thought": None} for row in QUESTIONS[8:]]
    printed = check(tmp_path, capsys, rows, min_thought_length=1, thought_length=8)
    assert "0 plus 0 is◆⟨1 2" in printed and "1 with written thoughts" in printed


def test_plain_training_is_checked_without_thoughts(tmp_path, capsys):
    """There are none to try."""
    printed = check(tmp_path, capsys, thought_positions="none")
    assert "thoughts raise" not in printed and "A step of 8 rows takes about" in printed


def test_long_rows_are_cut(tmp_path, capsys, monkeypatch):
    """Both ends are shown."""
    monkeypatch.setattr(preview, "SHOWN", 12)
    rows = [
        {"prompt": "1 plus 2 plus 3 plus 4 plus 5 plus 6 plus 7 plus 8 is", "completion": " 36 ."} for _ in QUESTIONS
    ]
    printed = check(tmp_path, capsys, rows)
    assert "1 plus 2 plus 3 plus … 8 is◆ 36 ." in printed


def test_a_run_begins_with_what_it_is(tmp_path, capsys):
    """The fields and one row; a token is no one else's business."""
    assert run(tmp_path, {**recipe_in(tmp_path), "hub_token": "hf_secret"}) == 0
    printed = capsys.readouterr().out
    assert "Set: " in printed and "thought_length=3" in printed and printed.count("Row ") == 1
    assert "0 plus 0 is 0 ." in printed.replace("◆", "") and "secret" not in printed


@pytest.mark.parametrize(
    "flag, message", [(("--do_train",), "has no effect in `trl-quietstar check`"), (("--modl",), "no flag")]
)
def test_errors_are_those_of_training(flag, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(["check", "--model_name_or_path", saved_model(tmp_path / "model"), *flag])


def test_what_is_said_where_no_thought_was_tried():
    """Written thoughts stand in the first rows, or no position is difficult."""
    none = Found(0, None, None, None, None, 0.1, written=True)
    assert "bring their thoughts" in judged(none) and "difficult" not in judged(none)
    assert "lower `difficulty_threshold`" in judged(none._replace(written=False))
