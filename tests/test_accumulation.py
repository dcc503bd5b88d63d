"""Several batches of a step are one batch: gradients and metrics in float64, whatever the batches hold."""

import pytest
import torch
from datasets import Dataset

from trl_quietstar.learning.experience import StepPart

from .tiny import byte_tokenizer, exact_model
from .training import Gradients, log_of, logged, tiny_trainer


TEXTS = [
    "1 plus 1 is 2 .",
    "7 plus 12 is 19 . 3 plus 4 is 7 . 8 plus 0 is 8 .",
    "5",
    "2 plus 19 is 21 . 6 plus 6 is 12 .",
]
WRITTEN = {
    "prompt": ["1 plus 1 is", "7 plus 12 is 19 . 3 plus 4 is", "5 plus", "2 plus 19 is"],
    "completion": [" 2 .", " 7 . 8 plus 0 is 8 .", " 0 is 5", " 21 ."],
    "thought": [[" 1"], None, [" 5", " 0 plus 5"], None],
}
CASES = {
    "default": {},
    "random positions": dict(thought_positions="3"),
    "difficult positions": dict(thought_positions="difficulty", difficulty_threshold=0.3, min_thought_interval=2),
    "early ends": dict(min_thought_length=1, thought_stop_string="1"),
    "standardized": dict(normalize_advantages="step", min_thought_length=1, thought_stop_string="1"),
    "scaled by group": dict(normalize_advantages="group", advantage_baseline="mean", num_iterations=2, max_steps=2),
    "positive": dict(positive_advantages_only=True, advantage_baseline="leave_one_out"),
    "least variance": dict(
        advantage_baseline="least_variance",
        min_thought_length=1,
        thought_stop_string="1",
        num_iterations=2,
        max_steps=2,
    ),
    "reference": dict(beta=0.3, no_thought_model="reference"),
    "weighted": dict(nll_weighting="share", thought_positions="3"),
    "two passes": dict(single_pass=False),
    "replay": dict(thought_path="replay"),
    "several updates": dict(num_iterations=2, max_steps=2),
    "written": dict(data=WRITTEN, min_thought_length=1, thought_length=6),
    "written, standardized": dict(data=WRITTEN, min_thought_length=1, thought_length=6, normalize_advantages="step"),
    "written, several updates": dict(
        data=WRITTEN, min_thought_length=1, thought_length=6, num_iterations=2, max_steps=2
    ),
}
IN_HALVES = ("default", "standardized")


def run(folder, rows: int, batches: int, **options):
    """Gradients of each step, and the trainer."""
    gradients = Gradients()
    trainer = tiny_trainer(
        folder,
        model=exact_model(vocab_size=len(byte_tokenizer())),
        data=Dataset.from_dict({name: values * 2 for name, values in options.pop("data", {"text": TEXTS}).items()}),
        **{"max_steps": 1, **options},
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=batches,
        learning_rate=1e-3,
        max_grad_norm=0.0,
        value_head_hidden_size=256,
        callbacks=[gradients],
    )
    trainer.train()
    return gradients.steps, trainer


@pytest.mark.parametrize("name", CASES)
def test_batches_add_up(name, tmp_path):
    """Four batches of one text give the gradients of one batch of four to 1e-9, and its metrics; so do two of two."""
    whole, oracle = run(tmp_path, 4, 1, **CASES[name])
    for rows, batches in ((1, 4), (2, 2)) if name in IN_HALVES else ((1, 4),):
        steps, trainer = run(tmp_path, rows, batches, **CASES[name])
        for ours, theirs in zip(steps, whole, strict=True):
            assert ours.keys() == theirs.keys()
            for parameter, gradient in theirs.items():
                torch.testing.assert_close(ours[parameter], gradient, rtol=1e-7, atol=1e-9)
        for ours, theirs in zip(logged(trainer), logged(oracle), strict=True):
            for metric, value in theirs.items():
                if metric not in ("rl/tokens_per_second", "rl/coherence"):  # coherence is of the first batch
                    wanted = value if value is None else pytest.approx(value, rel=1e-6, abs=1e-9)
                    assert ours[metric] == wanted, metric
    assert any(g.abs().max() > 1e-3 for g in whole[0].values())


