"""The example scripts run as their docstrings say."""

import json
import runpy
from pathlib import Path

import pytest

from .tiny import sums
from .training import saved_model


GSM8K = Path(__file__).parent.parent / "examples" / "gsm8k.py"


def test_thoughts_and_their_control_are_measured_alike(tmp_path, monkeypatch):
    """Both arms start from the same numbers, stop when their time is up, and end elsewhere."""
    model = saved_model(tmp_path / "model", max_position_embeddings=512)
    lines = [json.dumps({"question": text, "answer": f"{text} {text}"}) for text in sums()[:24]]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))
    results = {}
    for arm in ("thoughts", "plain"):
        output = tmp_path / arm
        flags = ["--model", model, "--data", str(tmp_path / "problems.jsonl"), "--output", str(output)]
        monkeypatch.setattr("sys.argv", ["gsm8k.py", arm, *flags, "--minutes", "0.02", "--held-out", "4"])
        runpy.run_path(str(GSM8K), run_name="__main__")
        results[arm] = json.loads((output / "results.json").read_text())
    names = ("eval_nll_without", "eval_nll_with", "eval_reward")
    for name in names:
        assert results["thoughts"]["before"][name] == pytest.approx(results["plain"]["before"][name])
        assert results["thoughts"]["after"][name] != results["plain"]["after"][name]
    for arm in results.values():
        assert arm["steps"] > 1  # the first is warm-up from a rate of 0
        assert arm["after"]["eval_nll_without"] != arm["before"]["eval_nll_without"]
