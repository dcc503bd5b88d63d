"""Nothing that a model, a data set or a name brings along is run, read as markup, or sent to the terminal as a command."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from trl_quietstar import QuietStarConfig, QuietStarForCausalLM
from trl_quietstar.cli import main
from trl_quietstar.evaluation import report
from trl_quietstar.evaluation.harness import QuietStarLM
from trl_quietstar.evaluation.page import write_page
from trl_quietstar.evaluation.report import TerminalStreamer, card_section, print_thoughts, printable
from trl_quietstar.loading import load_tokenizer

from .pages import HOSTILE, embedded, hostile_texts
from .tiny import byte_tokenizer
from .training import saved_model, text_data, tiny_trainer


CODE = """from pathlib import Path

Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig


class OddTokenizer(PreTrainedTokenizerFast):
    pass
"""
TERMINAL = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\x08 [bold]x[/bold] [link=http://evil]y[/link]"


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """A model and tokenizer of a class of their own, whose import leaves a mark."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = tmp_path / "odd", tmp_path / "mark"
    saved_model(folder)
    (folder / "code_odd.py").write_text(CODE.format(mark=str(mark)))
    edit(
        folder / "config.json",
        model_type="odd",
        auto_map=dict(AutoConfig="code_odd.OddConfig", AutoModelForCausalLM="code_odd.OddForCausalLM"),
    )
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="OddTokenizer",
        auto_map=dict(AutoTokenizer=[None, "code_odd.OddTokenizer"]),
    )
    return str(folder), mark


def edit(path: Path, **changes) -> None:
    """Changes entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def commands(folder: str, out: Path) -> dict:
    """Every way to load a model, without saying that its code may run."""
    data, text = out / "data.jsonl", out / "text.txt"
    data.write_text('{"text": "3 plus 4 is 7 ."}\n' * 4)
    text.write_text("3 plus 4 is 7 .")
    common = ["--use_cpu", "--thought_length", "3"]
    model = ["--model_name_or_path", folder, "--dataset_name", str(data)]
    return {
        "class": lambda: QuietStarForCausalLM.from_pretrained(folder),
        "trainer": lambda: tiny_trainer(out / "t", model=folder),
        "tokenizer": lambda: load_tokenizer(folder),
        "harness": lambda: QuietStarLM(folder, device="cpu"),
        "train": lambda: main(["train", *model, "--output_dir", str(out / "o"), *common]),
        "eval": lambda: main(["eval", *model, *common]),
        "generate": lambda: main(["generate", "--model", folder, "--prompt", "3 plus"]),
        "inspect": lambda: main(
            ["inspect", "--model", folder, "--text", str(text), "--output", str(out / "p.html"), *common]
        ),
    }


WAYS = ["class", "trainer", "tokenizer", "harness", "train", "eval", "generate", "inspect"]


@pytest.mark.parametrize("way", WAYS)
def test_code_of_a_model_does_not_run_unasked(way, odd, tmp_path, monkeypatch):
    """Every way to load one refuses, without a question on the terminal, and says what to set."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        commands(odd[0], tmp_path)[way]()
    assert not odd[1].exists()


def test_code_of_a_model_runs_when_asked(odd, capsys):
    """With the flag the same folder loads, and its code has run."""
    assert (
        main(["generate", "--model", odd[0], "--prompt", "3 plus", "--max_new_tokens", "2", "--trust_remote_code"])
        == 0
    )
    assert odd[1].exists()


def test_a_tokenizer_beside_a_model_does_not_run_either(odd, tmp_path):
    """`generate` looks for the tokenizer on its own where thoughts may end early; its code stays where it is."""
    model = QuietStarForCausalLM.from_pretrained(saved_model(tmp_path / "plain"))
    model.config.quietstar["min_thought_length"] = 1
    model.config.name_or_path = odd[0]
    with pytest.raises(ValueError, match="pass `tokenizer="):
        model.thought_tokenizer()
    assert not odd[1].exists()


