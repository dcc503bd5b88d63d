"""Every option of the configuration beyond its limits: refused by name, value and fix."""

import pickle
import re
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from trl_quietstar import QuietStarConfig
from trl_quietstar.config import CHOICES, LIMITS

from .training import logged, tiny_args, tiny_trainer


DOCS = Path(__file__).parent.parent / "docs" / "bad_input.md"
NAN = float("nan")
HINTS = get_type_hints(QuietStarConfig)
OURS = [f.name for f in fields(QuietStarConfig) if f.name in QuietStarConfig.__annotations__]
FREE = {  # no numbers and no choices: any text, any dictionary, a list that has a check of its own, `thought_positions`
    "model_init_kwargs", "dataset_text_field", "thought_stop_string", "thought_positions", "thought_start_text",
    "thought_end_text", "reward_clip_range", "curriculum", "thought_pattern", "thought_suppress_tokens",
    "score_pattern", "reward_functions", "reward_weights", "thought_prompt",
    "vllm_server_base_url",
}  # fmt: skip


def kinds(name: str) -> tuple:
    return get_args(HINTS[name]) or (HINTS[name],)


def test_every_field_has_limits():
    """A field of our own is a switch, has limits or choices, or is named here as free; a new one must be entered."""
    without = [
        name for name in OURS if bool not in kinds(name) and name not in {**LIMITS, **CHOICES} and name not in FREE
    ]
    assert not without


@pytest.mark.parametrize("name", LIMITS)
def test_limits_hold_for_every_number(name, tmp_path):
    """Beyond a limit, NaN, infinite, of another type: refused by name and value; at the limit: taken."""
    least, greatest = LIMITS[name]
    words = "eight" if str in kinds(name) else "8"  # the command line gives numbers in words
    bad = [least - 1, NAN, float("inf"), True, words, [1]] + ([] if greatest is None else [greatest + 1])
    if float not in kinds(name):
        bad.append(2.5)
    if type(None) not in kinds(name):
        bad.append(None)
    for value in bad:
        with pytest.raises((ValueError, TypeError), match=f"`{name}` is ") as error:
            tiny_args(tmp_path, **{name: value})
        assert repr(value).strip("'") in str(error.value)


@pytest.mark.parametrize("name", [name for name in OURS if bool in kinds(name)])
def test_switches_are_on_or_off(name, tmp_path):
    """A string or a number is no switch."""
    for value in ("false", 1, 0.0):
        with pytest.raises(TypeError, match=f"`{name}` is .*True or False"):
            tiny_args(tmp_path, **{name: value})


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(max_steps=0), "`max_steps` is 0"),
        (dict(thought_stop_string=""), "`thought_stop_string` is empty"),
        (dict(thought_stop_string="\ud800"), "half of a surrogate pair"),
        (dict(entropy_coefficient=0.0), "`min_entropy_coefficient` (0.001) exceeds"),
        (dict(reward_clip_range=[NAN, 1.0]), "`reward_clip_range` is"),
        (dict(reward_clip_range="01"), "`reward_clip_range` is"),
        (dict(thought_suppress_tokens=[3, -1]), "`thought_suppress_tokens` is [3, -1]; give ids of tokens, from 0 on"),
        (
            dict(thought_suppress_tokens=[1.5]),
            "`thought_suppress_tokens` is [1.5] (`list`); give a list of whole numbers or None",
        ),
        (dict(thought_suppress_tokens=[True]), "`thought_suppress_tokens` is [True]"),
        (dict(thought_suppress_tokens=3), "`thought_suppress_tokens` is 3 (`int`)"),
        (dict(thought_positions=True), "`thought_positions` is True"),
        (dict(thought_positions=[3]), "`thought_positions` is [3]"),
        (dict(normalize_advantages=2), "`normalize_advantages` is 2"),
        (dict(normalize_advantages="batch"), "`normalize_advantages` is 'batch'; choose one of none, group, step"),
        (dict(normalize_advantages="group"), "`normalize_advantages='group'` divides by the spread"),
        (dict(normalize_advantages="group", advantage_baseline="none"), "from `advantage_baseline='none'`"),
        (dict(normalize_advantages="group", num_thoughts=1), "`normalize_advantages='group'` compares the thoughts"),
        (dict(reward_std_filter=0.5, num_thoughts=1), "`reward_std_filter=0.5` compares the thoughts"),
        (dict(advantage_baseline="mean", num_thoughts=1), "`advantage_baseline='mean'` compares the thoughts"),
        (dict(reward_type="marginal_log_likelihood", num_thoughts=1), "needs `num_thoughts` of at least 2, got 1"),
        (dict(reward_type="marginal_log_likelihood", advantage_baseline="both"), "would bias the gradient"),
        (dict(truncation_mode="middle"), "`truncation_mode` is 'middle'"),
        (dict(thought_pattern="["), "`thought_pattern` is '[', which is no regular expression (unterminated"),
        (dict(thought_pattern=".*"), "`thought_pattern` is '.*', which matches the empty text"),
        (dict(thought_pattern="<(.*?)>", thought_stop_string=">", packing=True), "set `packing=False`"),
    ],
    ids=str,
)
def test_other_options(options, words, tmp_path):
    """What is no number, and contradictions."""
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        tiny_args(tmp_path, **options)


@pytest.mark.parametrize("value, word", [(False, "none"), (True, "step"), ("false", "none"), ("True", "step")])
def test_normalization_was_a_switch(value, word, tmp_path):
    """Values of YAML and the command line from before there were words, and a pickled configuration, mean what they did."""
    args = tiny_args(tmp_path, normalize_advantages=value)
    assert args.normalize_advantages == word
    args.normalize_advantages = value
    del vars(args)["reward_std_filter"]
    old = pickle.loads(pickle.dumps(args))
    assert old.normalize_advantages == word and old.reward_std_filter is None


def test_whole_betas_train(tmp_path):
    """PyTorch takes 0.0 and no 0; the configuration takes both."""
    trainer = tiny_trainer(tmp_path, adam_beta1=0, max_steps=1)
    trainer.train()
    assert len(logged(trainer)) == 1


def test_the_documented_limits_are_the_limits():
    """The table of docs/bad_input.md, row by row."""
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \|$", DOCS.read_text("utf-8"), re.M)
    shown = {
        name: tuple("open" if x is None else f"{x:g}" if x < 1e6 else str(x) for x in bounds)
        for name, bounds in LIMITS.items()
    }
    assert {name: (least, greatest) for name, least, greatest in rows} == shown
