"""Options whose values the command line, or an older version, gives in other words: what each reads as."""

from collections.abc import Callable
from typing import Any


POSITIONS = ("all", "difficulty", "prompt_end", "none")


def read_positions(value: Any) -> str | int | float:
    """
    Reads `thought_positions`: `"16"` is a number of positions, `"0.25"` a fraction of them.

    Raises:
        `TypeError`: if it is neither text nor a number.
        `ValueError`: if it is another word, a fraction outside (0, 1], or a number below 1.
    """
    if isinstance(value, str) and value not in POSITIONS:
        try:
            value = float(value) if "." in value or "e" in value.lower() else int(value)
        except ValueError:
            raise ValueError(
                f"`thought_positions` is {value!r}; give one of {', '.join(map(repr, POSITIONS))}, a number of positions, or "
                "a fraction."
            ) from None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(
            f"`thought_positions` is {value!r} (`{type(value).__name__}`); give 'all', 'difficulty', a number of "
            "positions, or a fraction."
        )
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(f"`thought_positions` is {value}; a fraction lies above 0 and up to 1.")
    if isinstance(value, int) and value < 1:
        raise ValueError(f"`thought_positions` is {value}; a number of positions is at least 1.")
    return value


def read_talk_length(value: Any) -> int | str:
    """
    Reads `talk_length`: `"4"` is a number of tokens, and `"completion"` stays a word.

    Raises:
        `TypeError`: if it is neither text nor a whole number.
        `ValueError`: if it is another word.
    """
    if value == "completion":
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError(
            f"`talk_length` is {value!r} (`{type(value).__name__}`); give a number of tokens, or 'completion'."
        )
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"`talk_length` is {value!r}; give a number of tokens, or 'completion'.") from None


def read_normalization(value: Any) -> str:
    """
    Reads `normalize_advantages`, which was once a switch: True is `step`, and False `none`.

    Raises:
        `TypeError`: if it is neither a word nor a switch.
    """
    if not isinstance(value, (str, bool)):
        raise TypeError(
            f"`normalize_advantages` is {value!r} (`{type(value).__name__}`); give 'none', 'group' or 'step'."
        )
    return {"false": "none", "true": "step"}.get(str(value).lower(), str(value))


READERS: dict[str, Callable[[Any], Any]] = {
    "thought_positions": read_positions,
    "talk_length": read_talk_length,
    "normalize_advantages": read_normalization,
}
