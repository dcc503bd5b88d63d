"""Reward functions: how they are named, what they are called with, and what becomes of what they give."""

import math
import re
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset

from trl_quietstar import QuietStarConfig, QuietStarREINFORCETrainer
from trl_quietstar.cli.parser import CommandParser
from trl_quietstar.learning.reward_functions import BY_NAME, RewardFunctions
from trl_quietstar.learning.rewards import GROUP_REWARDS, REWARD_TYPES
from trl_quietstar.text.batch import Positions, Thoughts

from .tiny import byte_tokenizer, sums
from .training import assert_same_logs, assert_same_state, log_of, logged, text_data, tiny_args, tiny_trainer


def length(thoughts):
    """A reward that looks at thoughts alone."""
    return thoughts.mask.sum(-1) / 10


def judged(functions, weights=None, columns=None, exists=None, **arguments):
    """Rewards and metrics of two rows with two positions of two thoughts, in float64."""
    mask = torch.ones(2, 2, 2, 3, dtype=torch.bool) if exists is None else exists
    positions = Positions(torch.zeros(2, 2, dtype=torch.long), mask[..., 0].any(-1))
    thoughts = Thoughts(positions, torch.zeros(mask.shape, dtype=torch.long), mask)
    functions = RewardFunctions(functions, weights or (1.0,) * len(functions))
    return functions.judge({"thoughts": thoughts, **arguments}, columns or {}, torch.float64)


# Names


def found(given, folder, **options):
    """The functions that a run takes."""
    return RewardFunctions.of(given, tiny_args(folder, **options))


