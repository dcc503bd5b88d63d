"""The only module that touches private names of TRL and Transformers; when one of them moves, this file changes."""

from types import SimpleNamespace

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer


__all__ = [
    "DataCollatorForLanguageModeling",
    "_BaseConfig",
    "_BaseTrainer",
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


def set_unsaved_keys(model: PreTrainedModel, keys: list[str]) -> None:
    """Tells Transformers that `keys` are not part of the model's own checkpoint."""
    model._keys_to_ignore_on_save = set(keys)
