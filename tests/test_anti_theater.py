"""Anti-theater validation: its numbers, its verdict, and what a failed one does to training."""

import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import TrainerCallback

from trl_quietstar import QuietStarSettings
from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.evaluation.anti_theater import CONDITIONS, SUMS, THRESHOLDS, judge, text_sums
from trl_quietstar.evaluation.controls import CONTROLS, controlled
from trl_quietstar.learning.rewards import coherence, masked_mean
from trl_quietstar.text.batch import Text, talk_after
from trl_quietstar.thinking.sampling import greedy_continuation
from trl_quietstar.thinking.scoring import ScoreRequest, at_talk, score, score_thoughts

from .tiny import exact_model, mixed_text, positions_of, think
from .training import logged, text_data, tiny_trainer


M = 3


def seeded(seed: int = 0) -> torch.Generator:
    """Random numbers of a fixed seed."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def examined():
    """A model, a text, its thoughts, and the sums over them."""
    model = exact_model(settings=QuietStarSettings(thought_length=4))
    text = mixed_text()
    thoughts = think(model, text)
    sums = text_sums(model, text, thoughts, M, SharedPrefix(), "mixed", seeded())
    return model, text, thoughts, dict(zip(SUMS, sums.T, strict=True))


def made_sums(texts: int = 50, seed: int = 0, **columns: float | np.ndarray) -> torch.Tensor:
    """Sums of texts with 4 thoughts and 8 talk tokens each that pass every test; `columns` replace some."""
    rng = np.random.default_rng(seed)
    correctness = rng.uniform(0, 1, (texts, 4))
    coherent = 0.5 + 0.2 * correctness + 0.01 * rng.standard_normal((texts, 4))
    values = {
        "thoughts": np.full(texts, 4.0),
        "distance": 4 * rng.uniform(0.5, 0.9, texts),
        "coherence": coherent.sum(1),
        "correctness": correctness.sum(1),
        "coherence_squared": (coherent**2).sum(1),
        "correctness_squared": (correctness**2).sum(1),
        "product": (coherent * correctness).sum(1),
        "tokens": np.full(texts, 8.0),
        **{f"nll_{name}": 8 * rng.uniform(1, 2, texts) for name in CONDITIONS},
        **{f"correct_{name}": 8 * rng.uniform(0.1, 0.3, texts) for name in CONDITIONS},
    }
    values["correct_real"] = values["correct_shuffled"] + 4
    values["correct_none"] = values["correct_real"] - 3
    values |= columns
    return torch.tensor(np.stack([np.broadcast_to(values[name], texts) for name in SUMS], axis=1))


# What a batch is measured by


@pytest.mark.parametrize("path", [SharedPrefix(), Replay()], ids=["shared_prefix", "replay"])
def test_continuation_is_the_models_own_greedy_one(path):
    """The divergence test compares with what `generate` would say, on either path, padding or not."""
    model, text = exact_model(), mixed_text()
    row = torch.tensor([0, 1, 2])  # full, padded right, padded left
    text = Text.from_batch(text.input_ids[row], text.attention_mask[row])
    positions = positions_of(text)
    continuation = greedy_continuation(model, path.read(model, text), positions, 4)
    for b, j in positions.mask.nonzero().tolist():
        index = int(positions.index[b, j])
        prefix = text.input_ids[b, : index + 1][text.attention_mask[b, : index + 1]][None]
        generated = model.generate(
            prefix, think="never", do_sample=False, max_new_tokens=4, min_new_tokens=4, eos_token_id=None
        )
        assert continuation[b, j].tolist() == generated[0, prefix.shape[1] :].tolist()


def plain_edit_distance(a: list[int], b: list[int]) -> int:
    """Levenshtein's distance by its definition."""
    if not a or not b:
        return len(a) + len(b)
    change = plain_edit_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(change, plain_edit_distance(a[1:], b) + 1, plain_edit_distance(a, b[1:]) + 1)