def test_means_of_batches_are_not_the_mean(tmp_path, monkeypatch):
    """The comparison can fail: each batch over its own tokens gives other gradients."""
    whole, _ = run(tmp_path, 4, 1)
    divide = "trl_quietstar.training.step.OptimizerStep._divide"
    monkeypatch.setattr(divide, lambda self, model, step: [StepPart([i]) for i in range(len(self._batches))])
    parts, _ = run(tmp_path, 1, 4)
    assert any((parts[0][name] / 4 - g).abs().max() > 1e-4 for name, g in whole[0].items())


def test_the_last_step_of_an_epoch_has_fewer_batches(tmp_path):
    """Eight texts in steps of three: the last of an epoch has two, and is the step that one batch of two would be."""
    options = dict(num_train_epochs=1, max_steps=-1, thought_positions="3")
    whole, _ = run(tmp_path, 3, 1, **options)
    parts, _ = run(tmp_path, 1, 3, **options)
    assert len(whole) == len(parts) == 3
    for name, gradient in whole[-1].items():
        torch.testing.assert_close(parts[-1][name], gradient, rtol=1e-7, atol=1e-9)


# Several updates on a batch


@pytest.mark.parametrize(("batches", "changes"), [(1, {}), (2, {}), (2, dict(normalize_advantages="step"))])
def test_further_updates_reuse_the_thoughts(batches, changes, tmp_path, monkeypatch):
    """Three updates a batch: thoughts are sampled and weighed once, and the rows of the next batch come after them."""
    from trl_quietstar.trainer import quietstar_loss

    calls = []

    def spy(inputs, *args, **kwargs):
        calls.append((inputs.advantages, inputs.sampled_logps, inputs.talk_weights))
        return quietstar_loss(inputs, *args, **kwargs)

    monkeypatch.setattr("trl_quietstar.trainer.quietstar_loss", spy)
    options = dict(num_iterations=3, max_steps=6, heads_learning_rate=1e-2, nll_weighting="probability")
    _, trainer = run(tmp_path, 4 // batches, batches, **options, **changes)
    for batch in range(batches):
        own = calls[batch::batches]  # of this batch, one for each update
        for first in (0, 3):
            assert all(given is not None for given in own[first])
            for later in (1, 2):
                assert all(ours is theirs for ours, theirs in zip(own[first + later], own[first], strict=True))
        assert not torch.equal(own[0][1], own[3][1])
    rewards = [entry["rl/reward"] for entry in logged(trainer)]
    assert rewards[0] == rewards[1] == rewards[2] != rewards[3]
    assert [entry["rl/clip_ratio"] is not None for entry in logged(trainer)] == [True] * 6


def test_a_first_update_is_reinforce(tmp_path):
    """Where the ratio is 1, the clipped surrogate has REINFORCE's gradient."""
    ours, _ = run(tmp_path, 4, 1, num_iterations=2)
    oracle, _ = run(tmp_path, 4, 1)
    for name, gradient in oracle[0].items():
        torch.testing.assert_close(ours[0][name], gradient, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("step", [5, 6])
def test_an_update_on_a_batch_resumes(step, tmp_path):
    """A checkpoint between a batch's updates or after them: the resumed run is the run, in a later epoch too."""
    options = dict(num_iterations=2, max_steps=8, save_strategy="steps", save_steps=step, beta=0.1)
    options |= dict(nll_weighting="probability")
    _, whole = run(tmp_path / "run", 2, 2, **options)
    resumed = tiny_trainer(
        tmp_path / "again",
        model=exact_model(vocab_size=len(byte_tokenizer())),
        data=Dataset.from_dict({"text": TEXTS * 2}),
        **options,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_grad_norm=0.0,
        value_head_hidden_size=256,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{step}"))
    assert log_of(resumed, after=step) == log_of(whole, after=step) != []


def test_a_stream_cannot_be_read_again(tmp_path):
    """Several updates want rows again, which a stream does not give."""
    with pytest.raises(ValueError, match="num_iterations=2"):
        tiny_trainer(tmp_path, data=Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(), num_iterations=2)
