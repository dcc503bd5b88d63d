"""The only module that touches private names of TRL, Transformers, Datasets and PyTorch; when one of them moves, this file
changes. It also holds what differs between versions of PyTorch.

Private names of the Trainer that the package overrides are used where they are overridden, too: `TRAINER_HOOKS` lists all of
them.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import is_peft_model
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, IterableDataset, arrow_dataset
from datasets.utils import are_progress_bars_disabled
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from trl.trainer.base_config import _BaseConfig as BaseConfig
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer


__all__ = ["BaseConfig", "DataCollatorForLanguageModeling"]

DICT_FIELDS = BaseConfig._VALID_DICT_FIELDS  # options that a string of JSON may stand for


# The Trainer

# private names of the Trainer that a subclass here overrides: the release of Transformers (or TRL) that first had it as it is
# called today, and what it is overridden for
TRAINER_HOOKS = {
    "_finalize_training": ("5.3", "the end of `train`: old checkpoints are deleted as whole folders"),
    "_get_output_dir": ("4", "a checkpoint is written beside its place"),
    "_get_train_sampler": ("4", "rows come again for each further update on them"),
    "_inner_training_loop": (
        "4",
        "a run begins: in `train`, and for each batch size that `auto_find_batch_size` tries",
    ),
    "_load_best_model": ("4", "the heads of the best checkpoint are read with its weights"),
    "_load_from_checkpoint": ("4", "weights pass through the conversions that they were saved by; heads are read"),
    "_load_optimizer_and_scheduler": ("4", "the rest of a checkpoint is read, once optimizer and scheduler exist"),
    "_load_rng_state": ("4", "experience of a step that updates again is read, by each process"),
    "_name": ("TRL 1", "the method's name in the model card"),
    "_paper": ("TRL 1", "the paper in the model card"),
    "_prepare_inputs": ("4", "a batch stays in the host's memory"),
    "_push_from_checkpoint": ("4", "a checkpoint is uploaded under its final name"),
    "_run_epoch": ("5.3", "loss and patience of the run that is resumed are set, after the Trainer has reset them"),
    "_save_checkpoint": ("4", "a checkpoint is whole or not there"),
    "_save_optimizer_and_scheduler": ("4", "one process writes what FSDP2 has sharded; the reference is saved"),
    "_save_rng_state": ("4", "experience of a step that updates again is saved, by each process"),
    "_set_signature_columns_if_needed": ("4", "columns of the data that are kept are those that the package reads"),
    "_tag_names": ("TRL 1", "tags of the model card and the model"),
}


class BaseTrainer(_BaseTrainer):
    """TRL's base of all trainers, with public names for what is private in the Trainer and is read or called here."""

    model: PreTrainedModel  # or a `PeftModel` around one, which answers to the same names
    _engine: dict[str, Any]  # Accelerate's state of this trainer

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self._engine = dict(vars(self.accelerator.state))

    def take_engine(self) -> None:
        """Puts this trainer's state of Accelerate in place. A process has one for all: options that are made after the trainer, as in
        another cell of a notebook, empty it, and another trainer fills it with a precision of its own."""
        shared = vars(self.accelerator.state)
        shared.clear()
        shared.update(self._engine)

    @property
    def rows_per_batch(self) -> int:
        """Rows of a batch, which `auto_find_batch_size` lowers below what `args` ask for."""
        return self._train_batch_size

    def loss_since_log(self) -> tuple[torch.Tensor, int]:
        """Sum of this process's losses since the Trainer last logged, of shape `()`, and the step of that log."""
        return self._tr_loss, self._globalstep_last_logged

    def restore_loss_since_log(self, loss: float, logged_at: int) -> None:
        """Takes back [`loss_since_log`], where the Trainer has just begun a run."""
        self._tr_loss += loss
        self._globalstep_last_logged = logged_at

    def keep_columns(self, names: list[str]) -> None:
        """Names the columns of the data that the Trainer leaves in place."""
        self._signature_columns = names  # type: ignore[assignment]  # inferred from its first value, None

    def move_model(self) -> None:
        """Puts the model on the run's device, as `train` and `evaluate` would."""
        self._move_model_to_device(self.model, self.args.device)

    def save_locally(self, output_dir: str) -> None:
        """As `save_model`, without an upload to the Hub."""
        self.save_model(output_dir, _internal_call=True)

    def save_checkpoint(self) -> None:
        """Writes a checkpoint of the current step."""
        self._save_checkpoint(self.model_wrapped, trial=None)