def test_distance_is_that_of_as_much_of_the_continuation(examined):
    """Thoughts that ended early are compared with as many tokens."""
    model, text, thoughts, sums = examined
    continuation = greedy_continuation(model, SharedPrefix().read(model, text), thoughts.positions, 4)
    expected = torch.zeros(len(text.input_ids), dtype=torch.float64)
    lengths = set()
    for b, j in thoughts.positions.mask.nonzero().tolist():
        for g in range(thoughts.mask.shape[2]):
            thought = thoughts.token_ids[b, j, g][thoughts.mask[b, j, g]].tolist()
            lengths.add(len(thought))
            expected[b] += plain_edit_distance(thought, continuation[b, j, : len(thought)].tolist()) / len(thought)
    assert len(lengths) > 1
    assert torch.allclose(sums["distance"], expected)


def test_conditions_are_scored_as_in_training(examined):
    """Each condition's NLL and accuracy are those of scoring its thoughts; without thoughts, of the text."""
    model, text, thoughts, sums = examined
    said = talk_after(text, thoughts.positions, M).target_mask[:, :, None].expand(*thoughts.mask.shape[:3], M)
    assert torch.equal(sums["tokens"], said.sum((1, 2, 3)).double())
    generator = seeded()
    for name in CONTROLS:
        other = controlled(thoughts, name, model.config.vocab_size, generator)
        scores = score(model, ScoreRequest(text, other, M, SharedPrefix()))
        assert torch.allclose(sums[f"nll_{name}"], -(scores.talk_logps * said).sum((1, 2, 3)))
        assert torch.equal(sums[f"correct_{name}"], (scores.talk_correct * said).sum((1, 2, 3)).double())
    without = at_talk(scores.text_logps, thoughts, M).expand_as(said)
    assert torch.allclose(sums["nll_none"], -(without * said).sum((1, 2, 3)))
    assert len({round(float(sums[f"nll_{name}"].sum()), 6) for name in CONDITIONS}) == len(CONDITIONS)


def test_coherence_and_correctness_are_those_of_each_thought(examined):
    model, text, thoughts, sums = examined
    scores = score(model, ScoreRequest(text, thoughts, M, SharedPrefix()))
    plain = score_thoughts(model, text, thoughts, SharedPrefix(), start=False).thought_logps
    mask = talk_after(text, thoughts.positions, M).target_mask[:, :, None]
    without = at_talk(scores.text_logps, thoughts, M)
    x = coherence(scores.similarity, plain, thoughts.mask, scores.talk_logps, without, mask)
    y = masked_mean(scores.talk_correct.double(), mask, dim=-1)
    exists = thoughts.positions.mask[..., None].expand_as(x)
    assert torch.equal(sums["thoughts"], exists.sum((1, 2)).double())
    expected = np.corrcoef(x[exists].detach().numpy(), y[exists].numpy())[0, 1]
    stacked = torch.stack([sums[name] for name in SUMS], dim=1)
    assert judge(stacked).estimates["correlation"].value == pytest.approx(expected)


def test_both_paths_agree(examined):
    """Anti-theater validation on replay, the oracle, gives the same sums."""
    model, text, thoughts, sums = examined
    replayed = text_sums(model, text, thoughts, M, Replay(), "mixed", seeded())
    assert torch.allclose(torch.stack([sums[name] for name in SUMS], dim=1), replayed, atol=1e-9)


# The verdict


def test_thoughts_that_pass_every_test_pass():
    report = judge(made_sums())
    assert report.passed and report.failures == []
    assert report.texts == 50 and report.thoughts == 200
    assert report.metrics()["passed"] == 1.0


@pytest.mark.parametrize(
    ("failed", "columns"),
    [
        ("divergence", {"distance": 4 * 0.299}),
        ("ablation", {"correct_none": 8 * 0.5, "correct_real": 8 * 0.519, "correct_shuffled": 0.0}),
        ("correlation", {"product": 0.0}),
        ("content_gain", {"correct_shuffled": np.linspace(-8, 16, 50), "correct_real": 4.0, "correct_none": 0.0}),
    ],
)
def test_each_test_can_fail_alone(failed, columns):
    """Just below its threshold a test is not passed, whatever the others say."""
    report = judge(made_sums(**columns))
    assert report.failures == [failed] and not report.passed
    assert report.metrics()["passed"] == 0.0


