"""Arguments of `generate` and of scoring: of which kind they are, and which Transformers would take in another way than a thinking
loop."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StopStringCriteria
from transformers.generation import StoppingCriteriaList

from ..model.family import CACHE_NAMES, forward_arguments


FROM_TEXTS = "such as `tokenizer(texts, padding=True, return_tensors='pt')` gives"
NOT_WITH_THOUGHTS = (
    *("custom_generate", "assistant_model", "assistant_tokenizer", "synced_gpus", "token_healing"),
    *("output_attentions", "output_hidden_states"),
)
# Arguments of a model's forward that `generate` is given and that thoughts go with, or that are refused where they are read
OF_FORWARD = ("input_ids", "attention_mask", "use_cache", "return_dict", *CACHE_NAMES)


def check_options(model: PreTrainedModel, options: dict[str, Any], thought_streamer: Any = None) -> None:
    """
    Refuses what Transformers' `generate` would do in place of thinking, or keep from a custom loop without a word.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model that generates.
        options (`dict`):
            Arguments of `generate`.
        thought_streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*):
            Another one.

    Raises:
        `TypeError`, `ValueError`: naming the argument.
    """
    _check_prompts(model, options)
    check_tokenizer(options.get("tokenizer"))
    is_streamer = callable(getattr(thought_streamer, "put", None)) and not isinstance(thought_streamer, type)
    if thought_streamer is not None and not is_streamer:
        raise TypeError(
            f"`thought_streamer` is {thought_streamer!r}; give a streamer, such as `TextStreamer(tokenizer)`."
        )
    config = options.get("generation_config")
    for name in (*NOT_WITH_THOUGHTS, "cache_implementation"):
        value = options.get(name, getattr(config, name, None))
        if value if name in NOT_WITH_THOUGHTS else value in ("paged", "quantized"):
            shown = repr(value) if isinstance(value, (str, bool)) else f"a `{type(value).__name__}`"
            raise ValueError(f"`{name}` ({shown}) does not go with thoughts; leave it out, or use `think='never'`.")


def check_ids(input_ids: Any, vocab_size: int | None = None) -> None:
    """
    Refuses what are no token ids of texts.

    Args:
        input_ids (`torch.Tensor` of shape `(B, T)`):
            The texts.
        vocab_size (`int`, *optional*):
            V, to which all ids must belong.

    Raises:
        `TypeError`: if they are no tensor of whole numbers.
        `ValueError`: if they have another shape, or there are none, or one that the model does not know.
    """
    if not isinstance(input_ids, torch.Tensor):
        raise TypeError(f"`input_ids` is a `{type(input_ids).__name__}`; give a tensor of shape (B, T), {FROM_TEXTS}.")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"`input_ids` is a tensor of {input_ids.dtype}; give token ids as whole numbers (`torch.int64`)."
        )
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"`input_ids` has the shape {tuple(input_ids.shape)}; give (B, T), with a row for each text and a token at least."
        )
    if vocab_size is not None:
        least, greatest = (int(x) for x in input_ids.aminmax())
        if least < 0 or greatest >= vocab_size:
            raise ValueError(
                f"`input_ids` has the id {least if least < 0 else greatest}, and the model's tokens are 0 to {vocab_size - 1}; take "
                "the model's own tokenizer."
            )


def check_masks(input_ids: torch.Tensor, **masks: Any) -> None:
    """Refuses masks, by their names, that are no tensors of the shape of `input_ids`: with a `TypeError` or a `ValueError`."""
    for name, mask in masks.items():
        if mask is not None and not isinstance(mask, torch.Tensor):
            raise TypeError(f"`{name}` is a `{type(mask).__name__}`; give a tensor of the shape of `input_ids`.")
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(
                f"`{name}` has the shape {tuple(mask.shape)}, and `input_ids` {tuple(input_ids.shape)}; give one of the same shape."
            )


def _check_prompts(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Refuses prompts that are no token ids, masks that are not theirs, and what a thought would not be read with. Without any
    prompts, `generate` says so itself."""
    prompts = next((options[name] for name in ("inputs", "input_ids") if options.get(name) is not None), None)
    if prompts is None or getattr(prompts, "shape", (1, 1))[-1:] == (0,):
        return
    check_ids(prompts, model.config.get_text_config().vocab_size)
    mask = options.get("attention_mask")
    check_masks(prompts, attention_mask=mask)
    others = forward_arguments(model) - {*OF_FORWARD, *NOT_WITH_THOUGHTS}
    for name, value in options.items():
        if name in others and value is not None and not _says_nothing_new(name, value, prompts, mask):
            raise ValueError(
                f"`{name}` does not go with thoughts, which are written after the tokens of `input_ids` alone, counted from 0; "
                "leave it out, or use `think='never'`."
            )


def _says_nothing_new(name: str, value: Any, prompts: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether an argument is what follows from the tokens anyway: positions that count them, or the one type that they are of."""
    if not isinstance(value, torch.Tensor) or value.shape != prompts.shape:
        return False
    if name == "position_ids":
        on = torch.ones_like(prompts) if mask is None else mask.long()
        return bool(((on.cumsum(1) - 1 == value) | (on == 0)).all())
    return name.endswith("token_type_ids") and not bool(value.any())


def check_tokenizer(tokenizer: Any, is_needed: bool = False) -> None:
    """Refuses, with a `TypeError`, what is no tokenizer; None too, where one is needed."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) and (is_needed or tokenizer is not None):
        raise TypeError(
            f"`tokenizer` is a `{type(tokenizer).__name__}`; give a tokenizer, such as `AutoTokenizer.from_pretrained(...)`."
        )


def take_stop_strings(
    options: dict[str, Any], own: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """
    Makes a stopping criterion of stop strings, wherever they are given. Transformers makes one too, but from a tokenizer that
    it keeps from a custom loop, which needs it as well.

    Args:
        options (`dict`):
            Arguments of `generate`, changed in place.
        own ([`~transformers.GenerationConfig`], *optional*):
            The model's own.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Says what the strings are in tokens.

    Raises:
        `ValueError`: if there are stop strings and no tokenizer.
    """
    configs = (options.get("generation_config"), own)
    saved = next((config.stop_strings for config in configs if config is not None and config.stop_strings), None)
    stop_strings = options.pop("stop_strings", saved)
    if saved is not None:
        options["stop_strings"] = None
    if stop_strings is None:
        return
    if tokenizer is None:
        raise ValueError(f"`stop_strings={stop_strings!r}` needs `tokenizer=...`.")
    criterion = StopStringCriteria(tokenizer, stop_strings)
    options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), criterion])