# Data


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: BaseConfig,
    completion_only_loss: bool,
    name: str,
) -> Dataset | IterableDataset:
    """
    Tokenizes a dataset exactly as `SFTTrainer` does: text, prompt/completion, conversational or pre-tokenized in; `input_ids`
    and `labels` out.
    """
    trainer: Any = SimpleNamespace(  # all that the method reads of its trainer
        _tokenizer=SimpleNamespace(eos_token=tokenizer.eos_token or ""),  # a tokenizer may have none
        completion_only_loss=completion_only_loss,
        chat_template=None,
    )
    options: Any = args  # read for names that both trainers' options have
    return SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, options, False, None, name)


@contextmanager
def one_bar(title: str, shown: bool = True) -> Iterator[None]:
    """Inside, the bars of Datasets' `map` and `filter` are one, which begins anew for each of them and says what it does."""
    own = arrow_dataset.hf_tqdm
    bars: list[Any] = []
    is_hidden = not shown or are_progress_bars_disabled()

    def next_stage(*args: Any, total: int | None = None, initial: int = 0, desc: str = "Map", **kwargs: Any):
        if not bars:  # none is shown where nothing is done
            bars.append(tqdm(desc=title, total=total, unit=" rows", dynamic_ncols=True, disable=is_hidden))
        stage = "" if desc in ("Map", "Filter") else f": {desc[:1].lower()}{desc[1:]}"
        bars[0].set_description(title + stage, refresh=False)
        bars[0].reset(total)
        bars[0].update(initial)
        return nullcontext(bars[0])

    arrow_dataset.hf_tqdm = next_stage
    try:
        yield
    finally:
        arrow_dataset.hf_tqdm = own
        for bar in bars:
            bar.set_description(title, refresh=False)
            bar.close()


def left_on_host(loader: DataLoader) -> DataLoader:
    """Keeps a prepared data loader from moving its batches to the device; one that gets them from another process has
    them there already."""
    if isinstance(loader, DataLoaderShard):
        loader.device = None
    return loader


def fingerprint(dataset) -> str | None:
    """What tells the contents of a map-style dataset apart from others'; None where it has no such thing."""
    return getattr(dataset, "_fingerprint", None) if isinstance(dataset, Dataset) else None


# Models


# `pipeline` says of each class that is not its own that it is not supported, with a list of two hundred that are, and goes on
logging.getLogger("transformers.pipelines.base").addFilter(
    lambda record: not record.getMessage().startswith("The model 'QuietStar")
)


def set_unsaved_keys(model: PreTrainedModel, keys: list[str]) -> None:
    """Tells Transformers that `keys` are not part of the model's own checkpoint."""
    model._keys_to_ignore_on_save = set(keys)


def find_file(source: str, filename: str, **hub: Any) -> str | None:
    """Local path of a file of a local directory or a Hub repository; None where there is no such file, or no connection."""
    return cached_file(
        source,
        filename,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )


def noted_commit(config: PreTrainedConfig) -> str | None:
    """The commit of the Hub that a configuration was loaded from, which Transformers notes until 5.23."""
    return getattr(config, "_commit_hash", None)


def is_compiled(model: nn.Module) -> bool:
    """Whether `model.compile()` was called on the whole model."""
    return model._compiled_call_impl is not None


def checkpoints_layers(model: PreTrainedModel) -> bool:
    """Whether layers keep only their inputs for the backward pass, which Transformers calls by another name from 5.24 on."""
    if hasattr(PreTrainedModel, "is_activation_checkpointing"):
        return model.is_activation_checkpointing
    return model.is_gradient_checkpointing


def holds_adapter(model: nn.Module) -> bool:
    """Whether Transformers itself put an adapter into the model (`add_adapter`)."""
    return getattr(model, "_hf_peft_config_loaded", False)


