"""What several commands are given: data by name, a model with how to think, and what a saved model remembers."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, ReadInstruction
from huggingface_hub import is_offline_mode
from transformers import PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME
from trl import ModelConfig

from .._compat import one_bar
from ..config import QuietStarConfig
from ..data.questions import as_chat, as_prompts, columns_of, give_template, split_off
from ..data.sources import load_mixture, load_splits
from ..loading import hub_kwargs, load_tokenizer
from ..model.saved import has_file, saved_settings
from ..rules import Limits, check_limits, notes_of
from ..settings import OPTIONS


# Arguments


def argument(default, help: str):
    """A field of a command's arguments, with its help."""
    return field(default=default, metadata={"help": help})


@dataclass
class DataArguments:
    """What to train and evaluate on. What each field means stands in its `help`."""

    dataset_name: str | None = argument(
        None,
        "Id on the Hub, local folder (of data files, or written by `save_to_disk`), or data file: JSON lines, Parquet, CSV, or "
        "text, each line of which is one.",
    )
    dataset_config: str | None = argument(None, "Configuration of a dataset on the Hub.")
    datasets: list[dict] | None = argument(
        None,
        "In a recipe, in place of `dataset_name`: several datasets, one after the other, as TRL's own recipes list them. Each has a "
        "`path`, and may have `name`, `data_dir`, `data_files`, `split`, `columns` and `fraction`.",
    )
    dataset_train_split: str = argument("train", "Split to train on, or a part of one, such as `train[:10%]`.")
    eval_dataset_name: str | None = argument(
        None, "Id, folder or file of the evaluation data, if it is not in `dataset_name`."
    )
    dataset_test_split: str | None = argument(
        None,
        "Split to evaluate on. By default `test` or `validation` where `dataset_name` has one, and the first split of "
        "`eval_dataset_name`.",
    )
    dataset_streaming: bool = argument(False, "Whether to stream the training data.")
    column_mapping: dict | str | None = argument(
        None, "JSON object that renames columns, from their names to new ones."
    )
    max_eval_samples: int | None = argument(None, "Number of texts that evaluation stops after. None: it takes all.")
    eval_size: float | None = argument(
        None,
        "Rows of the training split that are set apart for evaluation where there is no other data for it: below 1 their share, "
        "from 1 on their number. The same rows in every run, whatever its seed. None: none are.",
    )
    chat: bool = argument(
        False,
        "Whether prompts and completions of plain text become a user's message and its answer, in the model's chat template; or, "
        "where it has none, `Question: ...` and `Answer: ...`. `trl-quietstar generate --chat` does the same.",
    )

    def __post_init__(self):
        if isinstance(self.column_mapping, str):
            self.column_mapping = _mapping(self.column_mapping)
        if self.max_eval_samples is not None and self.max_eval_samples < 1:
            raise ValueError(f"`max_eval_samples` is {self.max_eval_samples}; give a number of texts, at least 1.")
        if self.datasets is not None and (self.dataset_name is not None or self.dataset_config is not None):
            given = "dataset_config" if self.dataset_name is None else "dataset_name"
            raise ValueError(f"`datasets` names the data, and so does `{given}`; leave out the one or the other.")
        size = self.eval_size
        if size is not None and not (0 < size < 1 or (size >= 1 and size == int(size))):
            raise ValueError(f"`eval_size` is {size:g}; give a share below 1, or a number of rows.")


def _mapping(text: str) -> dict:
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError:
        mapping = None
    if not isinstance(mapping, dict):
        raise ValueError(f"`column_mapping` is {text!r}; give a JSON object from names to names.")
    return mapping


@dataclass
class ThinkerArguments:
    """Which model writes or answers, and when it thinks. What each field means stands in its `help`."""

    model: str | None = argument(
        None, "Id on the Hub or local folder of a thinking model, or an adapter with its heads."
    )
    think: str | None = argument(
        None, "When to think: `always`, `adaptive`, `prompt_end` or `never`; by default as the model was trained."
    )
    think_every: int | None = argument(None, "Number of visible tokens that one thought serves.")
    thinking_threshold: float | None = argument(
        None, "Least normalised entropy of the next token at which an `adaptive` model thinks."
    )
    revision: str | None = argument(None, "Revision of the model on the Hub.")
    trust_remote_code: bool = argument(False, "Whether to run code that comes with a model on the Hub.")


def check_numbers(arguments) -> None:
    """Refuses numbers outside the limits that annotate a command's own arguments."""
    for name, limits in notes_of(type(arguments), Limits).items():
        check_limits(name, getattr(arguments, name), limits)


