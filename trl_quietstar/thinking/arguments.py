"""Arguments of `generate` that Transformers would take in another way than a thinking loop."""

from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase, StopStringCriteria
from transformers.generation import StoppingCriteriaList


NOT_WITH_THOUGHTS = (
    *("custom_generate", "assistant_model", "assistant_tokenizer", "synced_gpus", "token_healing"),
    *("output_attentions", "output_hidden_states"),
)


def check_options(options: dict[str, Any]) -> None:
    """
    Refuses what Transformers' `generate` would do in place of thinking, or keep from a custom loop without a word.

    Args:
        options (`dict`):
            Arguments of `generate`.

    Raises:
        `ValueError`: naming the argument.
    """
    config = options.get("generation_config")
    for name in (*NOT_WITH_THOUGHTS, "cache_implementation"):
        value = options.get(name, getattr(config, name, None))
        if value if name in NOT_WITH_THOUGHTS else value in ("paged", "quantized"):
            shown = repr(value) if isinstance(value, (str, bool)) else f"a `{type(value).__name__}`"
            raise ValueError(f"`{name}` ({shown}) does not go with thoughts; leave it out, or use `think='never'`.")


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
