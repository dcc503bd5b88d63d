"""The command line end to end, in this process, on a tiny saved model and files of a few lines."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_quietstar import QuietStarForCausalLM
from trl_quietstar.cli import DataArguments, console, load_data, main

from .tiny import sums
from .training import DEFAULTS, saved_model


def write_lines(path: Path, texts: list[str]) -> str:
    """A JSON-lines file of texts; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def recipe_in(folder: Path) -> dict:
    """Model, data and recipe on disk; the recipe as a dictionary, to change before writing."""
    return {
        **DEFAULTS,
        "model_name_or_path": saved_model(folder / "model"),
        "dataset_name": write_lines(folder / "data/train.jsonl", sums()[:40]),
        "eval_dataset_name": write_lines(folder / "data/test.jsonl", sums()[300:308]),
        "output_dir": str(folder / "out"),
        "max_steps": 2,
    }


@pytest.fixture
def recipe(tmp_path):
    """In a folder of the test's own."""
    return recipe_in(tmp_path)


def run(tmp_path: Path, recipe: dict, *flags: str) -> int:
    """`trl-quietstar train --config RECIPE FLAGS`."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return main(["train", "--config", str(path), *flags])


def history(folder: Path) -> list[dict]:
    """What the run logged, from its last checkpoint."""
    (state,) = folder.glob("checkpoint-*/trainer_state.json")
    return json.loads(state.read_text())["log_history"]


# Runs


def test_a_recipe_trains_saves_and_reports(recipe, tmp_path, capsys):
    """One command: a trained model that loads, thoughts and a before-and-after table to read, metrics and a card."""
    assert run(tmp_path, recipe) == 0
    printed = capsys.readouterr().out
    for phrase in ("Thoughts on held-out text", "NLL with thoughts", "NLL without thoughts", "before", "after"):
        assert phrase in printed
    out = tmp_path / "out"
    model = QuietStarForCausalLM.from_pretrained(out)
    assert model.quietstar_settings.thought_length == recipe["thought_length"]
    plain, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert "eval_reward" in json.loads((out / "eval_results.json").read_text())
    assert "Quiet-STaR" in (out / "README.md").read_text()


def test_the_numbers_printed_are_those_measured(recipe, tmp_path, capsys):
    """The table's last column is after minus before, and after is what is saved."""
    run(tmp_path, recipe)
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "NLL with thoughts" in line)
    before, after, change = (float(cell) for cell in row.strip("│| ").split("│")[1:])
    saved = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert after == pytest.approx(saved["eval_nll_with"], abs=1e-4)
    assert change == pytest.approx(after - before, abs=2e-4)


def test_flags_override_the_recipe(recipe, tmp_path):
    """A flag wins over the recipe's value."""
    run(tmp_path, recipe, "--thought_length", "2", "--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1",
        "--thought_positions", "2")  # fmt: skip
    assert QuietStarForCausalLM.from_pretrained(tmp_path / "out").quietstar_settings.thought_length == 2
    (entry,) = (entry for entry in history(tmp_path / "out") if "rl/num_thoughts" in entry)
    assert entry["rl/num_thoughts"] == 4 * 2 * 2


def test_lora_from_the_command_line(recipe, tmp_path):
    """`--use_peft` trains an adapter that loads with its heads."""
    run(tmp_path, recipe, "--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear")
    assert (tmp_path / "out/adapter_model.safetensors").exists()
    assert not (tmp_path / "out/model.safetensors").exists()
    assert QuietStarForCausalLM.from_pretrained(tmp_path / "out").get_base_model().quietstar is not None


@pytest.mark.parametrize("bits", ["--load_in_4bit", pytest.param("--load_in_8bit", marks=pytest.mark.slow)])
def test_quantization_from_the_command_line(bits, recipe, tmp_path):
    """TRL's own flags; an adapter is needed, and the message says how to get one."""
    pytest.importorskip("bitsandbytes")
    assert run(tmp_path, recipe, bits, "--use_peft", "--lora_target_modules", "q_proj", "v_proj") == 0
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match="pass a `peft_config` \\(`--use_peft` on the command line\\)"):
        run(tmp_path, recipe, bits)


