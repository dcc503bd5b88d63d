"""What a row of data may hold.

A bad row is refused by its number, with the value and the fix, before a library meets it: at once in a dataset, and when
it comes in a stream.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from transformers import PreTrainedTokenizerBase


# what each kind of data needs, by the column it is named after; text has a column of the user's choice
KINDS = {
    "input_ids": ("input_ids",),
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
    "conversations": ("conversations",),
}
# what it may hold beside; any other column is left alone
EXTRAS = {
    "input_ids": ("labels", "completion_mask", "assistant_masks", "thought_mask", "seq_lengths", "attention_mask"),
    "prompt": ("tools", "chat_template_kwargs"),
    "messages": ("tools", "chat_template_kwargs"),
    "conversations": ("tools", "chat_template_kwargs"),
}
MASKS = ("completion_mask", "assistant_masks", "thought_mask", "attention_mask")


def columns_read(columns: list[str], text_field: str, name: str) -> tuple[str, list[str]]:
    """
    Which kind of data a dataset holds, and which of its columns are read.

    Args:
        columns (`list[str]`):
            Those there are.
        text_field (`str`):
            Column of plain text.
        name (`str`):
            Of the dataset, for messages.

    Returns:
        `tuple[str, list[str]]`: A key of `KINDS` or `"text"`, and the columns.

    Raises:
        `ValueError`: if there is no kind of data, or more than one (token ids alone may stand beside their text).
    """
    kinds = {kind: needed for kind, needed in KINDS.items() if set(needed) <= set(columns)}
    if text_field in columns and text_field not in [column for needed in kinds.values() for column in needed]:
        kinds["text"] = (text_field,)
    if not kinds:
        raise ValueError(
            f"The {name} dataset has the columns {sorted(columns)}; it needs {text_field!r} (see "
            "`dataset_text_field`), 'prompt' and 'completion', 'messages', or 'input_ids'."
        )
    if len(kinds) > 1 and "input_ids" not in kinds:
        found = ", ".join(f"'{needed[0]}'" for needed in kinds.values())
        raise ValueError(
            f"The {name} dataset holds several kinds of data, under {found}; keep one, with `dataset.remove_columns(...)`, "
            "or rename the others."
        )
    kind = next(iter(kinds))
    if kind == "text" and text_field in ("prompt", "completion", "messages", "conversations"):
        raise ValueError(
            f"`dataset_text_field` is {text_field!r}, a name that stands for another kind of data; rename the column, to "
            "'text' for one."
        )
    return kind, [*kinds[kind], *(column for column in EXTRAS.get(kind, ()) if column in columns)]


@dataclass
class RowCheck:
    """
    Lets a good row pass, as the function of `dataset.filter(..., with_indices=True)`, and refuses any other.

    Args:
        name (`str`):
            Of the dataset, for messages.
        kind (`str`), columns (`list[str]`):
            As [`columns_read`] gives them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its chat template must take the messages.
        vocab_size (`int`):
            Of the model: ids lie below it.
        assistant_only (`bool`):
            Whether each conversation needs tokens of the assistant.

    Raises:
        `ValueError`: naming the row, the column, the value and the fix.
    """

    name: str
    kind: str
    columns: list[str]
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    assistant_only: bool = False

    def __call__(self, row: dict, index: int) -> bool:
        for column in self.columns:
            if column not in row or (row[column] is None and column != "tools"):
                self._refuse(index, f"nothing in {column!r}", "give it a value, or leave the row out")
        if self.kind == "input_ids":
            self._check_tokens(row, index)
        elif self.kind == "text" or isinstance(row[self.columns[0]], str):
            for column in self.columns:
                if column not in EXTRAS.get(self.kind, ()):
                    self._check_string(index, column, row[column])
        else:
            self._check_conversation(row, index)
        return True

    def _refuse(self, index: int, found: str, fix: str) -> None:
        raise ValueError(f"Row {index} of the {self.name} dataset has {found}; {fix}.")

    def _check_string(self, index: int, column: str, value) -> None:
        if not isinstance(value, str):
            self._refuse(index, f"{_shown(value)} in {column!r}", "give a string")
        if any("\ud800" <= character <= "\udfff" for character in value):
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
            if len(values) != len(ids):
                self._refuse(index, f"{len(values)} `{column}` and {len(ids)} `input_ids`", "give one for each token")
        if not all(row.get("attention_mask") or [1]):
            self._refuse(index, "zeros in 'attention_mask'", "leave out the padding; it is added to each batch")

    def _check_integers(self, index, column: str, values, least: int, greatest: int, what: str, also=None) -> None:
        if not isinstance(values, list):
            self._refuse(index, f"{_shown(values)} in {column!r}", "give a list of whole numbers")
        for value in values:
            if not isinstance(value, Integral) or not (least <= value <= greatest or value == also):
                fix = f"whole numbers from {least} to {greatest} are {what}"
                self._refuse(index, f"{_shown(value)} in {column!r}", fix)

    def _check_conversation(self, row: dict, index: int) -> None:
        needed = KINDS[self.kind]
        parts = [self._messages(index, column, row[column]) for column in needed]
        try:
            tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
            options = dict(tools=tools, **row.get("chat_template_kwargs", {}))
            if self.kind == "prompt":
                self.tokenizer.apply_chat_template(parts[0], add_generation_prompt=True, tokenize=False, **options)
            if self.assistant_only:
                options.update(return_assistant_tokens_mask=True, return_dict=True)
            rendered: Any = self.tokenizer.apply_chat_template(sum(parts, []), tokenize=self.assistant_only, **options)
        except Exception as error:  # a template is a program of its own, and may fail in any way
            words = f"{needed[0]!r} that the chat template refuses ({type(error).__name__}: {error})"
            raise ValueError(
                f"Row {index} of the {self.name} dataset has {words}; change the one or the other."
            ) from error
        if self.assistant_only and 1 not in rendered["assistant_masks"]:
            self._refuse(index, "no token of the assistant", "leave it out, or set `assistant_only_loss=False`")

    def _messages(self, index: int, column: str, messages) -> list[dict]:
        """A column's messages, with `role` and `content`."""
        if not isinstance(messages, list) or not messages:
            self._refuse(index, f"{_shown(messages)} in {column!r}", "give a list of at least one message")
        role, content = ("from", "value") if column == "conversations" else ("role", "content")
        for message in messages:
            if not isinstance(message, Mapping) or role not in message or content not in message:
                fix = f"give a dictionary with {role!r} and {content!r}"
                self._refuse(index, f"{_shown(message)} in {column!r}", fix)
            self._check_string(index, f"{column} {role}", message[role])
            if not (isinstance(message[content], list) or message.get("tool_calls")):  # parts of a message; a call
                self._check_string(index, f"{column} {content}", message[content])
        return [{**message, "role": message[role], "content": message[content]} for message in messages]


def _shown(value) -> str:
    """A value, cut, and its type."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} (`{type(value).__name__}`)"


def has_prediction(row: dict) -> bool:
    """Whether a token is to be predicted from one before it."""
    return any(label != -100 for label in row["labels"][1:])


def has_position(row: dict) -> bool:
    """Whether a thought may stand before such a token."""
    allowed = row.get("thought_mask") or [1] * len(row["labels"])
    return any(label != -100 and mask for label, mask in zip(row["labels"][1:], allowed, strict=False))
