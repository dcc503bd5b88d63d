"""Which models can learn to think: causal language models of text whose input embeddings and LM head are at hand."""

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from .._compat import is_compiled


def check_config(config: PreTrainedConfig, name: str) -> None:
    """
    Refuses what is known from its configuration to be no causal LM of text, before weights are loaded.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Of the model.
        name (`str`):
            What errors call it.

    Raises:
        `TypeError`: if it is no configuration.
        `ValueError`: for an encoder-decoder, or a model that reads more than text.
    """
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"`config` is a `{name}`; give a configuration, such as `AutoConfig.from_pretrained(...)`.")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder model (model_type {config.model_type!r}); thoughts need a causal "
            "(decoder-only) language model."
        )
    _check_reads_text(config, name)


def check_causal_lm(model: PreTrainedModel) -> None:
    """
    Refuses what cannot be a causal thinker, before anything is changed.

    Raises:
        `ValueError`: for a compiled model or none of Transformers, one that is no causal LM of text, and one without an LM head
            over one vocabulary or whose tables are offloaded.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or is_compiled(model):
        raise ValueError(
            f"The model is a {name}, compiled or not a model of Transformers; pass it as `AutoModelForCausalLM` loads it. "
            "Its layers may be compiled one by one, with `layer.compile()`."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; thoughts need a causal (decoder-only) language model.")
    _check_reads_text(model.config, name)
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{name} has no LM head; load the model with `AutoModelForCausalLM`.")
    if getattr(model, "hf_device_map", None) and any(
        x.weight.device.type == "meta" for x in (head, model.get_input_embeddings()) if hasattr(x, "weight")
    ):
        raise ValueError(
            f"The input embeddings or the LM head of the {name} are offloaded by its `device_map` ({model.hf_device_map}), and "
            "thoughts read both at every token; map them to a device."
        )
    if isinstance(head, nn.ModuleList):
        raise ValueError(
            f"{name} predicts {len(head)} codes at a time, as audio decoders do; thoughts need a language model with one "
            "vocabulary."
        )


def _check_reads_text(config: PreTrainedConfig, name: str) -> None:
    """Refuses a model that reads images or sounds too, unless Transformers knows it as a causal LM, which takes text alone."""
    is_text = config.get_text_config() is config or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not is_text and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise ValueError(
            f"{name} (model_type {config.model_type!r}) reads more than text, and `AutoModelForCausalLM` does not load it. Thoughts "
            "need a causal language model: take a text model, such as the one inside it."
        )
