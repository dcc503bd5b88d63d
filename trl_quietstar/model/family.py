"""What differs from one model family to another: names of arguments, where positions begin and end, which tokens end a text, and
what is done to attention scores and logits."""

import functools
import inspect

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# families whose table of absolute positions begins after the padding index
POSITIONS_AFTER_PADDING = (
    *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")  # what families call their cache
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # what they call a factor on their logits,
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # and a soft-cap on them


def forward_arguments(model: PreTrainedModel) -> frozenset[str]:
    """Names that the family's own forward takes."""
    return _arguments_of(getattr(type(model), "_plain_class", type(model)))  # type: ignore[arg-type]  # a class of models, by a name that only thinking classes have


@functools.cache
def _arguments_of(family: type[PreTrainedModel]) -> frozenset[str]:
    return frozenset(inspect.signature(family.forward).parameters)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text, by the tokenizer and by the model's generation config."""
    own = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}


def cache_name(arguments: frozenset[str]) -> str:
    """What the family calls its cache, as argument and in its output."""
    for name in CACHE_NAMES:
        if name in arguments:
            return name
    raise ValueError("the family keeps no cache")


def position_offset(config: PreTrainedConfig) -> int:
    """The position id of a text's first token."""
    return config.pad_token_id + 1 if config.model_type in POSITIONS_AFTER_PADDING else 0


def logit_transform(config: PreTrainedConfig) -> tuple[float, float | None]:
    """Factor on the logits, and soft-cap after it (or None), as the family's own forward applies them."""
    config = config.get_text_config()
    softcap = next((cap for name in SOFTCAPS if (cap := getattr(config, name, None)) is not None), None)
    scale = next((factor for name in SCALES if (factor := getattr(config, name, None)) is not None), None)
    if scale is not None:
        return float(scale), softcap
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None and config.model_type != "minicpm3":  # which divides what the head reads instead
        return (divisor if config.model_type == "hyperclovax" else 1 / divisor), softcap
    return 1.0, softcap


def max_positions(config: PreTrainedConfig) -> int | None:
    """Positions the model has for text, or None where its configuration names no limit (or -1)."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None or limit < 0 else limit - position_offset(config)


def check_length(
    longest: int,
    thought_length: int,
    limit: int | None,
    text: str | None = None,
    thoughts: str | None = None,
    advice: str = "lower `max_length` to",
    before: int = 0,
    around: int = 2,
) -> None:
    """
    Whether a text of `longest` tokens fits a model of `limit` positions with a thought before its last token.

    A branch replaces the last text token by start, thought and end: `longest + thought_length + around - 1` positions.

    Args:
        longest, thought_length (`int`), limit (`int`, *optional*):
            Tokens, and positions.
        text, thoughts (`str`, *optional*):
            What the message calls them.
        advice (`str`):
            What to change to the number of tokens that fit.
        before (`int`):
            Tokens that this number does not count.
        around (`int`):
            Tokens of what stands around a thought ([`~model.marks.Marks`]).

    Raises:
        `ValueError`: if it does not fit.
    """
    more = thought_length + around - 1
    if limit is None or longest + more <= limit:
        return
    fitting = limit - more - before
    raise ValueError(
        f"{text or f'A text of {longest} tokens'} with {thoughts or f'`thought_length` {thought_length}'} and its start "
        f"and end needs {longest + more} positions, and the model has {limit}; "
        + (f"{advice} {fitting}." if fitting > 0 else "shorten the one or the other.")
    )


def cap_(values: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """`softcap · tanh(values / softcap)`, in place; the values themselves without a cap."""
    return values if softcap is None else values.div_(softcap).tanh_().mul_(softcap)


def cap_slope(capped: torch.Tensor, softcap: float | None) -> torch.Tensor | None:
    """
    Derivative of the cap at capped values `c`: since `c = softcap · tanh(x / softcap)`, `dc/dx = 1 − (c / softcap)²`.

    Returns:
        `torch.Tensor`: 0 where a value is -inf; None without a cap.
    """
    return None if softcap is None else 1 - (capped.clamp(min=-softcap) / softcap) ** 2


def times_(grad: torch.Tensor, slope: torch.Tensor | None) -> torch.Tensor:
    """A gradient times the cap's derivative as [`cap_slope`] gives it, in place."""
    return grad if slope is None else grad.mul_(slope)
