"""The commands that read a trained model: `eval`, `generate` and `inspect`, and what each says is wrong."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from trl_quietstar import QuietStarForCausalLM
from trl_quietstar.cli import console, main

from .commands import recipe_in, run


@pytest.fixture
def recipe(tmp_path):
    """In a folder of the test's own."""
    return recipe_in(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run, for tests that only read it."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder, {**recipe_in(folder), "max_eval_samples": 6})
    return folder


@pytest.fixture
def trained(finished, tmp_path):
    """A trained model's folder, and flags that evaluate it."""
    flags = ["--dataset_name", str(finished / "data/test.jsonl"), "--max_eval_samples", "6", "--use_cpu"]
    flags += ["--thought_positions", "3", "--output_file", str(tmp_path / "metrics.json")]
    return str(finished / "out"), flags


def test_eval_measures_what_training_measured(trained, finished, tmp_path, capsys, monkeypatch):
    """By the saved lengths and heads, with no recipe; and it leaves nothing behind but the file asked for."""
    model, flags = trained
    monkeypatch.chdir(finished / "data")
    assert main(["eval", "--model_name_or_path", model, *flags]) == 0
    assert sorted(path.name for path in Path().iterdir()) == ["test.jsonl", "train.jsonl"]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    saved = json.loads(Path(model, "eval_results.json").read_text())
    for name in ("eval_reward", "eval_nll_with", "eval_nll_without", "eval_accuracy_with", "eval_coherence"):
        assert metrics[name] == pytest.approx(saved[name], rel=1e-5, abs=1e-6), name
    assert not [name for name in metrics if "theater" in name]
    assert "NLL with thoughts" in capsys.readouterr().out


def test_eval_validates_the_thoughts(trained, tmp_path, capsys):
    """The verdict, the tests, the controls and the gains: printed, and in the file."""
    model, flags = trained
    assert main(["eval", "--model_name_or_path", model, "--anti-theater", *flags]) == 0
    printed = capsys.readouterr().out
    for phrase in ("theater", "divergence", "content: real", "filler", "compute:"):
        assert phrase in printed
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["anti_theater_passed"] in (0.0, 1.0)
    assert metrics["anti_theater_nll_real"] == pytest.approx(metrics["eval_nll_with"], rel=1e-5)
    assert metrics["anti_theater_content_gain_low"] <= metrics["anti_theater_content_gain_high"]


def test_eval_takes_the_model_by_either_name(trained):
    """`--model`, as the other commands do, and TRL's own name; for tasks see test_harness.py."""
    model, flags = trained
    assert main(["eval", f"--model={model}", *flags]) == 0
    for name in ("--model", "--model_name_or_path"):
        with pytest.raises(ValueError, match="`tasks` is missing"):
            main(["eval", name, model, "--compare"])


def test_eval_takes_other_settings(trained, tmp_path):
    """A flag wins over what was saved."""
    model, flags = trained
    values = []
    for length in ("3", "1"):
        main(["eval", "--model_name_or_path", model, *flags, "--thought_length", length])
        values.append(json.loads((tmp_path / "metrics.json").read_text())["eval_nll_with"])
    assert values[0] != values[1]


def test_eval_of_a_plain_model(recipe, trained, tmp_path):
    """One that was never trained to think evaluates too, with fresh heads."""
    main(["eval", "--model_name_or_path", recipe["model_name_or_path"], *trained[1]])
    assert "eval_reward" in json.loads((tmp_path / "metrics.json").read_text())


def test_eval_of_an_adapter(recipe, tmp_path):
    """An adapter's folder is evaluated with its base and its heads."""
    lora = {"use_peft": True, "lora_target_modules": "all-linear", "lora_r": 4}
    run(tmp_path, {**recipe, **lora})
    output = str(tmp_path / "metrics.json")
    flags = ["--dataset_name", recipe["eval_dataset_name"], "--use_cpu", "--thought_positions", "3"]
    main(["eval", "--model_name_or_path", recipe["output_dir"], *flags, "--output_file", output])
    saved = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert json.loads(Path(output).read_text())["eval_nll_with"] == pytest.approx(saved["eval_nll_with"], rel=1e-5)


def test_eval_without_a_model(recipe):
    with pytest.raises(ValueError, match="`model_name_or_path` is missing"):
        main(["eval", "--dataset_name", recipe["dataset_name"]])


def said(capsys, *flags: str) -> str:
    """What `trl-quietstar generate` prints."""
    capsys.readouterr()
    assert main(["generate", *flags]) == 0
    return capsys.readouterr().out


def test_generate_streams_the_text_and_shows_thoughts(trained, capsys):
    """The visible text is what `generate` returns; thoughts stand in brackets, one before each token."""
    model, tokenizer = QuietStarForCausalLM.from_pretrained(trained[0]), AutoTokenizer.from_pretrained(trained[0])
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    out = model.generate(**tokenizer("7 plus 8 is", return_tensors="pt"), return_thoughts=True, **options)
    expected = tokenizer.decode(out.sequences[0], skip_special_tokens=True)
    flags = ("--model", trained[0], "--prompt", "7 plus 8 is", "--max_new_tokens", "5")
    plain = said(capsys, *flags)
    assert plain.strip() == expected.strip().rstrip("�")
    shown = said(capsys, *flags, "--show-thoughts")
    assert shown.count("⟨") == len(out.thoughts[0]) > 0
    assert re.sub("⟨.*?⟩", "", shown).strip() == plain.strip()
    assert "⟨" not in said(capsys, *flags, "--show-thoughts", "--think", "never")


def test_generate_from_standard_input_and_as_a_chat(trained, capsys, monkeypatch):
    """`-` reads the prompt; `--chat` puts it into the template."""
    flags = ("--model", trained[0], "--prompt", "-", "--max_new_tokens", "2")
    monkeypatch.setattr("sys.stdin", io.StringIO("7 plus"))
    assert said(capsys, *flags).startswith("7 plus")
    monkeypatch.setattr("sys.stdin", io.StringIO("7 plus"))
    assert said(capsys, *flags, "--chat").startswith("user: 7 plus")


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--prompt", "x"), "`model` is missing; give `--model`"),
        (("--model", "MODEL"), "`prompt` is missing; give `--prompt`"),
        (("--model", "MODEL", "--prompt", ""), "`prompt` has no tokens"),
        (("--model", "MODEL", "--prompt", "1", "--think", "hard"), "`think` is 'hard'"),
    ],
)
def test_generate_says_what_is_wrong(flags, message, trained):
    """Each with its fix."""
    with pytest.raises(ValueError, match=message):
        main(["generate", *(trained[0] if flag == "MODEL" else flag for flag in flags)])


