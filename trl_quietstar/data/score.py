"""Scores: the part of a completion that rewards look at, such as the final answer after a worked solution.

Rows give it in a column `score`, and `score_pattern` finds it in texts. [`FindScore`] comes before TRL's preparation, since it
reads whole texts, and [`Mark`] after it: it makes a mask of the score's tokens, and cuts rows to `max_length`, which TRL then
does not do. Rows of token ids have the mask itself, `score_mask`.
"""

import re
from dataclasses import dataclass

from datasets import Dataset, IterableDataset
from transformers.utils import logging
from trl.data_utils import common_prefix_length

from ..config import QuietStarConfig
from .places import Places
from .rows import Run, has_score, refusal, shown


logger = logging.get_logger(__name__)

SPAN = "tokens of the score"  # a column between the two steps: the first of them, and the one after the last
EVERY = 2**31 - 1  # above the number of tokens of any row
UNSCORED = (
    "have no token that is both scored and predicted, and thoughts earn nothing in them: `score_pattern` has no match there, "
    "`score_mask` is 0, or `max_length` or the labels leave out what is scored"
)


def holds_scores(
    dataset: Dataset | IterableDataset, first: dict, names: list[str], kind: str, args: QuietStarConfig, name: str
) -> bool:
    """
    Whether rewards look at a part of the texts only, by the columns of a dataset and the options.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        first (`dict`):
            The first row of a stream.
        names (`list[str]`):
            All columns of the dataset.
        kind (`str`):
            Kind of data, as [`~data.rows.columns_read`] gives it.
        args ([`QuietStarConfig`]):
            Configuration of the trainer.
        name (`str`):
            Name of the dataset, for messages.

    Raises:
        `ValueError`: if the data or the options have no place for a score, or two.
    """
    has_pattern, has_column = args.score_pattern is not None, "score" in names
    if has_column and not is_text(dataset, first, "score"):
        logger.warning(
            f"The column 'score' of the {name} dataset holds no strings, and is left alone: a score is a part of the completion."
        )
        has_column = False
    if kind == "input_ids" and (has_pattern or has_column):
        source = "`score_pattern` finds" if has_pattern else "'score' stands for"
        raise ValueError(
            f"The {name} dataset holds token ids, in which {source} nothing; leave it out, and give a `score_mask`, or give text."
        )
    if kind != "input_ids" and "score_mask" in names:
        raise ValueError(
            f"The {name} dataset has a `score_mask` for each token, which needs `input_ids` beside it; give a 'score', which is a "
            "part of the completion, or set `score_pattern`."
        )
    if has_pattern and has_column:
        raise ValueError(
            f"The {name} dataset has the column 'score', and `score_pattern` is set; leave out the one or the other."
        )
    return has_pattern or has_column


def is_text(dataset: Dataset | IterableDataset, first: dict, column: str) -> bool:
    """Whether a column holds strings or nothing: by the types of a dataset, or the `first` row of a stream."""
    if isinstance(dataset, Dataset):
        return getattr(dataset.features[column], "dtype", None) in ("string", "large_string", "null")
    return first[column] is None or isinstance(first[column], str)


def find_scores(dataset: Dataset | IterableDataset, step: "FindScore", **workers) -> Dataset | IterableDataset:
    """
    The dataset with the tokens of each row's score, for [`Mark`].

    Raises:
        `ValueError`: if the pattern has no match in any row of a dataset.
    """
    dataset = dataset.map(step, with_indices=True, **workers)
    if step.pattern is None or isinstance(dataset, IterableDataset):
        return dataset
    if not any(first < end for first, end in dataset[SPAN]):
        _, text = step.searched(dataset[0], 0)
        found = f"no match of `score_pattern` ({step.pattern!r}) in {shown(text)}, and no other row has one"
        raise refusal(0, step.name, found, "change the pattern, or leave it out")
    return dataset


