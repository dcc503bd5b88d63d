"""Stages of a run: options that change at an optimizer step, and hold until the next change."""

from collections.abc import Callable
from typing import Any


class Curriculum:
    """
    The options of a run at each optimizer step.

    Args:
        stages (`dict`, *optional*):
            From the optimizer step at which a stage begins, a whole number or a string of one, to the options that it
            changes and their values. It is left as it is.
        before (`dict`):
            The options that a stage may change, with their values before the first stage.
        readers (`dict[str, Callable]`):
            By the name of an option, a function that checks a value and reads one that is given in words.

    Raises:
        `TypeError`: if a reader refuses the type of a value.
        `ValueError`: if `stages` is no mapping of mappings, a step is no whole number or below 0, a stage changes an option
            that may not change, or a reader refuses a value.
    """

    def __init__(self, stages: dict | str | None, before: dict[str, Any], readers: dict[str, Callable[[Any], Any]]):
        self.before = dict(before)
        self.stages = _in_order(stages or {})
        unknown = sorted({name for _, changes in self.stages for name in changes} - set(before))
        if unknown:
            raise ValueError(
                f"`curriculum` changes {', '.join(unknown)}; a stage may change {', '.join(before)} only."
            )
        for _, changes in self.stages:
            changes.update({name: read(changes[name]) for name, read in readers.items() if name in changes})

    @property
    def starts(self) -> list[int]:
        """The optimizer steps at which options may change: the first, and those at which stages begin."""
        return [0, *(start for start, _ in self.stages)]

    def at(self, step: int) -> dict[str, Any]:
        """Every option that a stage may change, with its value at an optimizer step."""
        values = dict(self.before)
        for start, changes in self.stages:
            if start <= step:
                values.update(changes)
        return values

    def enter(self, step: int, options: dict[str, Any]) -> bool:
        """Sets the options to what they are at an optimizer step; returns whether any changed."""
        values = self.at(step)
        changed = any(options[name] != value for name, value in values.items())
        options.update(values)
        return changed


def _in_order(stages: dict | str) -> list[tuple[int, dict[str, Any]]]:
    """Copies of the stages, each with the step it begins at, the earliest first."""
    if not isinstance(stages, dict) or not all(isinstance(changes, dict) for changes in stages.values()):
        raise ValueError(f"`curriculum` is {stages!r}; give a mapping from steps to mappings of fields to values.")
    try:
        in_order = sorted(((int(step), dict(changes)) for step, changes in stages.items()), key=lambda stage: stage[0])
    except ValueError:
        raise ValueError(f"`curriculum` has the steps {list(stages)}; a stage begins at a whole number.") from None
    if in_order and in_order[0][0] < 0:
        raise ValueError(f"`curriculum` has a stage at step {in_order[0][0]}; the first step is 0.")
    return in_order
