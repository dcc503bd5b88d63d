"""What a row of data may hold.

A bad row is refused before a library reads it; the error names the row's number, the value and the fix. The rows of a dataset
are checked at once, those of a stream as they come.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from numbers import Integral
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .columns import likely_meant


logger = logging.get_logger(__name__)


# The columns that each kind of data needs; it is named after the first. A fifth kind, text, has a column of the user's choice.
KINDS = {
    "input_ids": ("input_ids",),
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
    "conversations": ("conversations",),
}
# The columns that each kind of data may have besides. Columns with other names are not read.
EXTRAS = {
    "text": ("score",),
    "input_ids": (
        "labels",
        "completion_mask",
        "assistant_masks",
        "thought_mask",
        "score_mask",
        "seq_lengths",
        "attention_mask",
        "position_ids",
    ),
    "prompt": ("tools", "chat_template_kwargs", "thought", "score"),
    "messages": ("tools", "chat_template_kwargs", "thought", "score"),
    "conversations": ("tools", "chat_template_kwargs", "thought", "score"),
}
# Keys of messages and roles in conversations, in the format of ShareGPT, and what they are in messages.
KEYS = {"from": "role", "value": "content"}
ROLES = {"human": "user", "gpt": "assistant"}
MASKS = ("completion_mask", "assistant_masks", "thought_mask", "score_mask", "attention_mask")
MAY_BE_NONE = ("tools", "thought", "score")
# Arguments of a chat template that are the preparation's, and that a row must not give.
OF_PREPARATION = {"tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask"}
# Columns that a text may refer to and a causal LM cannot see, so that the text alone would mean something else.
PICTURES = ("image", "images", "pixel_values", "video", "videos")


def columns_read(columns: list[str], text_field: str, name: str, lists: Collection[str] = ()) -> tuple[str, list[str]]:
    """
    The kind of data that a dataset holds, and its columns that are read.

    Args:
        columns (`list[str]`):
            All columns of the dataset.
        text_field (`str`):
            Name of the column of plain text.
        name (`str`):
            Name of the dataset, for messages.
        lists (`Collection[str]`):
            Columns whose values are lists.

    Returns:
        `tuple[str, list[str]]`: A key of `KINDS` or `"text"`, and the columns that are read.

    Raises:
        `ValueError`: if the dataset holds no kind of data, or more than one (only token ids may stand beside their text), or
            has images or videos.
    """
    for column in PICTURES:
        if column in columns:
            raise ValueError(
                f"The {name} dataset has the column {column!r}, and only text is trained on; remove it with "
                f"`dataset.remove_columns({column!r})` if the text stands alone."
            )
    kinds = {kind: needed for kind, needed in KINDS.items() if set(needed) <= set(columns)}
    if text_field in columns and text_field not in [column for needed in kinds.values() for column in needed]:
        kinds["text"] = (text_field,)
    if not kinds:
        raise ValueError(
            f"The {name} dataset has the columns {sorted(columns)}; it needs {text_field!r} (see "
            f"`dataset_text_field`), 'prompt' and 'completion', 'messages', or 'input_ids'.{likely_meant(columns, lists)}"
        )
    if len(kinds) > 1 and "input_ids" not in kinds:
        found = ", ".join(f"'{needed[0]}'" for needed in kinds.values())
        raise ValueError(
            f"The {name} dataset holds several kinds of data, under {found}; keep one, with `dataset.remove_columns(...)`, "
            "or rename the others (on the command line: `--column_mapping`)."
        )
    kind = next(iter(kinds))
    if kind == "text" and text_field in ("prompt", "completion", "messages", "conversations", "score"):
        raise ValueError(
            f"`dataset_text_field` is {text_field!r}, a name that stands for other data; rename the column, to "
            "'text' for one."
        )
    return kind, [*kinds[kind], *(column for column in EXTRAS[kind] if column in columns)]


@dataclass
class RowCheck:
    """
    Returns `True` for a good row and raises an error for any other: a function for `dataset.filter(..., with_indices=True)`.

    Args:
        name (`str`):
            Name of the dataset, for messages.
        kind (`str`), columns (`list[str]`):
            As [`columns_read`] gives them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer, whose chat template must take the messages.
        vocab_size (`int`):
            V of the model; ids lie below it.
        assistant_only (`bool`):
            Whether each conversation needs tokens of the assistant.
        is_conversation (`bool`):
            Whether rows hold messages, as the first one does.
        loss_masks (`tuple[str, ...]`):
            Columns of masks that confine the loss. A label where such a mask is 0 is refused.

    Raises:
        `ValueError`: for a bad row, naming the row, the column, the value and the fix.
    """

    name: str
    kind: str
    columns: list[str]
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    assistant_only: bool = False
    is_conversation: bool = False
    loss_masks: tuple[str, ...] = ()

    def __call__(self, row: dict, index: int) -> bool:
        for column in (*EXTRAS[self.kind], *PICTURES):
            value = row.get(column)
            is_other = column == "score" and not isinstance(value, str)  # a number, say, which is left alone
            # the columns of a stream are known by its first row alone
            if column not in self.columns and value is not None and not is_other:
                self._refuse(index, f"{column!r}, which the first row has not", "give it to each row, or to none")
        for column in self.columns:
            if column not in row or (row[column] is None and column not in MAY_BE_NONE):
                self._refuse(index, f"nothing in {column!r}", "give it a value, or leave the row out")
        thoughts = row["thought"] if "thought" in self.columns and row["thought"] is not None else []
        for thought in thoughts if isinstance(thoughts, list) else [thoughts]:
            self._check_string(index, "thought", thought)
        if "score" in self.columns and row["score"] is not None:
            self._check_string(index, "score", row["score"])
        if self.kind == "input_ids":
            self._check_tokens(row, index)
        elif self.is_conversation:
            self._check_conversation(row, index)
        else:
            for column in self.columns:
                if column not in EXTRAS[self.kind]:
                    self._check_string(index, column, row[column])
        return True

    def _refuse(self, index: int, found: str, fix: str) -> None:
        raise refusal(index, self.name, found, fix)

    def _check_string(self, index: int, column: str, value) -> None:
        if not isinstance(value, str):
            self._refuse(index, f"{shown(value)} in {column!r}", "give a string")
        if has_half_pair(value):
            fix = "give text that is Unicode, with `.encode('utf-8', 'replace').decode()` for one"
            self._refuse(index, f"half of a surrogate pair in {column!r}", fix)

    def _check_tokens(self, row: dict, index: int) -> None:
        ids = row["input_ids"]
        self._check_integers(index, "input_ids", ids, 0, self.vocab_size - 1, "the model's vocabulary")
        for column in self.columns:
            values = row[column]
            if column == "labels":
                self._check_integers(
                    index, column, values, 0, self.vocab_size - 1, "the model's vocabulary, or -100", -100
                )
            elif column in MASKS:
                self._check_integers(index, column, values, 0, 1, "a mask")
            elif column == "seq_lengths":
                self._check_integers(index, column, values, 1, len(ids), "the row's tokens")
                if sum(values) != len(ids):
                    found = f"`seq_lengths` that add up to {sum(values)}, and {len(ids)} `input_ids`"
                    self._refuse(index, found, "make them equal")
                continue
            elif column == "position_ids":
                self._check_integers(index, column, values, 0, len(ids) - 1, "the row's tokens")
            if len(values) != len(ids):
                self._refuse(index, f"{len(values)} `{column}` and {len(ids)} `input_ids`", "give one for each token")
        if not all(row.get("attention_mask") or [1]):
            self._refuse(index, "zeros in 'attention_mask'", "leave out the padding; it is added to each batch")
        for place, (token, label) in enumerate(zip(ids, row.get("labels") or (), strict=False)):
            if label not in (-100, token):
                found = f"the label {label} beside the id {token}, at token {place}"
                fix = "labels only say which of `input_ids` are predicted: give the same id there, or -100"
                self._refuse(index, found, fix)
        for column in self.loss_masks if "labels" in self.columns else ():
            for place, (label, mask) in enumerate(zip(row["labels"], row[column], strict=True)):
                if place and label != -100 and not mask:  # the first token is predicted in no case
                    found = f"a label at token {place}, which {column!r} leaves out"
                    self._refuse(index, found, "give -100 there, or leave out the one or the other column")
        if list(row.get("position_ids") or ()) not in ([], list(range(len(ids)))):
            fix = "leave them out, and give `seq_lengths` where a row is packed of several texts"
            self._refuse(index, "'position_ids' that do not count its tokens from 0", fix)

    def _check_integers(self, index, column: str, values, least: int, greatest: int, what: str, also=None) -> None:
        if not isinstance(values, list):
            self._refuse(index, f"{shown(values)} in {column!r}", "give a list of whole numbers")
        for value in values:
            is_whole = isinstance(value, Integral) and (what == "a mask" or not isinstance(value, bool))
            if not is_whole or not (least <= value <= greatest or value == also):
                fix = f"whole numbers from {least} to {greatest} are {what}"
                self._refuse(index, f"{shown(value)} in {column!r}", fix)

    def _check_conversation(self, row: dict, index: int) -> None:
        needed = KINDS[self.kind]
        parts = [self._messages(index, column, row[column]) for column in needed]
        messages = sum(parts, [])
        given = row.get("chat_template_kwargs", {})
        if not isinstance(given, Mapping) or OF_PREPARATION & given.keys():
            fix = f"give a dictionary of what the template reads, without {', '.join(sorted(OF_PREPARATION))}"
            self._refuse(index, f"{shown(given)} in 'chat_template_kwargs'", fix)
        try:
            tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
            options = dict(tools=tools, **given)
            if self.kind == "prompt":
                self._render(parts[0], add_generation_prompt=True, **options)
            rendered = self._render(messages, **options)
            masks = {"return_assistant_tokens_mask": True, "return_dict": True, "tokenize": True}
            tokens: Any = self._render(messages, **masks, **options) if self.assistant_only else None
        except Exception as error:  # a template is a program of its own, and may fail in any way
            words = f"{needed[0]!r} that the chat template refuses ({type(error).__name__}: {error})"
            raise ValueError(
                f"Row {index} of the {self.name} dataset has {words}; change the one or the other."
            ) from error
        self._check_rendered(index, messages, rendered, options)
        if self.assistant_only and 1 not in tokens["assistant_masks"]:
            self._refuse(index, "no token of the assistant", "leave it out, or set `assistant_only_loss=False`")

    def _render(self, messages: list[dict], tokenize: bool = False, **options):
        return self.tokenizer.apply_chat_template(messages, tokenize=tokenize, **options)

    def _check_rendered(self, index: int, messages: list[dict], rendered: str, options: dict) -> None:
        """Refuses what a chat template takes without an error, and writes as something else."""
        self._check_string(index, KINDS[self.kind][0], rendered)
        for message in messages:
            content = message.get("content")
            if isinstance(content, list) and content and str(content) in rendered:
                fix = "give the content as a string, or take a template that reads parts"
                self._refuse(index, f"parts of a message that the chat template writes as {shown(content)}", fix)
        silent = [message for message in messages if message.get("tool_calls") and not message.get("content")]
        if silent and rendered == self._without_calls(messages, options):
            fix = "take a template that writes calls, or leave the row out"
            self._refuse(index, "a tool call without content, which the chat template leaves out", fix)

    def _without_calls(self, messages: list[dict], options: dict) -> str | None:
        """What the chat template makes of messages without their calls, if anything."""
        try:
            return self._render([{**message, "tool_calls": None} for message in messages], **options)
        except Exception:  # it misses them
            return None

    def _messages(self, index: int, column: str, messages) -> list[dict]:
        """
        The messages of a column, under the keys `role` and `content`; refuses what is no list of messages. A message may lack
        content if it has tool calls.
        """
        if not isinstance(messages, list) or not messages:
            fix = "give a list of at least one message"
            if isinstance(messages, str):
                example = {"role": "assistant" if column == "completion" else "user", "content": "..."}
                fix += ", read from JSON with `json.loads`" if messages[:1] == "[" else f", such as [{example}]"
            self._refuse(index, f"{shown(messages)} in {column!r}", fix)
        of_sharegpt = column == "conversations" and any(isinstance(x, Mapping) and "from" in x for x in messages)
        role, content = KEYS if of_sharegpt else KEYS.values()
        for message in messages:
            calls = isinstance(message, Mapping) and not of_sharegpt and message.get("tool_calls")
            if not isinstance(message, Mapping) or role not in message or not (content in message or calls):
                fix = f"give a dictionary with {role!r} and {content!r}"
                if column == "messages" and isinstance(message, Mapping) and "from" in message:
                    fix += ", or call the column 'conversations'"
                self._refuse(index, f"{shown(message)} in {column!r}", fix)
            self._check_string(index, f"{column} {role}", message[role])
            if isinstance(message.get(content), list):
                self._check_parts(index, f"{column} {content}", message[content])
            elif message.get(content) is not None or not calls:
                self._check_string(index, f"{column} {content}", message[content])
        return [as_message(message) if column == "conversations" else dict(message) for message in messages]

    def _check_parts(self, index: int, where: str, parts: list) -> None:
        """The parts of a message, which must be of text."""
        for part in parts:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                fix = "give parts such as {'type': 'text', 'text': '...'}; only text is trained on"
                self._refuse(index, f"{shown(part)} in {where!r}", fix)
            self._check_string(index, where, part.get("text"))


DROPPED = (
    "are left out, since they have no token to predict from one before it: they hold fewer than two tokens, or "
    "`max_length`, `completion_only_loss` or the labels mask the rest"
)

# A stream with more rows than this, one after the other, of which nothing is learned is refused: it might be read for ever.
MOST_UNUSABLE = 5_000


@dataclass
class Run:
    """
    Counts the rows of a stream since the last one of use, and stops a stream without such rows.

    Args:
        name (`str`):
            Name of the dataset, for messages.
        why (`str`):
            What is wrong with such rows: what follows "rows".
    """

    name: str
    why: str
    length: int = 0

    def add(self) -> None:
        """
        Counts a row.

        Raises:
            `ValueError`: if it is one too many.
        """
        self.length += 1
        if self.length > MOST_UNUSABLE:
            raise ValueError(
                f"{MOST_UNUSABLE:,} rows of the {self.name} dataset, one after the other, {self.why}; look at what the stream "
                "gives."
            )


def refusal(index: int, name: str, found: str, fix: str) -> ValueError:
    """The error for a bad row of a dataset: what was found in it, and how to mend it."""
    return ValueError(f"Row {index} of the {name} dataset has {found}; {fix}.")


def as_message(message: Mapping) -> dict:
    """A message of a conversation under the keys and roles that chat templates know; other roles stay."""
    named = {KEYS.get(key, key): value for key, value in message.items()}
    return {**named, "role": ROLES.get(named["role"], named["role"])}


def has_half_pair(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def shown(value) -> str:
    """A value, cut to 60 characters, and its type."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} (`{type(value).__name__}`)"


