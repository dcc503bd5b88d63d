"""Rewards of a user's own: what a function is called with, and which columns of the data it takes."""

import inspect
from collections.abc import Callable

import torch


# a user's own reward: takes named arguments, `ARGUMENTS` and columns of the data, and gives one number a thought, `(B, J, G)`
RewardFunction = Callable[..., torch.Tensor]
ARGUMENTS = ("logps_with", "logps_without", "correct_with", "correct_without", "mask", "text", "thoughts")


def column_parameters(function: RewardFunction) -> tuple[dict[str, bool], bool]:
    """
    Which columns of the data a reward function takes: all parameters that are none of `ARGUMENTS` name one.

    Returns:
        `tuple[dict[str, bool], bool]`: The names, and whether each is needed; and whether any other is taken (`**kwargs`).
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have none
        return {}, True
    named = {
        parameter.name: parameter.default is parameter.empty
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in ARGUMENTS
    }
    return named, any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def has_columns(function: RewardFunction, args) -> bool:
    """Whether a reward function may get columns of the data, by the configuration."""
    named, takes_any = column_parameters(function)
    return bool(named) or takes_any and not args.remove_unused_columns


def columns_taken(function: RewardFunction, columns: dict[str, list]) -> dict[str, list]:
    """Of a batch's columns, those that a reward function takes."""
    named, takes_any = column_parameters(function)
    taken = named.keys() | (columns.keys() - set(ARGUMENTS) if takes_any else set())
    return {name: values for name, values in columns.items() if name in taken}
