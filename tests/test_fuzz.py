"""Options and data at random, good and bad: a step to finite numbers, or an error of this package's own that says something.

Never an exception from inside a library, a hang, or a number that is none. Reproducible: Hypothesis draws the same cases
at every run.
"""

import copy
import functools
import math
import signal
import traceback
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import datasets
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from trl_quietstar import QuietStarConfig, QuietStarREINFORCETrainer
from trl_quietstar import config as config_module
from trl_quietstar.config import CHOICES, LIMITS
from trl_quietstar.data.prepare import prepare_texts

from .tiny import byte_tokenizer, sums
from .training import plain_model, tiny_args


DEADLINE = 60  # seconds; a case takes a fraction of one
VOCABULARY = len(byte_tokenizer())
HINTS = get_type_hints(QuietStarConfig)
# where an error may come from: this package, and the checks that Transformers itself makes of `TrainingArguments`
OWN = Path(config_module.__file__).parent
CHECKS_OF_TRANSFORMERS = ("training_args.py", "generic.py")


@pytest.fixture(autouse=True, scope="module")
def _no_traces(tmp_path_factory):
    """Datasets keep their caches in a folder that goes, and draw no bars."""
    kept = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = kept


def cases(count: int):
    """So many cases of a property, the same at every run; many are not shrunk, which would take too long."""
    phases = [Phase.generate] if count > 100 else [Phase.generate, Phase.shrink]
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def own_errors_only(also: tuple[str, ...] = ()):
    """Yields a list that then holds the error, if any; any other kind of error fails, and so does a hang."""

    def too_slow(*_):
        raise AssertionError(f"more than {DEADLINE} s")

    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(DEADLINE)
    found: list[Exception] = []
    try:
        yield found
    except (ValueError, TypeError) as error:
        innermost = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not (innermost.is_relative_to(OWN) or innermost.name in also):
            raise
        assert len(str(error)) > 20, repr(error)
        found.append(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Options


NONSENSE = st.sampled_from(
    [float("nan"), float("inf"), -float("inf"), True, "8", "", 2.5, -1, 0, 10**9, [], {}, None, b"1", "\ud800", 1e-300]
)
# at the limits and a little above, where training a step stays cheap and in range
SMALL = {
    "thought_length": st.integers(1, 4),
    "talk_length": st.sampled_from([1, 2, 4, "3", "completion"]),
    "num_thoughts": st.integers(1, 3),
    "min_thought_length": st.one_of(st.none(), st.integers(1, 3)),
    "max_length": st.one_of(st.none(), st.integers(2, 40)),
    "per_device_train_batch_size": st.integers(1, 4),
    "per_device_eval_batch_size": st.integers(1, 4),
    "gradient_accumulation_steps": st.integers(1, 2),
    "value_head_hidden_size": st.integers(1, 16),
    "thought_positions": st.sampled_from(["all", "difficulty", "prompt_end", 1, 3, 0.5, 1.0, "2", "0.3"]),
    "thought_stop_string": st.sampled_from([None, " ", "plus"]),
    "thought_pattern": st.sampled_from([None, None, "us(.*?)is", " is .", "a|", "("]),
    "curriculum": st.sampled_from(
        [None, None, {"0": {"thought_length": 2}}, {"1": {"talk_length": "completion"}}, {"x": {}}]
    ),
    "reward_clip_range": st.sampled_from([None, [-1.0, 1.0], [0, 1]]),
    "thought_suppress_tokens": st.sampled_from([None, [], [0], [5, 7]]),
    "dataset_num_proc": st.none(),  # processes take seconds to start
    "dataloader_num_workers": st.just(0),
    "dataloader_prefetch_factor": st.none(),
    "router_aux_loss_coef": st.none(),  # for mixtures of experts alone
    "anti_theater_steps": st.none(),
    "early_stopping_patience": st.none(),
    "num_train_epochs": st.just(1.0),
    "max_steps": st.sampled_from([1, 1, 2]),  # two, for a second update on a batch
    "logging_steps": st.just(1),
    "eval_steps": st.just(1),
    "learning_rate": st.sampled_from([0, 1e-6, 1e-2, 1]),
    "heads_learning_rate": st.sampled_from([0, 1e-6, 1e-2, 1]),
    "warmup_steps": st.sampled_from([0, 0.5, 1]),
    "adam_epsilon": st.sampled_from([1e-30, 1e-8, 1.0]),
    "neftune_noise_alpha": st.none(),
    "completion_only_loss": st.sampled_from([None, None, None, True, False]),
    "assistant_only_loss": st.sampled_from([False, False, False, True]),
    "sync_ref_model": st.sampled_from([False, False, True]),
    "packing": st.sampled_from([False, False, True]),
    "single_pass": st.sampled_from([None, None, None, True, False]),
    "label_smoothing_factor": st.just(0),
    "model_init_kwargs": st.none(),
    "dataset_text_field": st.just("text"),
    "thought_start_text": st.sampled_from(["—", "a", "plus"]),
    "thought_end_text": st.sampled_from(["—", " "]),
    "log_thoughts": st.booleans(),
    "report_thoughts": st.booleans(),
}
OURS = [f.name for f in fields(QuietStarConfig) if f.name in QuietStarConfig.__annotations__ and f.init]
FUZZED = sorted({*OURS, *LIMITS} - {"_VALID_DICT_FIELDS", "trust_remote_code"})


def good(name: str):
    """Values of a field that its own limits allow."""
    if name in SMALL:
        return SMALL[name]
    kinds = get_args(HINTS[name]) or (HINTS[name],)
    if name in CHOICES:
        return st.sampled_from(CHOICES[name])
    if name in LIMITS:
        least, greatest = LIMITS[name]
        some = {least, least + 1 if greatest is None else greatest}
        if float in kinds:
            some |= {(least + (least + 1 if greatest is None else greatest)) / 2}
        return st.sampled_from(sorted(some) + ([None] if type(None) in kinds else []))
    if bool in kinds:
        return st.sampled_from([True, False] + ([None] if type(None) in kinds else []))
    return st.just(next(f.default for f in fields(QuietStarConfig) if f.name == name))


@st.composite
def options(draw, bad: int = 4):
    """Up to a dozen fields off their defaults; one time in `bad`, one of them at random."""
    names = draw(st.lists(st.sampled_from(FUZZED), max_size=12, unique=True))
    chosen = {name: draw(good(name)) for name in names}
    if draw(st.integers(1, bad)) == bad:
        chosen[draw(st.sampled_from(FUZZED))] = draw(NONSENSE)
    return chosen


def check_options(chosen, folder):
    """Options are refused by an error of this package, or lie within their limits."""
    with own_errors_only(CHECKS_OF_TRANSFORMERS) as refused:
        args = tiny_args(folder, **chosen)
    if refused:
        return
    for name, (least, greatest) in LIMITS.items():
        value = getattr(args, name)
        assert (
            value in (None, "completion")
            or math.isfinite(value)
            and least <= value
            and (greatest is None or value <= greatest)
        )
    for name, choices in CHOICES.items():
        assert getattr(args, name) in (None, *choices)  # where the type allows None


# Data

WORDS = st.sampled_from(sums()[::37] + ["", " ", "a", "\x00", "a\x00b", "\u202e\u2028", "é東京🙂", "3 plus " * 60])
WEIRD = st.sampled_from(
    [None, "\ud800", 5, 1.5, float("nan"), b"x", [], {}, ["a"], True, [None], [[1]], {"role": "user"}]
)
IDS = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)
ODD_IDS = st.sampled_from(
    [[], [5], [-1, 2, 3], [VOCABULARY, 1, 2], [1.0, 2.0], [float("nan")] * 3, ["a", "b"], [None, 1]]
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": WORDS}),
    min_size=1,
    max_size=3,
)
ODD_MESSAGES = st.sampled_from(
    [
        [],
        [{}],
        [{"role": "user"}],
        [{"role": None, "content": "a"}],
        [{"role": "user", "content": None}],
        ["a"],
        [5],
        "[]",
        '[{"role": "user", "content": "a"}]',
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "assistant", "tool_calls": [{"function": {}}]}],
    ]
)