def test_functions_are_named_in_three_ways(tmp_path, monkeypatch):
    """As objects, by the names of `reward_type`, or by import paths, with a colon or a dot; in the trainer or the options."""
    (tmp_path / "own_rewards.py").write_text("def short(thoughts): return -thoughts.mask.sum(-1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    given = [length, "probability", "own_rewards:short", "own_rewards.short"]
    functions = found(given, tmp_path, reward_weights=[1, 0.5, 2, 0]).functions
    assert list(functions) == ["length", "probability", "short", "short#2"]
    assert functions["length"] is length and functions["short"] is sys.modules["own_rewards"].short
    assert list(found(None, tmp_path, reward_functions=["own_rewards:short"]).functions) == ["short"]
    assert list(found("accuracy", tmp_path).functions) == ["accuracy"]
    assert list(found(lambda thoughts: 0, tmp_path).functions) == ["<lambda>"]
    assert found(None, tmp_path) is None
    assert set(BY_NAME) >= set(REWARD_TYPES) - set(GROUP_REWARDS)


WRONG = {
    "unknown": (
        ["probabilty"],
        {},
        ValueError,
        "'probabilty', which is unknown (did you mean 'probability'?); choose",
    ),
    "of a group": (["marginal_log_likelihood"], {}, ValueError, "'marginal_log_likelihood', which is unknown"),
    "no module": (
        ["no_such:f"],
        {},
        ValueError,
        "the module 'no_such' cannot be imported (No module named 'no_such')",
    ),
    "no function": (["math:sqr"], {}, ValueError, "the module 'math' has no function 'sqr' (did you mean 'sqrt'?)"),
    "no name": ([":f"], {}, ValueError, "':f', which is unknown"),
    "a constant": (["math:pi"], {}, ValueError, "'math' has no function 'pi'"),
    "a number": ([length, 3], {}, TypeError, "`reward_functions` holds a `int`; give functions, names (probability,"),
    "a model": (torch.nn.Linear(1, 1), {}, TypeError, "holds a `Linear`; give"),
    "none": ([], {}, ValueError, "`reward_weights` are 0 and `reward_functions` are 0"),
    "weights": ([length], dict(reward_weights=[1.0, 2.0]), ValueError, "are 2 and `reward_functions` are 1"),
    "weights alone": (None, dict(reward_weights=[1.0]), ValueError, "`reward_weights` is [1.0], and there are no"),
    "twice": (length, dict(reward_functions=["accuracy"]), ValueError, "to the trainer and as ['accuracy'] in `args`"),
    "a type": (
        length,
        dict(reward_type="accuracy"),
        ValueError,
        "the place of `reward_type`, which is 'accuracy'; leave it out (on the command line, `--reward_type probability`)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_a_reward_is_named(case, tmp_path):
    """With what to do, before a model is loaded."""
    given, options, kind, words = WRONG[case]
    with pytest.raises(kind, match=re.escape(words)):
        QuietStarREINFORCETrainer("/no/such", tiny_args(tmp_path, **options), text_data(), reward_functions=given)


def test_options_are_lists(tmp_path):
    """On the command line several words; anything else than strings and numbers is refused."""
    parser = CommandParser((QuietStarConfig,), "train")
    flags = f"--output_dir {tmp_path} --reward_functions accuracy math:sqrt --reward_weights 1 0.5"
    args, *_ = parser.parse_args_and_config(flags.split())
    assert args.reward_functions == ["accuracy", "math:sqrt"] and args.reward_weights == [1.0, 0.5]
    with pytest.raises(TypeError, match="`reward_functions` is 'accuracy' .*give a list of strings"):
        tiny_args(tmp_path, reward_functions="accuracy")
    with pytest.raises(TypeError, match="`reward_weights` is .*give a list of numbers"):
        tiny_args(tmp_path, reward_weights=["1"])


def test_the_old_argument_is_answered(tmp_path):
    """By the name of the new one."""
    with pytest.raises(TypeError, match="no argument `reward_function`: give it as `reward_functions`"):
        QuietStarREINFORCETrainer("/no/such", reward_function=length)


# Arguments


def test_functions_get_what_their_signatures_name():
    """One that takes any gets columns too, and nothing that has to be made first."""
    seen = {}

    def named(mask, answer, missing=7):
        seen["named"] = (mask, answer, missing)
        return torch.zeros(2, 2, 2)

    def greedy(**others):
        seen["greedy"] = others
        return torch.zeros(2, 2, 2)

    columns = {"answer": ["a", "b"], "number": [1, 2], "mask": ["x", "y"]}
    judged(
        {"named": named, "greedy": greedy}, columns=columns, mask="m", text="t", logps_with="l", thought_texts="made"
    )
    assert set(seen["greedy"]) == {"thoughts", "mask", "text", "logps_with", "answer", "number"}
    assert seen["named"] == ("m", ["a", "b"], 7)
    functions = RewardFunctions({"named": named}, (1.0,))
    assert functions.columns == {"answer": "named", "missing": None}
    assert functions.asks_for("mask") and not functions.asks_for("thought_texts") and not functions.takes_any
    assert RewardFunctions({"greedy": greedy}, (1.0,)).takes_any


def test_texts_of_thoughts_reach_a_function(tmp_path):
    """In training and evaluation, each thought its own."""
    tokenizer, seen = byte_tokenizer(), []

    def reward(thoughts, thought_texts):
        for ids, mask, text in zip(
            thoughts.token_ids.flatten(0, 2), thoughts.mask.flatten(0, 2), sum(sum(thought_texts, []), []), strict=True
        ):
            assert text == tokenizer.decode(ids[mask], skip_special_tokens=True)
            seen.append(text)
        return [[[float(len(text)) for text in group] for group in row] for row in thought_texts]

    trainer = tiny_trainer(
        tmp_path,
        tokenizer=tokenizer,
        reward_functions=reward,
        max_steps=1,
        evaluation=Dataset.from_dict({"text": sums()[:3]}),
    )
    trainer.train()
    count = len(seen)
    trainer.evaluate()
    assert len(set(seen)) > 3 and len(seen) > count


def test_a_column_by_the_name_of_a_made_argument_is_refused(tmp_path):
    """It would not be told which of the two is meant."""
    data = Dataset.from_dict({"text": sums()[:4], "thought_texts": ["a"] * 4})
    with pytest.raises(ValueError, match="column 'thought_texts' of the train dataset has the name of an argument"):
        tiny_trainer(tmp_path, data=data, reward_functions=lambda thought_texts: 0)


# Sums


def test_the_reward_is_the_weighted_sum():
    """Tensors, lists and arrays alike; nothing at positions that do not exist, whatever a function gives there."""
    one = torch.arange(8.0).view(2, 2, 2)
    mask = torch.ones(2, 2, 2, 3, dtype=torch.bool)
    mask[1, 1] = False
    given = one.clone()
    given[1, 1] = math.nan
    functions = {"a": lambda: given, "b": lambda: one.tolist(), "c": lambda: np.asarray(one, dtype=np.float32)}
    total, measured = judged(functions, (1.0, 10.0, -0.5), exists=mask)
    torch.testing.assert_close(total, (10.5 * one * mask[..., 0]).double())
    for name in functions:
        values, counted = measured[f"rewards/{name}/mean"]
        assert torch.equal(counted, mask[..., 0]) and torch.equal(values, (one * counted).double())


def test_none_leaves_a_function_out():
    """The others' sum is the reward, the log leaves the thought out, and a thought that nobody judges is an error."""
    one = [[[None, 1.0], [2.0, 3.0]], [[4.0, 5.0], [6.0, None]]]
    total, measured = judged({"a": lambda: one, "b": lambda: torch.ones(2, 2, 2)}, (2.0, 1.0))
    assert total.tolist() == [[[1.0, 3.0], [5.0, 7.0]], [[9.0, 11.0], [13.0, 1.0]]]
    values, counted = measured["rewards/a/mean"]
    assert counted.logical_not().nonzero().tolist() == [[0, 0, 0], [1, 1, 1]] and bool(torch.isfinite(values).all())
    with pytest.raises(ValueError, match=r"\(a, b\) gave None for thought 1 at position 1 of row 1; at least one"):
        judged({"a": lambda: one, "b": lambda: [[[1, 1], [1, 1]], one[1]]})


@pytest.mark.parametrize(
    "given", [1.0, None, [[["a"] * 2] * 2] * 2, [1.0] * 8, [[1.0, 2.0], [3.0]], torch.ones(2, 2), "abc"], ids=str
)
def test_anything_but_a_number_for_each_thought_is_refused(given):
    """By the name of the function, with the shape that is wanted."""
    with pytest.raises(ValueError, match=r"`odd` gave .*\(B, J, G\), here \(2, 2, 2\)"):
        judged({"odd": lambda: given})


def test_a_reward_type_by_name_is_the_reward_type(tmp_path):
    """Bit for bit; and twice a half of it is one, to rounding. Clipping and penalty act on the sum."""
    options = dict(
        reward_clip_range=[-0.01, 0.01], min_thought_length=1, thought_stop_string="1", unfinished_thought_penalty=0.5
    )
    runs = [
        tiny_trainer(tmp_path, **options, reward_type="log_likelihood"),
        tiny_trainer(tmp_path, **options, reward_functions=["log_likelihood"]),
        tiny_trainer(tmp_path, **options, reward_functions=["log_likelihood"] * 2, reward_weights=[0.25, 0.75]),
    ]
    for trainer in runs:
        trainer.train()
    assert_same_state(runs[1].model, runs[0].model)
    assert_same_logs(runs[1], runs[0])
    assert_same_logs(runs[2], runs[0], rel=1e-4)
    for entry in logged(runs[2]):
        assert (
            entry["rl/rewards/log_likelihood/mean"] == entry["rl/rewards/log_likelihood#2/mean"] != entry["rl/reward"]
        )


# The log


def noisy(thoughts, log_metric):
    """Gives the parity of the first token, and logs twice."""
    rewards = (thoughts.token_ids[..., 0] % 2).double()
    log_metric("seen/odd", rewards.mean())
    log_metric("seen/odd", 0)
    return rewards


def test_each_reward_and_logged_metrics_are_in_the_log(tmp_path):
    """Mean and standard deviation of each function before its weight, over all batches of a window; in evaluation too."""
    given = []

    def second(thoughts):
        given.append(torch.where(thoughts.mask[..., 0], (thoughts.token_ids[..., 0] % 7).double(), math.nan).flatten())
        return given[-1].view(thoughts.mask.shape[:3])

    evaluation = Dataset.from_dict({"text": sums()[40:43]})
    options = dict(max_steps=2, logging_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    trainer = tiny_trainer(
        tmp_path, evaluation=evaluation, reward_functions=[noisy, second], reward_weights=[1.0, 3.0], **options
    )
    trainer.train()
    (entry,) = logged(trainer)
    numbers = torch.cat(given)
    numbers = numbers[~numbers.isnan()]
    assert entry["rl/rewards/second/mean"] == pytest.approx(numbers.mean().item())
    assert entry["rl/rewards/second/std"] == pytest.approx(numbers.std(correction=0).item())
    assert entry["rl/reward"] == pytest.approx(entry["rl/rewards/noisy/mean"] + 3 * entry["rl/rewards/second/mean"])
    assert 0 < entry["rl/seen/odd"] < 0.5
    metrics = trainer.evaluate()
    assert {"eval_rewards/noisy/mean", "eval_rewards/second/std", "eval_seen/odd"} <= set(metrics)


@pytest.mark.parametrize("name", ["reward", "tokens", "reward_std", "skipped_steps"])
def test_a_metric_of_the_run_is_not_overwritten(name, tmp_path):
    """Whether it is summed over batches, follows from others, or belongs to the window."""

    def reward(thoughts, log_metric):
        log_metric(name, 1.0)
        return thoughts.mask[..., 0].double()

    with pytest.raises(ValueError, match=f"logs '(rl/)?{name}', which is a metric of the run"):
        tiny_trainer(tmp_path, reward_functions=reward, max_steps=1).train()


def test_a_number_that_is_not_finite_is_traced_to_its_function(tmp_path, caplog):
    """The step is skipped, as for a reward type."""
    calls = []

    def broken(thoughts):
        calls.append(1)
        return length(thoughts) * (math.inf if len(calls) == 2 else 1)

    trainer = tiny_trainer(tmp_path, reward_functions=["accuracy", broken])
    with caplog.at_level("WARNING"):
        trainer.train()
    assert "not finite is reward (inf) and reward of `broken` (inf) " in caplog.text
    assert [entry["rl/skipped_steps"] for entry in log_of(trainer)] == [0, 1, 1]
    assert "rl/rewards/broken/mean" not in logged(trainer, "rl/skipped_steps")[1]


# Ways through a step


@pytest.mark.parametrize(
    "options",
    [
        dict(gradient_accumulation_steps=2, normalize_advantages=True),
        dict(gradient_accumulation_steps=2, advantage_threshold=0.05, advantage_baseline="leave_one_out"),
        dict(num_iterations=2, per_device_train_batch_size=2),
        dict(single_pass=False, branch_batch_size=2),
    ],
    ids=str,
)
def test_functions_are_called_once_for_each_batch(options, tmp_path):
    """Judged ahead, in further iterations and in one pass or two; the log is of all thoughts of each update."""
    calls = []

    def counted(thoughts, log_metric, answer):
        calls.append(answer)
        log_metric("seen/rows", len(answer))
        return (thoughts.token_ids[..., 0] % 3).float()

    data = Dataset.from_dict({"text": sums()[:32], "answer": [str(i) for i in range(32)]})
    trainer = tiny_trainer(tmp_path, data=data, reward_functions=[counted, "probability"], max_steps=2, **options)
    trainer.train()
    batches = 2 * options.get("gradient_accumulation_steps", 1) // options.get("num_iterations", 1)
    assert len(calls) == batches
    for entry in logged(trainer):
        assert entry["rl/seen/rows"] == options.get("per_device_train_batch_size", 4)
        parts = entry["rl/rewards/counted/mean"] + entry["rl/rewards/probability/mean"]
        assert entry["rl/reward"] == pytest.approx(parts)


def test_a_run_resumes_between_two_updates_with_its_metrics(tmp_path):
    """What functions gave and logged is kept with the experience."""
    options = dict(
        num_iterations=2, max_steps=4, save_strategy="steps", save_steps=1, reward_functions=[noisy, "accuracy"]
    )
    straight = tiny_trainer(tmp_path / "straight", **options)
    straight.train()
    resumed = tiny_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert log_of(resumed, after=3) == log_of(straight, after=3)
    assert "rl/seen/odd" in log_of(resumed, after=3)[0]
    assert_same_state(resumed.model, straight.model)