def check_output(name: str, file: str | None) -> None:
    """Makes the folder of a file that a command will write, before it works for hours; an `OSError` if it cannot be written there."""
    if file is None:
        return
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"`{name}` {file!r} cannot be written ({error.strerror}); give another file.") from error
    if Path(file).is_dir():
        raise IsADirectoryError(f"`{name}` {file!r} is a folder; give a file.")


def required(arguments, *names: str) -> list[str]:
    """The values of arguments that must be given; a `ValueError` names the first that is not."""
    for name in names:
        if getattr(arguments, name) is None:
            raise ValueError(f"`{name}` is missing; give `--{name}`.")
    return [getattr(arguments, name) for name in names]


def revision_of(arguments) -> dict:
    """The revision on the Hub that arguments name, for `from_pretrained`; nothing where they name none."""
    return {} if arguments.revision is None else {"revision": arguments.revision}


def renamed(argv: list[str], flag: str, name: str) -> list[str]:
    """The arguments with one flag under its other name."""
    return [name + part[len(flag) :] if part.split("=")[0] == flag else part for part in argv]


def named(argv: list[str], *names: str) -> list[str]:
    """The arguments with the first ones, which come without a name, under these names."""
    count = next((i for i, part in enumerate(argv) if part.startswith("-")), len(argv))
    pairs = zip(names, argv[:count], strict=False)
    return [part for pair in pairs for part in pair] + argv[min(count, len(names)) :]


def check_new_folder(output: str) -> None:
    """Refuses a folder that has files, which a model's would be mixed with."""
    if Path(output).exists() and (not Path(output).is_dir() or any(Path(output).iterdir())):
        raise FileExistsError(f"`output` is {output!r}, which is there and not an empty folder; give a new one.")


# Data