def test_training_without_evaluation_data(recipe, tmp_path, capsys):
    """No evaluation data, no tables: training and saving work still."""
    del recipe["eval_dataset_name"]
    assert run(tmp_path, recipe) == 0
    assert "NLL with thoughts" not in capsys.readouterr().out
    assert (tmp_path / "out/quietstar.safetensors").exists()


def test_a_run_resumes(recipe, tmp_path):
    """`--resume_from_checkpoint` goes on where a run was left, of a folder or the last one of the output directory."""
    recipe.update(save_strategy="steps", save_steps=2, max_steps=2)
    run(tmp_path, recipe)
    checkpoint = str(tmp_path / "out/checkpoint-2")
    recipe.update(output_dir=str(tmp_path / "more"), max_steps=4)
    run(tmp_path, recipe, "--resume_from_checkpoint", checkpoint)
    state = json.loads((tmp_path / "more/checkpoint-4/trainer_state.json").read_text())
    assert [e["step"] for e in state["log_history"] if "rl/reward" in e] == [1, 2, 3, 4]
    recipe.update(max_steps=6)
    run(tmp_path, recipe, "--resume_from_checkpoint", "true")
    state = json.loads((tmp_path / "more/checkpoint-6/trainer_state.json").read_text())
    assert [e["step"] for e in state["log_history"] if "rl/reward" in e] == [1, 2, 3, 4, 5, 6]


def test_model_options_reach_the_model(recipe, tmp_path):
    """`--dtype` and `--attn_implementation` are TRL's own, and are heeded."""
    run(tmp_path, recipe, "--dtype", "bfloat16", "--attn_implementation", "eager")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16"


# Data


def split_sizes(**options) -> tuple[int, int | None]:
    """Number of training and evaluation texts."""
    train, evaluation = load_data(DataArguments(**options))
    return len(train), None if evaluation is None else len(evaluation)


def test_json_lines(tmp_path):
    """Files: the evaluation data is a file of its own, or there is none."""
    train = write_lines(tmp_path / "train.jsonl", sums()[:9])
    test = write_lines(tmp_path / "test.jsonl", sums()[:4])
    assert split_sizes(dataset_name=train) == (9, None)
    assert split_sizes(dataset_name=train, eval_dataset_name=test) == (9, 4)
    assert split_sizes(dataset_name=train, eval_dataset_name=test, max_eval_samples=3) == (9, 3)


def test_a_folder_of_data_files(tmp_path):
    """A folder of `train.jsonl` and `test.jsonl` has those splits."""
    write_lines(tmp_path / "train.jsonl", sums()[:9])
    write_lines(tmp_path / "test.jsonl", sums()[:4])
    assert split_sizes(dataset_name=str(tmp_path)) == (9, 4)
    assert split_sizes(dataset_name=str(tmp_path), dataset_train_split="test", dataset_test_split="train") == (4, 9)


def test_a_folder_saved_to_disk(tmp_path):
    """A dataset, or a dictionary of them, written by `save_to_disk`."""
    data = Dataset.from_dict({"text": sums()[:9]})
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data, validation=data.select(range(4))).save_to_disk(tmp_path / "several")
    assert split_sizes(dataset_name=str(tmp_path / "one")) == (9, None)
    assert split_sizes(dataset_name=str(tmp_path / "several")) == (9, 4)


def test_a_folder_trains(recipe, tmp_path):
    """The whole command on a folder written by `save_to_disk`."""
    data = Dataset.from_dict({"text": sums()[:20]})
    DatasetDict(train=data, test=data.select(range(4))).save_to_disk(tmp_path / "disk")
    del recipe["eval_dataset_name"]
    recipe["dataset_name"] = str(tmp_path / "disk")
    assert run(tmp_path, recipe) == 0
    assert (tmp_path / "out/eval_results.json").exists()


def test_streaming(recipe, tmp_path):
    """`--dataset_streaming` trains from a stream."""
    assert run(tmp_path, recipe, "--dataset_streaming", "--max_length", "64") == 0
    assert (tmp_path / "out/quietstar.safetensors").exists()


