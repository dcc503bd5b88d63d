"""Data files: those that load, with the rows that were written, and broken ones, which are named with their line."""

import gzip
import json
import logging
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset

from trl_quietstar.cli import DataArguments, console, load_data, load_splits, main

from .tiny import sums, tiny_config
from .training import saved_model, tiny_args


ROWS = [{"prompt": "3 plus 4 is", "completion": "007"}, {"prompt": 'say "None", twice', "completion": "None"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TEXT = '{"text": "a b"}\n{"text": "c d"}\n'


def write(folder: Path, name: str, content: str | bytes) -> str:
    """A file of some content; returns its path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(name: str, **options) -> list[dict]:
    """The rows of a file."""
    return list(load_splits(name, None, **options)["train"])


def frame(write_as: str, folder: Path, name: str, **options) -> str:
    """A file that pandas writes of `ROWS`; returns its path."""
    getattr(pd.DataFrame(ROWS), write_as)(folder / name, **{"index": False, **options})
    return str(folder / name)


GOOD_FILES = {
    "JSON lines": lambda folder: write(folder, "a.jsonl", LINES),
    "their other name": lambda folder: write(folder, "a.ndjson", LINES),
    "a list": lambda folder: write(folder, "a.json", json.dumps(ROWS, indent=1)),
    "upper case": lambda folder: write(folder, "A.JSONL", LINES),
    "packed": lambda folder: write(folder, "a.jsonl.gz", gzip.compress(LINES.encode())),
    "packed in upper case": lambda folder: write(folder, "A.JSON.GZ", gzip.compress(LINES.encode())),
    "Parquet": lambda folder: frame("to_parquet", folder, "a.parquet"),
    "CSV": lambda folder: frame("to_csv", folder, "a.csv"),
    "CSV of a spreadsheet": lambda folder: frame(
        "to_csv", folder, "A.CSV", encoding="utf-8-sig", lineterminator="\r\n"
    ),
    "packed CSV": lambda folder: frame("to_csv", folder, "a.csv.gz"),
    "TSV": lambda folder: frame("to_csv", folder, "a.tsv", sep="\t"),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_files_hold_what_was_written(name, tmp_path):
    """Whole and as a stream; of CSV every value is text, "007" and "None" too."""
    file = GOOD_FILES[name](tmp_path)
    assert read(file) == ROWS
    stream = load_splits(file, None, streaming=True)["train"]
    assert list(stream) == list(stream) == ROWS


def test_text_is_read_by_lines(tmp_path):
    """Each line is a text."""
    assert read(write(tmp_path, "a.TXT", "\ufeffa b\n\nc d")) == [{"text": "a b"}, {"text": ""}, {"text": "c d"}]


@pytest.mark.parametrize("name", ["run[1].jsonl", "a?.jsonl", "a*.jsonl", "data[1]/a.csv", "data[1]/a.txt"])
def test_a_name_is_no_pattern(name, tmp_path, monkeypatch):
    """It names that file, and none beside it, also from within its folder."""
    for other in ("run1.jsonl", "ab.jsonl"):
        write(tmp_path, other, '{"text": "another file"}\n')
    for other in ("data1/a.csv", "data1/a.txt"):
        write(tmp_path, other, "text\nanother file\n")
    content = {"csv": "text\nright\n", "txt": "right\n"}.get(name.rpartition(".")[2], '{"text": "right"}\n')
    file = Path(write(tmp_path, name, content))
    assert read(str(file)) == [{"text": "right"}]
    monkeypatch.chdir(file.parent)
    assert read(file.name) == [{"text": "right"}]


def test_a_changed_csv_file_is_read_anew(tmp_path):
    """Caches go by what is in the file."""
    for text in ("first", "second one"):
        assert read(write(tmp_path, "a.csv", f"text\n{text}\n")) == [{"text": text}]


BAD_FILES = {
    "empty": ("a.jsonl", "", "is empty"),
    "blank": ("a.jsonl", "\n\n", "is empty"),
    "empty CSV": ("a.csv", "", "is empty"),
    "empty text": ("a.txt", "", "is empty"),
    "empty Parquet": ("a.parquet", "", "is empty"),
    "cut off": ("a.jsonl", TEXT + '{"text": "e', "Line 3 of the data file {} is no JSON (Unterminated string"),
    "no comma": (
        "a.jsonl",
        '{"text": "a" "b"}\n' + TEXT,
        "Line 1 of the data file {} is no JSON (Expecting ',' delimiter",
    ),
    "cut list": ("a.json", '[{"text": "a"},\n {"text": "b"},\n', "Line 3 of the data file {} is no JSON"),
    "Latin-1": (
        "a.jsonl",
        (TEXT + '{"text": "é"}\n').encode("latin-1"),
        "Line 3 of the data file {} is not UTF-8 (byte 0xe9",
    ),
    "Latin-1 list": (
        "a.json",
        '[{"text": "é"}]'.encode("latin-1"),
        "Line 1 of the data file {} is not UTF-8 (byte 0xe9",
    ),
    "UTF-16": ("a.jsonl", TEXT.encode("utf-16"), "Line 1 of the data file {} is not UTF-8 (byte 0xff"),
    "half a pair": (
        "a.jsonl",
        TEXT + '{"text": "a\\ud800"}\n',
        "Line 3 of the data file {} holds half of a surrogate pair",
    ),
    "twice": ("a.jsonl", TEXT + '{"text": "a", "text": "b"}\n', "Line 3 of the data file {} names 'text' twice"),
    "strings": ("a.jsonl", '"a"\n"b"\n', "Line 1 of the data file {} holds 'a' (`str`); give an object"),
    "cut in packing": ("a.jsonl.gz", gzip.compress(TEXT.encode() * 999)[:-20], "{} cannot be unpacked after line"),
    "not packed": ("a.jsonl.gz", TEXT, "{} cannot be unpacked after line 0"),
    "no Parquet": ("a.parquet", TEXT, "{} cannot be read as Parquet"),
    "Latin-1 text": ("a.txt", "a\né\n".encode("latin-1"), "Line 2 of the data file {} is not UTF-8"),
    "Latin-1 CSV": ("a.csv", "text\né\n".encode("latin-1"), "Line 2 of the data file {} is not UTF-8"),
    "a header alone": ("a.csv", "text,id\n", "{} has no rows below its header"),
    "an open quote in the header": (
        "a.csv",
        '"text\na\n',
        "Line 2 of the data file {} is no CSV (unexpected end of data)",
    ),
    "a field more": (
        "a.csv",
        "text\na\nb, c\n",
        "Line 3 of the data file {} has 2 fields, and the header has 1 (text)",
    ),
    "a field more throughout": ("a.csv", "text\na,b\nc,d\n", "Line 2 of the data file {} has 2 fields"),
    "a field less": ("a.tsv", "prompt\tcompletion\na\n", "Line 2 of the data file {} has 1 fields"),
    "an open quote": ("a.csv", 'text\n"a\nb\n', "Line 3 of the data file {} is no CSV (unexpected end of data)"),
    "a quote that swallows lines": ("a.tsv", 'a\tb\n"c\td\ne\tf"\n', "Line 3 of the data file {} has 1 fields"),
    "a column twice": ("a.csv", "text,text\na,b\n", "Line 1 of the data file {} names a column twice (text, text)"),
}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_with_text_that_is_none(streaming, tmp_path):
    """Of a byte that was changed: found when it is read, not in the middle of preparation."""
    pd.DataFrame({"text": ["plain ascii"] * 2}).to_parquet(
        tmp_path / "a.parquet", compression=None, write_statistics=False
    )
    content = Path(tmp_path, "a.parquet").read_bytes()
    assert content.count(b"plain ascii") == 1
    file = write(tmp_path, "b.parquet", content.replace(b"plain ascii", b"pla\xffn ascii"))
    with pytest.raises(ValueError, match="b.parquet' cannot be read"):
        read(file, streaming=streaming)


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_file_is_named_with_its_line(name, streaming, tmp_path):
    """As soon as it is read: of a stream, when the line comes. No page of traceback leads there."""
    ending, content, words = BAD_FILES[name]
    file = write(tmp_path, ending, content)
    with pytest.raises(ValueError) as error:
        read(file, streaming=streaming)
    assert words.format(repr(file)) in str(error.value)
    assert error.value.__context__ is None or error.value.__suppress_context__
    assert "\n" not in str(error.value)


def test_the_command_prints_the_words_alone(tmp_path, monkeypatch, capfd):
    """One line on the terminal, before the model is loaded: there is no more of it than its configuration."""
    file, model = write(tmp_path, "a.csv", "text\na\nb, c\n"), tmp_path / "model"
    tiny_config("llama").save_pretrained(model)
    monkeypatch.setattr(
        "sys.argv", ["trl-quietstar", "train", "--model_name_or_path", str(model), "--dataset_name", file]
    )
    assert console() == 1
    printed = capfd.readouterr().err
    assert printed.splitlines()[-1].startswith("trl-quietstar: Line 3 of the data file") and "Traceback" not in printed


def test_rows_checked_by_several_processes_are_named_alike(tmp_path, monkeypatch, capfd):
    """A pool's traceback is left out too."""
    file = write(tmp_path, "a.jsonl", TEXT + '{"text": null}\n')
    model = saved_model(tmp_path / "model")
    flags = ["--model_name_or_path", model, "--dataset_name", file, "--dataset_num_proc", "2"]
    monkeypatch.setattr("sys.argv", ["trl-quietstar", "train", "--output_dir", str(tmp_path / "out"), *flags])
    assert console() == 1
    printed = capfd.readouterr().err
    assert printed.splitlines()[-1].startswith("trl-quietstar: Row 2 of the train dataset has nothing in 'text'; give")


def test_files_of_another_ending_are_refused(tmp_path, capsys):
    """By name, with the endings that are read; a missing file too. A configuration, as of a recipe's data, is warned of."""
    with pytest.raises(ValueError, match=r"a\.xlsx' .* \.json, \.jsonl, \.ndjson, \.parquet, \.csv, \.tsv or \.txt"):
        load_splits(write(tmp_path, "a.xlsx", "x"), None)
    for name in ("nowhere.csv", "nowhere.jsonl.gz", "NOWHERE.PARQUET"):
        with pytest.raises(FileNotFoundError, match=name):
            load_splits(str(tmp_path / name), None)
    assert len(load_splits(write(tmp_path, "a.jsonl", TEXT), "main")["train"]) > 0
    assert "`dataset_config` is 'main', and a file has none" in capsys.readouterr().err


def splits_of(folder: Path, **options) -> dict[str, list[dict]]:
    """The rows of a folder, by split."""
    return {split: list(rows) for split, rows in load_splits(str(folder), None, **options).items()}


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_hold_what_was_written(streaming, tmp_path):
    """Splits by the names of files, of one kind or another, in any case; CSV as it is read by itself; notes are none."""
    frame("to_csv", tmp_path, "train.csv"), frame("to_csv", tmp_path, "test.tsv", sep="\t")
    write(tmp_path, "validation.JSONL", LINES), write(tmp_path, "LICENSE.txt", "no data")
    write(tmp_path, "README.md", "# Sums")
    wanted = {"train": ROWS, "test": ROWS, "validation": ROWS}
    assert splits_of(tmp_path, streaming=streaming) == wanted
    for part in "01":
        write(tmp_path, f"parts/{part}.csv", f"text,id\n{part},{part}\n")
    for name in ("notes", "thanks", "todo"):  # more than there are data
        write(tmp_path, f"parts/{name}.txt", "no data")
    rows = [{"text": "0", "id": "0"}, {"text": "1", "id": "1"}]
    assert splits_of(tmp_path / "parts", streaming=streaming) == {"train": rows}
    card = "---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n"
    (
        write(tmp_path, "card/README.md", card),
        write(tmp_path, "card/a.jsonl", TEXT),
        write(tmp_path, "card/b.jsonl", TEXT),
    )
    assert len(splits_of(tmp_path / "card", streaming=streaming)["train"]) == 2


def test_a_folder_whose_name_is_a_pattern(tmp_path, monkeypatch):
    """It names that folder, also from within; with a card that the library reads, it is refused by name."""
    write(tmp_path, "data1/train.jsonl", TEXT)
    folder = Path(write(tmp_path, "data[1]/train.jsonl", '{"text": "right"}\n')).parent
    assert splits_of(folder) == {"train": [{"text": "right"}]}
    monkeypatch.chdir(folder)
    assert splits_of(Path(".")) == {"train": [{"text": "right"}]}
    write(folder, "README.md", "---\nconfigs: []\n---\n")
    with pytest.raises(ValueError, match=r"data\[1\]' .*rename"):
        load_splits(str(folder), None)


def test_a_folder_of_several_kinds(tmp_path, caplog):
    """Most files of a split say of which kind it is, and the others are named; as many of each are refused."""
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path, name, TEXT)
    write(tmp_path, "c.csv", "text\na\n")
    logger = logging.getLogger("trl_quietstar.data.files")
    said = []
    logger.warning, kept = (lambda words: said.append(words)), logger.warning
    try:
        assert len(splits_of(tmp_path)["train"]) == 4
    finally:
        logger.warning = kept
    assert "['c.csv']" in said[0]
    Path(tmp_path, "b.jsonl").unlink()
    with pytest.raises(ValueError, match=r"The split 'train' has files of several kinds \(a.jsonl, c.csv\); keep one"):
        load_splits(str(tmp_path), None)
    write(tmp_path, "parts/0.csv", "text\na\n"), write(tmp_path, "parts/1.csv", "body\na\n")
    with pytest.raises(ValueError, match=r"1.csv' has the columns body, and '0.csv' has text; give them the same"):
        load_splits(str(tmp_path / "parts"), None)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_file_of_a_folder_is_named(streaming, tmp_path):
    """With its line, as one that was named by itself."""
    write(tmp_path, "train.jsonl", TEXT)
    write(tmp_path, "test.jsonl", TEXT + '{"text": "e')
    with pytest.raises(ValueError, match="Line 3 of the data file '.*test.jsonl' is no JSON"):
        splits_of(tmp_path, streaming=streaming)


def test_a_saved_dataset_streams(tmp_path):
    """`dataset_streaming` holds for a folder written by `save_to_disk` too."""
    Dataset.from_dict({"text": sums()[:3]}).save_to_disk(tmp_path / "one")
    train, _ = load_data(DataArguments(dataset_name=str(tmp_path / "one"), dataset_streaming=True))
    assert not isinstance(train, Dataset) and [row["text"] for row in train] == sums()[:3]


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(column_mapping={"question": "prompt"}), "`column_mapping` renames 'question', which is no column of"),
        (dict(column_mapping={"text": "a", "id": "a"}), "`column_mapping` gives the name 'a' twice"),
        (dict(column_mapping={"text": "id"}), "`column_mapping` gives the name 'id' twice"),
        (dict(column_mapping="{text"), "`column_mapping` is '{text'; give a JSON object"),
        (dict(column_mapping="[1]"), "`column_mapping` is '[1]'; give a JSON object"),
        (dict(max_eval_samples=0), "`max_eval_samples` is 0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("streaming", [False, True])
def test_options_that_data_cannot_follow(options, words, streaming, tmp_path):
    """Named, with what is wrong."""
    file = write(tmp_path, "a.csv", "text,id\na,1\n")
    with pytest.raises(ValueError) as error:
        load_data(DataArguments(dataset_name=file, dataset_streaming=streaming, **options))
    assert words in str(error.value)


def test_a_command_trains_on_a_table(tmp_path):
    """Prompts and completions of a CSV file, numbers among them, from the command line."""
    file = write(tmp_path, "sums.csv", "prompt,completion\n" + "".join(f"3 plus {i} is,{3 + i}\n" for i in range(5)))
    model = saved_model(tmp_path / "model")
    args = tiny_args(tmp_path / "out")
    flags = [
        "--max_steps",
        "1",
        "--thought_length",
        "2",
        "--thought_positions",
        "1",
        "--report_to",
        "none",
        "--use_cpu",
    ]
    flags += ["--model_name_or_path", model, "--dataset_name", file, "--output_dir", args.output_dir]
    assert main(["train", *flags, "--save_strategy", "no", "--gradient_checkpointing", "False"]) == 0
    assert (tmp_path / "out/quietstar.safetensors").exists()
