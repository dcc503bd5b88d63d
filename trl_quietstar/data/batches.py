"""Rows of tokens as padded batches, and the order in which they come."""

import torch
from datasets import Dataset, IterableDataset
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import pack_dataset
from trl.trainer.utils import RepeatSampler, pad

from .._compat import DataCollatorForLanguageModeling
from ..config import QuietStarConfig


# The texts that batches are made of.
TEXT_COLUMNS = ("input_ids", "labels", "seq_lengths", "thought_mask", "score_mask")
# Written thoughts of each row, where data hold any: the token ids of each, and the index of the token that it follows.
WRITTEN_COLUMNS = ("written_ids", "written_at")
# All columns that batches are made of.
OWN_COLUMNS = (*TEXT_COLUMNS, *WRITTEN_COLUMNS)
# All columns with a value for each token. No reward function takes them, since it is given the batch made of them.
TOKEN_COLUMNS = (*TEXT_COLUMNS, "attention_mask", "position_ids", "completion_mask", "assistant_masks")


class TextCollator(DataCollatorForLanguageModeling):
    """
    Pads rows to a batch as TRL's collator does, with position ids that restart at each packed document.

    A batch has `input_ids`, `labels`, `attention_mask` and `position_ids` of shape `(B, T)`, and `thought_mask` and
    `score_mask` of that shape where rows have them. Where rows have written thoughts, it has `written_ids` of shape `(B, K, L)` and `written_at` of shape
    `(B, K)`, with -1 where there is none; K is at least 1.

    Args:
        pad_token_id (`int`):
            Any valid id.
        with_columns (`bool`):
            Whether the batch also holds the other columns of the rows, under `columns`: by its name, a list of B values.
    """

    def __init__(self, pad_token_id: int, with_columns: bool = False):
        super().__init__(pad_token_id, return_position_ids=True)
        self.with_columns = with_columns

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = super().torch_call(examples)
        for mask in ("thought_mask", "score_mask"):
            if mask in examples[0]:
                batch[mask] = pad([torch.tensor(example[mask]) for example in examples])
        if "written_ids" in examples[0]:
            batch["written_ids"], batch["written_at"] = padded_thoughts(examples)
        others = [name for name in examples[0] if name not in (*TOKEN_COLUMNS, *WRITTEN_COLUMNS)]
        if self.with_columns and others:
            batch["columns"] = {name: [example[name] for example in examples] for name in others}
        return batch


def packed(
    dataset: Dataset | IterableDataset, columns: list[str], args: QuietStarConfig, workers: dict
) -> Dataset | IterableDataset:
    """
    Several texts in a row, as `SFTTrainer` packs them, with all the columns of tokens that are named.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows of tokens.
        columns (`list[str]`):
            Columns with a value for each token, which are packed; others are left out.
        args ([`QuietStarConfig`]):
            Tells how, and whether rows are shuffled before and after.
        workers (`dict`):
            Keyword arguments of `dataset.map`.
    """
    assert args.max_length is not None  # without which `packing` is refused
    dataset = dataset.select_columns(columns)
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, workers)
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


def padded_thoughts(examples: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """`written_ids` of shape `(B, K, L)` and `written_at` of shape `(B, K)` of rows, padded with -1; K and L are at least 1."""
    K = max([1, *(len(example["written_at"]) for example in examples)])
    L = max([1, *(len(ids) for example in examples for ids in example["written_ids"])])
    token_ids, at = torch.full((len(examples), K, L), -1), torch.full((len(examples), K), -1)
    for row, example in enumerate(examples):
        at[row, : len(example["written_at"])] = torch.tensor(example["written_at"], dtype=torch.long)
        for k, ids in enumerate(example["written_ids"]):
            token_ids[row, k, : len(ids)] = torch.tensor(ids)
    return token_ids, at


class RepeatedRows(RepeatSampler):
    """
    Repeats rows as TRL's sampler does, in an order that depends on the seed and the epoch alone: a resumed run finds it again.

    Args:
        args, kwargs:
            As for [`~trl.trainer.utils.RepeatSampler`].
        lengths (`list[int]`, *optional*):
            Number of tokens of each row. If given, the rows of a batch are about equally long, in the order of Transformers'
            `group_by_length`.
    """

    def __init__(self, *args, lengths: list[int] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.lengths = lengths
        if lengths is not None:  # the parent then yields places 0, 1, 2, ... in an order that is made here
            self.shuffle, self.order = False, torch.Generator().manual_seed(self.seed or 0)

    def __iter__(self):
        if self.lengths is None:
            return super().__iter__()
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=self.order)
        return (order[place] for place in super().__iter__())

    def set_epoch(self, epoch: int) -> None:
        if self.lengths is not None:
            self.order.manual_seed((self.seed or 0) + epoch)
        elif self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)
