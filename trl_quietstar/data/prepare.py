"""Datasets as rows of tokens: each row is checked, tokenized, cut and masked; what cannot be trained on is refused."""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from datasets import Dataset, IterableDataset, LargeList, List
from pyarrow.compute import list_value_length
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.chat_template_utils import get_training_chat_template

from .._compat import prepare_dataset
from ..config import QuietStarConfig
from ..learning.reward_functions import RewardFunctions
from ..model.family import check_length, max_positions
from ..model.marks import Marks
from .batches import OWN_COLUMNS, TOKEN_COLUMNS, WRITTEN_COLUMNS, packed
from .columns import kept_columns, no_dataset, warn_of_reasoning, warn_of_unread
from .rows import DROPPED, MOST_UNUSABLE, RowCheck, Run, UsableRow, as_message, columns_read, has_position
from .score import SPAN, FindScore, Mark, checked_scores, find_scores, holds_scores
from .written import cut, holds_thoughts, take_out


logger = logging.get_logger(__name__)

# Columns that are checked and then left out.
CHECKED_ALONE = ("attention_mask", "position_ids")
ASIDE = "kept "  # put before a column's name, so that no library takes the column for one that it knows


def prepare_texts(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: QuietStarConfig,
    name: str,
    vocab_size: int,
    packing: bool = False,
    reward_functions: RewardFunctions | None = None,
) -> Dataset | IterableDataset:
    """
    Checks each row, then tokenizes, cuts and masks as `SFTTrainer` does, and drops texts with no token to predict.

    What happens with each kind of bad row stands in docs/bad_input.md.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            With a text column, `prompt` and `completion`, `messages`, or `input_ids`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The processing class.
        args ([`QuietStarConfig`]):
            Configuration of the trainer.
        name (`str`):
            Name of the dataset for messages, "train" or "eval".
        vocab_size (`int`):
            V of the model; ids lie below it.
        packing (`bool`):
            Whether to pack several texts into a row.
        reward_functions ([`~learning.reward_functions.RewardFunctions`], *optional*):
            The columns that they take are kept.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: With the columns `input_ids` and `labels`; `seq_lengths` when
            packed; `score_mask` if rewards look at a part of the texts; `written_ids` and `written_at` if rows hold written
            thoughts; and those that [`kept_columns`] names.

    Raises:
        `TypeError`: if it is not a dataset.
        `ValueError`: if it is empty, lacks the columns, contradicts an option, holds a bad row or no usable thought
            position. A bad row of a stream is refused when it comes.
    """
    dataset, source = _opened(dataset, name, args)
    if args.assistant_only_loss and source.is_conversation:
        tokenizer = _marking_turns(tokenizer)
    completion_only = _is_confined(source, args)
    _check_options(source, completion_only, tokenizer, args, packing)
    is_written = holds_thoughts(source.names, source.kind, tokenizer, args, name, packing)
    kept = kept_columns(source.names, reward_functions, args, name, packing)
    warn_of_unread(dataset, source.first, source.kind, source.names, kept, name)
    workers = {} if source.is_stream else {"num_proc": args.dataset_num_proc}
    run = Run(name, DROPPED) if source.is_stream else None

    dataset = _rows_of_our_own(dataset, source, kept)
    check = _row_check(source, completion_only, tokenizer, args, vocab_size)
    dataset = dataset.filter(_Counted(check, run), with_indices=True, **workers)
    warn_of_reasoning(dataset, source.kind, tokenizer, args, name)
    if kept:
        dataset = dataset.map(_set_aside, fn_kwargs={"columns": kept}, **workers)
    aside = [ASIDE + column for column in kept]
    dataset, source = _as_messages(dataset, source, workers)
    dataset = dataset.select_columns([*(x for x in source.columns if x not in CHECKED_ALONE), *aside])
    given = None if source.is_stream else len(dataset)

    options = copy.copy(args)
    options.shuffle_dataset = args.shuffle_dataset and not packing  # which is for the rows that packing makes
    dataset = _tokenized(dataset, source, completion_only, tokenizer, options, is_written, workers)
    opening = () if source.kind == "input_ids" else Marks.of(args.settings(), tokenizer, vocab_size).unread
    dataset = dataset.filter(UsableRow(name, vocab_size, run, list(opening)), **workers)
    _check_usable(dataset, given, name, args.thought_positions == "prompt_end")
    _warn_of_cuts(dataset, source, args)
    masks = ("score_mask",) if source.is_scored or "score_mask" in source.columns else ()
    if masks:
        dataset = checked_scores(dataset, name, **workers)
    if packing:
        return packed(dataset, ["input_ids", "labels", *masks], args, workers)
    if kept:  # under their own names again
        made = dataset.column_names or WRITTEN_COLUMNS if is_written else ()
        own = [column for column in OWN_COLUMNS if column in ("input_ids", "labels", *masks, *source.columns, *made)]
        dataset = dataset.select_columns([*own, *aside]).rename_columns(dict(zip(aside, kept, strict=True)))
    return dataset