def load_data(
    arguments: DataArguments, text_field: str = "text"
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """
    Training and evaluation data, the latter None where there is none.

    Args:
        arguments ([`DataArguments`]):
            What to load.
        text_field (`str`):
            Name of the column of plain text, if there is one.

    Raises:
        `ValueError`: if no dataset is named, it lacks the split, or it is not what an option needs.
    """
    splits, source = _named_splits(arguments)
    train = _split(splits, arguments.dataset_train_split, source)
    if arguments.eval_dataset_name is not None:
        others = load_splits(arguments.eval_dataset_name, None)
        evaluation = _split(others, arguments.dataset_test_split or next(iter(others)), arguments.eval_dataset_name)
    else:
        name = arguments.dataset_test_split or next((s for s in ("test", "validation") if s in splits), None)
        evaluation = None if name is None else _split(splits, name, source)
    if isinstance(arguments.column_mapping, dict) and arguments.column_mapping:
        train = _rename(train, arguments.column_mapping, source)
        if evaluation is not None:
            evaluation = _rename(evaluation, arguments.column_mapping, arguments.eval_dataset_name or source)
    if evaluation is None and arguments.eval_size is not None:
        train, evaluation = split_off(train, arguments.eval_size)
        if os.environ.get("RANK", "0") == "0":  # one process says it
            print(
                f"Of the {len(train) + len(evaluation)} rows of {source!r}, {len(evaluation)} are set apart for evaluation "
                "(`eval_size`) and not trained on."
            )
    with one_bar("Reading the data"):
        train = _as_asked(train, arguments, text_field)
        return train, None if evaluation is None else _as_asked(cut(evaluation, arguments), arguments, text_field)


def _named_splits(arguments: DataArguments) -> tuple[dict[str, Dataset | IterableDataset], str]:
    """The splits of the training data, and what to call these data."""
    if arguments.datasets is not None:
        return {"train": load_mixture(arguments.datasets, arguments.dataset_streaming)}, "datasets"
    if arguments.dataset_name is None:
        raise ValueError("`dataset_name` is missing; give a Hub id, a local folder or a data file.")
    splits = load_splits(arguments.dataset_name, arguments.dataset_config, arguments.dataset_streaming)
    return splits, arguments.dataset_name


def _as_asked(dataset: Dataset | IterableDataset, arguments: DataArguments, text_field: str):
    """Data with the names of columns that are read, and as messages where that is asked for."""
    dataset = as_prompts(dataset, text_field)
    return as_chat(dataset) if arguments.chat else dataset


def chat_tokenizer(arguments: DataArguments, source: str, args: QuietStarConfig) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer with a template for the messages that `chat` makes; None, for the model's own, without `chat`."""
    if not arguments.chat:
        return None
    tokenizer = load_tokenizer(source, trust_remote_code=args.trust_remote_code, **hub_kwargs(args))
    give_template(tokenizer)
    return tokenizer


def _rename(dataset: Dataset | IterableDataset, mapping: dict, source: str) -> Dataset | IterableDataset:
    names = columns_of(dataset)
    missing = [name for name in mapping if name not in names]
    if missing:
        raise ValueError(
            f"`column_mapping` renames {missing[0]!r}, which is no column of {source!r}; it has {', '.join(names)}."
        )
    renamed = [mapping.get(name, name) for name in names]
    twice = [name for name in renamed if renamed.count(name) > 1]
    if twice:
        raise ValueError(f"`column_mapping` gives the name {twice[0]!r} twice among the columns of {source!r}.")
    return dataset.rename_columns(mapping)


def cut(dataset: Dataset | IterableDataset, arguments: DataArguments) -> Dataset | IterableDataset:
    """The evaluation data up to `max_eval_samples`."""
    return dataset if arguments.max_eval_samples is None else dataset.take(arguments.max_eval_samples)


def _split(splits: dict, name: str, source: str):
    """A split, or a part of one, such as `train[:10%]`."""
    whole, bracket, _ = name.partition("[")
    if bracket and isinstance(splits.get(whole), Dataset):
        try:
            (part,) = ReadInstruction.from_spec(name).to_absolute({whole: len(splits[whole])})
        except (AssertionError, ValueError):
            raise ValueError(
                f"{name!r} is no part of a split; give one such as '{whole}[:10%]' or '{whole}[:100]'."
            ) from None
        return splits[whole].select(range(len(splits[whole]))[part.from_ : part.to])
    if name not in splits:
        raise ValueError(f"{source!r} has no split {name!r}; it has {', '.join(splits)}.")
    return splits[name]


# Models


def named_model(model_args: ModelConfig, args: QuietStarConfig) -> str:
    """
    The model that TRL's `ModelConfig` names, known to be there before data are read.

    Raises:
        `FileNotFoundError`: if there is no such model.
        `ValueError`: if none is named.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing; give a Hub id or a local folder.")
    if "gguf_file" not in (args.model_init_kwargs or {}):  # which has its configuration in itself
        check_model(model_args.model_name_or_path, **{"revision": model_args.model_revision, **hub_kwargs(args)})
    return model_args.model_name_or_path


def check_model(source: str, **hub) -> None:
    """
    Refuses a model that is nowhere.

    Args:
        source (`str`):
            Id on the Hub or local folder, of a model or an adapter.
        hub:
            Where on the Hub, as for `from_pretrained`.

    Raises:
        `FileNotFoundError`: if there is none.
    """
    if any(has_file(source, name, hub) for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
        return
    if Path(source).is_dir():
        raise FileNotFoundError(f"{source!r} is no model: it has neither {CONFIG_NAME} nor {ADAPTER_CONFIG_NAME}.")
    offline = ", which is not asked while `HF_HUB_OFFLINE` is set" if is_offline_mode() else ""
    raise FileNotFoundError(
        f"There is no model {source!r}: it is no local folder, and was not found on the Hub{offline}. Check the name, and the "
        "connection."
    )


def model_kwargs(model_args: ModelConfig, args: QuietStarConfig) -> dict:
    """Keyword arguments for loading the model: from TRL's `ModelConfig`, and those given as `model_init_kwargs`, which win."""
    kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    given: Any = args.model_init_kwargs or {}  # a dictionary, once the configuration has parsed it
    return {**{name: value for name, value in kwargs.items() if value is not None}, **given}


def saved_fields(source: str, **hub) -> dict:
    """
    The fields of `QuietStarConfig` that a saved thinking model keeps; none for a plain model.

    Args:
        source (`str`):
            Id on the Hub or local folder.
        hub:
            Where on the Hub, as for `from_pretrained`.
    """
    settings = saved_settings(source, **hub)
    return {} if settings is None else {OPTIONS[name]: value for name, value in settings.to_dict().items()}


def thinking_line(args: QuietStarConfig) -> str:
    """Where and how a model thinks in an evaluation, in one sentence."""
    read = "all that follow" if args.talk_length == "completion" else f"the next {args.talk_length} tokens"
    return (
        f"Thoughts of up to {args.thought_length} tokens, {args.num_thoughts} at a time, at the positions "
        f"{args.thought_positions!r}, read for {read}; temperature {args.temperature:g}, seed {args.seed}."
    )
