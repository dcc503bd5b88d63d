"""Rules that the value of each option keeps: its type, its limits, its choices, and what of the Trainer's own is supported.

Each function here raises an error that names the option, its value, the limit and the fix. `QuietStarConfig` says which rules
hold for its own fields, and calls the functions.
"""

import math
from collections.abc import Iterable
from dataclasses import field
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from .contradictions import check_lengths, check_marks, check_rewards, check_thinking, check_training
from .readers import READERS
from .settings import OPTIONS, QuietStarSettings


if TYPE_CHECKING:
    from .config import QuietStarConfig


_Note = TypeVar("_Note")


class Limits(NamedTuple):
    """Least and greatest value of an option that is a number; None is open."""

    least: float | None = None
    greatest: float | None = None


class Choices(tuple[str, ...]):
    """The values that an option may take."""

    def __new__(cls, *values: str):
        return super().__new__(cls, values)


class Staged:
    """Says of an option that it is read anew at every step, so that a curriculum may change it."""


def option(default: Any, help: str) -> Any:
    """A field with its help. `argparse` is given all that metadata holds, so that limits and choices annotate the type."""
    return field(default=default, metadata={"help": help})


def notes_of(options: type, kind: type[_Note]) -> dict[str, _Note]:
    """Limits, choices or marks of stages that annotate a class's own options, by the option's name."""
    hints = get_type_hints(options, include_extras=True)
    return {
        name: note
        for name in options.__annotations__
        for note in getattr(hints[name], "__metadata__", ())
        if isinstance(note, kind)
    }


# The Trainer lets any number through, and then divides by zero, trains on nothing or yields NaN.
TRAINER_LIMITS = {
    "per_device_train_batch_size": Limits(1),
    "per_device_eval_batch_size": Limits(1),
    "gradient_accumulation_steps": Limits(1),
    "eval_accumulation_steps": Limits(1),
    "max_steps": Limits(-1),
    "num_train_epochs": Limits(1e-6),
    "warmup_steps": Limits(0),
    "weight_decay": Limits(0),
    "adam_beta1": Limits(0, 0.999999),
    "adam_beta2": Limits(0, 0.999999),
    "adam_epsilon": Limits(1e-30),
    "max_grad_norm": Limits(0),
    "label_smoothing_factor": Limits(0, 0),
    "neftune_noise_alpha": Limits(0),
    "logging_steps": Limits(1e-6),
    "eval_steps": Limits(1e-6),
    "eval_delay": Limits(0),
    "save_steps": Limits(1e-6),
    "save_total_limit": Limits(1),
    "torch_empty_cache_steps": Limits(1),
    "seed": Limits(0, 2**32 - 1),
    "data_seed": Limits(0, 2**32 - 1),
    "dataloader_num_workers": Limits(0),
    "dataloader_prefetch_factor": Limits(1),
}

NO_METRICS = "it is for a `compute_metrics`, which the trainer does not take, since evaluation holds no logits"
NO_COMPILING = (
    "thoughts are sampled and scored with shapes that change at every step. Leave it out; to compile the layers alone, call "
    "`layer.compile()` on each of your model's."
)
# Options of the Trainer: the values that change nothing here, and why others are refused.
UNSUPPORTED: dict[str, tuple[tuple, str]] = {
    "use_liger_kernel": ((False,), "it replaces the forward that thoughts are sampled and scored in. Leave it out."),
    "liger_kernel_config": (
        (None,),
        "Liger's kernels replace the forward that thoughts are sampled and scored in. Leave it out.",
    ),
    "include_for_metrics": (([],), f"{NO_METRICS}. Leave it out."),
    "batch_eval_metrics": ((False,), f"{NO_METRICS}. Leave it out."),
    "label_names": ((None, ["labels"]), "labels are read from the column `labels`. Leave it out."),
    "length_column_name": (("length",), "lengths are those of the tokenized rows. Leave it out."),
    "neftune_noise_alpha": (
        (None, 0),
        "its noise would make a thought likelier or less likely than it was when it was drawn. Leave it out.",
    ),
    "torch_compile": ((False, None), NO_COMPILING),
    "torch_compile_backend": ((None, ""), NO_COMPILING),  # which switches compilation on too, as does the mode
    "torch_compile_mode": ((None, ""), NO_COMPILING),
}

