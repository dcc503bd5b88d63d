"""A turn of a conversation that asks for a thought, as the tokenizer's chat template writes it."""

import os
from itertools import product

from transformers import PreTrainedTokenizerBase


# Conversations that stand for all others: what is written of a turn after them must not depend on them
CONTENTS = ("1 plus 1", "Why?\n\nb")


def turn_tokens(
    tokenizer: PreTrainedTokenizerBase, content: str, role: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """
    The tokens by which a conversation with one more turn before the answer differs from the conversation without it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer, with its chat template.
        content (`str`), role (`str`):
            Of the turn, which stands after all others.

    Returns:
        `tuple`: tokens that end the conversation without the turn, and those that end it in their place with the turn. Both end with
            what opens the answer.

    Raises:
        `ValueError`: if there is no chat template, or it refuses such a turn, leaves it out, or writes it anywhere else than between
            the last message and the answer.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"`thought_prompt_role` is {role!r}, and the tokenizer has no chat template; set `tokenizer.chat_template`, or leave "
            "the role out."
        )
    turn, differences = {"role": role, "content": content}, set()
    for first, last in product(CONTENTS, CONTENTS):
        own = [{"role": "user", "content": first}]
        if first != last:
            own += [{"role": "assistant", "content": "2"}, {"role": "user", "content": last}]
        without, with_turn = (_rendered(tokenizer, messages, role) for messages in (own, [*own, turn]))
        if content.strip() not in with_turn:
            raise _refusal(role, "leaves it out")
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (without, with_turn)]
        shared = len(os.path.commonprefix(ids))
        differences.add((tuple(ids[0][shared:]), tuple(ids[1][shared:])))
    if len(differences) > 1:
        raise _refusal(
            role, "does not write it between the last message and the answer, where alone a thought can see it"
        )
    ((unread, tokens),) = differences
    return unread, tokens


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict], role: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template is a program of its own, and may fail in any way
        raise _refusal(role, f"refuses it ({type(error).__name__}: {error})") from error


def _refusal(role: str, why: str) -> ValueError:
    return ValueError(
        f"`thought_prompt_role` is {role!r}, and of such a turn after the user's the chat template {why}. Choose the other role, or "
        "leave it out: `thought_prompt` may then hold the template's own marks."
    )


def with_turn(template: str, content: str, role: str) -> str:
    """A chat template that adds a turn to a conversation that is to be answered, and writes others as they are."""
    turn = f"{{'role': {quoted(role)}, 'content': {quoted(content)}}}"
    return f"{{% if add_generation_prompt %}}{{% set messages = messages + [{turn}] %}}{{% endif %}}{template}"


def quoted(string: str) -> str:
    """A string as a template writes it."""
    for plain, written in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r")):
        string = string.replace(plain, written)
    return f"'{string}'"
