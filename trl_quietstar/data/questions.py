"""Questions and answers in a user's own file: their columns, a chat made of them, and rows set apart for evaluation.

What is read of a dataset afterwards is what `prepare.py` reads of any.
"""

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase


# For a tokenizer that has no template: base models know this form from the texts they were trained on. It is saved with the
# tokenizer, so that generation finds it.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Question: ' ~ message['content'] ~ '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Answer: ' ~ (message['content'] | trim) ~ eos_token }}"
    "{% else %}{{ message['content'] ~ '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)
# columns that say themselves what data are
OTHERS = ("prompt", "completion", "messages", "conversations", "input_ids")
SPLIT_SEED = 0  # not the run's: runs of several seeds are evaluated on the same rows


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """Names of the columns, which a stream may know by its first row alone."""
    return dataset.column_names or list(next(iter(dataset), {}))


def as_prompts(dataset: Dataset | IterableDataset, text_field: str) -> Dataset | IterableDataset:
    """
    A dataset whose columns `question` and `answer` stand as `prompt` and `completion` too; any other as it is. They stay for
    reward functions, such as `exact_match`, which takes `answer`.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            With any columns.
        text_field (`str`):
            Name of the column of plain text; data that have it are text.
    """
    names = columns_of(dataset)
    if {"question", "answer"} <= set(names) and not {text_field, *OTHERS} & set(names):
        return dataset.map(_prompt, **({} if isinstance(dataset, IterableDataset) else {"desc": "Naming columns"}))
    return dataset


def _prompt(row: dict) -> dict:
    return {"prompt": row.get("question"), "completion": row.get("answer")}


def as_chat(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    Prompts and completions of plain text as a user's message and the assistant's answer; messages stay as they are.

    Raises:
        `ValueError`: for data without prompts and completions.
    """
    names = columns_of(dataset)
    if {"messages", "conversations"} & set(names):
        return dataset
    if not {"prompt", "completion"} <= set(names):
        raise ValueError(
            f"`chat` makes messages of 'prompt' and 'completion' (or 'question' and 'answer'), and the data have {', '.join(names)}; "
            "rename columns by `column_mapping`, or leave `chat` out."
        )
    return dataset.map(_messages, **({} if isinstance(dataset, IterableDataset) else {"desc": "Making messages"}))


def _messages(row: dict) -> dict:
    """The prompt and the completion of a row as messages; what is no text is refused later, by the number of its row."""
    roles = {"prompt": "user", "completion": "assistant"}
    return {
        name: [{"role": role, "content": row[name]}] if isinstance(row.get(name), str) else row.get(name)
        for name, role in roles.items()
    }


def give_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a tokenizer without a chat template the one of plain questions and answers."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE


def split_off(dataset: Dataset | IterableDataset, size: float) -> tuple[Dataset, Dataset]:
    """
    Sets rows apart for evaluation: the same ones of the same data in every run, in the order of the data.

    Args:
        dataset ([`~datasets.Dataset`]):
            All rows.
        size (`float`):
            Below 1 the share of the rows, of which there are two at least; from 1 on their number.

    Returns:
        `tuple`: The rows that are left to train on, and those for evaluation.

    Raises:
        `ValueError`: for a stream, or if no row is left to train on.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError("`eval_size` needs to know how many rows there are, and a stream does not; leave it out.")
    rows = len(dataset)
    count = max(2, round(size * rows)) if size < 1 else int(size)
    if count >= rows:
        raise ValueError(f"`eval_size={size:g}` takes {count} rows of {rows} and leaves none to train on; lower it.")
    chosen = np.zeros(rows, dtype=bool)
    chosen[np.random.default_rng(SPLIT_SEED).choice(rows, count, replace=False)] = True
    return dataset.select(np.flatnonzero(~chosen)), dataset.select(np.flatnonzero(chosen))