def test_content_gain_needs_its_whole_interval():
    """A positive gain that a few texts could undo is no proof."""
    shuffled = np.where(np.arange(50) < 27, 0.0, 8.0)  # against 4: positive on average, by four texts
    report = judge(made_sums(correct_shuffled=shuffled, correct_real=4.0, correct_none=0.0))
    gain = report.estimates["content_gain"]
    assert gain.low < 0 < gain.value < gain.high and report.failures == ["content_gain"]


@pytest.mark.parametrize("constant", ["coherence", "correctness"])
def test_undefined_correlation_fails_and_is_not_a_number(constant):
    """Where everything is right, or everything wrong, nothing can correlate."""
    values = made_sums()
    columns = {constant: 4 * 0.7, f"{constant}_squared": 4 * 0.49}
    other = "correctness" if constant == "coherence" else "coherence"
    columns["product"] = 0.7 * values[:, SUMS.index(other)].numpy()
    report = judge(made_sums(**columns))
    assert math.isnan(report.estimates["correlation"].value)
    assert report.failures == ["correlation"]
    assert report.metrics()["correlation"] is None and report.metrics()["correlation_low"] is None


def test_gains_have_the_sign_of_help():
    """Positive where the content, or the compute, helps; in accuracy and in nats."""
    columns = {f"nll_{name}": 8.0 * nats for name, nats in zip(CONDITIONS, (3, 1, 2.5, 4, 2, 2), strict=True)}
    columns |= {f"correct_{name}": float(n) for name, n in zip(CONDITIONS, (1, 7, 2, 0, 3, 0), strict=True)}
    estimates = judge(made_sums(**columns)).estimates
    values = {name: estimates[name].value for name in estimates if "gain" in name}
    assert values == pytest.approx(
        {"content_gain": 5 / 8, "compute_gain": 2 / 8, "content_gain_nll": 1.5, "compute_gain_nll": 1.0}
    )


def test_intervals_are_paired():
    """A difference that is the same in every text is certain, however much the texts differ."""
    shuffled = np.random.default_rng(1).uniform(0, 4, 50)
    estimate = judge(made_sums(correct_shuffled=shuffled, correct_real=shuffled + 2)).estimates["content_gain"]
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((0.25, 0.25, 0.25))


def test_more_thoughts_of_the_same_texts_are_no_more_evidence():
    """Texts are drawn, not thoughts: tenfold sums leave intervals as they are, fourfold texts halve them."""
    sums = made_sums(texts=100)
    one, tenfold, more = (judge(x).estimates["accuracy_none"] for x in (sums, 10 * sums, sums.repeat(4, 1)))
    assert (tenfold.low, tenfold.high) == pytest.approx((one.low, one.high))
    assert (more.high - more.low) == pytest.approx((one.high - one.low) / 2, rel=0.15)


def test_interval_covers_what_it_promises(monkeypatch):
    """Over many samples the 95% interval holds the truth about that often."""
    monkeypatch.setattr("trl_quietstar.evaluation.anti_theater.RESAMPLES", 300)
    truth = judge(made_sums(texts=20_000, seed=1_000)).estimates["divergence"].value
    estimates = [judge(made_sums(texts=60, seed=seed)).estimates["divergence"] for seed in range(200)]
    held = sum(estimate.low <= truth <= estimate.high for estimate in estimates)
    assert 0.88 <= held / 200 <= 0.99


@given(order=st.permutations(range(12)))
def test_the_order_of_texts_changes_no_value(order):
    sums = made_sums(texts=12)
    one, other = judge(sums).estimates, judge(sums[list(order)]).estimates
    assert {k: v.value for k, v in one.items()} == pytest.approx({k: v.value for k, v in other.items()})


def test_one_text_is_refused():
    with pytest.raises(ValueError, match="at least 2 of them, got 1; give a larger `eval_dataset`"):
        judge(made_sums(texts=1))


# In training


def validated_at(trainer) -> list[int]:
    """The steps of a log at which the thoughts were validated."""
    return [entry["step"] for entry in logged(trainer, "rl/anti_theater_passed")]


