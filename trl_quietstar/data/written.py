"""Written thoughts: those that data hold, to be imitated where the model will later write its own.

Rows of prompts and messages give them in a column `thought`, and `thought_pattern` takes them out of texts. [`TakeOut`] comes
before TRL's preparation: it makes tokens of each thought, and finds the token of the text that it follows. [`Cut`] comes after:
it cuts rows and their thoughts to `max_length`, which TRL then does not do.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl.data_utils import common_prefix_length

from ..config import QuietStarConfig
from ..thinking.drawing import check_endings, thought_end
from .batches import WRITTEN_COLUMNS
from .places import Places
from .rows import KINDS, refusal


logger = logging.get_logger(__name__)

NUMBER = "number of the row"  # a column between the two steps, since TRL may shuffle rows
LISTS = List(List(Value("int64")))  # of token ids; the first rows, if they hold no thoughts, do not tell
NO_TOKEN = 2**31 - 1  # fills a row of token ids where there is no token; above the ids of any tokenizer

# a thought's place, which is the number of a message (0 in plain text) and of a character of it, and the thought
Found = tuple[tuple[int, int], str]


def holds_thoughts(
    names: list[str],
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    args: QuietStarConfig,
    name: str,
    packing: bool,
) -> bool:
    """
    Whether rows of a dataset may hold written thoughts, by its columns and the options.

    Args:
        names (`list[str]`):
            All columns of the dataset.
        kind (`str`):
            Kind of data, as [`~data.rows.columns_read`] gives it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        args ([`QuietStarConfig`]):
            Configuration of the trainer.
        name (`str`):
            Name of the dataset, for messages.
        packing (`bool`):
            Whether several texts are packed into a row.

    Raises:
        `ValueError`: if the data or the options have no place for such thoughts.
    """
    for column in WRITTEN_COLUMNS:
        if column in names:
            raise ValueError(
                f"The {name} dataset has the column {column!r}, which preparation itself makes of thoughts that are text; "
                "rename it, or give texts with thoughts."
            )
    has_column, has_pattern = "thought" in names, args.thought_pattern is not None
    if not has_column and not has_pattern:
        return False
    if has_column and (has_pattern or kind in ("text", "input_ids")):
        beside = "`thought_pattern` is set" if has_pattern else f"{kind!r}, where such thoughts have no place"
        fix = (
            "leave out the one or the other" if has_pattern else "give 'prompt' and 'completion', or rename the column"
        )
        raise ValueError(f"The {name} dataset has the column 'thought', and {beside}; {fix}.")
    if kind == "input_ids":
        raise ValueError(
            f"The {name} dataset holds token ids, in which `thought_pattern` finds nothing; leave it out, or give text."
        )
    if packing:
        raise ValueError(f"The {name} dataset has the column 'thought', which packing loses; set `packing=False`.")
    if args.min_thought_length is None:
        # not known with the options: the commands take what a saved model says of its thoughts
        source = "`thought_pattern`" if has_pattern else f"The column 'thought' of the {name} dataset"
        raise ValueError(
            f"{source} gives thoughts that end as their writers ended them, and sampled thoughts would not end early; set "
            "`min_thought_length`, with which the EOS token ends a thought, or `thought_stop_string`."
        )
    check_endings(args.settings(), tokenizer)
    return True


def take_out(
    dataset: Dataset | IterableDataset,
    kind: str,
    is_conversation: bool,
    tokenizer: PreTrainedTokenizerBase,
    args: QuietStarConfig,
    name: str,
    **workers,
) -> Dataset | IterableDataset:
    """The dataset, its texts without their written thoughts, which stand in `written_ids` and `written_at` for [`cut`]."""
    step = TakeOut(
        name,
        kind,
        args.dataset_text_field,
        is_conversation,
        tokenizer,
        args.thought_pattern,
        args.thought_stop_string,
        args.min_thought_length or 1,
        args.longest_thought,
        args.thought_suppress_tokens or [],
    )
    if isinstance(dataset, IterableDataset):
        return dataset.map(step, with_indices=True)
    own = {"written_ids": LISTS, "written_at": List(Value("int64")), NUMBER: Value("int64")}
    return dataset.map(step, with_indices=True, features=Features({**dataset.features, **own}), **workers)


def cut(dataset: Dataset | IterableDataset, args: QuietStarConfig, name: str, **workers) -> Dataset | IterableDataset:
    """
    The prepared dataset, cut to `max_length`. The columns of written thoughts stay, unless it is known at once that no row has
    one.
    """
    dataset = dataset.map(
        Cut(name, args.max_length, args.truncation_mode == "keep_end", args.thought_positions == "prompt_end"),
        **workers,
    )
    dataset = dataset.remove_columns(NUMBER)
    if isinstance(dataset, IterableDataset) or any(dataset["written_at"]):
        return dataset
    logger.warning(f"No row of the {name} dataset has a written thought.")
    return dataset.remove_columns(list(WRITTEN_COLUMNS))


@dataclass
class TakeOut(Places):
    """
    Takes the written thoughts of a row out of it: a function for `dataset.map(..., with_indices=True)`.

    Args:
        name, kind, text_field, is_conversation, tokenizer:
            As in [`~data.places.Places`].
        pattern (`str`, *optional*):
            Regular expression of thoughts within texts; without one they are in the column `thought`.
        stop_string (`str`, *optional*):
            String that ends a thought; without one the EOS token does.
        least (`int`), most (`int`):
            Limits of a thought's length, with its ending, in tokens.
        suppressed (`Sequence[int]`):
            Ids of tokens that no thought holds.

    Raises:
        `ValueError`: for a thought that sampling could not have written, or that has no place.
    """

    pattern: str | None
    stop_string: str | None
    least: int
    most: int
    suppressed: Sequence[int] = ()

    def __call__(self, row: dict, index: int) -> dict:
        changed: dict = {}
        if self.pattern is None:
            thoughts = self._from_column(row, index)
        else:
            changed, thoughts = self._from_pattern(row, index, self.pattern)
        row = {**row, **changed}
        tokens = [self._tokens(thought, index) for _, thought in thoughts]
        return {**changed, "written_ids": tokens, "written_at": self._places(row, index, thoughts), NUMBER: index}

    # Thoughts

    def _from_column(self, row: dict, index: int) -> list[Found]:
        given = row["thought"]
        thoughts = [given] if isinstance(given, str) else given or []
        if not thoughts:
            return []
        if not self.is_conversation:
            return [((0, len(row["prompt"])), thought) for thought in thoughts if thought]
        turns = self._turns(row)
        if not turns:
            raise self._refusal(
                index, "a 'thought' and no turn of the assistant's", "leave out the one, or add the other"
            )
        return [((turns[-1], 0), thought) for thought in thoughts if thought]

    def _from_pattern(self, row: dict, index: int, pattern: str) -> tuple[dict, list[Found]]:
        """Also the columns that hold less now."""
        if self.is_conversation:
            return self._from_turns(row, index, pattern)
        column = self.text_field if self.kind == "text" else "completion"
        first = len(row["prompt"]) if self.kind == "prompt" else 0
        text, found = without_thoughts(row[column], pattern)
        return {column: text}, [((0, first + place), thought) for place, thought in found]

    def _from_turns(self, row: dict, index: int, pattern: str) -> tuple[dict, list[Found]]:
        column = KINDS[self.kind][-1]
        messages, first = list(row[column]), len(row["prompt"]) if self.kind == "prompt" else 0
        thoughts = []
        for turn in self._turns(row):
            message = messages[turn - first]
            content = message.get("content") or ""
            if not isinstance(content, str):
                if re.search(pattern, "".join(part["text"] for part in content), re.DOTALL):
                    fix = "give the content of that message as a string"
                    raise self._refusal(index, "parts of a message in which `thought_pattern` finds a thought", fix)
                continue
            text, found = without_thoughts(content, pattern)
            if text == content:
                continue
            messages[turn - first] = {**message, "content": text}
            thoughts += [((turn, place), thought) for place, thought in found]
        return {column: messages}, thoughts

    # Places

    def _places(self, row: dict, index: int, thoughts: list[Found]) -> list[int]:
        """
        Index of the token that each thought follows: the last one that the row shares with the text before the thought. Where a
        token reaches over the place itself, the thought stands before that token.
        """
        if not thoughts:
            return []
        whole = self._text(row, index)
        ids = self._ids(whole, add_special_tokens=not self.is_conversation)
        places = {}
        for place, _ in thoughts:
            before = self._text_before(row, index, whole, *place) if self.is_conversation else whole[: place[1]]
            own = self._ids(before, add_special_tokens=not self.is_conversation)
            places[place] = common_prefix_length(own, ids) - 1
        if min(places.values()) < 0:
            fix = "a thought follows a token: put text before it, or leave the row out"
            raise self._refusal(index, "a written thought before its first token", fix)
        return [places[place] for place, _ in thoughts]

    def _text_before(self, row: dict, index: int, whole: str, turn: int, character: int) -> str:
        """
        What stands before a place in a conversation: before a turn, what generation would be asked to go on from. A turn without
        anything before it begins where its content does.
        """
        messages = self._messages(row)
        if character == 0 and turn > 0:
            return self._rendered(row, index, messages[:turn], add_generation_prompt=True)
        if not isinstance(messages[turn].get("content"), str):
            fix = "give the content of that message as a string"
            raise self._refusal(index, "a thought before its first message, which holds no string", fix)
        return self._up_to(row, index, whole, turn, character)

    # Tokens

    def _tokens(self, thought: str, index: int) -> list[int]:
        """Token ids of a thought with its ending, as sampling would have ended it."""
        stop = self.stop_string
        if stop is None:
            ids = [*self._ids(thought), self.tokenizer.eos_token_id]
        else:
            ids = self._ids(thought if thought.endswith(stop) else thought + stop)
        ending = "the EOS token" if stop is None else f"`thought_stop_string` ({stop!r})"
        what = f"the written thought {thought if len(thought) <= 60 else thought[:57] + '...'!r}"
        if len(ids) > self.most:
            fix = "raise `thought_length`, or shorten or leave out the thought"
            found = f"{what} of {len(ids)} tokens with its ending, above the limit of {self.most} (`thought_length`)"
            raise self._refusal(index, found, fix)
        if len(ids) < self.least:
            fix = "lower `min_thought_length`, or leave out the thought"
            found = f"{what} of {len(ids)} tokens with its ending, below `min_thought_length` ({self.least})"
            raise self._refusal(index, found, fix)
        for token_id in set(ids).intersection(self.suppressed):
            fix = "leave the thought out, or take the token out of it or of `thought_suppress_tokens`"
            raise self._refusal(index, f"{what}, which holds the suppressed token {token_id}", fix)
        *early, last = self._ends(ids)
        if any(early):
            fix = "a sampled thought would end there: take it out of the thought"
            raise self._refusal(index, f"{what}, which holds {ending} before its end", fix)
        if not last:
            fix = "end thoughts by another string, or by the EOS token (`thought_stop_string=None`)"
            raise self._refusal(index, f"{what}, whose last token does not end it by {ending}", fix)
        return ids

    def _ends(self, ids: list[int]) -> list[bool]:
        """Whether a sampled thought would have ended, for each number of tokens at which it may."""
        rows = [[NO_TOKEN] * (len(ids) - length) + ids[:length] for length in range(self.least, len(ids) + 1)]
        return self._end(torch.tensor(rows)).tolist()

    @functools.cached_property
    def _end(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return thought_end(self.tokenizer, self.stop_string)

    def __getstate__(self) -> dict:  # without what tells an end, which no process can send to another
        return {name: value for name, value in vars(self).items() if name != "_end"}


@dataclass
class Cut:
    """
    Cuts a row and leaves out the thoughts that stood in what is cut: a function for `dataset.map`.

    Args:
        name (`str`):
            Name of the dataset, for messages.
        max_length (`int`, *optional*):
            Most tokens of a row.
        keep_end (`bool`):
            Whether a longer row is cut at its beginning.
        prompt_end (`bool`):
            Whether the model itself only thinks at the end of a prompt; of thoughts elsewhere a warning says so.

    Raises:
        `ValueError`: for a thought that no label follows.
    """

    name: str
    max_length: int | None
    keep_end: bool
    prompt_end: bool

    def __call__(self, row: dict) -> dict:
        ids, labels, places = row["input_ids"], row["labels"], row["written_at"]
        for place in places:
            if labels[place + 1 : place + 2] in ([], [-100]):
                found = f"a written thought after token {place}, whose next token is no label"
                fix = "put a thought before text that is to be predicted, or leave the row out"
                raise refusal(row[NUMBER], self.name, found, fix)
        if self.prompt_end and any(labels[place] != -100 for place in places):
            logger.warning_once(
                f"Some written thoughts of the {self.name} dataset stand within the text that is predicted, and with "
                "`thought_positions='prompt_end'` the model will think once, before it; set `thought_positions='all'`, or give "
                "thoughts that belong before the whole completion."
            )
        first, end = 0, len(ids)
        if self.max_length is not None:
            first, end = (max(end - self.max_length, 0), end) if self.keep_end else (0, min(end, self.max_length))
        kept = [k for k, place in enumerate(places) if first <= place < end - 1]
        if len(kept) < len(places):
            logger.warning_once(
                f"Some written thoughts of the {self.name} dataset are left out: they stand where `max_length` "
                f"({self.max_length}) cuts their text."
            )
        return {
            "input_ids": ids[first:end],
            "labels": labels[first:end],
            "written_ids": [row["written_ids"][k] for k in kept],
            "written_at": [places[k] - first for k in kept],
        }


def without_thoughts(text: str, pattern: str) -> tuple[str, list[tuple[int, str]]]:
    """
    A text without what a pattern matches, and the thoughts in there: the place of each in the text that is left, and the
    pattern's group 1, or the whole match if the pattern has no group. A match without a thought is taken out all the same.
    """
    kept, thoughts, end = "", [], 0
    for match in re.finditer(pattern, text, re.DOTALL):
        kept += text[end : match.start()]
        end = match.end()
        thought = match[1] if match.re.groups else match[0]
        if thought:
            thoughts.append((len(kept), thought))
    return kept + text[end:], thoughts
