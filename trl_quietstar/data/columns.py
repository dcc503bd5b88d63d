"""Columns of a dataset: which stay beside the tokens, and what columns of other names are likely to hold."""

from collections.abc import Collection, Mapping
from itertools import islice

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..config import QuietStarConfig
from ..learning.reward_functions import ARGUMENTS, ON_DEMAND, RewardFunctions
from .batches import TOKEN_COLUMNS


logger = logging.get_logger(__name__)

# names under which public datasets hold what is read here under another one
CONVERSATIONS = ("conversation", "dialogue", "dialog", "chat", "chosen")
PROMPTS = ("prompt", "instruction", "question", "problem", "query", "input")
COMPLETIONS = ("completion", "output", "response", "answer", "solution", "chosen", "target")
TEXTS = ("Text", "content", "article", "document", "story", "passage", "body", "completion")
# names of what belongs before a prompt
CONTEXTS = ("input", "context", "system", "system_prompt")
# keys of a message beside its content that hold how its author came to it
REASONING = ("reasoning_content", "reasoning", "thinking")
OF_TRL = ("prompts", "completions", "completion_ids")  # arguments of the reward functions of TRL's trainers
LOOKED_AT = 20  # rows in which reasoning is looked for


def likely_meant(columns: Collection[str], lists: Collection[str] = ()) -> str:
    """
    Advice for a dataset without a column that is read.

    Args:
        columns (`Collection[str]`), lists (`Collection[str]`):
            All columns of the dataset, and those whose values are lists.

    Returns:
        `str`: A sentence with a space before it; empty if no column has a common name.
    """
    talks = [name for name in CONVERSATIONS if name in columns and (name != "chosen" or name in lists)]
    prompt, completion = (next((x for x in names if x in columns), None) for names in (PROMPTS, COMPLETIONS))
    text = next((name for name in TEXTS if name in columns), None)
    if talks and prompt is None:
        return _renamed({talks[0]: "messages"})
    if prompt is not None and completion is not None:
        names = {prompt: "prompt", completion: "completion"}
        unread = [name for name in CONTEXTS if name in columns and name != prompt]
        extra = f" Put {unread[0]!r} into the prompt first, with `dataset.map`." if unread else ""
        return _renamed({name: own for name, own in names.items() if name != own}) + extra
    if {"role", "content"} <= set(columns):
        return " A row holds a whole conversation; give the messages of each as a list, as 'messages'."
    if len(columns) == 1 and set(columns) <= set(lists):
        return f" If all rows are in {next(iter(columns))!r}, load them by `load_dataset('json', data_files=..., field=...)`."
    if text is not None or completion is not None:
        return f" To train on all of {text or completion!r}, set `dataset_text_field={text or completion!r}`."
    if prompt is not None:
        return " Thoughts are rewarded for the text that follows them, so give the true answers too, as 'completion'."
    return ""


def _renamed(names: dict[str, str]) -> str:
    words = " and ".join(f"{name!r} to {own!r}" for name, own in names.items())
    return f" Rename {words}, with `dataset.rename_columns({names})` (on the command line: `--column_mapping`)."


def no_dataset(dataset, name: str) -> TypeError:
    """The error for what is given in place of a dataset: how to make one of it."""
    fix = "give a `datasets.Dataset` or a stream"
    if isinstance(dataset, Mapping) and all(isinstance(x, (Dataset, IterableDataset)) for x in dataset.values()):
        fix = f"give one of its splits ({', '.join(map(str, dataset))}), such as `dataset[{next(iter(dataset), 'train')!r}]`"
    elif isinstance(dataset, (list, dict)):
        fix += f", made by `Dataset.from_{type(dataset).__name__}`"
    elif isinstance(dataset, str):
        fix += ", loaded by `datasets.load_dataset`"
    elif hasattr(dataset, "to_csv"):
        fix += ", made by `Dataset.from_pandas`"
    return TypeError(f"The {name} dataset is a `{type(dataset).__name__}`; {fix}.")


def warn_of_unread(
    dataset: Dataset | IterableDataset,
    first: dict,
    kind: str,
    names: Collection[str],
    kept: Collection[str],
    name: str,
) -> None:
    """
    Says that a column which is likely to belong to the prompts is not read.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]), first (`dict`):
            The rows; of a stream only the first one is looked at, which has been read.
        kind (`str`):
            Kind of data.
        names (`Collection[str]`), kept (`Collection[str]`):
            Its columns, and those that reward functions take.
        name (`str`):
            Name of the dataset, for messages.
    """
    if kind not in ("prompt", "messages", "conversations"):
        return
    for column in CONTEXTS:
        if column in names and column not in kept:
            is_stream = isinstance(dataset, IterableDataset)
            rows = [first] if is_stream else islice(dataset.select_columns([column]), LOOKED_AT)
            if any(row[column] for row in rows):
                logger.warning(
                    f"The column {column!r} of the {name} dataset is not read; if it belongs to the prompts, put it into them with "
                    "`dataset.map`."
                )