TYPE_WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: "a dictionary",
    list[float]: "a list of numbers",
    list[int]: "a list of whole numbers",
    list[str]: "a list of strings",
    NoneType: "None",
}


# All of them


def check_types(args: "QuietStarConfig", names: Iterable[str]) -> None:
    """Checks the types of these options, but of those that [`READERS`] reads."""
    hints = get_type_hints(type(args))
    for name in names:
        if name in hints and name not in READERS:
            check_type(name, getattr(args, name), hints[name])


def check_values(args: "QuietStarConfig", limits: dict[str, Limits], choices: dict[str, Choices]) -> None:
    """Checks each option's value by itself, then what contradicts another."""
    for name, own in limits.items():
        check_limits(name, getattr(args, name), own)
    for name, values in choices.items():
        check_choice(name, getattr(args, name), values)
    for name in UNSUPPORTED:
        check_supported(name, getattr(args, name))
    check_thinking(args)
    check_rewards(args)
    check_training(args)


def check_settings(settings: Any, limits: dict[str, Limits], choices: dict[str, Choices]) -> None:
    """
    Checks settings that were made by hand, by the rules of the options that they remember. None passes.

    Raises:
        `TypeError`: for what are no [`QuietStarSettings`].
        `ValueError`: if one is outside its limits or contradicts another.
    """
    if settings is None:
        return
    if not isinstance(settings, QuietStarSettings):
        advice = "; of a `QuietStarConfig` they are `args.settings()`" if hasattr(settings, "settings") else ""
        raise TypeError(f"`settings` is a `{type(settings).__name__}`; give `QuietStarSettings(...)`{advice}.")
    for name, option in OPTIONS.items():
        value = getattr(settings, name)
        read = READERS[option](value) if option in READERS else value
        if read != value:
            raise ValueError(f"`{name}` is {value!r}; give {read!r}.")
        if option in limits:
            check_limits(name, value, limits[option])
        if option in choices:
            check_choice(name, value, choices[option])
    check_marks(settings)
    check_lengths(settings)


# One value


def check_type(name: str, value: Any, hint: Any) -> None:
    """
    Refuses a value of another type than the option's, a number that is not finite, and text that is not Unicode.

    Raises:
        `TypeError`: for another type.
        `ValueError`: for NaN, infinity, and half of a surrogate pair.
    """
    kinds = list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]
    kinds.sort(key=lambda kind: kind is NoneType)  # None is named last
    if not any(_is_of(kind, value) for kind in kinds):
        wanted = " or ".join(TYPE_WORDS.get(kind, str(kind)) for kind in kinds)
        raise TypeError(f"`{name}` is {value!r} (`{type(value).__name__}`); give {wanted}.")
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(number, Real) and not math.isfinite(number):
            raise ValueError(f"`{name}` is {value}; give a finite number.")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"`{name}` is {value!r}, which holds half of a surrogate pair; give text that is Unicode.")


def _is_of(kind: Any, value: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, (list, tuple)) and all(_is_of(get_args(kind)[0], part) for part in value)
    if kind in (int, float):  # numbers of NumPy too, but no switch, which Python takes for 0 or 1
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind)


def check_limits(name: str, value: Any, limits: Limits) -> None:
    """Refuses a number outside its limits with a `ValueError`; None and words have no limits."""
    if value is None or isinstance(value, str):
        return
    if limits.least is not None and value < limits.least:
        raise ValueError(f"`{name}` is {value}, below its limit of {limits.least}; raise it.")
    if limits.greatest is not None and value > limits.greatest:
        raise ValueError(f"`{name}` is {value}, above its limit of {limits.greatest}; lower it.")


def check_choice(name: str, value: Any, choices: Choices) -> None:
    """Refuses a value that is none of the choices with a `ValueError`; of None the type says whether it may stand."""
    if value is not None and value not in choices:
        raise ValueError(f"`{name}` is {value!r}; choose one of {', '.join(choices)}.")


def check_supported(name: str, value: Any) -> None:
    """Refuses, with a `ValueError`, a value of an option in `UNSUPPORTED` that this trainer could not follow."""
    values, reason = UNSUPPORTED[name]
    if value not in values:
        raise ValueError(f"`{name}={value!r}` is not supported: {reason}")
