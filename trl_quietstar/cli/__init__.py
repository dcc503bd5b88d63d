"""The command line.

    trl-quietstar recipes copy qa
    trl-quietstar check --config qa.yaml
    trl-quietstar train --config qa.yaml --learning_rate 1e-4
    trl-quietstar generate --model out/lora --prompt "Twice seven is" --show-thoughts
    trl-quietstar eval --model_name_or_path out/lora --dataset_name test.jsonl --anti-theater
    trl-quietstar eval --model out/lora --tasks gsm8k --compare
    trl-quietstar inspect --model out/lora --text story.txt --output report.html
    trl-quietstar convert quietstar-8-ahead out/published --n_ahead 8 --tokenizer mistralai/Mistral-7B-v0.1
    accelerate launch -m trl_quietstar.cli train --config qa.yaml

Every field of `QuietStarConfig`, TRL's `ModelConfig` and `DataArguments` is a key of the recipe and a flag, which wins.

A command's module is imported when it runs, since PyTorch and Transformers take ten seconds, and help needs neither.
"""

import os


# Threads that wait for each other sleep, which is several times as fast beside a busy neighbour. OpenMP reads this when PyTorch
# is imported, so that it stands before all that imports PyTorch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import logging
import sys
import textwrap
import warnings
from importlib import import_module
from typing import TYPE_CHECKING

from .commands import COMMANDS
from .help import print_help


if TYPE_CHECKING:
    from ..data.sources import load_splits
    from .arguments import DataArguments, load_data, saved_fields

__all__ = ["DataArguments", "console", "load_data", "load_splits", "main", "saved_fields"]

MODULES = dict.fromkeys(("DataArguments", "load_data", "saved_fields"), ".arguments") | {
    "load_splits": "..data.sources"
}


def __getattr__(name: str):
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(MODULES[name], __name__), name)


def usage() -> str:
    """What the commands are, each in a paragraph."""
    width = max(map(len, COMMANDS)) + 2
    paragraphs = [
        textwrap.fill(command.summary, 120, initial_indent=name.ljust(width), subsequent_indent=" " * width)
        for name, command in COMMANDS.items()
    ]
    heading = f"usage: trl-quietstar {{{','.join(COMMANDS)}}} ..."
    return "\n".join(
        [
            heading,
            "",
            *paragraphs,
            "",
            "`trl-quietstar COMMAND --help` lists the options of a command, and `--version` versions.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    name, *rest = argv or [""]
    if name in COMMANDS:
        if {"-h", "--help"} & set(rest):
            print_help(name, rest)
        else:
            # of its import alone: on a processor it has no faster kernel, which is so for each one that is not an accelerator
            logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
            import_module(f".{COMMANDS[name].module}", __name__).run(rest)
        return 0
    if name == "--version":
        print(versions())
    elif name in ("-h", "--help"):
        print(usage())
    else:
        print(usage(), file=sys.stderr)
        return 2
    return 0


def versions() -> str:
    """Of this package, and of what a report of an error needs to name."""
    from importlib.metadata import PackageNotFoundError, version
    from platform import python_version

    from trl_quietstar import __version__

    found = []
    for package in ("torch", "transformers", "trl", "peft", "accelerate", "datasets"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return f"trl-quietstar {__version__} (Python {python_version()}, {', '.join(found)})"


def console() -> int:
    """Entry point of the console script: of an error that its user can mend, prints the words alone, in a line."""
    from .errors import words_of

    if not sys.warnoptions:  # what libraries deprecate in each other would break into the text that streams
        warnings.simplefilter("ignore", FutureWarning)
    try:
        return main()
    except Exception as error:
        words = words_of(error)
        if words is None:
            raise
        print(f"trl-quietstar: {words}", file=sys.stderr)
        return 1
