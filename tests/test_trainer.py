"""The trainer end to end on tiny models: metrics, data formats, options, adapters, schedules and reports."""

import itertools
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from trl_quietstar import QuietStarConfig
from trl_quietstar.learning.metrics import BatchResult
from trl_quietstar.model.adapters import base_of
from trl_quietstar.training.runlog import RunLog

from .tiny import sums
from .training import (
    EVAL_METRICS,
    LORA,
    Recorder,
    assert_same_logs,
    finite,
    logged,
    plain_model,
    text_data,
    tiny_args,
    tiny_trainer,
)


METRICS = (
    "episode reward avg_reward_100 policy_loss value_loss entropy entropy_coefficient advantages kl_divergence "
    "total_loss num_thoughts coherence learning_rate reward_std mixing_weight nll_with nll_without "
    "explained_variance grad_norm thought_length tokens_per_second useful_thoughts mixed_groups exact_match_with "
    "exact_match_without"
).split()


# Metrics


def test_every_metric_is_logged(tmp_path):
    """Each `rl/*` metric of the design is in every log entry, as a finite number."""
    trainer = tiny_trainer(tmp_path, beta=0.1)
    trainer.train()
    entries = logged(trainer)
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    for entry in entries:
        assert not [name for name in METRICS if not finite(entry.get(f"rl/{name}"))]


def test_metrics_are_what_they_say(tmp_path):
    """Counts, means and schedules in the log are those of the run."""
    trainer = tiny_trainer(tmp_path, num_thoughts=2, max_steps=4, max_grad_norm=0.5, entropy_decay=0.9)
    trainer.train()
    rewards = []
    for entry in logged(trainer):
        rewards.append(entry["rl/reward"])
        assert entry["rl/episode"] == entry["step"]
        assert entry["rl/total_loss"] == pytest.approx(entry["loss"])
        assert entry["rl/learning_rate"] == entry["learning_rate"]
        assert entry["rl/grad_norm"] == entry["grad_norm"]
        assert entry["rl/num_thoughts"] == 4 * 3 * 2
        assert entry["rl/thought_length"] == 3
        assert entry["rl/avg_reward_100"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-12)
        assert 0 <= entry["rl/coherence"] <= 1 and 0 < entry["rl/mixing_weight"] < 1
        assert 0 <= entry["rl/entropy"] <= math.log(300)
        assert -1 <= entry["rl/reward"] <= 1
    assert len(set(rewards)) == 4
    weights = [entry["rl/entropy_coefficient"] for entry in logged(trainer)]
    assert all(after == pytest.approx(0.9 * before) for before, after in zip(weights, weights[1:], strict=False))


def test_a_logging_window_averages_its_steps(tmp_path):
    """Two steps a log: the mean of what each step logs alone, and the moving average of all of them."""
    single, double = tiny_trainer(tmp_path, max_steps=4), tiny_trainer(tmp_path, max_steps=4, logging_steps=2)
    single.train(), double.train()
    steps, windows = logged(single), logged(double)
    assert [window["step"] for window in windows] == [2, 4]
    for i, window in enumerate(windows):
        pair = steps[2 * i : 2 * i + 2]
        for name in ("reward", "policy_loss", "thought_length", "num_thoughts", "total_loss"):
            mean = sum(entry[f"rl/{name}"] for entry in pair) / 2
            assert window[f"rl/{name}"] == pytest.approx(mean, rel=1e-5, abs=1e-9), name
        assert window["rl/avg_reward_100"] == pytest.approx(pair[-1]["rl/avg_reward_100"], abs=1e-9)