def test_training_ends_with_the_verdict(recipe, tmp_path, capsys):
    """Where anti-theater validation is on, the saved model's is printed."""
    run(tmp_path, {**recipe, "anti_theater_steps": 5})
    assert "Anti-theater validation" in capsys.readouterr().out


# Inspection


def test_inspect_of_an_adapter(recipe, tmp_path, capsys):
    """An adapter's folder is shown with its base and its heads, by the lengths it was trained with."""
    run(tmp_path, {**recipe, "use_peft": True, "lora_target_modules": "all-linear", "lora_r": 4})
    (tmp_path / "text.txt").write_text("3 plus 4 is 7 .")
    pages = []
    for model in (recipe["output_dir"], recipe["model_name_or_path"]):
        output = tmp_path / "page.html"
        flags = ["--text", str(tmp_path / "text.txt"), "--output", str(output), "--use_cpu", "--thought_length", "3"]
        assert main(["inspect", "--model", model, *flags, "--talk_length", "2", "--value_head_hidden_size", "16"]) == 0
        pages.append(output.read_text())
    adapted, plain = (re.search(r"NLL without thoughts</dt><dd>([\d.]+)", page)[1] for page in pages)
    assert adapted != plain
    assert ["never trained" in page for page in pages] == [False, True]


def test_errors_are_said_in_a_line(trained, tmp_path, monkeypatch, capsys):
    """In a terminal, of what the user can mend: the words alone. Anything else keeps its traceback."""
    model = trained[0]
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    capsys.readouterr()
    for argv, words in {
        ("generate", "--model", "./nowhere", "--prompt", "1"): "There is no model folder './nowhere'; give",
        ("inspect", "--model", "a/b/c", "--text", "x.txt"): "There is no model folder 'a/b/c'; give",
        ("eval", "--model", "./nowhere", "--tasks", "gsm8k"): "There is no model folder './nowhere'; give",
        ("generate", "--model", str(bare), "--prompt", "1"): f"There is no tokenizer in '{bare}'; save",
        ("inspect", "--model", model, "--text", "x.txt"): "There is no text file 'x.txt'; give",
        ("generate", "--model", model): "`prompt` is missing; give `--prompt`",
    }.items():
        monkeypatch.setattr("sys.argv", ["trl-quietstar", *argv])
        assert console() == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"trl-quietstar: {words}")
    monkeypatch.setattr("trl_quietstar.cli.generate.set_seed", lambda seed: int("nothing"))
    monkeypatch.setattr("sys.argv", ["trl-quietstar", "generate", "--model", model, "--prompt", "1"])
    with pytest.raises(ValueError, match="invalid literal"):
        console()
