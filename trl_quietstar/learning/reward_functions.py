"""Rewards in place of `reward_type`: functions of a user's own and those that come by name, what they are called with, and their
weighted sum."""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..text.batch import Thoughts
from ..text.transfer import to_device
from .rewards import GROUP_REWARDS, REWARDS, thought_rewards


if TYPE_CHECKING:
    from ..config import QuietStarConfig


# takes named arguments, some of `ARGUMENTS` and columns of the data, and gives one number a thought, `(B, J, G)`
RewardFunction = Callable[..., Any]
# arguments that only a function gets whose signature names them: they cost time
ON_DEMAND = ("thought_texts", "answers", "log_metric")
ARGUMENTS = (
    *("logps_with", "logps_without", "correct_with", "correct_without", "mask", "text", "thoughts"),
    *ON_DEMAND,
)


def _of_type(reward_type: str) -> RewardFunction:
    """A name of `reward_type` as a function."""

    def reward(logps_with, logps_without, correct_with, correct_without, mask) -> torch.Tensor:
        return thought_rewards(logps_with, logps_without, correct_with, correct_without, mask, reward_type)

    return reward


def exact_match(answers: list[list[list[str]]], answer: list) -> list[list[list[float]]]:
    """
    Whether the model's own answer after each thought is the right one.

    Args:
        answers (`list`):
            What the model says after each thought, in lists of B, J and G.
        answer (`list`):
            The column `answer` of the data: the right answer of each row, of any type that `str` makes a string of.

    Returns:
        `list`: 1 where both are the same string, once spaces and line breaks around them are taken off, else 0. Upper and lower
            case differ, and so do `7` and `7.0`.
    """
    right = [str(value).strip() for value in answer]
    return [
        [[float(own.strip() == wanted) for own in group] for group in row]
        for row, wanted in zip(answers, right, strict=True)
    ]


# no group rewards: no baseline of advantages fits them and others alike
BY_NAME: dict[str, RewardFunction] = {
    **{name: _of_type(name) for name in REWARDS if name not in GROUP_REWARDS},
    "exact_match": exact_match,
}