def shares_by_loop(batch: BatchResult, useful_gain: float) -> dict[str, float]:
    """Useful thoughts, mixed groups and exact matches of a batch, one thought at a time."""
    useful, mixed, with_, without = [], [], [], []
    experience, scores, reader_logps = batch.experience, batch.scores, batch.scores.reader_logps.detach()
    B, J, G, M = scores.talk_logps.shape
    for b, j in itertools.product(range(B), range(J)):
        if not experience.thoughts.positions.mask[b, j]:
            continue
        said = [m for m in range(M) if experience.talk_mask[b, j, 0, m]]
        plain = math.prod(math.exp(experience.logps_without[b, j, 0, m]) for m in said)
        group = [math.prod(math.exp(reader_logps[b, j, g, m]) for m in said) - plain for g in range(G)]
        useful += [gain > useful_gain for gain in group]
        mixed.append(len({gain > useful_gain for gain in group}) == 2)
        with_ += [all(scores.talk_correct[b, j, g, m] for m in said) for g in range(G)]
        without += [all(experience.correct_without[b, j, 0, m] for m in said)] * G
    shares = {
        "useful_thoughts": useful,
        "mixed_groups": mixed,
        "exact_match_with": with_,
        "exact_match_without": without,
    }
    return {f"rl/{name}": sum(flags) / len(flags) for name, flags in shares.items()}


@pytest.mark.parametrize("options", [{}, dict(thought_positions="all", num_thoughts=3, reward_prediction="thought")])
def test_shares_of_thoughts_are_their_definition(options, tmp_path, monkeypatch):
    """Useful thoughts, mixed groups and exact matches in the log equal a loop, also where rows have fewer positions."""
    batches, add = [], RunLog.add
    monkeypatch.setattr(RunLog, "add", lambda self, batch, *args: (batches.append(batch), add(self, batch, *args)))
    data = Dataset.from_dict({"text": [*sums()[:6], "5", "1 plus"]})
    trainer = tiny_trainer(tmp_path, data=data, max_steps=4, useful_gain=1e-3, talk_length=3, **options)
    trainer.train()
    assert len(batches) == len(logged(trainer)) == 4
    for batch, entry in zip(batches, logged(trainer), strict=True):
        for name, share in shares_by_loop(batch, 1e-3).items():
            assert entry[name] == pytest.approx(share), name
    for name in ("useful_thoughts", "mixed_groups"):
        assert any(0 < entry[f"rl/{name}"] < 1 for entry in logged(trainer)), name