@st.composite
def row(draw, kind: str, odd: bool):
    """A row of one kind of data; an odd one has a value of any type, or lacks a column."""
    if kind == "text":
        made = {"text": draw(WORDS)}
    elif kind.startswith("prompt"):
        made = {"prompt": draw(WORDS), "completion": draw(WORDS)}
    elif kind.startswith("messages"):
        made = {"messages": draw(MESSAGES)}
    elif kind == "conversation":
        made = {"prompt": draw(MESSAGES), "completion": draw(MESSAGES)}
    elif kind == "conversations":
        made = {"conversations": [{"from": m["role"], "value": m["content"]} for m in draw(MESSAGES)]}
    else:
        ids = draw(IDS)
        made = {"input_ids": ids}
        if "labels" in kind:
            made["labels"] = [i if i % 3 else -100 for i in ids]
        if "mask" in kind:
            made["thought_mask"] = [i % 2 for i in ids]
        if "lengths" in kind:
            made["seq_lengths"] = [n for n in (len(ids) // 2, len(ids) - len(ids) // 2) if n]
    if "with thoughts" in kind:
        made["thought"] = draw(st.one_of(st.none(), WORDS))
    if odd:
        column = draw(st.sampled_from(sorted(made)))
        if draw(st.integers(1, 5)) == 5:
            del made[column]
        else:
            pools = {"input_ids": ODD_IDS, "labels": ODD_IDS, "seq_lengths": ODD_IDS, "thought_mask": ODD_IDS}
            is_talk = kind.startswith(("messages", "conversation"))
            pool = ODD_MESSAGES if is_talk else pools.get(column, WEIRD)
            made[column] = draw(st.one_of(pool, WEIRD))
    if odd and draw(st.booleans()):
        made[
            draw(
                st.sampled_from(
                    [
                        "label",
                        "text",
                        "prompt",
                        "labels",
                        "input_ids",
                        "id",
                        "image",
                        "position_ids",
                        "thought",
                        "written_at",
                    ]
                )
            )
        ] = draw(st.one_of(WORDS, WEIRD))
    return made


KINDS = [
    "text",
    "text",
    "prompt",
    "messages",
    "conversation",
    "conversations",
    "prompt with thoughts",
    "messages with thoughts",
    "ids",
    "ids labels",
    "ids mask labels",
    "ids lengths",
]


@st.composite
def data(draw, odd: int = 3, most: int = 6):
    """A dataset or a stream of a few rows, one time in `odd` with an odd one among them."""
    kind = draw(st.sampled_from(KINDS))
    rows = draw(st.lists(row(kind, False), min_size=1, max_size=most))
    if draw(st.integers(1, odd)) == odd:
        rows.insert(draw(st.integers(0, len(rows))), draw(row(kind, True)))
    if draw(st.booleans()):
        try:
            return Dataset.from_list(rows)
        except Exception:  # Arrow takes one type a column, and says so to whoever makes the dataset
            pass
    return stream(rows)


def stream(rows):
    """The rows as a stream."""
    return IterableDataset.from_generator(lambda: iter(rows))


def check_data(given_data, args):
    """Every row that preparation leaves holds ids, labels and lengths that fit each other."""
    tokenizer, args = byte_tokenizer(), copy.copy(args)
    with own_errors_only():
        prepared = list(prepare_texts(given_data, tokenizer, args, "train", VOCABULARY, args.packing))
        for found in prepared:
            ids, labels = found["input_ids"], found["labels"]
            assert len(ids) == len(labels) and all(0 <= i < VOCABULARY for i in ids)
            assert any(label != -100 for label in labels[1:])
            assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
            assert sum(found.get("seq_lengths") or [len(ids)]) == len(ids)
            assert len(found.get("thought_mask") or ids) == len(ids)
            assert args.max_length is None or len(ids) <= args.max_length
            for at, thought in zip(found.get("written_at", ()), found.get("written_ids", ()), strict=True):
                assert at >= 0 and labels[at + 1] != -100 and all(0 <= i < VOCABULARY for i in thought)
                assert args.min_thought_length <= len(thought) <= args.thought_length


# Training


@functools.cache
def model(name: str):
    return plain_model(name)


def check_training(chosen, given_data, name, evaluates, folder):
    """A step on the data leaves finite numbers, or is refused by an error of this package."""
    with own_errors_only(CHECKS_OF_TRANSFORMERS) as refused:
        args = tiny_args(folder, **{"max_steps": 1, "max_length": 60, **chosen})
    if refused:
        return
    with own_errors_only():
        trainer = QuietStarREINFORCETrainer(
            copy.deepcopy(model(name)),
            args,
            given_data,
            given_data if evaluates else None,
            byte_tokenizer(),
        )
        trainer.train()
        if evaluates:
            trainer.evaluate()
        for entry in trainer.state.log_history:
            for key, value in entry.items():
                assert value is None or math.isfinite(value), (key, value)
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One output directory for all cases."""
    return tmp_path_factory.mktemp("out")


DATA_OPTIONS = (
    "max_length",
    "packing",
    "completion_only_loss",
    "assistant_only_loss",
    "truncation_mode",
    "shuffle_dataset",
    "thought_pattern",
    "thought_stop_string",
)
data_options = st.fixed_dictionaries(
    {"min_thought_length": st.sampled_from([None, 1, 2]), "thought_length": st.sampled_from([3, 50, 500])},
    optional={name: good(name) for name in DATA_OPTIONS},
)


def options_property(count: int):
    """A test of so many cases."""

    @cases(count)
    @given(chosen=options(bad=2))
    def run(folder, chosen):
        """Options are refused in words, or lie within their limits."""
        check_options(chosen, folder)

    return run


def data_property(count: int):
    """A test of so many cases."""

    @cases(count)
    @given(given_data=data(), chosen=data_options)
    def run(folder, given_data, chosen):
        """Data are refused in words, or every row that is left can be trained on."""
        with own_errors_only() as refused:
            args = tiny_args(folder, **chosen)
        if not refused:
            check_data(given_data, args)

    return run


def steps_property(count: int):
    """A test of so many cases."""

    @cases(count)
    @given(options(bad=10), data(odd=8), st.sampled_from(["llama", "llama", "gpt2"]), st.booleans())
    def run(folder, chosen, given_data, name, evaluates):
        """Options and data are refused in words, or train a step to finite numbers and parameters."""
        check_training(chosen, given_data, name, evaluates, folder)

    return run


test_some_options, test_many_options = options_property(40), pytest.mark.slow(options_property(1500))
test_some_data, test_many_data = data_property(15), pytest.mark.slow(data_property(700))
test_some_steps, test_many_steps = steps_property(8), pytest.mark.slow(steps_property(300))
