"""Non-finite values cost one optimizer step: they are named, skipped and counted, and too many in a row stop training."""

import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from trl_quietstar import QuietStarConfig
from trl_quietstar import trainer as trainer_module
from trl_quietstar.learning import experience as experience_module
from trl_quietstar.learning.objective import quietstar_loss
from trl_quietstar.learning.rewards import thought_rewards
from trl_quietstar.training.faults import FaultGuard

from .training import States, logged, saved_model, text_data, tiny_trainer


ROWS = 4
STOPPED = "was skipped: not finite is {}.*checkpoint-{}"


@contextmanager
def spoilt(name: str, steps, value: float = float("nan"), row: int = 2):
    """During the given optimizer steps (counted from 1), or in evaluation (0), something is not finite: a `reward`, the
    `loss`, or a `term` of the objective; or what is said of one `row`: its `prediction`."""
    current = {"step": -1, "training": True}

    def now() -> bool:
        return (current["step"] + 1 if current["training"] else 0) in steps

    def rewards(**arguments):
        given = thought_rewards(**arguments)
        if now() and name == "reward":
            given[row, 0, 0] = value
        return given

    def objective(*args, **kwargs):
        loss, terms = quietstar_loss(*args, **kwargs)
        if now() and name == "loss":
            loss = loss * value
        if now() and name == "term":
            loss, terms["entropy"] = loss + value, terms["entropy"] + value
        return loss, terms

    compute = trainer_module.QuietStarREINFORCETrainer._compute_loss

    def computed(self, model, inputs):
        current.update(step=self.state.global_step, training=model.training)
        return compute(self, model, inputs)

    with (
        patch.object(experience_module, "thought_rewards", rewards),
        patch.object(trainer_module, "quietstar_loss", objective),
        patch.object(trainer_module.QuietStarREINFORCETrainer, "_compute_loss", computed),
    ):
        yield


@pytest.fixture
def messages(caplog):
    """Warnings of the project."""
    return lambda: [record.getMessage() for record in caplog.records if record.name == "trl_quietstar.training.faults"]


def all_finite(trainer) -> bool:
    """Whether no weight is NaN or infinite."""
    return all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())


# One step


@pytest.mark.parametrize(
    ("kind", "value", "named"),
    [
        ("reward", math.nan, "reward (nan)"),
        ("reward", math.inf, "reward (inf)"),
        ("loss", math.inf, "loss (inf)"),
        ("term", math.nan, "entropy (nan)"),
    ],
)
def test_a_fault_costs_one_step(kind, value, named, tmp_path, messages):
    """The step is named, skipped and counted: weights, moments and metrics are untouched, and training goes on."""
    states = States()
    trainer = tiny_trainer(tmp_path, max_steps=4, warmup_steps=0, weight_decay=0.1, callbacks=[states])
    with spoilt(kind, {3}, value):
        trainer.train()
    assert [states.unchanged(step) for step in (2, 3, 4)] == [False, True, False]
    (message,) = messages()
    assert "Optimizer step 3" in message and named in message
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["rl/skipped_steps"] for entry in entries] == [0, 0, 1, 1]
    assert "rl/reward" not in entries[2] and len(trainer.runlog.recent_rewards) == 3
    assert len({entry["learning_rate"] for entry in entries}) == 4  # the schedule keeps to the steps
    json.dumps(trainer.state.log_history, allow_nan=False)
    assert all_finite(trainer) and trainer.state.global_step == 4


def test_a_fault_among_steps_of_imitation(tmp_path, messages):
    """A step that is skipped leaves the other steps of its logging window in the log, also where none samples thoughts."""
    data = {"prompt": ["1 plus 1 is"] * 8, "completion": [" 2 ."] * 8, "thought": [" 2"] * 8}
    own = dict(thought_positions="prompt_end", talk_length="completion", min_thought_length=1, thought_length=4)
    options = dict(data=Dataset.from_dict(data), logging_steps=2, max_steps=2, **own)
    trainer = tiny_trainer(tmp_path, **options)
    with spoilt("loss", {2}):
        trainer.train()
    (entry,) = logged(trainer, "loss")
    oracle = tiny_trainer(tmp_path, **{**options, "max_steps": 1, "logging_steps": 1})
    oracle.train()
    (first,) = logged(oracle, "loss")
    assert entry["rl/skipped_steps"] == 1 and len(messages()) == 1
    assert entry["rl/written_nll"] == first["rl/written_nll"] and entry["rl/total_loss"] == first["rl/total_loss"]