def test_exact_matches_are_what_greedy_decoding_writes(tmp_path):
    """On texts that the model itself wrote greedily, all talk without thoughts is an exact match, and some is not with them."""
    model = plain_model()
    prompts = torch.arange(1, 9)[:, None]
    texts = model.generate(input_ids=prompts, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    trainer = tiny_trainer(
        tmp_path,
        model,
        Dataset.from_dict({"input_ids": texts.tolist()}),
        max_steps=1,
        thought_positions="all",
        talk_length=3,
        reward_prediction="thought",
    )
    trainer.train()
    (entry,) = logged(trainer)
    assert entry["rl/exact_match_without"] == entry["rl/accuracy_without"] == 1
    assert entry["rl/exact_match_with"] < entry["rl/accuracy_with"] < 1


def test_single_thoughts_are_no_groups(tmp_path):
    """With one thought at a position there is nothing to mix; whether it is useful can still be said."""
    trainer = tiny_trainer(tmp_path, num_thoughts=1, max_steps=1)
    trainer.train()
    (entry,) = logged(trainer)
    assert "rl/mixed_groups" not in entry and finite(entry["rl/useful_thoughts"])


def test_evaluation_metrics(tmp_path):
    """Each `eval_*` metric of the design is logged at each evaluation, and is a mean over the data."""
    trainer = tiny_trainer(tmp_path, evaluation=text_data(10, 300), eval_strategy="steps", eval_steps=2)
    trainer.train()
    entry = logged(trainer, "eval_reward")[0]
    assert entry["step"] == 2
    assert not [name for name in EVAL_METRICS if not finite(entry.get(f"eval_{name}"))]
    assert 0 <= entry["eval_accuracy_with"] <= 1 and 0 <= entry["eval_coherence"] <= 1


def test_evaluation_is_deterministic(tmp_path):
    """Twice the same numbers, whatever the random state, and none of the training's own."""
    trainer = tiny_trainer(tmp_path, evaluation=text_data(10, 300))
    first = trainer.evaluate()
    torch.manual_seed(99)
    second = trainer.evaluate()
    trainer.train()
    third = trainer.evaluate()
    for name in EVAL_METRICS:
        assert first[f"eval_{name}"] == second[f"eval_{name}"], name
    assert first["eval_nll_with"] != third["eval_nll_with"]


def test_evaluation_changes_no_training(tmp_path):
    """Evaluating on the way leaves every training metric as it was."""
    plain = tiny_trainer(tmp_path)
    watched = tiny_trainer(tmp_path, evaluation=text_data(6, 300), eval_strategy="steps", eval_steps=1)
    plain.train(), watched.train()
    assert_same_logs(watched, plain)


@pytest.mark.parametrize("sample", [True, False])
def test_evaluation_does_not_depend_on_its_batches(sample, tmp_path):
    """Means are taken over thoughts and tokens, not over batches of unequal size."""
    metrics = []
    for size in (10, 3):
        trainer = tiny_trainer(
            tmp_path,
            evaluation=Dataset.from_dict({"text": [" ".join(sums()[: 1 + i % 4]) for i in range(10)]}),
            per_device_eval_batch_size=size,
            eval_do_sample=sample,
            thought_positions="all",
        )
        metrics.append(trainer.evaluate())
    for name in EVAL_METRICS:
        assert metrics[0][f"eval_{name}"] == pytest.approx(metrics[1][f"eval_{name}"], rel=1e-5, abs=1e-6), name


def test_several_evaluation_sets(tmp_path):
    """A dictionary of datasets is evaluated name by name."""
    sets = {"small": text_data(4, 300), "large": text_data(8, 310)}
    trainer = tiny_trainer(tmp_path, evaluation=sets, eval_strategy="steps", eval_steps=3)
    trainer.train()
    for name in sets:
        assert finite(logged(trainer, f"eval_{name}_reward")[0][f"eval_{name}_nll_with"])


def test_training_improves_prediction(tmp_path):
    """A few dozen steps lower the held-out NLL, with thoughts and without: gradients point downhill."""
    trainer = tiny_trainer(tmp_path, evaluation=text_data(16, 300), max_steps=30, data=text_data(200))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("eval_nll_with", "eval_nll_without"):
        assert after[name] < before[name] - 0.5, name


# The optimizer


def test_warm_up_is_linear(tmp_path):
    """The learning rate rises from 0 to its peak over the warm-up, then falls: for the model and, in proportion, the
    heads; and it is what the log says."""
    recorder = Recorder()
    trainer = tiny_trainer(
        tmp_path, max_steps=8, warmup_steps=4, lr_scheduler_type="linear", callbacks=[recorder],
        learning_rate=1e-3, heads_learning_rate=2e-2,
    )  # fmt: skip
    trainer.train()
    factors = [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]
    assert [rate for rate, _ in recorder.rates] == pytest.approx([1e-3 * f for f in factors])
    assert [rate for _, rate in recorder.rates] == pytest.approx([2e-2 * f for f in factors])
    assert [entry["rl/learning_rate"] for entry in logged(trainer)] == pytest.approx([1e-3 * f for f in factors])


@pytest.mark.parametrize("peft", [False, True])
def test_every_parameter_is_in_one_group(peft, tmp_path):
    """Each trainable parameter is optimised once, and the heads at their own rate."""
    trainer = tiny_trainer(tmp_path, peft_config=LoraConfig(**LORA) if peft else None, weight_decay=0.1)
    trainer.create_optimizer()
    grouped = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    heads = {id(p) for p in base_of(trainer.model).quietstar.parameters()}
    for group in trainer.optimizer.param_groups:
        assert all(group["lr"] == (1e-2 if id(p) in heads else 1e-3) for p in group["params"])


@pytest.mark.parametrize(
    ("baseline", "prediction", "peft"),
    [
        ("value", "mixed", False),
        ("leave_one_out", "thought", True),
        ("both", "thought", False),
        ("none", "mixed", True),
        ("value", "mixed", True),
    ],
)
def test_every_trainable_parameter_has_a_gradient(baseline, prediction, peft, tmp_path):
    """No parameter is left out of the graph, which would stall distributed training; an unused head is frozen."""
    recorder = Recorder()
    trainer = tiny_trainer(
        tmp_path,
        advantage_baseline=baseline,
        reward_prediction=prediction,
        peft_config=LoraConfig(**LORA) if peft else None,
        max_steps=1,
        callbacks=[recorder],
    )
    trainer.train()
    heads = base_of(trainer.model).quietstar
    assert recorder.rates and not recorder.without
    assert all(p.requires_grad == (baseline in ("value", "both")) for p in heads.value_head.parameters())
    assert all(p.requires_grad == (prediction == "mixed") for p in heads.mixing_head.parameters())
    assert heads.start_embedding.requires_grad and heads.end_embedding.requires_grad


def equal_rows(count: int = 16) -> Dataset:
    """Texts of ten tokens each, so that a mean over a batch is the mean over its halves."""
    ids = torch.randint(1, 200, (count, 10), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist()})


