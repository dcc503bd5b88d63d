"""`trl-quietstar merge`: an adapter and its base as one model, with the heads."""

import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME

from ..loading import load_tokenizer
from ..model.adapters import base_of, heads_aside
from ..model.embeddings import weight_of
from ..model.heads import ThinkingModel
from ..model.saved import has_file
from ..modeling import QuietStarForCausalLM
from .arguments import argument, check_model, check_new_folder, named, required, revision_of
from .parser import CommandParser


logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST_DIFFERENCE = (
    1e-3  # of a log-probability in float32, which errs by some 1e-6: more is a method that merges to another model
)


@dataclass
class MergeArguments:
    """What to merge. What each field means stands in its `help`."""

    adapter: str | None = argument(None, "Id on the Hub or local folder of an adapter with its heads.")
    output: str | None = argument(None, "Folder to write the model to; new or empty.")
    dtype: str = argument(
        "float32",
        "Type that the weights are saved in: `float32`, `bfloat16` or `float16`. They are merged in float32, and rounded after.",
    )
    revision: str | None = argument(None, "Revision of the adapter on the Hub.")
    trust_remote_code: bool = argument(False, "Whether to run code that comes with the base on the Hub.")


def run(argv: list[str]) -> None:
    """Merges an adapter into its base: `ADAPTER OUTPUT`, then flags."""
    (args,) = CommandParser((MergeArguments,), "merge").parse_args_and_config(named(argv, "--adapter", "--output"))
    source, output = required(args, "adapter", "output")
    if args.dtype not in DTYPES:
        raise ValueError(f"`dtype` is {args.dtype!r}; choose one of {', '.join(DTYPES)}.")
    check_new_folder(output)
    hub = revision_of(args)
    check_model(source, **hub)
    if not has_file(source, ADAPTER_CONFIG_NAME, hub):
        raise ValueError(
            f"{source!r} is no adapter: it has no {ADAPTER_CONFIG_NAME}, so that there is nothing to merge."
        )
    options = {**hub, "trust_remote_code": args.trust_remote_code}
    adapted = QuietStarForCausalLM.from_pretrained(source, dtype=torch.float32, **options).eval()
    tokenizer = tokenizer_of(source, base_of(adapted), hub, options)
    model, before = merged_exactly(adapted)
    with heads_aside(model):
        nn.Module.to(model, DTYPES[args.dtype])
    difference = (_log_probabilities(model, some_tokens(model)) - before).abs().max()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(
        f"Saved to {output}, in {args.dtype}. Log-probabilities differ from the adapter's by {difference:.0e} at most."
    )


def tokenizer_of(source: str, base: ThinkingModel, hub: dict, options: dict) -> PreTrainedTokenizerBase:
    """The tokenizer beside an adapter, or else that of its base. `hub` and `options` are those the adapter was loaded with."""
    if has_file(source, "tokenizer_config.json", hub):
        return load_tokenizer(source, **options)
    return load_tokenizer(str(base.config.name_or_path), **{**options, **base._loaded_by})


def merged_exactly(adapted: nn.Module) -> tuple[ThinkingModel, torch.Tensor]:
    """
    The base of a thinking model with its adapter merged into the weights, in place, known to predict the same.

    Args:
        adapted ([`~peft.PeftModel`]):
            The thinking model with its adapter, in float32 and `eval()` mode.

    Returns:
        `tuple`: the model, and log-probabilities of [`some_tokens`] before.

    Raises:
        `ValueError`: if the base is quantized, or the merged model would predict otherwise.
    """
    base = base_of(adapted)
    token_ids = some_tokens(base)
    _check_base(base)
    before = _log_probabilities(adapted, token_ids)
    config: Any = adapted.peft_config["default"]  # type: ignore[index,union-attr]  # an attribute of a module
    model = merged(adapted)
    _check_same(type(config).__name__, before, _log_probabilities(model, token_ids))
    return model, before


def merged(adapted: nn.Module) -> ThinkingModel:
    """
    The base of a thinking model with its adapter merged into the weights, in place.

    Args:
        adapted ([`~peft.PeftModel`]):
            The thinking model with its adapter.

    Raises:
        `ValueError`: if the adapter's method has no form without an adapter.
    """
    config: Any = adapted.peft_config["default"]  # type: ignore[index,union-attr]  # an attribute of a module
    _untie(base_of(adapted))
    try:
        model = adapted.merge_and_unload()  # type: ignore[operator]  # an attribute of a module
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"An adapter of {type(config).__name__} ({config.peft_type.value}) cannot be merged into its base: {error}. It works as it is: give its folder as the model."
        ) from error
    return cast(ThinkingModel, model)


def _check_base(base: ThinkingModel) -> None:
    """Refuses a base whose weights can take few values, so that merged ones would be others."""
    if getattr(base.config, "quantization_config", None) is not None:
        raise ValueError(
            f"The base {str(base.config.name_or_path)!r} is quantized, and the merged weights would be rounded to its few values. "
            f"Name the model that it was made from in `base_model_name_or_path` of the adapter's {ADAPTER_CONFIG_NAME}."
        )


def _untie(base: ThinkingModel) -> None:
    """Gives the LM head weights of its own where it shares those of input embeddings that have an adapter: what the adapter does
    to the one, it does not do to the other."""
    table, head = base.get_input_embeddings(), base.get_output_embeddings()
    if not hasattr(table, "base_layer") or hasattr(head, "base_layer") or weight_of(table) is not weight_of(head):
        return
    head.weight = nn.Parameter(weight_of(head).detach().clone())  # type: ignore[union-attr]  # there is one
    base.config.get_text_config().tie_word_embeddings = base.config.tie_word_embeddings = False
    logger.warning("The adapter changes the input embeddings alone, so that the LM head gets weights of its own.")


def some_tokens(base: ThinkingModel) -> torch.Tensor:
    """Ids of tokens from the whole vocabulary, `(1, 64)`."""
    return torch.linspace(0, weight_of(base.get_input_embeddings()).shape[0] - 1, 64).long()[None]


@torch.no_grad()
def _log_probabilities(model: nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    """Of all next tokens, `(1, T, V)`, in float32."""
    return model(input_ids=token_ids).logits.float().log_softmax(-1)


def _check_same(kind: str, before: torch.Tensor, after: torch.Tensor) -> None:
    """Refuses to save a model that predicts otherwise than the adapter did."""
    difference = (after - before).abs().max()
    if not difference < LARGEST_DIFFERENCE:
        raise ValueError(
            f"The merged model's log-probabilities differ from those of the adapter (`{kind}`) by {difference:.1e}, above "
            f"{LARGEST_DIFFERENCE}: PEFT merges it to another model. It works as it is: give its folder as the model."
        )