def test_the_row_is_named(tmp_path, messages):
    """A reward that is not finite is traced to its row of the global batch and the text of that row."""
    trainer = tiny_trainer(tmp_path, gradient_accumulation_steps=2, max_steps=1)
    batches = []
    original = trainer.thinker.request

    def request(text, part):
        batches.append(text)
        return original(text, part)

    trainer.thinker.request = request
    with spoilt("reward", {1}, row=2):
        trainer.train()
    (message,) = messages()
    for batch, row in ((0, 2), (1, ROWS + 2)):
        text = batches[batch]
        excerpt = trainer.processing_class.decode(text.input_ids[2][text.attention_mask[2]])
        assert f"row {row} ({excerpt!r}) of the global batch" in message


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_is_named(max_grad_norm, tmp_path, messages):
    """A gradient alone that is not finite is named by its parameter, with clipping and without, and spoils no other."""
    states = States()
    trainer = tiny_trainer(tmp_path, max_grad_norm=max_grad_norm, callbacks=[states], max_steps=4)
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if "down_proj" in n)
    parameter.register_hook(lambda grad: grad * (math.nan if trainer.state.global_step == 1 else 1))
    trainer.train()
    (message,) = messages()
    assert f"Optimizer step 2 was skipped: not finite is the gradient of {name}." in message
    assert [states.unchanged(step) for step in (2, 3, 4)] == [True, False, False]
    assert all_finite(trainer) and logged(trainer)[-1]["rl/skipped_steps"] == 1
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_a_model_that_yields_nan_for_one_row(tmp_path, messages):
    """Hidden states of one row that are NaN are traced to that row alone, through sampling, scoring and reward."""
    trainer = tiny_trainer(tmp_path, max_steps=2)
    layer = trainer.model.model.layers[0]

    def poison(module, args, output):
        if trainer.state.global_step != 0 or len(output) != ROWS:
            return output
        return torch.cat([output[:1] * math.nan, output[1:]])

    layer.mlp.register_forward_hook(poison)
    trainer.train()
    (message,) = messages()
    assert "nll_without (nan)" in message and "in row 0 (" in message and "row 1 (" not in message
    assert all_finite(trainer) and logged(trainer)[-1]["rl/skipped_steps"] == 1


def test_one_micro_batch_skips_the_step(tmp_path):
    """A fault in the first of two micro-batches drops the gradients of both."""
    states = States()
    trainer = tiny_trainer(tmp_path, gradient_accumulation_steps=2, callbacks=[states])
    calls = []

    def objective(*args, **kwargs):
        calls.append(None)
        loss, terms = quietstar_loss(*args, **kwargs)
        return (loss * math.nan if len(calls) == 3 else loss), terms

    with patch.object(trainer_module, "quietstar_loss", objective):
        trainer.train()
    assert len(calls) == 6
    assert [states.unchanged(step) for step in (2, 3)] == [True, False]
    assert logged(trainer)[-1]["rl/skipped_steps"] == 1


# Many steps


def test_too_many_in_a_row_stop(tmp_path):
    """After `max_skipped_steps` in a row training stops with an error that names the fault, and leaves a checkpoint of the
    weights of before, from which a run goes on with its count."""
    path, states = saved_model(tmp_path / "model"), States()
    options = dict(max_steps=8, max_skipped_steps=3, save_total_limit=1)
    trainer = tiny_trainer(tmp_path / "run", path, callbacks=[states], **options)
    with (
        spoilt("term", {2, 4, 5, 6}),
        pytest.raises(FloatingPointError, match=STOPPED.format(r"entropy \(nan\)", 6)),
    ):
        trainer.train()
    assert trainer.state.global_step == 6
    assert [states.unchanged(step) for step in (2, 3, 4, 5)] == [True, False, True, True]
    checkpoint = tmp_path / "run/checkpoint-6"
    for file in ("model.safetensors", "quietstar.safetensors"):
        assert all(bool(torch.isfinite(value).all()) for value in load_file(checkpoint / file).values())
    optimizer = torch.load(checkpoint / "optimizer.pt")
    assert all(bool(torch.isfinite(v).all()) for state in optimizer["state"].values() for v in state.values())
    for file in ("quietstar_state.json", "trainer_state.json"):
        assert "NaN" not in (checkpoint / file).read_text()

    resumed = tiny_trainer(tmp_path / "again", path, **options)
    with spoilt("term", {7}):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 8 and all_finite(resumed)
    assert [entry["rl/skipped_steps"] for entry in resumed.state.log_history if "loss" in entry][-2:] == [5, 5]


def test_without_a_limit_training_goes_on(tmp_path):
    """`max_skipped_steps=None` skips as many as there are, and 0 is refused by name."""
    trainer = tiny_trainer(tmp_path, max_skipped_steps=None, max_steps=12, log_thoughts=True)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with spoilt("loss", range(1, 13)):
        trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters()))
    assert trainer.guard.skipped == 12
    with pytest.raises(ValueError, match="`max_skipped_steps` is 0, below its limit of 1"):
        QuietStarConfig(str(tmp_path), max_skipped_steps=0, use_cpu=True)