def test_gradient_accumulation_is_a_larger_batch(tmp_path):
    """Two batches of four accumulated make the step, and the log, of one batch of eight."""
    options = dict(data=equal_rows(32), talk_length=1, optim="sgd", learning_rate=0.1, heads_learning_rate=0.1)
    whole = tiny_trainer(tmp_path, per_device_train_batch_size=8, **options)
    halves = tiny_trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
    whole.train(), halves.train()
    for (name, ours), oracle in zip(halves.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-6, msg=name)
    for ours, oracle in zip(logged(halves), logged(whole), strict=True):
        for name in ("loss", "grad_norm", "rl/reward", "rl/num_thoughts", "rl/total_loss", "rl/avg_reward_100"):
            assert ours[name] == pytest.approx(oracle[name], rel=1e-4, abs=1e-6), name


def test_gradient_checkpointing_changes_no_step(tmp_path):
    """With layers recomputed, the run is the same."""
    ours = tiny_trainer(tmp_path / "a", gradient_checkpointing=True)
    oracle = tiny_trainer(tmp_path / "b", gradient_checkpointing=False, thought_path="replay")
    ours.train(), oracle.train()
    assert logged(ours)[0]["loss"] == pytest.approx(logged(oracle)[0]["loss"], rel=1e-5)
    assert logged(ours)[-1]["loss"] == pytest.approx(logged(oracle)[-1]["loss"], rel=1e-3)


def test_runs_are_reproducible(tmp_path):
    """The same seed gives the same run; another gives another."""
    first, again, other = (tiny_trainer(tmp_path, seed=seed) for seed in (3, 3, 4))
    for trainer in (first, again, other):
        trainer.train()
    assert_same_logs(again, first)
    assert logged(other)[0]["loss"] != logged(first)[0]["loss"]


# Options


