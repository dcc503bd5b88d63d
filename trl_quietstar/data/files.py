"""Data files: which endings are read and how, and what an error says of a broken file.

The library `datasets` reads JSON, Parquet and text. CSV is read here, since its values are texts: pandas would read "007" as a
number and "None" as nothing, and would shift the columns of a row that has one field too many. A file that cannot be read is
read again line by line, so that the error names the first line at fault.
"""

import csv
import glob
import json
import lzma
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.data_files import DataFilesDict, get_data_patterns
from pyarrow.parquet import ParquetFile
from transformers.utils import logging

from .rows import has_half_pair, shown


logger = logging.get_logger(__name__)

# By a file's ending, what reads it.
READERS = {
    "json": "json",
    "jsonl": "json",
    "ndjson": "json",
    "parquet": "parquet",
    "csv": "csv",
    "tsv": "csv",
    "txt": "text",
}
COMPRESSIONS = ("gz", "bz2", "xz", "zst")

csv.field_size_limit(sys.maxsize)  # a field may be a book


def ending_of(path: Path) -> str:
    """The ending of a file in small letters; of a compressed file, the ending before that of the compression."""
    endings = path.name.lower().split(".")[1:]
    if endings and endings[-1] in COMPRESSIONS:
        endings.pop()
    return endings[-1] if endings else ""


def reader_of(path: Path) -> str | None:
    """What reads a file, by its ending; None if files with this ending are not read."""
    return READERS.get(ending_of(path))


def load_folder(path: Path, streaming: bool = False) -> dict[str, Dataset | IterableDataset]:
    """
    The splits of a folder of data files: `train`, `test` and `validation` by the names of files and folders, as in
    `datasets.load_dataset`.

    Args:
        path (`Path`):
            The folder.
        streaming (`bool`):
            Whether to stream.

    Returns:
        `dict`: Datasets by the names of their splits; empty if the folder has no file of a kind that is read.

    Raises:
        `ValueError`: if a file cannot be read, naming the file, the line and the fault; or if a split has as many files of one
            kind as of another.
    """
    base = glob.escape(str(path.absolute()))  # a name and no pattern, which may match others
    try:
        found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    except FileNotFoundError:
        return {}
    splits = {}
    for split, names in found.items():
        files = _of_one_kind([file for file in map(Path, names) if reader_of(file) is not None], str(split))
        if files:
            splits[str(split)] = load_files(files, streaming)
    return splits


def _of_one_kind(files: list[Path], split: str) -> list[Path]:
    """
    The files of a split that are of its kind, which is the kind of most of them. Text files beside data files are taken for
    notes and left out; a warning names what else is left out.
    """
    counts = Counter(map(reader_of, files)).most_common()
    counts = [pair for pair in counts if pair[0] != "text"] or counts
    if len(counts) > 1 and counts[0][1] == counts[1][1]:
        names = ", ".join(sorted(file.name for file in files)[:4])
        raise ValueError(f"The split {split!r} has files of several kinds ({names}); keep one kind, or name a file.")
    others = [file.name for file in files if reader_of(file) not in (counts[0][0], "text")]
    if others:
        logger.warning(f"Of the split {split!r} these files are not read, since most are of another kind: {others}.")
    return [file for file in files if reader_of(file) == counts[0][0]]


def load_files(paths: list[Path], streaming: bool = False) -> Dataset | IterableDataset:
    """
    The rows of data files of one kind, one file after the other.

    Args:
        paths (`list[Path]`):
            The files, with endings of `READERS`.
        streaming (`bool`):
            Whether to stream.

    Raises:
        `ValueError`: if a file cannot be read, naming the file, the line and the fault. A stream raises it at that line.
    """
    if streaming:
        return IterableDataset.from_generator(_rows, gen_kwargs={"paths": list(paths)})
    reader = reader_of(paths[0])
    try:
        if reader == "csv":
            return _load_csv(paths)
        for path in paths if reader == "json" else ():
            _check_lines(path, is_json=False)  # Arrow takes any bytes, and fails at them later
        rows = _load(paths)
        if reader == "parquet":
            rows.data.validate(full=True)
        return rows
    except Exception as error:  # each of the libraries that read has errors of its own
        faults = filter(None, map(fault_in, paths))
        raise next(faults, None) or _unreadable(paths[0], error) from None


def _load(paths: list[Path], streaming: bool = False) -> Dataset | IterableDataset:
    options = {"encoding": "utf-8-sig"} if reader_of(paths[0]) == "text" else {}
    files = {"train": [glob.escape(str(path.absolute())) for path in paths]}
    return load_dataset(reader_of(paths[0]), data_files=files, streaming=streaming, **options)["train"]


