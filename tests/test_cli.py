"""The command line end to end, in this process, on a tiny saved model and files of a few lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM

from trl_quietstar import QuietStarForCausalLM
from trl_quietstar.cli import DataArguments, load_data

from .commands import recipe_in, run, write_lines
from .tiny import sums


@pytest.fixture
def recipe(tmp_path):
    """In a folder of the test's own."""
    return recipe_in(tmp_path)


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
    assert "exact match with thoughts" in printed and "No thought was taught." in printed
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
    first, row = (line for line in capsys.readouterr().out.splitlines() if "NLL with thoughts" in line)
    before, after, change = (float(cell) for cell in row.strip("│| ").split("│")[1:])
    saved = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert f"{before:.4f}" in first
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


# Usage


# ends where PyTorch is there, and does not wait for the other libraries
UP_TO_PYTORCH = """
import sys

class End:
    def find_spec(self, name, path=None, target=None):
        if "torch" in sys.modules and name.split(".")[0] in ("datasets", "transformers", "trl", "accelerate"):
            raise SystemExit

sys.meta_path.insert(0, End())
from trl_quietstar.cli import DataArguments
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
