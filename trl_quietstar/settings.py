"""What a saved model remembers of its training: how long, how and where it thinks."""

import functools
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class QuietStarSettings:
    """
    What a saved model needs to think again; stored under `quietstar` in `config.json`.

    Each setting remembers an option of [`QuietStarConfig`], under the option's name but for `prediction`, which is
    `reward_prediction` there. The defaults are the options' defaults.

    Parameters:
        thought_length (`int`):
            L, tokens in a thought.
        talk_length (`int` or `str`):
            M, text tokens that a thought is read for; `"completion"`: all that follow.
        prediction (`str`):
            `"mixed"` (the mixing head weighs the predictions with and without the thought) or `"thought"` (with it alone).
        mixing_head_type (`str`):
            `"mlp"` or `"published"`, that of the published Quiet-STaR code.
        value_head_type (`str`):
            `"linear"`, `"mlp"` or `"transformer"`.
        value_head_hidden_size (`int`):
            Width of an `"mlp"` or `"transformer"` value head.
        temperature (`float`), top_k (`int`), top_p (`float`), min_p (`float`, *optional*):
            How the tokens of a thought are drawn.
        min_thought_length (`int`, *optional*), thought_stop_string (`str`, *optional*):
            When a thought may end early.
        thought_suppress_tokens (`list[int]`, *optional*):
            Ids of tokens that no thought holds. The policy gives them no probability.
        thought_format (`str`):
            `"embeddings"` (a learned vector opens a thought, and another one closes it) or `"text"` (strings of ordinary tokens
            do).
        thought_start_text (`str`), thought_end_text (`str`):
            These strings; with `"embeddings"`, what the vectors began as. A thought of `"text"` ends once it has written the
            latter, which is its `thought_stop_string`.
        thought_prompt (`str`, *optional*):
            Text that asks for a thought, which the thought alone sees.
        thought_prompt_role (`str`, *optional*):
            Whose turn that text is, by the chat template, between the last message and the answer: `"system"` or `"user"`.
        thought_positions (`str`, `int` or `float`), difficulty_threshold (`float`), min_thought_interval (`int`):
            Where the model learned to think; [`~thinking.when.Thinking.of`] says what generation and scoring make of it.
    """

    thought_length: int = 8
    talk_length: int | str = 4
    prediction: str = "mixed"
    value_head_type: str = "mlp"
    value_head_hidden_size: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    min_thought_length: int | None = None
    thought_stop_string: str | None = None
    thought_positions: str | int | float = "all"
    difficulty_threshold: float = 0.6
    min_thought_interval: int = 3
    mixing_head_type: str = "mlp"
    thought_suppress_tokens: list[int] | None = None
    thought_format: str = "embeddings"
    thought_start_text: str = "—"
    thought_end_text: str = "—"
    thought_prompt: str | None = None
    thought_prompt_role: str | None = None

    def __post_init__(self):
        for name, kinds in _kinds().items():
            if not _is_of(kinds, getattr(self, name)):
                raise TypeError(
                    f"`{name}` of the settings is {getattr(self, name)!r}; give what `QuietStarSettings` says."
                )
        if self.thought_format == "text":  # what follows from that; the dataclass is frozen
            object.__setattr__(self, "thought_stop_string", self.thought_end_text)
            object.__setattr__(self, "min_thought_length", self.min_thought_length or 1)

    def to_dict(self) -> dict:
        """The settings as they are saved."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict, source: str) -> "QuietStarSettings":
        """
        Settings that were saved.

        Args:
            saved (`dict`):
                The `quietstar` entry of a `config.json`, or what is saved beside an adapter.
            source (`str`):
                Where it is from, for errors.

        Raises:
            `ValueError`: if it has settings that this version does not know, or values of another kind.
        """
        where = f"What {source!r} saves as its `quietstar` settings"
        if not isinstance(saved, dict):
            raise ValueError(f"{where} is damaged: {saved!r} is no JSON object. Copy the file again.")
        kinds = _kinds()
        unknown = sorted(saved.keys() - kinds.keys())
        if unknown:
            raise ValueError(
                f"{where} has {', '.join(unknown)}, which this version does not know: a newer version of trl-quietstar wrote it. "
                "Upgrade trl-quietstar."
            )
        for name, value in saved.items():
            if not _is_of(kinds[name], value):
                raise ValueError(f"{where} is damaged: `{name}` is {value!r}. Copy the file again.")
        return cls(**saved)


@functools.cache
def _kinds() -> dict[str, tuple]:
    """The types that each setting may be of."""
    return {name: get_args(hint) or (hint,) for name, hint in get_type_hints(QuietStarSettings).items()}


def _is_of(kinds: tuple, value) -> bool:
    """Whether a value is of one of the kinds. JSON may write 1.0 as 1, and NumPy has numbers too; Python takes a switch for one."""
    if isinstance(value, (list, tuple)):
        return any(get_origin(kind) is list and all(_is_of(get_args(kind), x) for x in value) for kind in kinds)
    numbers = {int: Integral, float: Real}
    kinds = tuple(numbers.get(kind, kind) for kind in kinds if get_origin(kind) is None)
    return not isinstance(value, bool) and isinstance(value, kinds)


# The settings that heads are made by, which a model cannot change.
OF_HEADS = ("mixing_head_type", "value_head_type", "value_head_hidden_size")
# The option of `QuietStarConfig` that each setting remembers.
OPTIONS = {field.name: field.name for field in fields(QuietStarSettings)} | {"prediction": "reward_prediction"}
