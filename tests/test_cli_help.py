"""What the command line says without importing PyTorch: usage, help, versions."""

import os
import resource
import subprocess
import sys
from dataclasses import MISSING, fields
from importlib import import_module

import pytest
from trl import ModelConfig

import trl_quietstar
from trl_quietstar import QuietStarConfig
from trl_quietstar.cli import main
from trl_quietstar.cli.arguments import DataArguments
from trl_quietstar.cli.commands import COMMANDS, OF_OTHERS, TASKS
from trl_quietstar.cli.options import is_deprecated, is_used, options_of
from trl_quietstar.rules import UNSUPPORTED


KINDS = {"train": (DataArguments, QuietStarConfig, ModelConfig), "inspect": ("InspectArguments", QuietStarConfig)}
KINDS |= {
    "eval": ("EvalArguments", *KINDS["train"]),
    "generate": ("GenerateArguments",),
    "eval --tasks": ("TaskArguments",),
}


@pytest.mark.parametrize("argv, status", [([], 2), (["trian"], 2), (["--help"], 0), (["-h"], 0)])
def test_usage(argv, status, capsys):
    """Anything but a known command prints the usage; only asking for it is a success."""
    assert main(argv) == status
    printed = capsys.readouterr()
    assert "usage: trl-quietstar" in printed.out + printed.err


def test_versions(capsys):
    """What a report of an error needs to name."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"trl-quietstar {trl_quietstar.__version__} (Python 3.")


@pytest.mark.parametrize("name", KINDS)
def test_what_is_read_is_what_the_parser_takes(name):
    """Names and defaults that the sources have, as the dataclasses have them when they are imported: a release of Transformers or
    TRL that moves or rewrites them is noticed here."""
    command = TASKS if name == "eval --tasks" else COMMANDS[name]
    module = import_module(f"trl_quietstar.cli.{command.module}")
    kinds = [getattr(module, kind) if isinstance(kind, str) else kind for kind in KINDS[name]]
    taken = {field.name: field for kind in reversed(kinds) for field in fields(kind)}
    options = {option.name: option for option in options_of(command)}
    assert options.keys() == taken.keys()
    assert all(option.help for option in options.values())
    for field in taken.values():
        read = options[field.name].default
        if read is not None and field.default is not MISSING and field.name not in command.defaults:
            assert read == field.default, field.name


def test_what_is_named_as_used_or_unused_exists():
    """No name of an option or a section is stale, and what the trainer refuses is not shown."""
    for command in COMMANDS.values():
        options = options_of(command)
        known = {option.name for option in options} | {option.section for option in options}
        assert command.unused | (command.used or frozenset()) <= known
    assert UNSUPPORTED.keys() <= OF_OTHERS


def helped(capsys, *argv: str) -> str:
    assert main([*argv, "--help"]) == 0
    return capsys.readouterr().out


def test_help_of_train(capsys):
    """Own options first and in groups, then TRL's and the Trainer's; of those none that has no effect."""
    printed = helped(capsys, "train")
    order = [
        "--dataset_name",
        "\nThoughts:",
        "--thought_length",
        "\nReward and advantage:",
        "--reward_type",
        "--learning_rate",
    ]
    order += ["\nModel and adapter", "--lora_r", "\nTrainer: Evaluation:", "--eval_steps", "--resume_from_checkpoint"]
    places = [printed.index(part) for part in order]
    assert places == sorted(places)
    for name in ("torch_compile", "label_names", "do_train", "gradient_checkpointing_kwargs"):
        assert f"--{name} " not in printed
    assert printed.count("--learning_rate ") == 1


def test_help_of_what_trains_nothing(capsys):
    """What to look at and how to think, and nothing of optimizers and checkpoints."""
    for command, own in (("eval", "--per_device_eval_batch_size"), ("inspect", "--text")):
        printed = helped(capsys, command)
        for name in (own, "--thought_length", "--max_length", "--seed", "--temperature", "--use_cpu"):
            assert name in printed
        for name in ("--learning_rate", "--save_steps", "--anti_theater_steps", "--max_steps", "--push_to_hub"):
            assert name not in printed
    assert "--num_thoughts INT" in printed and "(G). [3]" in " ".join(
        printed.split()
    )  # `inspect` has a default of its own


def test_help_of_tasks(capsys):
    """The help of `eval` says where that of its tasks is."""
    assert "eval --tasks TASKS --help" in " ".join(helped(capsys, "eval").split())
    assert "--include_path" in helped(capsys, "eval", "--tasks", "x")


def test_every_command_has_help(capsys):
    for name in COMMANDS:
        assert f"usage: trl-quietstar {name}" in helped(capsys, name)


def test_no_option_of_a_command_is_deprecated():
    """What help does not show for its age is the Trainer's."""
    shown = {o.name for o in options_of(COMMANDS["train"]) if is_used(COMMANDS["train"], o) and not is_deprecated(o)}
    assert set(QuietStarConfig.__annotations__) <= shown


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell, capsys):
    """Of commands, and of the flags of each."""
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    for word in ("generate", "--thought_length", "--show_thoughts"):
        assert word in printed
    with pytest.raises(ValueError, match="`completion dos` is not known; give one of bash"):
        main(["completion", "dos"])


def test_help_takes_less_than_two_seconds():
    """Of processor time: nothing imports PyTorch. It takes a tenth of one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = (
        "import sys; from trl_quietstar.cli import main; main(['train', '--help']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=dict(os.environ))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