@dataclass
class _Source:
    """What a dataset holds: all its columns (`names`), the `kind` of data and its `columns` that are read."""

    name: str  # for messages: "train" or "eval"
    is_stream: bool
    first: dict  # the first row of a stream; of others its prompt alone, if it has one
    names: list[str]
    kind: str
    columns: list[str]
    is_conversation: bool
    is_scored: bool  # rewards look at a part of the texts, which is found in them


def _opened(dataset, name: str, args: QuietStarConfig) -> tuple[Dataset | IterableDataset, _Source]:
    """The dataset, whose rows are now lists and not tensors, and what it holds by its columns and its first row."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise no_dataset(dataset, name)
    is_stream = isinstance(dataset, IterableDataset)
    if not is_stream and dataset.format["type"] == "custom":
        raise ValueError(
            f"The {name} dataset has a transform, which would run in preparation; apply it with `.map(...)`."
        )
    dataset = dataset.with_format(None)
    if is_stream:
        first = next(iter(dataset), None)
    else:  # only of the column that is looked at below: others may be costly to decode, or not decode at all
        prompt = [column for column in dataset.column_names if column == "prompt"]
        first = None if len(dataset) == 0 else dict(dataset.select_columns(prompt)[0]) if prompt else {}
    if first is None:
        raise ValueError(f"The {name} dataset is empty; give at least one text.")
    names = list(first) if is_stream else dataset.column_names
    features = dataset.features or {}
    lists = [x for x in names if isinstance(first.get(x), list) or isinstance(features.get(x), (List, LargeList))]
    kind, columns = columns_read(names, args.dataset_text_field, name, lists)
    is_conversation = kind in ("messages", "conversations") or (kind == "prompt" and isinstance(first["prompt"], list))
    is_scored = holds_scores(dataset, first, names, kind, args, name)
    if not is_scored or args.score_pattern is not None:
        columns = [column for column in columns if column != "score"]
    return dataset, _Source(name, is_stream, first, names, kind, columns, is_conversation, is_scored)


def _is_confined(source: _Source, args: QuietStarConfig) -> bool:
    """Whether the loss is confined to completions."""
    if args.completion_only_loss is None:
        return source.kind == "prompt" or "completion_mask" in source.columns
    return args.completion_only_loss


def _check_options(
    source: _Source,
    completion_only: bool,
    tokenizer: PreTrainedTokenizerBase,
    args: QuietStarConfig,
    packing: bool,
) -> None:
    """Refuses options that the data cannot follow."""
    name, columns = source.name, source.columns
    if "thought_mask" in source.names and (packing or source.kind != "input_ids"):
        raise ValueError(
            f"The {name} dataset has a `thought_mask` for each token, which needs `input_ids` beside it and no packing."
        )
    if "seq_lengths" in columns and packing:
        raise ValueError(f"The {name} dataset has `seq_lengths`: it is packed already; set `packing=False`.")
    if completion_only and source.kind != "prompt" and not {"completion_mask", "labels"} & set(columns):
        raise ValueError(
            f"`completion_only_loss=True` needs 'prompt' and 'completion', or a `completion_mask` or `labels` beside "
            f"`input_ids`; the {name} dataset has {columns}."
        )
    if source.is_conversation and tokenizer.chat_template is None:
        raise ValueError(
            f"The {name} dataset holds messages, and the tokenizer has no chat template; set `tokenizer.chat_template`."
        )
    if args.assistant_only_loss and not source.is_conversation and not {"assistant_masks", "labels"} & set(columns):
        raise ValueError(
            f"`assistant_only_loss=True` needs messages, or `assistant_masks` or `labels` beside `input_ids`; the {name} "
            f"dataset has {columns}."
        )
    if args.assistant_only_loss and source.is_conversation and not _marks_turns(tokenizer):
        raise ValueError(
            "`assistant_only_loss=True` needs a chat template that marks the assistant's turns, with `{% generation %}` and "
            "`{% endgeneration %}`, or one that TRL has such a template for; change the template, or set it to False."
        )


def _marks_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)))


def _marking_turns(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy of it with the template that TRL trains its family by, where its own does not mark the assistant's
    turns; the tokenizer that is saved keeps its own. As `SFTTrainer` does."""
    if tokenizer.chat_template is None or _marks_turns(tokenizer):
        return tokenizer
    try:
        template = get_training_chat_template(tokenizer)
    except ValueError:  # TRL has none for it
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def _rows_of_our_own(
    dataset: Dataset | IterableDataset, source: _Source, kept: list[str]
) -> Dataset | IterableDataset:
    """The dataset with rows that may be changed. Columns of a map-style dataset that nobody reads are not even decoded."""
    if source.is_stream:
        return dataset.map(_own_row, fn_kwargs={"kind": source.kind})
    return dataset.select_columns(list(dict.fromkeys([*source.columns, *kept])))