def _load_csv(paths: list[Path]) -> Dataset:
    header, *others = [next(_csv_lines(path)) for path in paths]
    for path, other in zip(paths[1:], others, strict=True):
        if set(other) != set(header):
            raise ValueError(
                f"The data file {str(path)!r} has the columns {', '.join(other)}, and {paths[0].name!r} has {', '.join(header)}; "
                "give them the same."
            )
    # the cache of `datasets` goes by these arguments: with the stamps, a file that has changed is read again
    stamps = [(path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
    features = Features({name: Value("string") for name in header})
    return Dataset.from_generator(_rows, features, gen_kwargs={"paths": list(paths), "stamps": stamps})


def _rows(paths: list[Path], stamps: list[tuple] | None = None) -> Iterator[dict]:
    """Yields the rows of files; raises an error that names the fault where one cannot be read."""
    for path in paths:
        row = None
        try:
            if reader_of(path) == "json" and not _has_rows_by_lines(path):  # read whole, and in any encoding
                _check_lines(path, is_json=False)
            for row in _csv_rows(path) if reader_of(path) == "csv" else _load([path], streaming=True):
                yield row
        except Exception as error:
            raise fault_in(path) or _unreadable(path, error) from None
        if row is None:
            check_file(path)


def _csv_rows(path: Path) -> Iterator[dict]:
    lines = _csv_lines(path)
    header = next(lines)
    for line in lines:
        yield dict(zip(header, line, strict=True))


def _csv_lines(path: Path) -> Iterator[list[str]]:
    """Yields the header of a CSV file and then its rows, and refuses rows with more or fewer fields than the header."""
    delimiter = "\t" if ending_of(path) == "tsv" else ","
    with fsspec.open(str(path), "rt", compression="infer", encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(lines, [])
            if len(set(header)) < len(header):
                raise ValueError(f"Line 1 of the data file {str(path)!r} names a column twice ({', '.join(header)}).")
            yield header
            for line in lines:
                if line and len(line) != len(header):
                    raise ValueError(
                        f"Line {lines.line_num} of the data file {str(path)!r} has {len(line)} fields, and the header "
                        f"has {len(header)} ({', '.join(header)}); put a text that holds the separator in double quotes."
                    )
                if line:
                    yield line
        except csv.Error as error:
            raise ValueError(
                f"Line {lines.line_num} of the data file {str(path)!r} is no CSV ({error}); a text that holds double quotes "
                "stands in double quotes, with each of its own doubled."
            ) from None


def fault_in(path: Path) -> ValueError | None:
    """The error that [`check_file`] raises for a path; None if there is no such file or it has no fault."""
    try:
        if path.is_file() and reader_of(path) is not None:
            check_file(path)
    except ValueError as found:
        return found
    return None


def _unreadable(path: Path, error: Exception) -> ValueError:
    """The error for a file that a library could not read, though [`check_file`] finds no fault in it."""
    if isinstance(error, ValueError) and error.__traceback__ is not None and str(path) in str(error):
        return error
    reason = f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}".splitlines()[0]
    return ValueError(f"The data file {str(path)!r} cannot be read ({reason}).")


def check_file(path: Path) -> None:
    """
    Reads a data file line by line to find a fault.

    Args:
        path (`Path`):
            The file.

    Raises:
        `ValueError`: if there is a fault, naming the file, the line and the fault.
    """
    reader = reader_of(path)
    if path.stat().st_size == 0:
        raise ValueError(f"The data file {str(path)!r} is empty.")
    if reader == "parquet":
        try:
            ParquetFile(path)
        except Exception as error:
            raise ValueError(
                f"The data file {str(path)!r} cannot be read as Parquet ({str(error).splitlines()[0]}); it may have been cut off."
            ) from None
        return
    _check_lines(path, is_json=reader == "json")
    if reader == "csv" and sum(1 for _ in _csv_lines(path)) < 2:
        raise ValueError(f"The data file {str(path)!r} has no rows below its header.")


def _has_rows_by_lines(path: Path) -> bool:
    """Whether each line of a JSON file is a row. Others hold a list of objects, or one object over several lines."""
    with fsspec.open(str(path), "rb", compression="infer") as file:
        first = next((line.strip() for line in file if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
    return not _is_whole(first.decode("utf-8-sig", "replace"))


def _is_whole(first_line: str) -> bool:
    """Whether a JSON file is one value, by its first line: a list, or an object that goes on in the next line."""
    return first_line[:1] == "[" or first_line == "{"


def _check_lines(path: Path, is_json: bool) -> None:
    """Refuses a file with a line that is not UTF-8, or not a JSON object where each line should be one; and an empty file."""
    number, first, is_whole = 0, "", False
    try:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text and not first:
                    first, is_whole = text, _is_whole(text)
                if is_json and text and not is_whole:
                    _check_json(path, number, text)
            if is_json and is_whole:
                file.seek(0)
                _check_json(path, 1, file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Line {number} of the data file {str(path)!r} is not UTF-8 (byte {error.object[error.start]:#x} at character "
            f"{error.start + 1}); save the file as UTF-8."
        ) from None
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(
            f"The data file {str(path)!r} cannot be unpacked after line {number} ({error}); it may have been cut off, or be "
            "of another kind than its ending says."
        ) from None
    if not first:
        raise ValueError(f"The data file {str(path)!r} is empty.")


def _check_json(path: Path, line: int, text: str) -> None:
    """Refuses text, which begins at a line, unless it is JSON: one or more objects that name each column once, in Unicode."""

    def refuse(number: int, fault: str):
        raise ValueError(f"Line {number} of the data file {str(path)!r} {fault}.") from None

    def named_once(pairs: list[tuple]) -> dict:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            refuse(line, f"names {twice!r} twice; keep one")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=named_once)
    except json.JSONDecodeError as error:
        cut = "; the file may have been cut off" if error.pos >= len(text) - 1 or "Unterminated" in error.msg else ""
        refuse(line + error.lineno - 1, f"is no JSON ({error.msg} at character {error.colno}){cut}")
    for row in value if isinstance(value, list) else [value]:
        if not isinstance(row, dict):
            refuse(line, f'holds {shown(row)}; give an object, such as {{"text": "..."}}')
        if has_half_pair(json.dumps(row, ensure_ascii=False)):
            refuse(line, "holds half of a surrogate pair; give text that is Unicode")
