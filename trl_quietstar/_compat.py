"""The only module that touches private names of TRL and Transformers; when one of them moves, this file changes. It also
holds what differs between versions of PyTorch."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer


__all__ = [
    "DataCollatorForLanguageModeling",
    "_BaseConfig",
    "_BaseTrainer",
    "fingerprint",
    "full_float32",
    "is_fault_of_device",
    "left_on_host",
    "prepare_dataset",
    "set_unsaved_keys",
]


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: _BaseConfig,
    completion_only_loss: bool,
    packing: bool,
    name: str,
) -> Dataset | IterableDataset:
    """
    Tokenizes a dataset exactly as `SFTTrainer` does: text, prompt/completion, conversational or pre-tokenized in;
    `input_ids`, `labels` and, when packed, `seq_lengths` out.
    """
    trainer = SimpleNamespace(  # all that the method reads of its trainer
        _tokenizer=SimpleNamespace(eos_token=tokenizer.eos_token or ""),  # a tokenizer may have none
        completion_only_loss=completion_only_loss,
        chat_template=None,
    )
    return SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, args, packing, None, name)


@contextmanager
def full_float32():
    """Inside, products of float32 are not rounded to TF32 or bfloat16, whatever the user has set; afterwards that holds again."""
    if not hasattr(torch.backends, "fp32_precision"):  # PyTorch before 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    kinds = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,
        torch.backends.mkldnn.matmul,
        torch.backends.mkldnn.conv,
    )
    settings = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        for kind, setting in zip(kinds, settings, strict=True):
            # "none" goes by the setting for all, so that this is followed when it changes
            kind.fp32_precision = "none" if setting == torch.backends.fp32_precision else setting


def is_fault_of_device(error: Exception) -> bool:
    """Whether an error says that memory ran out or a device failed, and nothing of what was computed."""
    kinds = (
        torch.OutOfMemoryError,
        getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
    )  # the latter from 2.8 on
    faults = ("CUDA error", "HIP error", "XPU error", "NPU error", "cuDNN error", "CUBLAS_STATUS", "not enough memory")
    return isinstance(error, kinds) or should_reduce_batch_size(error) or any(x in str(error) for x in faults)


def left_on_host(loader: DataLoader) -> DataLoader:
    """Keeps a prepared data loader from moving its batches to the device; one that gets them from another process has
    them there already."""
    if isinstance(loader, DataLoaderShard):
        loader.device = None
    return loader


def set_unsaved_keys(model: PreTrainedModel, keys: list[str]) -> None:
    """Tells Transformers that `keys` are not part of the model's own checkpoint."""
    model._keys_to_ignore_on_save = set(keys)


def fingerprint(dataset) -> str | None:
    """What tells the contents of a map-style dataset apart from others'; None where it has no such thing."""
    return getattr(dataset, "_fingerprint", None) if isinstance(dataset, Dataset) else None
