"""From what a user passes as model and tokenizer to a thinking model, with its adapter."""

from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import is_peft_available
from trl.trainer.utils import disable_dropout_in_model, get_config_model_id

from .config import QuietStarConfig
from .distributed import check_one_device, check_whole, loaded_whole
from .modeling import QuietStarForCausalLM, QuietStarMixin, attach_heads, base_of, heads_aside


if is_peft_available():
    from peft import PeftConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer


def build_model(
    model, args: QuietStarConfig, tokenizer: PreTrainedTokenizerBase | None, quantization_config, peft_config
):
    """
    The thinking model, inside a `PeftModel` where there is an adapter, and its tokenizer.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As passed to the trainer. An object is changed in place.
        args ([`QuietStarConfig`]):
            Settings of the heads, and how to load.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Defaults to the model's own.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            How to quantize a model that is loaded.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to add.

    Raises:
        `ValueError`: for a model that is no causal LM, saved heads of another kind, or an adapter on the heads or the LM head.
    """
    settings = args.settings()
    if isinstance(model, str):
        kwargs = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code}
        kwargs.update(args.model_init_kwargs or {})
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        with loaded_whole(args):
            model = QuietStarForCausalLM.from_pretrained(model, settings=settings, **kwargs)
    check_whole(model)
    base = base_of(model)
    check_one_device(base)
    for module in base.modules():
        # bitsandbytes on a CPU repacks 4-bit weights at a forward in `eval()` mode, as sampling is one, for a kernel that
        # passes no gradient, and keeps to it in training
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if tokenizer is None:
        source = get_config_model_id(base.config)
        tokenizer = load_tokenizer(source, trust_remote_code=args.trust_remote_code)
    if not isinstance(base, QuietStarMixin):
        attach_heads(base, settings)
    base.adopt_settings(settings)
    if base.fresh_thought_embeddings:
        base.initialize_thought_embeddings(tokenizer, args.thought_start_text, args.thought_end_text)
    if peft_config is not None:
        with heads_aside(base):
            model = get_peft_model(base, peft_config)
    if is_peft_model(model):
        if any(isinstance(module, BaseTunerLayer) for module in base.quietstar.modules()):
            raise ValueError(
                "The adapter sits on the thinking heads, which are trained whole and saved beside it; name only layers "
                "of the base in `target_modules`, or pass `peft_config` to the trainer, which keeps adapters off them."
            )
        if isinstance(base.get_output_embeddings(), BaseTunerLayer):
            raise ValueError(
                "An adapter on the LM head is not supported: log-probabilities are computed from its weight directly, "
                "so the adapter would not be trained. Remove 'lm_head' from `target_modules`."
            )
        base.quietstar.requires_grad_(True)
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
    text_config = base.config.get_text_config()
    if text_config.pad_token_id is None:
        text_config.pad_token_id = pad_token_id(tokenizer)
    return model, tokenizer


def load_tokenizer(source: str, **kwargs) -> PreTrainedTokenizerBase:
    """
    A model's own tokenizer.

    Args:
        source (`str`):
            Id on the Hub or local folder.
        kwargs:
            As for [`~transformers.AutoTokenizer.from_pretrained`].

    Raises:
        `ValueError`: if a local folder has none.
    """
    kwargs.setdefault("trust_remote_code", False)
    try:
        return AutoTokenizer.from_pretrained(source, **kwargs)
    except (OSError, ValueError):
        if not Path(source).is_dir() or any(Path(source).glob("*token*")):
            raise
        raise ValueError(
            f"There is no tokenizer in {source!r}; save the model's own there, with `tokenizer.save_pretrained({source!r})`."
        ) from None


def check_quantization(model, args: QuietStarConfig, peft_config, training: bool) -> None:
    """
    Refuses a `quantization_config` that cannot be followed.

    Raises:
        `ValueError`: if the model is loaded already, the configuration is given twice, or there is nothing to train.
    """
    if not isinstance(model, str):
        raise ValueError(
            "You passed a model that is loaded already together with a `quantization_config`; pass its id or path, or "
            "load it quantized."
        )
    if "quantization_config" in (args.model_init_kwargs or {}):
        raise ValueError("`quantization_config` is given twice: leave it out of `model_init_kwargs`.")
    if training and peft_config is None:
        raise ValueError(
            "A quantized model's own weights cannot be trained; pass a `peft_config` (`--use_peft` on the command line)."
        )


def check_adapter(model, peft_config) -> None:
    """
    Refuses what cannot be an adapter for `model`.

    Raises:
        `ImportError`: if PEFT is not installed.
        `TypeError`: if it is no PEFT configuration.
        `ValueError`: if the model has an adapter already.
    """
    if not is_peft_available():
        raise ImportError("`peft_config` needs PEFT; install it with `pip install trl-quietstar[peft]`.")
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"`peft_config` is a `{type(peft_config).__name__}`; give a `peft.PeftConfig`.")
    if not isinstance(model, str) and is_peft_model(model):
        raise ValueError(
            "You passed a `PeftModel` together with a `peft_config`; merge and unload the adapter first, or leave out "
            "`peft_config` to go on training it."
        )


def disable_dropout(model) -> None:
    """TRL's, and that of attention, which families keep as a number."""
    disable_dropout_in_model(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with. Any valid one will do: padding is masked everywhere."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0