def _parameters(function: RewardFunction) -> tuple[dict[str, bool], bool]:
    """The parameters of a function and whether each is needed; and whether any other is taken (`**kwargs`)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have none
        return {}, True
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {x.name: x.default is x.empty for x in parameters if x.kind in kinds}
    return named, any(x.kind is x.VAR_KEYWORD for x in parameters)


@dataclass(frozen=True)
class RewardFunctions:
    """
    The reward functions of a run. The reward is the sum of what they give, each times its weight.

    Parameters:
        functions (`dict[str, Callable]`):
            The functions by the names that the log has for them.
        weights (`tuple[float, ...]`):
            One for each.
    """

    functions: dict[str, RewardFunction]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, given, args: "QuietStarConfig") -> "RewardFunctions | None":
        """
        The reward functions that a user asks for; None where the reward is `args.reward_type`.

        Args:
            given (`Callable`, `str`, or `list` of them, *optional*):
                What the trainer was given: functions, names of `BY_NAME`, or import paths.
            args ([`QuietStarConfig`]):
                May name the functions in its place, and tells their weights.

        Raises:
            `TypeError`: for something that is neither a function nor a name.
            `ValueError`: for a name that nothing has, a module that cannot be imported, functions that are given twice or
                beside a `reward_type`, or another number of weights.
        """
        if given is not None and args.reward_functions is not None:
            raise ValueError(
                f"`reward_functions` is given twice, to the trainer and as {args.reward_functions} in `args`; leave one out."
            )
        given = args.reward_functions if given is None else given
        if given is None:
            if args.reward_weights is not None:
                raise ValueError(
                    f"`reward_weights` is {args.reward_weights}, and there are no `reward_functions` to weigh; name them, or "
                    "leave it out."
                )
            return None
        if args.reward_type != type(args).reward_type:
            raise ValueError(
                f"`reward_functions` take the place of `reward_type`, which is {args.reward_type!r}; leave it out (on the "
                f"command line, `--reward_type {type(args).reward_type}`), and name {args.reward_type!r} among the functions "
                "if it is to count."
            )
        found = [_found(one) for one in (given if isinstance(given, (list, tuple)) else [given])]
        weights = [1.0] * len(found) if args.reward_weights is None else [float(x) for x in args.reward_weights]
        if not found or len(weights) != len(found):
            raise ValueError(
                f"`reward_weights` are {len(weights)} and `reward_functions` are {len(found)}; give one weight for each of at "
                "least one function."
            )
        return cls(_by_unique_names(found), tuple(weights))

    def asks_for(self, argument: str) -> bool:
        """Whether the signature of a function names an argument."""
        return any(argument in _parameters(function)[0] for function in self.functions.values())

    def has_columns(self, args: "QuietStarConfig") -> bool:
        """Whether a function may get columns of the data, by the configuration."""
        own = any(name not in ARGUMENTS for function in self.functions.values() for name in _parameters(function)[0])
        return own or self.takes_any and not args.remove_unused_columns

    @property
    def columns(self) -> dict[str, str | None]:
        """The columns that functions name, each with the name of a function that needs it; None: none does."""
        named: dict[str, str | None] = {}
        for name, function in self.functions.items():
            for parameter, needed in _parameters(function)[0].items():
                if parameter not in ARGUMENTS:
                    named[parameter] = name if needed else named.get(parameter)
        return named

    @property
    def takes_any(self) -> bool:
        """Whether a function takes any columns (`**kwargs`)."""
        return any(_parameters(function)[1] for function in self.functions.values())

    def judge(
        self, arguments: dict[str, Any], columns: dict[str, list], dtype: torch.dtype
    ) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """
        Calls the functions, each with what its signature asks for.

        Args:
            arguments (`dict`):
                All of `ARGUMENTS` but `log_metric`, as far as functions ask for them.
            columns (`dict`):
                Columns of the data, one value for each row.
            dtype (`torch.dtype`):
                Of the rewards.

        Returns:
            `tuple`: the rewards, of shape `(B, J, G)`, 0 at positions that do not exist; and metrics by their names, each as
                values and their mask: `rewards/NAME/mean` of each function, and what functions logged.

        Raises:
            `ValueError`: if a function gives anything but one number for each thought, or none gives any for one.
        """
        noted: dict[str, list[float]] = {}

        def log_metric(name: str, value: float) -> None:
            noted.setdefault(name, []).append(float(value))

        thoughts: Thoughts = arguments["thoughts"]
        device, exists = thoughts.mask.device, thoughts.mask[..., 0]
        total = torch.zeros(exists.shape, dtype=dtype, device=device)
        measured, missing = {}, thoughts.positions.host.mask[..., None].expand(exists.shape)
        for (name, function), weight in zip(self.functions.items(), self.weights, strict=True):
            given = _called(function, {**arguments, "log_metric": log_metric}, columns)
            values, known = _numbers(given, name, thoughts)
            missing = missing & ~known
            known = to_device(known, device) & exists
            values = torch.where(known, to_device(values, device).detach().to(dtype), 0)
            total = total + weight * values
            measured[f"rewards/{name}/mean"] = (values, known)
        if bool(missing.any()):
            row, position, thought = missing.nonzero()[0].tolist()
            raise ValueError(
                f"Each of the reward functions ({', '.join(self.functions)}) gave None for thought {thought} at position "
                f"{position} of row {row}; at least one must give a number."
            )
        for name, numbers in sorted(noted.items()):
            logged = to_device(torch.tensor(numbers), device)
            measured[name] = (logged, torch.ones_like(logged))
        return total, measured


def _found(given) -> tuple[str, RewardFunction]:
    """A function, and the name that the log has for it."""
    if isinstance(given, str):
        return _by_name(given)
    if not callable(given) or isinstance(given, torch.nn.Module):
        raise TypeError(
            f"`reward_functions` holds a `{type(given).__name__}`; give functions, names ({', '.join(BY_NAME)}), or import "
            "paths such as 'module:function'. A model is called in a function of your own."
        )
    function = given
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__), given


def _by_name(name: str) -> tuple[str, RewardFunction]:
    """A function by its name in `BY_NAME`, or by its import path, `module:function` or `module.function`."""
    if name in BY_NAME:
        return name, BY_NAME[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        module, _, attribute = name.rpartition(".")
    if not module or not attribute:
        raise ValueError(
            f"`reward_functions` names {name!r}, which is unknown{_meant(name, BY_NAME)}; choose of {', '.join(BY_NAME)}, or "
            "give an import path such as 'module:function'."
        )
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"`reward_functions` names {name!r}, but the module {module!r} cannot be imported ({error}); install it, or start "
            "where it lies."
        ) from error
    if not callable(getattr(found, attribute, None)):
        raise ValueError(
            f"`reward_functions` names {name!r}, but the module {module!r} has no function {attribute!r}"
            f"{_meant(attribute, vars(found))}."
        )
    return attribute, getattr(found, attribute)


def _meant(name: str, known: Iterable[str]) -> str:
    """What a misspelt name may have meant, to follow a message."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _by_unique_names(found: list[tuple[str, RewardFunction]]) -> dict[str, RewardFunction]:
    """Functions by their names. A second one of the same name gets a number."""
    functions: dict[str, RewardFunction] = {}
    for name, function in found:
        same = sum(other.split("#")[0] == name for other in functions)
        functions[f"{name}#{same + 1}" if same else name] = function
    return functions


def _called(function: RewardFunction, own: dict[str, Any], columns: dict[str, list]) -> Any:
    """What a function gives for those of its own arguments and of the columns that it takes."""
    named, takes_any = _parameters(function)
    taken = {name: x for name, x in own.items() if name in named or (takes_any and name not in ON_DEMAND)}
    given = {name: x for name, x in columns.items() if name not in ARGUMENTS and (takes_any or name in named)}
    return function(**taken, **given)


def _numbers(given: Any, name: str, thoughts: Thoughts) -> tuple[torch.Tensor, torch.Tensor]:
    """What a function gave as a tensor of shape `(B, J, G)`, and where it is not None, in the host's memory."""
    wanted = tuple(thoughts.mask.shape[:3])
    values, known = given, torch.ones(wanted, dtype=torch.bool)
    if isinstance(given, (list, tuple, np.ndarray)):
        array = np.array(given, dtype=object)
        if array.shape == wanted and all(x is None or isinstance(x, (Real, np.bool_)) for x in array.flat):
            known = torch.tensor([x is not None for x in array.flat]).view(wanted)
            values = torch.tensor([0.0 if x is None else float(x) for x in array.flat], dtype=torch.float64).view(
                wanted
            )
    if not isinstance(values, torch.Tensor) or values.shape != wanted:
        shape = tuple(values.shape) if isinstance(values, torch.Tensor) else type(given).__name__
        raise ValueError(
            f"The reward function `{name}` gave {shape}; it must give one number for each thought, a tensor or nested lists of "
            f"shape (B, J, G), here {wanted}."
        )
    return values, known