def warn_of_reasoning(
    dataset: Dataset | IterableDataset, kind: str, tokenizer: PreTrainedTokenizerBase, args: QuietStarConfig, name: str
) -> None:
    """
    Says that reasoning in the data is no thought to be learned: it stands in the text, or under a key that the chat template leaves
    out. Only the first rows are looked at, of a stream one.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows that have been checked.
        kind (`str`), name (`str`):
            Kind of data, and name of the dataset, for messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]), args ([`QuietStarConfig`]):
            The tokenizer, with its chat template, and the options of the run.
    """
    if kind == "input_ids" or args.thought_pattern is not None or args.thought_positions == "none":
        return
    column = {"text": args.dataset_text_field, "prompt": "completion"}.get(kind, kind)
    rows = islice(dataset, 1 if isinstance(dataset, IterableDataset) else LOOKED_AT)
    values = [row[column] for row in rows]
    messages = [message for value in values if isinstance(value, list) for message in value]
    lost = [
        key
        for key in REASONING
        if key not in str(tokenizer.chat_template) and any(message.get(key) for message in messages)
    ]
    if lost:
        logger.warning(
            f"Messages of the {name} dataset hold {lost[0]!r}, which the chat template leaves out. To teach it as a thought, give it as "
            "a column `thought`."
        )
    texts = [*values, *(message.get("content", message.get("value")) for message in messages)]
    if any(isinstance(text, str) and "<think>" in text and "</think>" in text for text in texts):
        logger.warning(
            f"The {name} dataset holds '<think>', which is trained on as text. To teach what stands in it as thoughts, set "
            "`thought_pattern='<think>(.*?)</think>'`."
        )


def kept_columns(
    columns: list[str], reward_functions: RewardFunctions | None, args: QuietStarConfig, name: str, packing: bool
) -> list[str]:
    """
    The columns that stay in the dataset beside its tokens: those that reward functions name, and with
    `remove_unused_columns=False` all.

    Args:
        columns (`list[str]`):
            All columns of the dataset.
        reward_functions ([`~learning.reward_functions.RewardFunctions`], *optional*):
            Of the run.
        args ([`QuietStarConfig`]):
            Configuration of the trainer.
        name (`str`):
            Name of the dataset, for messages.
        packing (`bool`):
            Whether several texts are packed into a row, which then has no value of its own in other columns.

    Raises:
        `ValueError`: if a column that is needed is missing, has a name that means something else, or is lost in packing.
    """
    named = {} if reward_functions is None else reward_functions.columns
    takes_any = reward_functions is not None and reward_functions.takes_any
    others = [column for column in columns if column not in TOKEN_COLUMNS]
    for parameter, needed_by in named.items():
        if needed_by is not None and parameter in OF_TRL and parameter not in others:
            raise ValueError(
                f"The reward function `{needed_by}` takes {parameter!r}, as TRL's do of whole completions; here thoughts are rewarded, "
                f"and a function takes of {', '.join(ARGUMENTS)}, and columns of the data: `thought_texts` for one."
            )
        if parameter in TOKEN_COLUMNS:
            raise ValueError(f"A reward function takes {parameter!r}, which it finds in `text`; take `text` for it.")
        if needed_by is not None and parameter not in others:
            raise ValueError(
                f"The reward function `{needed_by}` takes {parameter!r}, which is no column of the {name} dataset ({', '.join(columns)}), "
                f"and none of its own arguments ({', '.join(ARGUMENTS)}); add the column, or give the parameter a default."
            )
    kept = [column for column in others if column in named or not args.remove_unused_columns]
    taken = [column for column in kept if column in named or takes_any]
    asked = [x for x in ON_DEMAND if x in others and reward_functions is not None and reward_functions.asks_for(x)]
    clashing = asked + [x for x in taken if x in ARGUMENTS and x not in (args.dataset_text_field, "text")]
    if clashing:
        raise ValueError(
            f"The column {clashing[0]!r} of the {name} dataset has the name of an argument of reward functions; rename it."
        )
    if packing and taken:
        raise ValueError(
            f"`packing=True` joins rows, and `reward_functions` take their columns ({', '.join(taken)}); set `packing=False`."
        )
    return [] if packing else kept
