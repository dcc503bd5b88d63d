"""From what a user passes as model and tokenizer to a thinking model, with its adapter."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import is_peft_model
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.utils import ADAPTER_CONFIG_NAME, is_peft_available
from trl.trainer.utils import disable_dropout_in_model, get_config_model_id

from ._compat import checkpoint_exactly, noted_commit
from .config import QuietStarConfig
from .model.adapters import (
    base_of,
    check_adapter_model,
    check_method,
    check_trainable,
    heads_aside,
    save_heads_too,
    trains_added_weights_only,
    warn_of_absent,
)
from .model.heads import ThinkingModel
from .model.saved import HUB_KWARGS, file_of, has_file, read_json, saved_settings, settings_in, warn_of_lost_heads
from .model.sharding import check_one_device, check_unpartitioned, loaded_whole
from .modeling import QuietStarForCausalLM, QuietStarMixin, attach_heads, attach_saved_heads
from .settings import QuietStarSettings
from .thinking.drawing import check_endings


if is_peft_available():
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer


logger = logging.getLogger(__name__)

SLOW_RATE = 1e-5  # LoRA hardly learns below it; the papers' rates are for all weights


# What can be refused before anything is loaded


def check_model_kind(model) -> None:
    """Refuses, with a `TypeError`, what is neither a model nor the name of one."""
    if not isinstance(model, (str, PreTrainedModel, *((PeftModel,) if is_peft_available() else ()))):
        raise TypeError(
            f"`model` is a `{type(model).__name__}`; give an id or a path as a string, or a model as `AutoModelForCausalLM` loads it, "
            "neither wrapped nor compiled. Its layers may be compiled one by one, with `layer.compile()`."
        )


def check_kinds(model, args: QuietStarConfig, tokenizer) -> None:
    """
    Refuses arguments of another kind than the trainer takes, and warns of one that has no effect.

    Raises:
        `TypeError`: for a tokenizer that is none.
    """
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"`processing_class` is {tokenizer!r} (`{type(tokenizer).__name__}`); give a tokenizer, such as "
            "`AutoTokenizer.from_pretrained(...)`, or leave it out for the model's own."
        )
    if args.model_init_kwargs and not isinstance(model, str):
        logger.warning(
            "`model_init_kwargs` (%s) has no effect, since the model is loaded already.",
            ", ".join(args.model_init_kwargs),
        )


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
        `ValueError`: if the model has an adapter already, or the method is not supported.
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
    check_method(peft_config)


# The model


def build_model(
    model,
    args: QuietStarConfig,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    quantization_config,
    peft_config,
):
    """
    Makes the model that is trained, inside a `PeftModel` where there is an adapter, and finds its tokenizer.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As passed to the trainer. An object is changed in place.
        args ([`QuietStarConfig`]):
            Settings of the heads, and how to load.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Of a processor, the part that reads text. Defaults to the model's own.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            How to quantize a model that is loaded.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to add.

    Returns:
        `tuple`: the model, and its tokenizer.

    Raises:
        `ValueError`: for a model that is no causal LM of text, saved heads of another kind, or an adapter that cannot be
            trained: a second one, one of another method, or one on the heads or the LM head.
    """
    hub = hub_kwargs(args)
    if args.thought_suppress_tokens is None:
        args.thought_suppress_tokens = _saved_suppression(model, hub)
    settings, source = args.settings(), model if isinstance(model, str) else None
    if source is not None:
        kwargs = {"dtype": _dtype(source, args, quantization_config, peft_config, hub), **_init_kwargs(args)}
        source, model = _load(source, args, settings, quantization_config, hub, kwargs)
    check_unpartitioned(model)
    base = base_of(model)
    check_one_device(base)
    check_adapter_model(model)
    if peft_config is not None:
        _check_alone(model, source, hub)
    _keep_gradients(base)
    if not isinstance(base, QuietStarMixin):
        _attach(base, settings)
    if tokenizer is None:
        tokenizer = _own_tokenizer(base, source, hub, args.trust_remote_code)
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = cast(PreTrainedTokenizerBase, tokenizer.tokenizer)
    text_config = base.config.get_text_config()
    _warn_of_other_vocabulary(tokenizer, text_config.vocab_size)
    _pad_within(tokenizer, text_config.vocab_size)
    check_endings(settings, tokenizer)
    base.adopt_settings(settings, tokenizer)
    base.initialize_thought_embeddings(tokenizer, args.thought_start_text, args.thought_end_text, only_fresh=True)
    if peft_config is not None:
        warn_of_absent(base, peft_config)
        with heads_aside(base):
            model = get_peft_model(base, peft_config, revision=base._loaded_by.get("revision"))
    if is_peft_model(model):
        _train_beside_heads(model, args, is_given=source is None)
    if text_config.pad_token_id is None:
        text_config.pad_token_id = pad_token_id(tokenizer, text_config.vocab_size)
    return model, tokenizer


def _init_kwargs(args: QuietStarConfig) -> dict[str, Any]:
    """`model_init_kwargs`, which the configuration has read if it was a string of JSON, with a former name in its new form."""
    return {"dtype" if x == "torch_dtype" else x: value for x, value in (args.model_init_kwargs or {}).items()}  # type: ignore[union-attr]  # a dictionary, once the configuration has parsed it


def hub_kwargs(args: QuietStarConfig) -> dict[str, Any]:
    """Where on the Hub the model is, as `model_init_kwargs` say it."""
    return {name: value for name, value in _init_kwargs(args).items() if name in HUB_KWARGS}


def _saved_suppression(model, hub: dict[str, Any]) -> list[int] | None:
    """Ids of the tokens that the thoughts of a saved model do not hold. They go with its vocabulary, not with a run."""
    saved = saved_settings(model, **hub) if isinstance(model, str) else settings_in(base_of(model).config)
    return None if saved is None else saved.thought_suppress_tokens


def _keep_gradients(base: PreTrainedModel) -> None:
    """Turns off what would lose the gradient of thoughts on its way through the layers."""
    for module in base.modules():
        # bitsandbytes on a CPU repacks 4-bit weights at a forward in `eval()` mode, as sampling is one, for a kernel that
        # passes no gradient, and keeps to it in training
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a flag of bitsandbytes' layers
    checkpoint_exactly(base)


def _train_beside_heads(model: "PeftModel", args: QuietStarConfig, is_given: bool) -> None:
    """Readies an adapter, new or loaded, and the heads for training. The adapter of a model that was given as an object gets the
    revision of its base noted; where the model was loaded here, PEFT has noted it."""
    base, config = base_of(model), model.peft_config["default"]
    _check_places(base)
    if is_given and config.revision is None:
        config.revision = base._loaded_by.get("revision")
    base.quietstar.requires_grad_(True)
    save_heads_too(model)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()


def _attach(base: ThinkingModel, settings: QuietStarSettings) -> None:
    """Gives a plainly loaded model its heads: those that it was saved with, if it was."""
    try:
        if getattr(base.config, "quietstar", None) is None:
            attach_heads(base, settings)
        else:
            attach_saved_heads(base)
    except FileNotFoundError:
        warn_of_lost_heads(str(base.config.name_or_path))
        attach_heads(base, settings)
    base._loaded_by = {"revision": noted_commit(base.config)}


def _dtype(source: str, args: QuietStarConfig, quantization_config, peft_config, hub: dict[str, Any]) -> torch.dtype:
    """
    The dtype that a model is loaded in unless the user names one.

    It is float32, in which weights are trained, but bf16 for weights that stay frozen in a run under bf16 autocast. Autocast
    keeps its copy of a weight that needs a gradient for the whole step, but copies a frozen one anew at each forward, and a step
    has a forward for each token of a thought.
    """
    sharded = is_fsdp_enabled() or is_deepspeed_zero3_enabled()  # which keep weights of one dtype together
    if not args.bf16 or quantization_config is not None or sharded:
        return torch.float32
    adapter = peft_config or _adapter_at(source, hub)
    stays_frozen = adapter is not None and trains_added_weights_only(adapter)
    return torch.bfloat16 if stays_frozen else torch.float32


def _adapter_at(source: str, hub: dict[str, Any]) -> "PeftConfig | None":
    """The configuration of the adapter that a folder or repository holds; None if it holds none."""
    file = file_of(source, ADAPTER_CONFIG_NAME, hub) if is_peft_available() else None
    if file is None:
        return None
    read_json(file)  # which says of a damaged one what is wrong
    return PeftConfig.from_pretrained(source, **hub)


def _load(
    source: str, args: QuietStarConfig, settings: QuietStarSettings, quantization_config, hub: dict, kwargs: dict
) -> "tuple[str, PreTrainedModel | PeftModel]":
    """The model of an id or path, and where it was: a subfolder of a local folder is a folder too."""
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if kwargs.get("subfolder") and Path(source).is_dir():
        source = str(Path(source, kwargs.pop("subfolder")))
        hub.pop("subfolder")
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    with loaded_whole(args):
        return source, QuietStarForCausalLM.from_pretrained(source, settings=settings, **kwargs)


def _check_alone(model, source: str | None, hub: dict) -> None:
    """Refuses a second adapter, and one whose base could not be named in its configuration."""
    if is_peft_model(model):
        raise ValueError(
            f"{source!r} is an adapter, and you passed a `peft_config` for another one; leave out `peft_config` to go on training "
            "it, or merge it into its base first (`merge_and_unload`) and save that."
        )
    if hub.get("subfolder"):
        raise ValueError(
            f"The model is in the subfolder {hub['subfolder']!r} of {source!r}, which an adapter's configuration cannot say; "
            "download that folder and pass its path."
        )


def _check_places(base: ThinkingModel) -> None:
    """Refuses an adapter on the heads or on the LM head."""
    if any(isinstance(module, BaseTunerLayer) for module in base.quietstar.modules()):
        raise ValueError(
            "The adapter sits on the thinking heads, which are trained whole and saved beside it; name only layers "
            "of the base in `target_modules`, or pass `peft_config` to the trainer, which keeps adapters off them."
        )
    head = base.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        name = next(name for name, module in base.named_modules() if module is head).split(".")[-1]
        raise ValueError(
            "An adapter on the LM head is not supported: log-probabilities are computed from its weight directly, so the adapter "
            f"would not be trained. Keep it off {name!r}: leave that out of `target_modules`, or set `exclude_modules=[{name!r}]`."
            f" To train all of the LM head name it in `modules_to_save`."
        )


def warn_of_untrained_heads(source: str) -> None:
    """Says that a model that is to think, a plain one, has not learned to."""
    logger.warning(
        "%r is a plain model without thinking heads: its thoughts are read by untrained ones and hardly count. Train it first, "
        "or let it not think.",
        source,
    )


def default_args(model) -> QuietStarConfig:
    """The default configuration, with an output directory named after the model that a user passes."""
    check_model_kind(model)
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    return QuietStarConfig(f"{name.split('/')[-1]}-QuietStar")


def prepare_to_train(model, args: QuietStarConfig, needs_weights: bool) -> ThinkingModel:
    """
    Freezes the heads that the options do not train, and switches dropout off where they say so.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The thinking model; changed in place.
        args ([`QuietStarConfig`]):
            The options.
        needs_weights (`bool`):
            Whether something beside the heads must be left to train.

    Returns:
        [`ThinkingModel`]: The causal LM itself, inside a `PeftModel` or not.

    Raises:
        `ValueError`: if nothing is.
    """
    base = base_of(model)
    if needs_weights:
        check_trainable(model)
        _warn_of_slow_rate(model, args)
    if args.use_vllm and getattr(base, "hf_quantizer", None) is not None:
        raise ValueError(
            "`use_vllm=True` sends the model with its adapter merged in, which would round the weights of a quantized one anew; "
            "load it without quantization, or leave `use_vllm` out."
        )
    if args.disable_dropout:
        disable_dropout(model)
    if not args.uses_value_head:  # an unused head would stall DDP and drift under weight decay
        base.quietstar.value_head.requires_grad_(False)
    if args.reward_prediction == "thought":
        base.quietstar.mixing_head.requires_grad_(False)
    if args.thought_format == "text":
        base.quietstar.start_embedding.requires_grad_(False)
        base.quietstar.end_embedding.requires_grad_(False)
    return base


def _warn_of_slow_rate(model, args: QuietStarConfig) -> None:
    is_slow = 0 < args.learning_rate < SLOW_RATE and args.muon_learning_rate is None
    if is_slow and is_peft_model(model) and isinstance(model.peft_config["default"], LoraConfig):
        logger.warning(
            "`learning_rate` is %g, at which LoRA hardly learns: its matrices begin at zero. Take 1e-4 to 4e-4, or train all weights.",
            args.learning_rate,
        )


def disable_dropout(model) -> None:
    """Turns off dropout, of layers as TRL does and of attention, which families keep as a number."""
    disable_dropout_in_model(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


# Its tokenizer


def _own_tokenizer(
    base: ThinkingModel, source: str | None, hub: dict, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model or adapter that was asked for, or that of the base, in the revision that was loaded."""
    if source is not None and has_file(source, "tokenizer_config.json", hub):
        return load_tokenizer(source, trust_remote_code=trust_remote_code, **hub)
    return load_tokenizer(get_config_model_id(base.config), trust_remote_code=trust_remote_code, **base._loaded_by)


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


def _warn_of_other_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Says that a tokenizer with far fewer tokens than the model has embeddings is likely that of another model. Some embeddings
    without a token are common: tables are filled up to round sizes."""
    if len(tokenizer) < vocab_size / 2:
        logger.warning(
            "The tokenizer has %d tokens and the model's vocabulary %d: it is likely that of another model, to which the ids mean "
            "other words. Give the model's own as `processing_class`.",
            len(tokenizer),
            vocab_size,
        )


def _pad_within(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Pads with the EOS token in place of one that the model does not have. The Trainer copies the id of padding into the model's
    configuration, and no saved model could be loaded with an id beyond its embeddings."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= vocab_size:
        logger.warning(
            "The pad token %r has the id %d, and the model's vocabulary %d: the EOS token pads in its place. To keep it, resize "
            "the model's embeddings.",
            tokenizer.pad_token,
            tokenizer.pad_token_id,
            vocab_size,
        )
        eos = tokenizer.eos_token_id
        tokenizer.pad_token = tokenizer.eos_token if eos is not None and eos < vocab_size else None


def pad_token_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """Chooses an id to pad with. Any that the model has will do: padding is masked everywhere."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None and token_id < vocab_size:
            return token_id
    return 0