def has_prediction(row: dict) -> bool:
    """Whether a tokenized row has something to predict: a label at its second token or later."""
    return any(label != -100 for label in row["labels"][1:])


def has_score(row: dict) -> bool:
    """Whether a tokenized row has a label that is scored, at its second token or later."""
    return any(label != -100 and mask for label, mask in zip(row["labels"][1:], row["score_mask"][1:], strict=True))


def positions_in(row: dict, prompt_end: bool = False) -> Iterator[int]:
    """
    Finds the positions for thoughts in a tokenized row: tokens whose next one has a label. With `prompt_end` the token itself has
    no label.
    """
    allowed, labels = row.get("thought_mask") or [1] * len(row["labels"]), row["labels"]
    for at, (before, label, mask) in enumerate(zip(labels, labels[1:], allowed, strict=False)):
        if label != -100 and mask and not (prompt_end and before != -100):
            yield at


def has_position(row: dict, prompt_end: bool = False) -> bool:
    """Whether a tokenized row has one of [`positions_in`]."""
    return any(True for _ in positions_in(row, prompt_end))


@dataclass
class UsableRow:
    """Whether a tokenized row has a token to predict; of a stream, warns at the first row without one."""

    name: str
    vocab_size: int
    run: Run | None = None
    opening: list[int] = field(default_factory=list)  # what opens an answer, before which a turn asks for a thought

    def __call__(self, row: dict) -> bool:
        greatest = max(chain(row["input_ids"], *row.get("written_ids", ())), default=0)
        if greatest >= self.vocab_size:
            raise ValueError(
                f"The tokenizer gives the id {greatest} in the {self.name} dataset, and the model's vocabulary "
                f"has {self.vocab_size}; take the model's own tokenizer, or resize its embeddings."
            )
        if not self._opens_answers(row):
            raise ValueError(
                f"`thought_prompt_role` puts a turn before an answer, and a prompt of the {self.name} dataset does not end with what "
                "opens an answer in the chat template; give messages (`--chat` makes them), or leave the role out."
            )
        usable = has_prediction(row)
        if usable and self.run is not None:
            self.run.length = 0
        if self.run is not None and not usable:
            logger.warning_once(f"Some rows of the {self.name} dataset {DROPPED}.")
        return usable

    def _opens_answers(self, row: dict) -> bool:
        k, ids = len(self.opening), row["input_ids"]
        return k == 0 or all(ids[max(at + 1 - k, 0) : at + 1] == self.opening for at in positions_in(row, True))
