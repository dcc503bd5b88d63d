"""What a run shows of itself: lines and named bars on a terminal, and nothing that is computed twice."""

import json
import re

import pytest
from transformers import TrainerState

from trl_quietstar import _compat
from trl_quietstar.training.evaluation import EvaluationTrainer
from trl_quietstar.training.progress import line_of

from .commands import recipe_in, run
from .training import text_data, tiny_trainer


@pytest.mark.parametrize(
    "logs, line",
    [
        (
            {
                "loss": 1.23456,
                "rl/reward": 0.01,
                "rl/nll_with": 2,
                "rl/nll_without": 2.5,
                "rl/thought_length": 3,
                "rl/x": 1,
            },
            "Step 4 of 9: loss 1.235, reward +0.0100, NLL 2.000 with thoughts, 2.500 without, thoughts of 3.0 tokens",
        ),
        ({"loss": 1.5, "grad_norm": 2.0}, "Step 4 of 9: loss 1.5"),
        (
            {
                "eval_loss": 1.0,
                "eval_reward": -0.1,
                "eval_nll_with": 2.0,
                "eval_nll_without": 1.0,
                "eval_exact_match_with": 0.5,
            },
            "Evaluation at step 4: reward -0.1000, NLL 2.000 with thoughts, 1.000 without, right 50.0% with thoughts",
        ),
        ({"eval_hard_nll_without": 1.0}, "Evaluation of hard at step 4: 1.000 without"),
        (
            {"preflight_useful_thoughts": 0.25, "preflight_mixed_groups": 0.5},
            "Before training: 25% of the thoughts are useful, 50% of their positions have useful and useless ones",
        ),
        ({"preflight_useful_thoughts": 0.0}, "Before training: 0% of the thoughts are useful"),
        (
            {"rl/anti_theater_passed": 1.0, "rl/anti_theater_ablation": 0.1},
            "Validation of the thoughts at step 4: passed",
        ),
        ({"train_runtime": 63.4, "train_loss": 1.0}, "Trained 4 steps in 0:01:03"),
        ({"my_own": 3.0}, None),
    ],
)
def test_a_line_of_metrics(logs, line):
    """What a reader asks first; anything else is shown as the Trainer shows it."""
    assert line_of(logs, TrainerState(global_step=4, max_steps=9)) == line


def test_what_stands_on_a_terminal(tmp_path, capsys, monkeypatch):
    """One bar for the preparation of each dataset, lines with the time left, and evaluations that are named."""
    monkeypatch.setattr(_compat, "are_progress_bars_disabled", lambda: False)  # which is so for other tests
    options = dict(evaluation=text_data(8, 300), disable_tqdm=False, eval_strategy="steps", eval_steps=2)
    tiny_trainer(tmp_path, max_steps=3, anti_theater_steps=3, **options).train()
    printed = capsys.readouterr()
    shown = printed.out + printed.err
    bars = set(re.findall(r"^\W*([A-Z][^\n:|]*?)(?:: [a-z ]+)?:\s+\d+%", shown.replace("\r", "\n"), re.MULTILINE))
    assert {"Preparing the train data", "Preparing the eval data", "Training", "Evaluation at step 2"} <= bars
    assert "Validation of the thoughts" in bars and not {"Map", "Filter"} & bars
    assert re.search(
        r"Step 3 of 3: loss \S+, reward \S+, NLL \S+ with thoughts, \S+ without, thoughts of 3.0 tokens, 0:00:00 left",
        shown,
    )
    assert "Evaluation at step 2: reward" in shown and "policy_loss" not in shown


def test_without_bars_all_metrics_are_printed(tmp_path, capsys):
    """As the Trainer does with `disable_tqdm`; preparation is silent then."""
    tiny_trainer(tmp_path, max_steps=1).train()
    printed = capsys.readouterr()
    assert "rl/policy_loss" in printed.out and "Preparing" not in printed.err and "Map" not in printed.err


@pytest.mark.parametrize(
    "more, runs",
    [({}, 2), (dict(eval_strategy="steps", eval_steps=2), 2), (dict(eval_strategy="steps", eval_steps=1), 3)],
)
def test_no_evaluation_runs_twice(more, runs, tmp_path, monkeypatch, capsys):
    """The last one in training is the one after it; and the validation that ends training is the one that is shown."""
    calls = []

    def counted(name):
        whole = getattr(EvaluationTrainer, name)

        def call(self, *args, **kwargs):
            calls.append(name)
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(EvaluationTrainer, name, call)

    counted("evaluate"), counted("validate_thoughts")
    run(tmp_path, {**recipe_in(tmp_path), **more, "max_steps": 2, "anti_theater_steps": 2})
    assert calls.count("evaluate") == runs and calls.count("validate_thoughts") == 1
    printed = capsys.readouterr().out
    assert printed.index("Before training") < printed.index("'loss'") < printed.index("After 2 steps")
    results = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert "eval_reward" in results and "step" not in results


def test_the_best_model_is_evaluated_anew(tmp_path, capsys):
    """Where it is not the last one, whose evaluation is then of another model."""
    more = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True)
    recipe = {
        **recipe_in(tmp_path),
        **more,
        "max_steps": 3,
        "metric_for_best_model": "eval_nll_with",
        "greater_is_better": True,
    }
    run(tmp_path, {**recipe, "learning_rate": 1e-2})
    state = json.loads((tmp_path / "out/checkpoint-3/trainer_state.json").read_text())
    best = next(e for e in state["log_history"] if e["step"] == state["best_global_step"] and "eval_nll_with" in e)
    results = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert state["best_global_step"] < 3 and results["eval_nll_with"] == pytest.approx(best["eval_nll_with"])
