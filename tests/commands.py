"""Commands on a tiny saved model and files of a few lines."""

import json
from pathlib import Path

import yaml

from trl_quietstar.cli import main

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


def run(tmp_path: Path, recipe: dict, *flags: str) -> int:
    """`trl-quietstar train --config RECIPE FLAGS`."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return main(["train", "--config", str(path), *flags])