def test_columns_are_renamed(tmp_path):
    """A mapping, as a dictionary in a recipe or JSON in a flag, renames columns of both datasets."""
    data = Dataset.from_dict({"question": ["3 plus 4 is"], "answer": [" 7 ."]})
    DatasetDict(train=data, test=data).save_to_disk(tmp_path)
    mapping = {"question": "prompt", "answer": "completion"}
    for given in (mapping, json.dumps(mapping)):
        train, evaluation = load_data(DataArguments(dataset_name=str(tmp_path), column_mapping=given))
        assert set(train.column_names) == set(evaluation.column_names) == {"prompt", "completion"}


# Errors


def test_a_missing_data_file(recipe, tmp_path):
    """The message names the file."""
    recipe["dataset_name"] = str(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        run(tmp_path, recipe)


def test_a_missing_split(recipe, tmp_path):
    """The message lists the splits there are."""
    with pytest.raises(ValueError, match=r"no split 'dev'.*train"):
        run(tmp_path, recipe, "--dataset_train_split", "dev")


@pytest.mark.parametrize("name", ["dataset_name", "model_name_or_path"])
def test_a_missing_name(name, recipe, tmp_path):
    """Data and model must be named; the message says which is not."""
    del recipe[name]
    with pytest.raises(ValueError, match=f"`{name}` is missing"):
        run(tmp_path, recipe)


def test_a_missing_model(recipe, tmp_path):
    """A folder without a model is an error before any data is tokenized."""
    recipe["model_name_or_path"] = str(tmp_path / "nowhere")
    with pytest.raises(OSError, match="nowhere"):
        run(tmp_path, recipe)


def test_an_unknown_key(recipe, tmp_path):
    """A misspelt key in a recipe is an error, not ignored."""
    recipe["thought_lenght"] = 3
    with pytest.raises(ValueError, match="thought_lenght"):
        run(tmp_path, recipe)


def test_a_bad_value(recipe, tmp_path):
    """Limits hold on the command line too."""
    with pytest.raises(ValueError, match=r"`thought_length` is 0"):
        run(tmp_path, recipe, "--thought_length", "0")


# Evaluation


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


# Usage


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


def test_help_of_inspect(capsys):
    """What to look at, and the sampling of thoughts."""
    with pytest.raises(SystemExit) as ending:
        main(["inspect", "--help"])
    assert ending.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--model", "--text", "--output", "--num_thoughts", "--max_length", "--seed", "--temperature"):
        assert option in printed


@pytest.mark.parametrize("argv, status", [([], 2), (["trian"], 2), (["--help"], 0), (["-h"], 0)])
def test_usage(argv, status, capsys):
    """Anything but a known command prints the usage; only asking for it is a success."""
    assert main(argv) == status
    printed = capsys.readouterr()
    assert "usage: trl-quietstar" in printed.out + printed.err


def test_help_of_tasks(capsys):
    """The help of `eval` says where that of its tasks is."""
    for flags, words in (((), "eval --tasks TASKS --help"), (("--tasks", "x"), "--include_path")):
        with pytest.raises(SystemExit):
            main(["eval", *flags, "--help"])
        assert words in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_lists_every_option(command, capsys):
    """`--help` documents the method's options beside TRL's."""
    with pytest.raises(SystemExit) as ending:
        main([command, "--help"])
    assert ending.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--thought_length", "--reward_type", "--dataset_name", "--lora_r", "--learning_rate"):
        assert option in printed


# ends where PyTorch is there, and does not wait for the other libraries
UP_TO_PYTORCH = """
import sys

class End:
    def find_spec(self, name, path=None, target=None):
        if "torch" in sys.modules and name.split(".")[0] in ("datasets", "transformers", "trl", "accelerate"):
            raise SystemExit

sys.meta_path.insert(0, End())
import trl_quietstar.cli
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what GNU's OpenMP says of itself")
@pytest.mark.parametrize("chosen, policy", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")], ids=["default", "by the user"])
def test_threads_wait_asleep(chosen, policy):
    """OpenMP, which reads the environment when PyTorch is imported, has been told, and the user's word counts for more."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "TRUE"} | ({"OMP_WAIT_POLICY": chosen} if chosen else {})
    said = subprocess.run(
        [sys.executable, "-c", UP_TO_PYTORCH], env=environment, capture_output=True, text=True
    ).stderr
    assert f"OMP_WAIT_POLICY = '{policy}'" in said