def test_code_of_a_dataset_never_runs(tmp_path):
    """A folder with a loading script, which Datasets no longer knows."""
    mark, folder = tmp_path / "mark", tmp_path / "odd"
    folder.mkdir()
    (folder / "odd.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    with pytest.raises(Exception):  # noqa: B017  # whatever Datasets says of a folder without data
        main(
            [
                "train",
                "--model_name_or_path",
                saved_model(tmp_path / "m"),
                "--dataset_name",
                str(folder),
                "--output_dir",
                str(tmp_path / "o"),
            ]
        )
    assert not mark.exists()


# The terminal


def recorded(monkeypatch) -> io.StringIO:
    """What reports print from now on, as a terminal would get it."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=False, width=200)
    monkeypatch.setattr(report, "Console", lambda: console)
    return stream


def controls(text: str) -> list[str]:
    """Characters of a text that command a terminal."""
    return re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)


def test_thoughts_do_not_command_the_terminal(monkeypatch):
    """In a table, title and all: no control character, and what looks like rich's markup is shown as it is."""
    stream = recorded(monkeypatch)
    print_thoughts({"thought": [TERMINAL, "\ud800"], "reward": [0.5, float("nan")]}, TERMINAL)
    shown = stream.getvalue()
    assert not controls(shown)
    assert shown.count("[bold]x[/bold] [link=http://evil]y[/link]") == 2 and "␛[2J" in shown


@pytest.mark.parametrize("thoughts", [False, True])
def test_generated_text_does_not_command_the_terminal(thoughts):
    """Streamed token by token, nor a thought."""
    stream, tokenizer = io.StringIO(), byte_tokenizer()
    streamer = TerminalStreamer(tokenizer, Console(file=stream, force_terminal=False, width=200), thoughts)
    streamer.put(torch.tensor(tokenizer(TERMINAL)["input_ids"]))
    streamer.end()
    assert not controls(stream.getvalue()) and "[bold]x[/bold]" in stream.getvalue()


def test_ordinary_text_is_printed_as_it_is():
    """Letters of any script, tabs and line ends stay, and the length does."""
    text = "naïve 東京 🙂\tΕλλάδα\n"
    assert printable(text) == text and len(printable(TERMINAL)) == len(TERMINAL)


# The model card and the report


def test_thoughts_stay_text_in_the_model_card():
    """Each is one indented line, which Markdown shows as it is; what loads the model is one line of code."""
    hostile = HOSTILE + "\n```\n# Title | a | `b` \x1b[2J\r\n---"
    table = {name: [hostile] for name in ("context", "thought", "next")}
    section = card_section("x')\n```\n# Title", False, None, {**table, "reward": [0.5]}, QuietStarConfig())
    assert not controls(section) and "\n# Title" not in section and "\n---" not in section
    assert [line[:4] for line in section.splitlines() if "<img" in line] == ["    "]
    assert section.count("\n```") == 2


def test_names_stay_names_in_the_model_card(tmp_path):
    """Neither Markdown, HTML nor a field of the YAML header can be made by the name of a model or a dataset."""
    trainer = tiny_trainer(tmp_path, data=text_data(8), max_steps=1)
    name = "x\nlicense: evil\n---\n# Title <img src=x onerror=alert(1)> [a](http://evil) |`"
    trainer.create_model_card(name, name)
    card = (tmp_path / "README.md").read_text("utf-8")
    header, body = card.split("---\n")[1], card.split("---\n", 2)[2]
    assert set(yaml.safe_load(header)) <= {"base_model", "datasets", "library_name", "licence", "model_name", "tags"}
    assert "<img src=x" not in card and "# Title" not in re.findall(r"^#.*", body, re.M)
    assert "](http://evil" not in card and "license: evil" not in header.splitlines()


def test_a_report_with_half_a_surrogate_is_written(tmp_path):
    """File names that are not UTF-8 reach Python so; the page is written all the same, and hostile text stays data."""
    write_page(tmp_path / "page.html", "a\udcff" + HOSTILE, hostile_texts(), ["\ud800</p><script>alert(1)</script>"])
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "<script>alert" not in page and "<img" not in page and embedded(page)["texts"] == hostile_texts()
