"""When a model thinks in generation and scoring, and for how long a thought is read."""

from dataclasses import dataclass, replace
from numbers import Integral, Real

from ..settings import QuietStarSettings


MODES = ("always", "adaptive", "prompt_end", "never")
ENDLESS = 2**31  # tokens: more than any text has


@dataclass(frozen=True)
class Thinking:
    """
    When to think in generation and scoring, and for how long a thought is read. A new thought takes an older one's place.

    Parameters:
        mode (`str`):
            `"always"`; `"adaptive"`: where the no-thought prediction is uncertain; `"prompt_end"`: once, before the first
            new token; or `"never"`.
        every (`int`):
            Least distance between two thoughts, in tokens. Not read with `"prompt_end"`.
        threshold (`float`):
            With `"adaptive"`, the least entropy of the no-thought prediction, divided by log V, to think at.
        reach (`int`, *optional*):
            M, the number of tokens that a thought is read for. Defaults to `every`, and with `"prompt_end"` to all that follow.
        greedy (`bool`):
            Whether greedy generation, and scoring, take the most likely tokens for thoughts too, as plain generation does. Otherwise
            they draw thoughts, by fixed random numbers.

    Raises:
        `ValueError`: if a value is outside its limits.
    """

    mode: str = "always"
    every: int = 1
    threshold: float = 0.6
    reach: int | None = None
    greedy: bool = False

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"`think` is {self.mode!r}; choose one of {', '.join(MODES)}.")
        if self.every < 1:
            raise ValueError(f"`think_every` is {self.every}, below its limit of 1; raise it.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"`thinking_threshold` is {self.threshold}; it lies between 0 and 1.")

    @property
    def distance(self) -> int:
        """Least distance between two thoughts, in tokens. With a single thought it is longer than any text."""
        return ENDLESS if self.mode == "prompt_end" else self.every

    @property
    def span(self) -> int:
        """M, the number of tokens that a thought is read for, unless another takes its place before."""
        return self.distance if self.reach is None else self.reach

    @classmethod
    def of(
        cls,
        settings: QuietStarSettings,
        mode: "str | Thinking | None" = None,
        every: int | None = None,
        threshold: float | None = None,
    ) -> "Thinking":
        """
        Says when a model thinks: as it was trained to, unless a user asks for something else.

        Args:
            settings ([`~settings.QuietStarSettings`]):
                What the model remembers of its training.
            mode (`str` or [`Thinking`], *optional*), every (`int`, *optional*), threshold (`float`, *optional*):
                What the user asks for. Without a mode, the model keeps that of its training.

        Raises:
            `TypeError`: if a value is of another kind.
            `ValueError`: if a value is outside its limits, or does not go with the mode.
        """
        for name, number, kind in (("think_every", every, Integral), ("thinking_threshold", threshold, Real)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, kind)):
                wanted = "a whole number" if kind is Integral else "a number"
                raise TypeError(f"`{name}` is {number!r} (`{type(number).__name__}`); give {wanted}.")
        if isinstance(mode, Thinking):
            if every is not None or threshold is not None:
                raise ValueError("`think` says all; leave out `think_every` and `thinking_threshold`.")
            return mode
        talk_length = ENDLESS if settings.talk_length == "completion" else int(settings.talk_length)
        if every is not None and every > talk_length:
            raise ValueError(
                f"`think_every` is {every}, but the model reads a thought for `talk_length` {talk_length} tokens; lower it."
            )
        thinking = replace(cls._as_trained(settings, talk_length), greedy=settings.thought_format == "text")
        asked = mode is not None
        if mode is not None and mode != thinking.mode:
            thinking = cls(mode, reach=talk_length if mode == "prompt_end" else None, greedy=thinking.greedy)
        for name, value in (("think_every", every), ("thinking_threshold", threshold)):
            if value is not None and (thinking.mode == "prompt_end" or (thinking.mode == "never" and not asked)):
                raise ValueError(
                    f"`{name}` is {value}, but the model thinks {thinking}; leave it out, or pass `think='always'` or "
                    "`think='adaptive'` too."
                )
        if every is not None:
            thinking = replace(thinking, every=every, reach=None)
        return thinking if threshold is None else replace(thinking, threshold=threshold)

    @classmethod
    def _as_trained(cls, settings: QuietStarSettings, talk_length: int) -> "Thinking":
        """Positions were a number or a fraction to save time in training: such a model has learned to think anywhere."""
        if settings.thought_positions == "none":
            return cls("never")
        if settings.thought_positions == "prompt_end":
            return cls("prompt_end", reach=talk_length)
        if settings.thought_positions == "difficulty":
            return cls("adaptive", settings.min_thought_interval, settings.difficulty_threshold, talk_length)
        return cls()

    def __str__(self) -> str:
        """In words that follow "thinks"."""
        if self.mode == "never":
            return "never"
        where = "once, at the end of the prompt"
        if self.mode != "prompt_end":
            where = "before every token" if self.every == 1 else f"every {self.every} tokens"
        if self.mode == "adaptive":
            where = f"where the next token is uncertain (normalised entropy of {self.threshold:g} or more)"
            where += "" if self.every == 1 else f", {self.every} tokens apart or more"
        read = "all that follows" if self.span >= ENDLESS else "one token" if self.span == 1 else f"{self.span} tokens"
        return f"{where}, each thought for {read}" if self.mode != "prompt_end" else f"{where}, for {read}"