def checkpoint_exactly(model: nn.Module) -> None:
    """Has layers that are checkpointed by PyTorch's reentrant way, as `prepare_model_for_kbit_training` sets it, checkpointed
    by the other: the reentrant one loses the gradient from thoughts to the text that they read."""
    for module in model.modules():
        function = vars(module).get("_gradient_checkpointing_func")
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant") is not False:
            options = {**function.keywords, "use_reentrant": False}
            vars(module)["_gradient_checkpointing_func"] = functools.partial(function.func, **options)


def attention_of(model: PreTrainedModel) -> str | None:
    """Name of the attention function that a model's text layers use."""
    return model.config.get_text_config()._attn_implementation


def takes_sdpa(model: PreTrainedModel) -> bool:
    """Whether the family can attend by `sdpa`."""
    return model._supports_sdpa


def can_set_attention(model: PreTrainedModel) -> bool:
    """Whether the family takes its attention function from Transformers' registry."""
    return model._can_set_attn_implementation()


def pad_token(config: GenerationConfig) -> torch.Tensor | None:
    """The id that finished rows are padded with, on the device, once `generate` has prepared it."""
    return config._pad_token_tensor


# Engines


def vllm_generation(**options: Any) -> Any:
    """
    TRL's own class for generation by vLLM, which sends the plain model.

    The heads are left out of what is sent: vLLM knows no such parameters. And an adapter is merged for the time of sending, and taken
    out again by subtraction, which rounds; weights that it was merged into are put back as they were.

    Args:
        options:
            Of `trl.generation.vllm_generation.VLLMGeneration`. It is imported here, because it imports vLLM.
    """
    from trl.generation.vllm_generation import VLLMGeneration

    class Generation(VLLMGeneration):
        def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
            before = [(weight, weight.detach().clone()) for weight in _merged_weights(self.model)]
            try:
                for name, tensor in super()._iter_named_params():
                    if not name.startswith("quietstar."):
                        yield name, tensor
            finally:
                for weight, own in before:
                    weight.data.copy_(own)

    return Generation(**options)


def _merged_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights that `merge_adapter` changes; none without an adapter."""
    if not is_peft_model(model):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return [weight for layer in layers for weight in layer.parameters(recurse=False)]


# PyTorch


def is_slow_in_bf16(device: torch.device) -> bool:
    """
    Whether a device has no instructions for products in bfloat16, so that PyTorch emulates them: GPUs before Ampere, such as a T4,
    whose `torch.cuda.is_bf16_supported()` is true all the same; and processors for which oneDNN has no kernels. On one with AVX2
    alone a forward and backward of SmolLM2-135M under autocast took ten times as long as in float32.
    """
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    supports = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return device.type == "cpu" and supports is not None and not supports()


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, products of float32 are not rounded to TF32 or bfloat16, whatever the user has set; afterwards that holds again."""
    kinds = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]  # the stubs are of an earlier version
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]  # not in the stubs of older releases
        torch.backends.mkldnn.conv,  # type: ignore[attr-defined]  # not in the stubs of older releases
    )
    settings = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        for kind, setting in zip(kinds, settings, strict=True):
            # "none" goes by the setting for all, so that this is followed when it changes
            for_all = torch.backends.fp32_precision  # type: ignore[attr-defined]  # not in the stubs
            kind.fp32_precision = "none" if setting == for_all else setting


def is_fault_of_device(error: Exception) -> bool:
    """Whether an error says that memory ran out or a device failed, and nothing of what was computed."""
    kinds = (
        torch.OutOfMemoryError,
        getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
    )  # the latter from 2.8 on
    faults = ("CUDA error", "HIP error", "XPU error", "NPU error", "cuDNN error", "CUBLAS_STATUS", "not enough memory")
    return isinstance(error, kinds) or should_reduce_batch_size(error) or any(x in str(error) for x in faults)


def keep_attention_cap(model: PreTrainedModel) -> None:
    """Takes a model with a soft-cap on its attention (Gemma 2) off SDPA, which leaves it out. Up to 5.20, Transformers ran it so."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
