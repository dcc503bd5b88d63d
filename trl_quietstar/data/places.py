"""Places in the text of a row: from characters of what a user gives to the tokens that TRL's preparation makes of it."""

import json
import os
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from .rows import KINDS, refusal


MARK = "\ue000"  # of a place in a message; a character that Unicode leaves to private use


@dataclass
class Places:
    """
    Reads the rows of a dataset: the base of functions for `dataset.map(..., with_indices=True)` that look for something in them.

    Args:
        name (`str`):
            Name of the dataset, for messages.
        kind (`str`), text_field (`str`), is_conversation (`bool`):
            Kind of data, name of the column of plain text, and whether rows hold messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
    """

    name: str
    kind: str
    text_field: str
    is_conversation: bool
    tokenizer: PreTrainedTokenizerBase

    def _turns(self, row: dict) -> list[int]:
        """Numbers of the messages that the assistant wrote; of a prompt and a completion, those in the completion."""
        first = len(row["prompt"]) if self.kind == "prompt" else 0
        messages = self._messages(row)
        return [turn for turn in range(first, len(messages)) if messages[turn]["role"] == "assistant"]

    def _messages(self, row: dict) -> list[dict]:
        """All messages of a row, as TRL gives them to the chat template."""
        return [dict(message) for column in KINDS[self.kind] for message in row[column]]

    def _text(self, row: dict, index: int) -> str:
        """The text that TRL makes tokens of, up to the EOS token that it adds."""
        if self.is_conversation:
            return self._rendered(row, index, self._messages(row))
        return row[self.text_field] if self.kind == "text" else row["prompt"] + row["completion"]

    def _up_to(self, row: dict, index: int, whole: str, turn: int, character: int) -> str:
        """What stands before a character of a message's content, which is a string, in the whole text of a conversation."""
        messages = self._messages(row)
        content = messages[turn]["content"]
        messages[turn] = {**messages[turn], "content": content[:character] + MARK + content[character:]}
        return os.path.commonprefix([whole, self._rendered(row, index, messages)])

    def _rendered(self, row: dict, index: int, messages: list[dict], **options) -> str:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options |= dict(tools=tools, **row.get("chat_template_kwargs", {}))
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # a template is a program of its own, and may fail in any way
            words = f"messages around a thought or a score that the chat template refuses ({type(error).__name__}: {error})"
            raise self._refusal(index, words, "change the one or the other") from error

    def _ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def _refusal(self, index: int, found: str, fix: str) -> ValueError:
        return refusal(index, self.name, found, fix)