def test_an_optimizer_that_steps_in_the_backward_stops_at_once(tmp_path):
    """Where gradients are applied in the backward, as under DeepSpeed, the first fault stops training ahead of it."""
    states = States()
    trainer = tiny_trainer(tmp_path, callbacks=[states])
    with (
        patch.object(FaultGuard, "_steps_in_backward", lambda self: True),
        spoilt("loss", {2}, math.inf),
        pytest.raises(FloatingPointError, match=r"Stopped at step 1: loss \(inf\)"),
    ):
        trainer.train()
    assert all(p.grad is None for p in trainer.model.parameters())
    assert all(map(torch.equal, states.states[0], trainer.model.parameters()))
    assert (tmp_path / "checkpoint-1/model.safetensors").is_file()


@pytest.mark.parametrize(("options", "expected"), [({}, False), (dict(optim="lomo"), True)])
def test_optimizers_that_step_in_the_backward_are_known(options, expected, tmp_path):
    """LOMO steps in its backward, AdamW does not."""
    assert tiny_trainer(tmp_path, **options).guard._steps_in_backward() is expected


# Evaluation


def test_a_faulty_evaluation_is_never_the_best(tmp_path, messages):
    """One non-finite evaluation batch makes that evaluation's metrics NaN, with a warning that names it; it is not the best
    model and, for early stopping, no improvement."""
    trainer = tiny_trainer(
        tmp_path / "run",
        saved_model(tmp_path / "model"),
        evaluation=text_data(6, 300),
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=6,
        load_best_model_at_end=True,
        early_stopping_patience=2,
        report_thoughts=True,
    )
    batches = []

    def rewards(**arguments):
        given = thought_rewards(**arguments)
        if not trainer.model.training:
            batches.append(None)
            if len(batches) > 3 and len(batches) % 3 == 1:  # the first batch of every evaluation after the first
                given[1, 0, 0] = math.inf
        return given

    with patch.object(experience_module, "thought_rewards", rewards):
        trainer.train()
    evaluations = logged(trainer, "eval_runtime")
    assert [math.isfinite(entry["eval_reward"]) for entry in evaluations] == [True, False, False]
    assert math.isnan(evaluations[1]["eval_loss"]) and math.isnan(evaluations[1]["eval_nll_without"])
    assert trainer.state.best_global_step == 1 and trainer.state.global_step == 3
    assert trainer.state.best_metric == evaluations[0]["eval_reward"]
    assert ["row 1 (" in m and "Evaluation at step" in m and "reward (inf)" in m for m in messages()] == [True] * 2
    assert "nan" not in (tmp_path / "run/reports/step-3.html").read_text().lower().split("<svg")[-1]


def test_a_first_faulty_evaluation_is_not_the_best(tmp_path):
    """Not even where there is no other."""
    trainer = tiny_trainer(
        tmp_path, evaluation=text_data(4, 300), eval_strategy="steps", eval_steps=1, save_strategy="best",
        metric_for_best_model="eval_reward", max_steps=2,
    )  # fmt: skip
    with spoilt("reward", {0}):
        trainer.train()
    assert trainer.state.best_model_checkpoint is None and not list(tmp_path.glob("checkpoint-*"))


# Several processes


PROCESS = """
import math, os, sys
from pathlib import Path
from tests.training import States
from tests.training import tiny_trainer
from trl_quietstar.learning import experience
from trl_quietstar.learning.rewards import thought_rewards

def rewards(**arguments):
    given = thought_rewards(**arguments)
    if os.environ["RANK"] == "1" and trainer.state.global_step in (1, 3, 4):
        given[2, 0, 0] = math.nan
    return given

states = States()
trainer = tiny_trainer(Path(sys.argv[1]), max_steps=6, max_skipped_steps=2, callbacks=[states])
experience.thought_rewards = rewards
try:
    trainer.train()
except FloatingPointError as error:
    total = sum(p.double().sum().item() for p in trainer.model.parameters())
    unchanged = [states.unchanged(step) for step in (2, 3, 4)]
    Path(sys.argv[1], os.environ["RANK"]).write_text(f"{trainer.guard.skipped} {unchanged} {total} {error}")
"""


@pytest.mark.slow
def test_all_processes_skip_together(tmp_path):
    """A fault on one of two processes skips the step on both, with its row named, and both stop with the same weights."""
    script = tmp_path / "train.py"
    script.write_text(PROCESS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([*launch, str(tmp_path)], env=environment, check=True, timeout=300)
    first, second = ((tmp_path / rank).read_text() for rank in "01")
    assert first == second
    assert first.startswith("3 [True, False, True]") and f"row {ROWS + 2} (" in first
    assert (tmp_path / "checkpoint-5/model.safetensors").is_file()
