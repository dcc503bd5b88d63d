"""Datasets in, padded texts out; what cannot be trained on is refused here, before any compute."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.trainer.utils import RepeatSampler, pad

from ._compat import DataCollatorForLanguageModeling, prepare_dataset
from .config import QuietStarConfig
from .paths import position_offset
from .rows import RowCheck, columns_read, has_position, has_prediction


logger = logging.get_logger(__name__)


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
    vocab_size: int,
    packing: bool = False,
) -> Dataset | IterableDataset:
    """
    Checks each row, then tokenizes, cuts and masks as `SFTTrainer` does, and drops texts with no token to predict.

    What each kind of bad row comes to stands in docs/bad_input.md.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            With a text column, `prompt` and `completion`, `messages`, or `input_ids`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The processing class.
        args ([`QuietStarConfig`]):
            Lengths and masks.
        name (`str`):
            For messages: "train" or "eval".
        vocab_size (`int`):
            Of the model: ids lie below it.
        packing (`bool`):
            Whether to pack.

    Returns:
        The dataset with `input_ids`, `labels` and, when packed, `seq_lengths`.

    Raises:
        `TypeError`: if it is not a dataset.
        `ValueError`: if it is empty, lacks the columns, contradicts an option, holds a bad row or no usable thought
            position. A bad row of a stream is refused when it comes.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(f"The {name} dataset is a `{type(dataset).__name__}`; give a `datasets.Dataset` or a stream.")
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            f"The {name} dataset has a transform, which would run in preparation; apply it with `.map(...)`."
        )
    dataset = dataset.with_format(None)  # plain lists, not tensors
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} dataset is empty; give at least one text.")
    kind, columns = columns_read(list(first), args.dataset_text_field, name)
    completion_only = _check_masks(first, kind, columns, tokenizer, args, name, packing)
    workers = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
    check = RowCheck(name, kind, columns, tokenizer, vocab_size, args.assistant_only_loss and kind != "input_ids")
    dataset = dataset.filter(check, with_indices=True, **workers).select_columns(columns)
    given = len(dataset) if isinstance(dataset, Dataset) else None

    options = copy.copy(args)
    options.shuffle_dataset = args.shuffle_dataset and not packing
    dataset = prepare_dataset(dataset, tokenizer, options, completion_only, packing=False, name=name)
    masked, packed = "thought_mask" in columns, "seq_lengths" in columns
    if masked or packed:
        dataset = dataset.map(_cut, fn_kwargs={"keep_end": args.truncation_mode == "keep_end"})
    dataset = dataset.filter(_Usable(name, vocab_size, has_prediction, warns=given is None), **workers)
    if next((True for row in dataset if has_position(row)), None) is None:
        raise ValueError(
            f"No text of the {name} dataset has a usable thought position: each needs a token whose next token is to "
            "be predicted. Texts are too short, or `max_length`, `completion_only_loss` or the labels mask everything."
        )
    if given is not None and len(dataset) < given:
        logger.warning(f"{given - len(dataset):,} of {given:,} rows of the {name} dataset {DROPPED}.")
    return prepare_dataset(dataset, tokenizer, args, completion_only, packing, name) if packing else dataset


DROPPED = (
    "are left out, since they have no token to predict from one before it: they hold fewer than two tokens, or "
    "`max_length`, `completion_only_loss` or the labels mask the rest"
)


@dataclass
class _Usable:
    """Lets a tokenized row pass that has something to predict; of a stream, warns at the first that has not."""

    name: str
    vocab_size: int
    wanted: Callable[[dict], bool]
    warns: bool

    def __call__(self, row: dict) -> bool:
        if max(row["input_ids"], default=0) >= self.vocab_size:
            raise ValueError(
                f"The tokenizer gives the id {max(row['input_ids'])} in the {self.name} dataset, and the model's vocabulary "
                f"has {self.vocab_size}; take the model's own tokenizer, or resize its embeddings."
            )
        usable = self.wanted(row)
        if self.warns and not usable:
            logger.warning_once(f"Some rows of the {self.name} dataset {DROPPED}.")
        return usable


def _check_masks(first: dict, kind: str, columns: list[str], tokenizer, args, name: str, packing: bool) -> bool:
    """Whether the loss is confined to completions; refuses options that the data cannot follow."""
    completion_only = args.completion_only_loss
    if completion_only is None:
        completion_only = kind == "prompt" or "completion_mask" in columns
    if "thought_mask" in first and (packing or kind != "input_ids"):
        raise ValueError(
            f"The {name} dataset has a `thought_mask` for each token, which needs `input_ids` beside it and no packing."
        )
    if "seq_lengths" in columns and packing:
        raise ValueError(f"The {name} dataset has `seq_lengths`: it is packed already; set `packing=False`.")
    if completion_only and kind != "prompt" and not {"completion_mask", "labels"} & set(columns):
        raise ValueError(
            f"`completion_only_loss=True` needs 'prompt' and 'completion', or a `completion_mask` or `labels` beside "
            f"`input_ids`; the {name} dataset has {columns}."
        )
    conversation = kind in ("messages", "conversations") or (kind == "prompt" and isinstance(first["prompt"], list))
    if conversation and tokenizer.chat_template is None:
        raise ValueError(
            f"The {name} dataset holds messages, and the tokenizer has no chat template; set `tokenizer.chat_template`."
        )
    if args.assistant_only_loss:
        if not conversation and not {"assistant_masks", "labels"} & set(columns):
            raise ValueError(
                f"`assistant_only_loss=True` needs messages, or `assistant_masks` or `labels` beside `input_ids`; the {name} "
                f"dataset has {columns}."
            )
        if conversation and not re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)):
            raise ValueError(
                "`assistant_only_loss=True` needs a chat template that marks the assistant's turns, with "
                "`{% generation %}` and `{% endgeneration %}`; change the template, or set it to False."
            )
    return completion_only


def _cut(row: dict, keep_end: bool) -> dict:
    """Cuts the mask and the lengths as the text was cut."""
    length, cut = len(row["input_ids"]), {}
    if "thought_mask" in row:
        cut["thought_mask"] = row["thought_mask"][-length:] if keep_end else row["thought_mask"][:length]
    if "seq_lengths" in row:
        lengths, left = [], length
        for document in reversed(row["seq_lengths"]) if keep_end else row["seq_lengths"]:
            lengths.append(min(document, left))
            left -= lengths[-1]
        lengths = [document for document in lengths if document > 0]
        cut["seq_lengths"] = lengths[::-1] if keep_end else lengths
    return cut


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


def check_amount(dataset: Dataset | IterableDataset, args: QuietStarConfig) -> None:
    """
    Whether there is anything to train on, and an end to it.

    Raises:
        `ValueError`: for a stream without `max_steps`, or fewer rows than a batch that must be full.
    """
    if isinstance(dataset, IterableDataset):
        if args.max_steps < 1:
            raise ValueError(
                f"A stream has no length, and `max_steps` is {args.max_steps}; set it to the steps to train."
            )
        return
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and len(dataset) < batch:
        raise ValueError(
            f"`dataloader_drop_last=True` drops all {len(dataset)} rows of the train dataset, fewer than a batch of "
            f"{batch}; lower `per_device_train_batch_size`, or leave it out."
        )


def longest_text(dataset: Dataset | IterableDataset, max_length: int | None) -> int | None:
    """Tokens of the longest document; for a stream `max_length`, which may be None."""
    if isinstance(dataset, IterableDataset):
        return max_length
    if "seq_lengths" in dataset.column_names:
        return max(max(lengths) for lengths in dataset["seq_lengths"])
    return max(len(ids) for ids in dataset["input_ids"])