def _as_messages(
    dataset: Dataset | IterableDataset, source: _Source, workers: dict
) -> tuple[Dataset | IterableDataset, _Source]:
    """Conversations as messages, which they then are to all that follows."""
    if source.kind != "conversations":
        return dataset, source
    columns = ["messages", *(column for column in source.columns if column != "conversations")]
    dataset = dataset.map(_renamed_messages, remove_columns="conversations", **workers)
    return dataset, replace(source, kind="messages", columns=columns)


def _renamed_messages(row: dict) -> dict:
    return {"messages": [as_message(message) for message in row["conversations"]]}


def _row_check(
    source: _Source,
    completion_only: bool,
    tokenizer: PreTrainedTokenizerBase,
    args: QuietStarConfig,
    vocab_size: int,
) -> RowCheck:
    """The check of each row, by what the dataset holds and what the options ask of it."""
    assistant_only = args.assistant_only_loss and source.kind != "input_ids"
    confining = ("completion_mask", "assistant_masks") if completion_only else ("assistant_masks",)
    masks = tuple(column for column in confining if column in source.columns)
    return RowCheck(
        source.name,
        source.kind,
        source.columns,
        tokenizer,
        vocab_size,
        assistant_only,
        source.is_conversation,
        masks,
    )


def _tokenized(
    dataset: Dataset | IterableDataset,
    source: _Source,
    completion_only: bool,
    tokenizer: PreTrainedTokenizerBase,
    args: QuietStarConfig,
    is_written: bool,
    workers: dict,
) -> Dataset | IterableDataset:
    """Rows of tokens with labels, and with the written thoughts and masks that belong to them, cut to `max_length`."""
    name, kind, keep_end, options = source.name, source.kind, args.truncation_mode == "keep_end", copy.copy(args)
    if is_written:
        dataset = take_out(dataset, kind, source.is_conversation, tokenizer, args, name, **workers)
    if source.is_scored:
        how = (name, kind, args.dataset_text_field, source.is_conversation, tokenizer, args.score_pattern)
        dataset = find_scores(dataset, FindScore(*how), **workers)
    if is_written or source.is_scored:  # whose places are those in whole rows
        options.max_length = None
    dataset = prepare_dataset(dataset, tokenizer, options, completion_only, name)
    if source.is_scored:
        most = None if is_written else args.max_length
        dataset = dataset.map(Mark(most, keep_end), **workers).remove_columns(SPAN)
    if is_written:
        dataset = cut(dataset, args, name, **workers)
    if source.is_scored or {"thought_mask", "score_mask", "seq_lengths"} & set(source.columns):
        dataset = dataset.map(_cut, fn_kwargs={"keep_end": keep_end})
    return dataset


def _own_row(row: dict, kind: str) -> dict:
    """
    A copy of a stream's row, since TRL changes rows in place and a stream may yield the same objects again; with lists in place
    of arrays, tensors and tuples of ids.
    """
    if kind != "input_ids":
        return dict(row)
    return {name: _as_list(value) if name in TOKEN_COLUMNS else value for name, value in row.items()}