COMBINATIONS = [
    dict(reward_type="log_likelihood", advantage_baseline="leave_one_out", no_thought_model="reference"),
    dict(reward_type="accuracy", advantage_baseline="both", reward_prediction="thought"),
    dict(reward_type="binary", advantage_baseline="none", normalize_advantages="step"),
    dict(reward_type="probability", advantage_baseline="value", use_gae=False, positive_advantages_only=True),
    dict(reward_type="log_likelihood", reward_prediction="thought", reward_clip_range=[-0.5, 0.5], beta=0.1),
    dict(no_thought_model="reference", advantage_baseline="both", beta=0.1, sync_ref_model=True),
    dict(nll_weighting="gain", thought_positions="difficulty", difficulty_threshold=0.1),
    dict(value_head_type="linear", temperature=0.7, top_p=0.9, top_k=20, min_p=0.01),
    dict(value_head_type="transformer", thought_positions="difficulty", difficulty_threshold=0.1),
    dict(thought_positions="0.5", min_thought_length=1, thought_stop_string=" .", thought_path="replay"),
    dict(thought_positions="all", num_thoughts=1, thought_length=1, talk_length=1),
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_options_train(options, tmp_path):
    """Every option, in some combination, gives finite steps that change the model."""
    trainer = tiny_trainer(tmp_path, max_steps=2, **options)
    before = trainer.model.model.embed_tokens.weight.clone()
    trainer.train()
    for entry in logged(trainer):
        assert finite(entry["loss"]) and finite(entry["grad_norm"]) and finite(entry["rl/reward"])
    assert not torch.equal(trainer.model.model.embed_tokens.weight, before)


def test_rewards_are_clipped_in_training(tmp_path):
    """A clip range bounds the rewards in the log."""
    trainer = tiny_trainer(tmp_path, reward_clip_range=[0.25, 0.5], reward_type="log_likelihood")
    trainer.train()
    assert all(0.25 <= entry["rl/reward"] <= 0.5 for entry in logged(trainer))


def test_stop_strings_shorten_thoughts(tmp_path):
    """A thought that meets the stop string is shorter on average, and never below the least length."""
    trainer = tiny_trainer(tmp_path, thought_stop_string="e", min_thought_length=2, thought_length=8, max_steps=2)
    trainer.train()
    assert all(2 <= entry["rl/thought_length"] <= 8 for entry in logged(trainer))


# Reports


def test_thoughts_are_printed(tmp_path, capsys):
    """`log_thoughts` prints a table with the thoughts, their context and their reward at each log."""
    tiny_trainer(tmp_path, log_thoughts=True, num_thoughts_to_print=2, max_steps=2).train()
    printed = capsys.readouterr().out
    assert "Thoughts at step 1" in printed and "Thoughts at step 2" in printed
    assert all(name in printed for name in ("context", "thought", "next", "reward"))
    assert "plus" in printed


def test_thoughts_are_not_printed_unless_asked(tmp_path, capsys):
    """Off by default."""
    tiny_trainer(tmp_path, max_steps=1).train()
    assert "Thoughts at step" not in capsys.readouterr().out


def test_sampled_thoughts_can_be_read(tmp_path):
    """After an evaluation a few of its thoughts are at hand, in equal columns."""
    trainer = tiny_trainer(tmp_path, evaluation=text_data(6, 300))
    trainer.evaluate()
    columns = trainer.sampled_thoughts()
    assert {"context", "thought", "next", "reward"} <= set(columns)
    assert {len(column) for column in columns.values()} == {5}


def test_a_model_card_is_written(tmp_path):
    """The card names the method, its paper and this library."""
    trainer = tiny_trainer(tmp_path)
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "Quiet-STaR" in card and "2403.09629" in card and "quietstar" in card


def test_wandb_receives_the_metrics(tmp_path, monkeypatch):
    """An offline W&B run holds every `rl/*` metric, and thoughts as a table."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer = tiny_trainer(tmp_path / "out", report_to="wandb", log_thoughts=True, beta=0.1, max_steps=2)
    try:
        trainer.train()
        summary = dict(wandb.run.summary)
    finally:
        wandb.finish()
    assert not [name for name in METRICS if not any(key.endswith(f"rl/{name}") for key in summary)]
    assert any(key.endswith("thoughts") for key in summary)


def test_arguments_stay_training_arguments(tmp_path):
    """Fields of `TrainingArguments` work beside the own ones, and the defaults are the documented ones."""
    args = tiny_args(tmp_path, weight_decay=0.3, lr_scheduler_type="cosine")
    assert args.weight_decay == 0.3 and args.lr_scheduler_type == "cosine"
    plain = QuietStarConfig(str(tmp_path))
    assert (plain.learning_rate, plain.heads_learning_rate) == (1e-6, 1e-4)
    assert (plain.thought_length, plain.talk_length, plain.num_thoughts) == (8, 4, 2)
    assert (plain.reward_type, plain.advantage_baseline, plain.beta) == ("probability", "value", 0.0)
