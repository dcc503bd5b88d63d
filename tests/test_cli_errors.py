"""What a user can mend is said in a line, before anything is loaded where it can be known then; and nothing else is said."""

import logging
import os
import subprocess
import sys
import warnings
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import yaml
from datasets import load_dataset
from transformers import pipeline
from trl import ModelConfig

from trl_quietstar import QuietStarConfig, QuietStarForCausalLM
from trl_quietstar.cli import console
from trl_quietstar.cli.errors import words_of
from trl_quietstar.cli.evaluate import TaskArguments
from trl_quietstar.cli.generate import GenerateArguments
from trl_quietstar.rules import Limits, notes_of

from .commands import recipe_in, run
from .tiny import byte_tokenizer
from .training import saved_model, tiny_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("errors")


@pytest.fixture(scope="module")
def recipe(folder) -> dict:
    return recipe_in(folder)


@pytest.fixture
def said(folder, recipe, monkeypatch, capfd):
    """What the console script says of `train` by a changed recipe and flags."""

    def say(flags: tuple = (), config: str | None = None, **changes) -> str:
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changes}))
        monkeypatch.setattr(
            "sys.argv", ["trl-quietstar", "train", "--config", config or str(folder / "recipe.yaml"), *flags]
        )
        capfd.readouterr()
        assert console() == 1
        *before, line = capfd.readouterr().err.splitlines()
        assert line.startswith("trl-quietstar: ") and "Traceback" not in before
        return line

    return say


def test_a_recipe_that_is_not_there(said, monkeypatch, folder):
    """With the command that copies it, where it comes with the package."""
    monkeypatch.chdir(folder)
    assert "no recipe 'lora.yaml'; `trl-quietstar recipes copy lora` copies" in said(config="lora.yaml")
    assert "no recipe 'x.yaml'; `trl-quietstar recipes` lists" in said(config="x.yaml")
    (folder / "list.yaml").write_text("- 1\n")
    assert "'list.yaml' is no mapping of fields to values" in said(config="list.yaml")
    (folder / "bad.yaml").write_text("a: [1\n")
    assert "'bad.yaml' is no valid YAML: " in said(config="bad.yaml")
    assert "`--config` names no recipe" in said(config="--max_steps")


READ_ALWAYS = {"model_name_or_path", "model_revision", "dtype", "attn_implementation"}
SWITCHES = {"use_peft", "load_in_4bit", "load_in_8bit"}
OF_ADAPTERS = {field.name: field.default for field in fields(ModelConfig) if field.name not in READ_ALWAYS | SWITCHES}


@pytest.mark.parametrize("name", OF_ADAPTERS)
def test_options_of_an_adapter_that_nothing_asks_for(name, said):
    """All weights would be trained instead. A new option of TRL's must be read, or be refused here."""
    switch = "load_in_4bit" if "bnb" in name else "use_peft"
    value = ["q_proj"] if OF_ADAPTERS[name] is None else OF_ADAPTERS[name]
    assert f"`{name}` has no effect without `{switch}`; set `{switch}: true`" in said(**{name: value})


def test_unknown_fields(said):
    """As a key and as a flag, with what may have been meant."""
    assert "sets `thought_lenght`, which is no field; did you mean `thought_length`?" in said(thought_lenght=3)
    assert "no flag `--thought-lenght`; did you mean `thought_length`?" in said(("--thought-lenght", "3"))
    assert "no flag `--zzz`; `trl-quietstar train --help` lists all" in said(("--zzz=3",))
    assert "no flag `--thought_len`; did you mean `thought_length`?" in said(
        ("--thought_len", "3")
    )  # no abbreviations
    assert "'word' follows no flag" in said(("--max_steps", "3", "word"))
    assert "Argument --thought_length/--thought-length: invalid int value: 'long'; `trl" in said(
        ("--thought_length", "long")
    )


def test_fields_without_effect(said, folder, monkeypatch):
    """Of a flag or a key that nothing would follow; a recipe of `train` serves other commands all the same."""
    assert "`do_train` has no effect in `trl-quietstar train`" in said(do_train=True)
    flags = ["eval", "--config", str(folder / "recipe.yaml"), "--learning_rate", "1"]
    monkeypatch.setattr("sys.argv", ["trl-quietstar", *flags])
    with pytest.raises(ValueError, match="`learning_rate` has no effect in `trl-quietstar eval`"):
        from trl_quietstar.cli import main

        main(flags)


def test_an_unknown_model(said, folder):
    """A name that is nowhere, and a folder that holds no model."""
    assert "There is no model 'no/body': it is no local folder, and was not found on the Hub" in said(
        model_name_or_path="no/body", dataset_name="nowhere"
    )
    (folder / "empty").mkdir()
    assert "is no model: it has neither config.json nor adapter_config.json" in said(
        model_name_or_path=str(folder / "empty")
    )


def test_a_push_without_a_network(said):
    """Is refused before anything is trained."""
    line = said(push_to_hub=True, model_name_or_path="no/body")
    assert "`push_to_hub` needs the Hub (" in line and "hf upload" in line


def test_a_push_that_fails_at_the_end(recipe, folder, monkeypatch):
    """What was trained is on disk, and the message says where."""
    monkeypatch.setattr("trl_quietstar.cli.train._check_hub", lambda args: None)
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, **kwargs: None)
    changes = {"push_to_hub": True, "hub_strategy": "end", "max_steps": 1, "output_dir": str(folder / "pushed")}
    with pytest.raises(ConnectionError, match="What was trained is in .*pushed', and could not be pushed"):
        run(folder, {**recipe, **changes, "eval_dataset_name": recipe["eval_dataset_name"]})
    assert (folder / "pushed/quietstar.safetensors").is_file()