def _as_list(value):
    """Lists in place of arrays, tensors and tuples; anything else as it is."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _check_usable(dataset: Dataset | IterableDataset, given: int | None, name: str, prompt_end: bool) -> None:
    """Refuses a dataset without a position for a thought; warns if fewer rows are left than the `given` ones."""
    most = MOST_UNUSABLE if given is None else None
    if not any(has_position(row, prompt_end) for row in islice(dataset, most)):
        if prompt_end and any(has_position(row) for row in islice(dataset, most)):
            raise ValueError(
                f"`thought_positions` is 'prompt_end', and no text of the {name} dataset has a prompt before its labels; give "
                "'prompt' and 'completion', or set `assistant_only_loss=True` for 'messages', or `thought_positions='all'`."
            )
        raise ValueError(
            f"No text of the {name} dataset has a usable thought position: each needs a token whose next token is to "
            "be predicted. Texts are too short, or `max_length`, `completion_only_loss` or the labels mask everything."
        )
    if given is not None and len(dataset) < given:
        logger.warning(f"{given - len(dataset):,} of {given:,} rows of the {name} dataset {DROPPED}.")


def _warn_of_cuts(dataset: Dataset | IterableDataset, source: _Source, args: QuietStarConfig) -> None:
    """Says how many answers may lack their end, which is what they are for; of plain text any part can be trained on."""
    if source.is_stream or source.kind not in ("prompt", "messages"):
        return
    if args.max_length is None or args.truncation_mode == "keep_end":
        return
    count = sum(length >= args.max_length for length in _lengths(dataset))
    if count:
        logger.warning(
            f"{count:,} of {len(dataset):,} rows of the {source.name} dataset have `max_length` ({args.max_length}) tokens or more, and are "
            "cut there: their answers may lack the end. Raise it, or leave such rows out."
        )


def _lengths(dataset: Dataset) -> Iterator[int]:
    """Number of tokens of each row."""
    for rows in dataset.select_columns("input_ids").with_format("arrow").iter(1_000):
        yield from list_value_length(rows["input_ids"]).to_pylist()


def _set_aside(row: dict, columns: list[str]) -> dict:
    """Copies of columns, under names that TRL's preparation leaves alone; it changes messages in place."""
    return {ASIDE + column: copy.deepcopy(row.get(column)) for column in columns}


@dataclass
class _Counted:
    """Checks a row, and counts it if it is a stream's."""

    check: RowCheck
    run: Run | None

    def __call__(self, row: dict, index: int) -> bool:
        if self.run is not None:
            self.run.add()
        return self.check(row, index)


def _cut(row: dict, keep_end: bool) -> dict:
    """Cuts `thought_mask`, `score_mask` and `seq_lengths` to the tokens that are left of their text."""
    length, cut = len(row["input_ids"]), {}
    for column in ("thought_mask", "score_mask"):
        if column in row:
            cut[column] = row[column][-length:] if keep_end else row[column][:length]
    if "seq_lengths" in row:
        lengths, left = [], length
        for document in reversed(row["seq_lengths"]) if keep_end else row["seq_lengths"]:
            lengths.append(min(document, left))
            left -= lengths[-1]
        lengths = [document for document in lengths if document > 0]
        cut["seq_lengths"] = lengths[::-1] if keep_end else lengths
    return cut


def check_longest(longest: int, args: QuietStarConfig, config: PreTrainedConfig, around: int, is_stream=False) -> None:
    """
    Refuses texts that do not fit the model with a thought, in the words of the options that the user gave.

    Args:
        longest (`int`):
            Tokens of the longest text to train on.
        args ([`QuietStarConfig`]), config ([`~transformers.PreTrainedConfig`]):
            Options of the run, and the model's configuration.
        around (`int`):
            As in [`~model.family.check_length`].
        is_stream (`bool`):
            Whether the texts are a stream's, which none has been read of: `longest` is then `args.max_length`.

    Raises:
        `ValueError`: if it does not fit.
    """
    text = thoughts = None
    if is_stream:
        default = ", its default" if args.max_length == QuietStarConfig.max_length else ""
        text = f"A text of a stream may have `max_length` ({args.max_length}{default}) tokens, and"
    if args.longest_thought != args.thought_length:
        thoughts = f"the `thought_length` {args.longest_thought} of a stage of `curriculum`"
    advice = f"{'set' if args.max_length is None else 'lower'} `max_length` to"
    check_length(longest, args.longest_thought, max_positions(config), text, thoughts, advice, around=around)


def check_amount(dataset: Dataset | IterableDataset, args: QuietStarConfig, name: str, trains: bool) -> None:
    """
    Refuses data to train on without an end, and data without a batch.

    Raises:
        `ValueError`: for a stream without `max_steps`, or fewer rows than a batch has where batches must be full.
    """
    if isinstance(dataset, IterableDataset):
        if trains and args.max_steps < 1:
            raise ValueError(
                f"A stream has no length, and `max_steps` is {args.max_steps}; set it to the steps to train."
            )
        return
    option = f"per_device_{'train' if trains else 'eval'}_batch_size"
    batch = getattr(args, option) * args.world_size
    if args.dataloader_drop_last and len(dataset) < batch:
        raise ValueError(
            f"`dataloader_drop_last=True` drops all {len(dataset)} rows of the {name} dataset, fewer than a batch of "
            f"{batch}; lower `{option}`, or leave it out."
        )


def longest_text(dataset: Dataset | IterableDataset, max_length: int | None) -> int | None:
    """Number of tokens of the longest document; for a stream `max_length`, which may be None."""
    if isinstance(dataset, IterableDataset):
        return max_length
    if "seq_lengths" in dataset.column_names:
        return max(max(lengths) for lengths in dataset["seq_lengths"])
    return max(_lengths(dataset))