@pytest.mark.parametrize(("max_steps", "at"), [(5, [2, 4, 5]), (4, [2, 4]), (1, [1])])
def test_validates_on_schedule_and_at_the_end(max_steps, at, tmp_path):
    """Once a step, also where the schedule meets the end."""
    trainer = tiny_trainer(tmp_path, evaluation=text_data(6), anti_theater_steps=2, max_steps=max_steps)
    trainer.train()
    assert validated_at(trainer) == at
    entry = logged(trainer, "rl/anti_theater_passed")[-1]
    for name in (
        "divergence",
        "ablation",
        "content_gain",
        "compute_gain_nll_high",
        "accuracy_filler",
        "nll_truncated",
    ):
        assert isinstance(entry[f"rl/anti_theater_{name}"], float)


def test_validation_leaves_training_as_it_was(tmp_path):
    """The same losses with and without it, and the model still in training mode."""
    losses = []
    for steps in (None, 1):
        trainer = tiny_trainer(tmp_path, evaluation=text_data(6), anti_theater_steps=steps)
        trainer.train()
        losses.append([entry["loss"] for entry in logged(trainer, "loss")])
        assert trainer.model.training
    assert losses[0] == losses[1]


def test_validation_agrees_with_evaluation(tmp_path):
    """Both look at the same thoughts, and a second validation at the same again."""
    trainer = tiny_trainer(tmp_path, evaluation=text_data(6), per_device_eval_batch_size=4)
    metrics, report = trainer.evaluate(), trainer.validate_thoughts()
    values = {name: estimate.value for name, estimate in report.estimates.items()}
    assert values["nll_real"] == pytest.approx(metrics["eval_nll_with"], rel=1e-5)
    assert values["nll_none"] == pytest.approx(metrics["eval_nll_without"], rel=1e-5)
    assert values["accuracy_real"] == pytest.approx(metrics["eval_accuracy_with"])
    assert values["ablation"] == pytest.approx(metrics["eval_accuracy_with"] - metrics["eval_accuracy_without"])
    assert trainer.validate_thoughts().metrics() == report.metrics()
    assert report.texts == 6


def test_several_evaluation_sets_are_validated_together(tmp_path):
    evaluation = {"first": text_data(3), "second": text_data(4, first=10)}
    assert tiny_trainer(tmp_path, evaluation=evaluation).validate_thoughts().texts == 7


class Verdicts(TrainerCallback):
    """Lets validation pass up to a step and fail from then on: there is no test, or one that none can pass."""

    def __init__(self, monkeypatch, passes_until: int):
        self.monkeypatch, self.passes_until = monkeypatch, passes_until

    def on_step_begin(self, args, state, control, **kwargs):
        for name in list(THRESHOLDS):
            self.monkeypatch.delitem(THRESHOLDS, name)
        if state.global_step >= self.passes_until:
            self.monkeypatch.setitem(THRESHOLDS, "divergence", math.inf)


class Weights(TrainerCallback):
    """Copies of all weights after each step."""

    def __init__(self):
        self.after: dict[int, dict[str, torch.Tensor]] = {}

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        self.after[state.global_step + 1] = {name: p.detach().clone() for name, p in model.named_parameters()}


def judged_trainer(folder, monkeypatch, action, passes_until, **options):
    """A trainer whose validations pass until a step, and the weights after each of its steps."""
    verdicts, weights = Verdicts(monkeypatch, passes_until), Weights()
    trainer = tiny_trainer(
        folder,
        evaluation=text_data(8),
        anti_theater_steps=1,
        anti_theater_action=action,
        callbacks=[verdicts, weights],
        **{"max_steps": 5, **options},
    )
    return trainer, weights.after