@dataclass
class FindScore(Places):
    """
    Finds the tokens of a row's score: a function for `dataset.map(..., with_indices=True)`.

    Args:
        name, kind, text_field, is_conversation, tokenizer:
            As in [`~data.places.Places`].
        pattern (`str`, *optional*):
            Regular expression of scores within texts; without one they are in the column `score`.

    Raises:
        `ValueError`: for a score that is no part of what it scores.
    """

    pattern: str | None

    def __call__(self, row: dict, index: int) -> dict:
        if self.pattern is None and row["score"] is None:  # all of it is scored
            return {SPAN: [0, EVERY]}
        turn, text = self.searched(row, index)
        place = self._place(row, index, text) if self.pattern is None else last_match(text, self.pattern)
        if place is None:
            return {SPAN: [0, 0]}
        whole, (first, end) = self._text(row, index), place
        if self.is_conversation:
            first, end = (len(self._up_to(row, index, whole, turn, at)) for at in (first, end))
        elif self.kind == "prompt":
            first, end = (len(row["prompt"]) + at for at in (first, end))
        if first == end:
            fix = "score something that it writes"
            raise self._refusal(index, "a score that the chat template leaves out", fix)
        return {SPAN: self._tokens(whole, first, end)}

    def searched(self, row: dict, index: int) -> tuple[int, str]:
        """The completion, the text or the assistant's last turn, with the number of its message."""
        if not self.is_conversation:
            return 0, row[self.text_field if self.kind == "text" else "completion"]
        turns = self._turns(row)
        if not turns:
            return 0, ""
        content = self._messages(row)[turns[-1]].get("content") or ""
        if not isinstance(content, str):
            raise self._refusal(index, "a score in a message of parts", "give the content of that message as a string")
        return turns[-1], content

    def _place(self, row: dict, index: int, text: str) -> tuple[int, int]:
        """The last occurrence of what the column holds."""
        given = row["score"]
        first = text.rfind(given) if given else -1
        if first < 0:
            fix = "give a part of what is predicted, as it stands there, or None; or rename the column"
            raise self._refusal(index, f"{shown(given)} in 'score', which does not occur in {shown(text)}", fix)
        return first, first + len(given)

    def _tokens(self, whole: str, first: int, end: int) -> list[int]:
        """
        The tokens that characters of a text reach into: the index of the first, and that after the last. They begin with the last
        token from which on all of the characters are left: the text before them alone may have fewer tokens in common, as its line
        breaks may join to one. They end where the text up to a character has the same tokens as there, so that none reaches over
        it.
        """
        own = self._ids(whole)
        given = self._ids(whole, add_special_tokens=not self.is_conversation)
        before = next((at for at in range(len(given)) if given[at : at + len(own)] == own), 0)  # a BOS token, for one
        start, stop, rest = common_prefix_length(self._ids(whole[:first]), own), len(own), whole[first:]
        while str(self.tokenizer.decode(own[start + 1 :])).endswith(rest):
            start += 1
        for place in range(end, len(whole)):
            ids = self._ids(whole[:place])
            if own[: len(ids)] == ids:
                stop = len(ids)
                break
        return [before + start, before + stop]


def last_match(text: str, pattern: str) -> tuple[int, int] | None:
    """
    Where a pattern finds the score of a text: the first and the last character, plus one, of its group 1, or of the whole match if
    the pattern has no group, in its last match. None: there is no match, or nothing in it.
    """
    last = None
    for match in re.finditer(pattern, text):
        last = match.span(1 if match.re.groups else 0)
    return last if last is not None and last[0] < last[1] else None


@dataclass
class Mark:
    """
    Makes a mask of the tokens that [`FindScore`] found, over the whole row, and cuts the row: a function for `dataset.map`.

    Args:
        max_length (`int`, *optional*):
            Most tokens of a row. None: it is not cut here.
        keep_end (`bool`):
            Whether a longer row is cut at its beginning.
    """

    max_length: int | None
    keep_end: bool

    def __call__(self, row: dict) -> dict:
        ids, (first, end), most = row["input_ids"], row[SPAN], self.max_length
        kept = slice(None) if most is None else slice(-most, None) if self.keep_end else slice(most)
        mask = [int(first <= at < end) for at in range(len(ids))]
        return {"input_ids": ids[kept], "labels": row["labels"][kept], "score_mask": mask}


@dataclass
class _Scored:
    """Whether a row has a token that is scored and predicted; of a stream all rows stay, and a warning tells of the first
    without."""

    name: str
    run: Run | None

    def __call__(self, row: dict) -> bool:
        found = has_score(row)
        if self.run is None:
            return found
        self.run.add()
        if found:
            self.run.length = 0
        else:
            logger.warning_once(f"Some rows of the {self.name} dataset {UNSCORED}.")
        return True


def checked_scores(dataset: Dataset | IterableDataset, name: str, **workers) -> Dataset | IterableDataset:
    """
    The prepared dataset; a warning says in how many rows thoughts earn nothing.

    Raises:
        `ValueError`: if there are no others; for a stream, once thousands of such rows have come in a row.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_Scored(name, Run(name, UNSCORED)))
    scored = len(dataset.filter(_Scored(name, None), **workers))
    if scored == 0:
        raise ValueError(f"All {len(dataset):,} rows of the {name} dataset {UNSCORED}; look at what is scored.")
    if scored < len(dataset):
        logger.warning(f"{len(dataset) - scored:,} of {len(dataset):,} rows of the {name} dataset {UNSCORED}.")
    return dataset
