"""What arrives in loggers beside the metrics that Transformers sends; W&B's is in the tests of trainer and inspection."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trl_quietstar.evaluation.report import markdown_table

from .pages import HOSTILE
from .training import text_data, tiny_trainer


ROOT = Path(__file__).parent.parent


def test_tensorboard_receives_the_thoughts(tmp_path, monkeypatch):
    """As text in a run of their own, of evaluations and of training; the metrics are in the Trainer's."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    options = dict(report_to="tensorboard", report_thoughts=True, log_thoughts=True, max_steps=1)
    trainer = tiny_trainer(tmp_path, **options, evaluation=text_data(4, 300))
    trainer.train()
    trainer.evaluate()
    events = {}
    for folder in (tmp_path / "runs").iterdir():
        events[folder.name] = accumulator.EventAccumulator(str(folder))
        events[folder.name].Reload()
    thoughts = events.pop("thoughts")
    assert {"thoughts/text_summary", "eval_thoughts/text_summary"} <= set(thoughts.Tags()["tensors"])
    (event,) = thoughts.Tensors("eval_thoughts/text_summary")
    table = event.tensor_proto.string_val[0].decode()
    assert event.step == 1 and table.startswith("| step | context | thought |") and table.count("\n") == 6
    assert any("train/rl/reward" in run.Tags()["scalars"] for run in events.values())


def test_thoughts_stay_text_in_a_table_of_markdown():
    """Each is one cell, whatever is in it."""
    lines = markdown_table({"step": [1], "thought": [HOSTILE + "\n| a | `b`"], "reward": [-0.5]}).split("\n")
    assert len(lines) == 3 and len(re.findall(r"(?<!\\)\|", lines[2])) == 4
    assert not re.search(r"(?<!\\)[<`]", lines[2])


TRACKED = """
from pathlib import Path
from tests.training import text_data, tiny_trainer
options = dict(report_to="trackio", report_thoughts=True, log_thoughts=True, max_steps=1, project="thinking")
trainer = tiny_trainer(Path({folder!r}), **options, evaluation=text_data(4, 300))
trainer.train()
trainer.evaluate()
"""


def test_trackio_receives_metrics_and_thoughts(tmp_path):
    """On disk, where it looks when it is imported: so in a process of its own."""
    pytest.importorskip("trackio")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "kept")}
    command = [sys.executable, "-c", TRACKED.format(folder=str(tmp_path / "out"))]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = b"".join(file.read_bytes() for file in (tmp_path / "kept").rglob("*") if file.is_file())
    for name in (b"train/rl/reward", b"eval/reward", b"eval_thoughts", b'"thoughts"'):
        assert name in kept, name
