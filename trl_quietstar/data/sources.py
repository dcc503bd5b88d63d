"""Datasets by name: from the Hub, a local folder or a data file."""

import glob
import re
import sys
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from trl import DatasetMixtureConfig, get_dataset

from .files import READERS, load_files, load_folder, reader_of


def load_splits(name: str, config: str | None, streaming: bool = False) -> dict[str, Dataset | IterableDataset]:
    """
    All splits of a dataset from the Hub, a local folder or a data file.

    Args:
        name (`str`):
            Id or path. Files may end in what [`data.files.READERS`] names, and be compressed.
        config (`str`, *optional*):
            Configuration of a Hub dataset.
        streaming (`bool`):
            Whether to stream.

    Raises:
        `FileNotFoundError`: if a path to a file does not exist.
        `ValueError`: for a file that is not read or broken, or a folder with a card whose name is a pattern.
    """
    path = Path(name)
    if path.is_file() or (reader_of(path) is not None and not path.is_dir()):
        return {"train": _load_file(path, name, config, streaming)}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # written by `save_to_disk`
        loaded = load_from_disk(name)
        loaded = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        return {split: x.to_iterable_dataset() if streaming else x for split, x in loaded.items()}
    if path.is_dir() and config is None and not _is_described(path):
        splits = load_folder(path, streaming)
        if splits:
            return splits
    if path.is_dir() and glob.has_magic(str(path.absolute())):  # the library looks for files by patterns
        raise ValueError(
            f"The folder {str(path.absolute())!r} has one of *?[ in its name, and files of another would be taken for its "
            "own; rename it."
        )
    return load_dataset(name, config, streaming=streaming)


def load_mixture(parts: list[dict], streaming: bool = False) -> Dataset | IterableDataset:
    """
    The rows of several datasets, as [`~trl.get_dataset`] puts them together.

    Args:
        parts (`list[dict]`):
            Of each dataset the fields of TRL's `DatasetConfig`: `path`, and what else it needs.
        streaming (`bool`):
            Whether to stream.

    Raises:
        `ValueError`: if there is no part, or one is no mapping of such fields, or names a file as `path`.
    """
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("path"), str):
            raise ValueError(
                f"`datasets` has {part!r}; give each as a mapping with a `path`, such as `- path: org/name`."
            )
        reader = reader_of(Path(part["path"]))
        if reader is not None and Path(part["path"]).is_file():
            raise ValueError(
                f"`datasets` has the file {part['path']!r} as a `path`; give `path: {reader}` and `data_files: {part['path']}`."
            )
    try:
        mixture = DatasetMixtureConfig(datasets=[*parts], streaming=streaming)  # type: ignore[list-item]  # it makes them of mappings
    except TypeError as error:  # of a keyword that `DatasetConfig` does not have
        raise ValueError(f"`datasets` has a part with an unknown field ({error}).") from None
    return get_dataset(mixture)["train"]


def _load_file(path: Path, name: str, config: str | None, streaming: bool) -> Dataset | IterableDataset:
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {name!r}.")
    if reader_of(path) is None:
        *others, last = READERS
        raise ValueError(
            f"The data file {name!r} is of no kind that is read; give one that ends in .{', .'.join(others)} or .{last}, "
            "compressed or not."
        )
    if config is not None:  # of a recipe, perhaps, whose data this file takes the place of
        print(
            f"Warning: `dataset_config` is {config!r}, and a file has none; all of {name!r} is read.", file=sys.stderr
        )
    return load_files([path], streaming)


def _is_described(folder: Path) -> bool:
    """Whether a folder has a card that says which files make which split."""
    card = folder / "README.md"
    return card.is_file() and bool(re.search(r"^configs:", card.read_text("utf-8", "replace"), re.MULTILINE))
