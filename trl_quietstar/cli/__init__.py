"""The command line.

    trl-quietstar train --config recipes/demo.yaml --learning_rate 2e-4
    trl-quietstar generate --model out/lora --prompt "Twice seven is" --show-thoughts
    trl-quietstar eval --model_name_or_path out/lora --dataset_name test.jsonl --anti-theater
    trl-quietstar eval --model out/lora --tasks gsm8k --compare
    trl-quietstar inspect --model out/lora --text story.txt --output report.html
    trl-quietstar convert quietstar-8-ahead out/published --n_ahead 8 --tokenizer mistralai/Mistral-7B-v0.1
    accelerate launch -m trl_quietstar.cli train --config recipes/lora.yaml

Every field of `QuietStarConfig`, TRL's `ModelConfig` and `DataArguments` is a key of the recipe and a flag, which wins.
"""

import os


# Threads that wait for each other sleep, which is several times as fast beside a busy neighbour. OpenMP reads this when PyTorch
# is imported, so that it stands before all that imports PyTorch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import re
import sys
import traceback
import warnings
from pathlib import Path

from ..data.sources import load_splits
from . import convert, evaluate, generate, inspect, train
from .arguments import DataArguments, load_data, saved_fields


__all__ = ["DataArguments", "console", "load_data", "load_splits", "main", "saved_fields"]

COMMANDS = {
    "train": train.run,
    "generate": generate.run,
    "eval": evaluate.run,
    "inspect": inspect.run,
    "convert": convert.run,
}
USAGE = """usage: trl-quietstar train|generate|eval|inspect|convert [--config RECIPE.yaml] [--FIELD VALUE ...]

train     trains a causal language model to think, evaluates it before and after where there is evaluation data, and
          saves it
generate  writes on from a prompt, thinking; with --show-thoughts, the thoughts too
eval      evaluates a model; with --anti-theater, also whether its thoughts are used or decoration; with --tasks, on any
          tasks of lm-evaluation-harness, and with --compare there also without thoughts
inspect   writes a page of what a model thinks after each token of a text: --model PATH --text FILE --output PAGE.html; with
          --prompt FILE, of what it thinks between a prompt and the text
convert   makes a thinking model of a checkpoint of the published Quiet-STaR code: PATH OUTPUT --n_ahead N

`trl-quietstar COMMAND --help` lists every field."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] and argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
        return 0
    print(USAGE, file=sys.stderr)
    return 0 if argv[:1] in (["-h"], ["--help"]) else 2


def _is_own(error: Exception) -> bool:
    """Whether this package worded an error, in this process or in one of a pool's, whose traceback is text."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if type(error.__cause__).__name__ == "RemoteTraceback":
        raised_in = re.findall(r'^  File "(.*?)", line', str(error.__cause__), re.MULTILINE)[-1]
    return Path(raised_in).is_relative_to(Path(__file__).parents[1])


def console() -> int:
    """Entry point of the console script: of an error that this package words itself, prints the words alone."""
    if not sys.warnoptions:  # what libraries deprecate in each other would break into the text that streams
        warnings.simplefilter("ignore", FutureWarning)
    try:
        return main()
    except (ValueError, OSError, ImportError) as error:
        if not _is_own(error):
            raise
        print(f"trl-quietstar: {error}", file=sys.stderr)
        return 1