def weights_of(trainer) -> dict[str, torch.Tensor]:
    """All parameters by name."""
    return {name: p.detach() for name, p in trainer.model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether parameters are equal, bit for bit."""
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("action", "last_step"), [("warn", 5), ("stop", 3), ("rollback", 3)])
def test_actions(tmp_path, monkeypatch, action, last_step):
    """`warn` goes on, `stop` stops with the model as it is, `rollback` stops with the last that passed."""
    trainer, after = judged_trainer(tmp_path, monkeypatch, action, passes_until=2)
    trainer.train()
    passed = {entry["step"]: entry["rl/anti_theater_passed"] for entry in logged(trainer, "rl/anti_theater_passed")}
    assert passed[1] == passed[2] == 1 and passed[3] == 0
    assert trainer.state.global_step == last_step
    assert same(weights_of(trainer), after[2 if action == "rollback" else last_step])
    assert not same(after[2], after[3])


def test_rollback_restores_an_adapter_and_its_heads(tmp_path, monkeypatch):
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer, after = judged_trainer(tmp_path, monkeypatch, "rollback", passes_until=2, peft_config=adapter)
    trainer.train()
    restored = weights_of(trainer)
    assert trainer.state.global_step == 3 and same(restored, after[2])
    changed = {name for name in restored if not torch.equal(after[2][name], after[3][name])}
    assert any("lora_" in name for name in changed) and any("quietstar" in name for name in changed)


def test_rollback_keeps_the_last_that_passed_only(tmp_path, monkeypatch):
    trainer, _ = judged_trainer(tmp_path, monkeypatch, "rollback", passes_until=3)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("_passed-*")) == ["_passed-3"]
    assert (tmp_path / "_passed-3" / "quietstar.safetensors").is_file()


def test_rollback_keeps_what_a_checkpoint_refers_to(tmp_path, monkeypatch):
    """Until there is a later checkpoint, so that a run that is killed meanwhile can still roll back."""
    options = dict(save_strategy="steps", save_steps=3)
    trainer, _ = judged_trainer(tmp_path, monkeypatch, "rollback", passes_until=4, max_steps=6, **options)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("_passed-*")) == ["_passed-3", "_passed-4"]


def test_rollback_with_nothing_to_go_back_to_goes_on(tmp_path, monkeypatch):
    """A model that has not learned to think yet fails; that must not end its training."""
    trainer, after = judged_trainer(tmp_path, monkeypatch, "rollback", passes_until=0)
    trainer.train()
    assert trainer.state.global_step == 5 and same(weights_of(trainer), after[5])


def test_other_actions_keep_no_model(tmp_path, monkeypatch):
    trainer, _ = judged_trainer(tmp_path, monkeypatch, "warn", passes_until=5)
    trainer.train()
    assert not list(tmp_path.glob("_passed-*"))


def test_resumed_run_can_still_roll_back(tmp_path, monkeypatch):
    """The checkpoint knows which model passed."""
    options = dict(save_strategy="steps", save_steps=1)
    trainer, after = judged_trainer(tmp_path, monkeypatch, "rollback", passes_until=2, **options)
    trainer.train()
    resumed, _ = judged_trainer(tmp_path, monkeypatch, "rollback", passes_until=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3 and same(weights_of(resumed), after[2])


def test_resumed_run_without_the_kept_model_goes_on(tmp_path, monkeypatch):
    """The run that was killed may have kept a later model and dropped the one its checkpoint knows."""
    options = dict(save_strategy="steps", save_steps=1)
    trainer, _ = judged_trainer(tmp_path, monkeypatch, "rollback", passes_until=2, **options)
    trainer.train()
    shutil.rmtree(tmp_path / "_passed-2")
    resumed, after = judged_trainer(tmp_path, monkeypatch, "rollback", passes_until=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 5 and same(weights_of(resumed), after[5])


def test_best_model_that_fails_is_rolled_back(tmp_path, monkeypatch):
    """The last word at the end: the best model by reward is not returned if it fails and an earlier one passed."""
    options = dict(
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True
    )
    trainer, after = judged_trainer(tmp_path, monkeypatch, "rollback", passes_until=2, **options)
    trainer.train()
    assert same(weights_of(trainer), after[2])


def test_batches_do_not_matter(tmp_path):
    """Validation does not depend on how the evaluation data is batched."""
    reports = [
        tiny_trainer(tmp_path, evaluation=text_data(6), per_device_eval_batch_size=size).validate_thoughts()
        for size in (2, 6)
    ]
    one, other = ({k: v.value for k, v in r.estimates.items()} for r in reports)
    for name in ("divergence", "ablation", "accuracy_real", "nll_real", "nll_truncated", "nll_filler", "nll_none"):
        assert one[name] == pytest.approx(other[name], rel=1e-5), name