def test_a_logger_that_is_not_there(said, monkeypatch):
    """Known and not installed, and unknown: before the model is looked at."""
    monkeypatch.setattr("trl_quietstar.training.checks.get_available_reporting_integrations", lambda: [])
    assert "`report_to` names 'trackio', which is not installed: `pip install trackio`" in said(report_to="trackio")
    assert "`report_to` names 'wandbb'; choose among " in said(report_to="wandbb")


def test_a_bare_flag_resumes_from_the_last_checkpoint(recipe, folder, said):
    """`--resume_from_checkpoint` alone; and where there is none, the message says so."""
    changes = {
        **recipe,
        "output_dir": str(folder / "resumed"),
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 1,
    }
    line = said(("--resume_from_checkpoint", "--max_steps", "2"), output_dir=str(folder / "resumed"))
    assert "checkpoint" in line
    run(folder, changes)
    run(folder, changes, "--resume_from_checkpoint", "--max_steps", "2")
    assert (folder / "resumed/checkpoint-2").is_dir()


@pytest.mark.parametrize("kind", [GenerateArguments, TaskArguments])
def test_numbers_of_commands_have_limits(kind):
    """Where no class of options checks them: below, each is refused by name before anything is loaded."""
    limits = notes_of(kind, Limits)
    numbers = {name for name, hint in get_type_hints(kind).items() if {int, float} & {hint, *get_args(hint)}}
    assert numbers - set(limits) == {"think_every", "thinking_threshold"}  # which depend on the model
    for name, own in limits.items():
        with pytest.raises(ValueError, match=f"`{name}` is .*, below its limit"):
            kind(**{name: own.least - 1})


def test_options_of_sampling_without_it():
    """Are refused; greedy text would not follow them."""
    for name in ("temperature", "top_p"):
        with pytest.raises(ValueError, match=f"`{name}` has no effect without `do_sample`"):
            GenerateArguments(**{name: 0.5})
        GenerateArguments(**{name: 0.5}, do_sample=True)


OUTPUTS = {
    "inspect": ("--text", "x.txt", "--output"),
    "eval": ("--dataset_name", "x.jsonl", "--output_file"),
    "eval on tasks": ("--tasks", "sums", "--output_file"),
    "compare": ("--output",),
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_a_file_that_cannot_be_written(command, recipe, folder, monkeypatch, capfd):
    """Is known before anything is computed; a folder that is not there is made."""
    (folder / "file").touch()
    start = [command.split()[0], *(["run"] if command == "compare" else ["--model", recipe["model_name_or_path"]])]
    for target, words in (
        (folder, "is a folder"),
        (folder / "file/x", "cannot be written"),
        (folder / command / "x", ""),
    ):
        monkeypatch.setattr("sys.argv", ["trl-quietstar", *start, *OUTPUTS[command], str(target)])
        if words:
            assert console() == 1
            line = capfd.readouterr().err.splitlines()[-1]
            assert line.startswith("trl-quietstar: `output") and words in line
        else:
            console()  # and ends, since there is nothing to read
            assert target.parent.is_dir()


def raised(error: Exception, inside) -> Exception:
    try:
        inside()
    except type(error) as found:
        return found
    raise AssertionError


def test_an_error_that_nobody_worded_keeps_its_traceback():
    """A fault of the program is no line."""
    assert words_of(raised(ValueError(), lambda: int("x"))) is None
    assert words_of(raised(ZeroDivisionError(), lambda: 1 / 0)) is None
    offline = ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")
    assert words_of(raised(offline, lambda: load_dataset("no/where"))) is not None  # by a task of lm-eval
    assert "`gamma` is 2" in words_of(raised(ValueError(), lambda: QuietStarConfig("out", gamma=2)))


# What is not said

CALM = """
import sys
from trl_quietstar.cli import console
sys.argv = ["trl-quietstar", *{argv!r}]
sys.exit(console())
"""


@pytest.mark.slow
def test_training_is_calm(recipe, folder):
    """No warning of libraries' own affairs: pinned memory on a processor, a kernel of bitsandbytes, a name that moved."""
    path = folder / "calm.yaml"
    path.write_text(yaml.safe_dump({**recipe, "output_dir": str(folder / "calm"), "max_steps": 1}))
    argv = ["train", "--config", str(path), "--use_peft", "--lora_target_modules", "all-linear"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-c", CALM.format(argv=argv)], env=environment, capture_output=True, text=True, check=True
    )
    for words in ("pin_memory", "gemm_4bit_forward", "is_gradient_checkpointing", "is not supported for"):
        assert words not in done.stdout + done.stderr


def test_no_name_of_transformers_that_is_deprecated_is_read(tmp_path):
    """By our own code; PEFT reads one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "`is_gradient_checkpointing`", FutureWarning)
        trainer = tiny_trainer(tmp_path, max_steps=1)
        trainer.train()
    assert not trainer.args.dataloader_pin_memory  # of which PyTorch would warn on a processor


def test_pipelines_list_no_models(tmp_path, caplog):
    """A thinking model is one that they generate with, whatever they say of its class."""
    model = QuietStarForCausalLM.from_pretrained(saved_model(tmp_path / "model"))
    with caplog.at_level(logging.ERROR):
        pipeline("text-generation", model=model, tokenizer=byte_tokenizer())
    assert "not supported" not in caplog.text
