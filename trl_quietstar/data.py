"""Datasets in, padded texts out; what cannot be trained on is refused here, before any compute."""

from itertools import repeat

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from trl.trainer.utils import RepeatSampler, pad

from ._compat import DataCollatorForLanguageModeling, prepare_dataset
from .config import QuietStarConfig
from .paths import position_offset


class TextCollator(DataCollatorForLanguageModeling):
    """
    TRL's collator, with position ids that restart at each packed document and the optional `thought_mask` column.

    Args:
        pad_token_id (`int`):
            Any valid id.
    """

    def __init__(self, pad_token_id: int):
        super().__init__(pad_token_id, return_position_ids=True)

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = super().torch_call(examples)
        if "thought_mask" in examples[0]:
            batch["thought_mask"] = pad([torch.tensor(example["thought_mask"]) for example in examples])
        return batch


class RepeatedRows(RepeatSampler):
    """TRL's sampler, in an order that depends on the epoch alone, so that a resumed run finds it again."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


def prepare_texts(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: QuietStarConfig,
    name: str,
    packing: bool = False,
) -> Dataset | IterableDataset:
    """
    Tokenizes, cuts and masks a dataset as `SFTTrainer` does, and drops texts with no token to predict.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            With a text column, `prompt` and `completion`, `messages`, or `input_ids`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The processing class.
        args ([`QuietStarConfig`]):
            Lengths and masks.
        name (`str`):
            For messages: "train" or "eval".
        packing (`bool`):
            Whether to pack.

    Returns:
        The dataset with `input_ids`, `labels` and, when packed, `seq_lengths`.

    Raises:
        `TypeError`: if it is not a dataset.
        `ValueError`: if it is empty, lacks the columns, or holds no usable thought position.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(f"The {name} dataset is a `{type(dataset).__name__}`; give a `datasets.Dataset` or a stream.")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} dataset is empty; give at least one text.")
    _check_columns(first, args.dataset_text_field, name)
    completion_only = args.completion_only_loss
    if completion_only is None:
        completion_only = "prompt" in first and "completion" in first
    if "thought_mask" in first and (packing or "input_ids" not in first):
        raise ValueError(
            f"The {name} dataset has a `thought_mask` for each token, which needs `input_ids` beside it and no packing."
        )
    dataset = prepare_dataset(dataset, tokenizer, args, completion_only, packing, name)
    if "thought_mask" in first:
        dataset = dataset.map(_cut_mask, fn_kwargs={"keep_end": args.truncation_mode == "keep_end"})
    usable = dataset.filter(_has_position)
    if next(iter(usable), None) is None:
        raise ValueError(
            f"No text of the {name} dataset has a usable thought position: each needs a token whose next token is to "
            "be predicted. Texts are too short, or `max_length`, `completion_only_loss` or the labels mask everything."
        )
    return dataset if "thought_mask" in first else usable


def _check_columns(example: dict, text_field: str, name: str) -> None:
    columns = set(example)
    wanted = [{"input_ids"}, {text_field}, {"prompt", "completion"}, {"messages"}, {"conversations"}]
    if not any(group <= columns for group in wanted):
        raise ValueError(
            f"The {name} dataset has the columns {sorted(columns)}; it needs {text_field!r} (see "
            "`dataset_text_field`), 'prompt' and 'completion', 'messages', or 'input_ids'."
        )


def _cut_mask(example: dict, keep_end: bool) -> dict:
    """Cuts the mask as the text was cut."""
    length = len(example["input_ids"])
    return {"thought_mask": example["thought_mask"][-length:] if keep_end else example["thought_mask"][:length]}


def _has_position(example: dict) -> bool:
    predicted = (label != -100 for label in example["labels"][1:])
    return any(p and m for p, m in zip(predicted, example.get("thought_mask") or repeat(1), strict=False))


def max_positions(config: PreTrainedConfig) -> int | None:
    """Positions the model has for text, or None where its configuration names no limit (or -1)."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None or limit < 0 else limit - position_offset(config)


def check_length(longest: int, thought_length: int, limit: int | None) -> None:
    """
    Whether a text of `longest` tokens fits a model of `limit` positions with a thought before its last token.

    A branch replaces the last text token by start, thought and end: `longest + thought_length + 1` positions.

    Raises:
        `ValueError`: if it does not fit.
    """
    if limit is not None and longest + thought_length + 1 > limit:
        raise ValueError(
            f"A text of {longest} tokens with `thought_length` {thought_length} and its start and end needs "
            f"{longest + thought_length + 1} positions, and the model has {limit}; lower `max_length` to "
            f"{limit - thought_length - 1}."
        )


def longest_text(dataset: Dataset | IterableDataset, max_length: int | None) -> int | None:
    """Tokens of the longest document; for a stream `max_length`, which may be None."""
    if isinstance(dataset, IterableDataset):
        return max_length
    if "seq_lengths" in dataset.column_names:
        return max(max(lengths) for lengths in dataset["seq_lengths"])
    return max(len(ids) for ids in dataset["input_ids"])
