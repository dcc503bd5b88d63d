"""The recipes that come with the package, from the repository and from a wheel."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from trl_quietstar.cli import main
from trl_quietstar.cli.recipes import recipes

from .training import saved_model


ROOT = Path(__file__).parent.parent
SMALL = "--model_name_or_path model --use_cpu --max_steps 4 --thought_length 4 --num_thoughts 2 --eval_strategy steps --eval_steps 2 "
SMALL += "--save_strategy steps --save_steps 2 --logging_steps 2"


def test_recipes_are_listed(capsys):
    """Each with what it is."""
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    for file in ROOT.glob("recipes/**/*.yaml"):
        name = file.relative_to(ROOT / "recipes").with_suffix("").as_posix()
        assert f"\n{name} " in f"\n{printed}"
    assert "lora" in recipes() and "accelerate/fsdp2" in recipes()
    assert "QLoRA (arXiv 2305.14314): the base in 4 bits" in printed


def test_a_recipe_is_copied(tmp_path, monkeypatch, capsys):
    """Into this folder, another one, or a file; with the command that trains by it. Nothing is written over."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for arguments, target in {
        ("lora",): "lora.yaml",
        ("lora.yaml", "folder"): "folder/lora.yaml",
        ("lora", "a/b.yaml"): "a/b.yaml",
    }.items():
        assert main(["recipes", "copy", *arguments]) == 0
        assert (tmp_path / target).read_text() == (ROOT / "recipes/lora.yaml").read_text()
        assert f"`trl-quietstar train --config {target}`" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"'lora.yaml' is there already"):
        main(["recipes", "copy", "lora"])
    main(["recipes", "copy", "accelerate/fsdp2"])
    assert "accelerate launch --config_file fsdp2.yaml -m trl_quietstar.cli train" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (("copy", "loar"), "no recipe 'loar'; did you mean 'lora'"),
        (("copy", "xxxx"), "no recipe 'xxxx'; there are "),
        (("copy",), "`recipes copy` is not known; give `recipes`, or `recipes copy NAME"),
        (("lora",), "`recipes lora` is not known"),
    ],
)
def test_what_is_no_recipe(argv, message):
    with pytest.raises(ValueError, match=message):
        main(["recipes", *argv])


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A folder with a wheel and a source distribution, built in a copy of the repository."""
    setuptools = pytest.importorskip("setuptools", minversion="77")
    assert setuptools
    folder = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "out", "*.egg-info", "wandb")
    shutil.copytree(ROOT, folder / "copy", ignore=ignored)
    code = "from setuptools import build_meta as b; b.build_sdist('../dist'); b.build_wheel('../dist')"
    (folder / "dist").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=folder / "copy", check=True, capture_output=True)
    return folder / "dist"


def test_recipes_travel_in_the_wheel(distributions, tmp_path):
    """What is installed lists and copies them, without the repository."""
    (wheel,) = distributions.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    folder = tmp_path / "installed/trl_quietstar/recipes"
    of_repository = {path.relative_to(ROOT / "recipes"): path for path in ROOT.glob("recipes/**/*.*")}
    assert {path.relative_to(folder) for path in folder.rglob("*.*")} == of_repository.keys()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-m", "trl_quietstar.cli", "recipes"]
    listed = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "lora " in listed
    subprocess.run([*command, "copy", "qlora"], env=environment, cwd=tmp_path, check=True, capture_output=True)
    assert yaml.safe_load((tmp_path / "qlora.yaml").read_text())["load_in_4bit"] is True


def test_the_source_distribution_is_whole(distributions):
    """Documentation, recipes, examples and tests are in it."""
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for folder in ("docs", "recipes", "examples", "tests", "benchmarks", "trl_quietstar"):
        files = {p.relative_to(ROOT).as_posix() for p in ROOT.glob(f"{folder}/**/*") if p.is_file()}
        assert {name for name in files if "__pycache__" not in name} <= names
    assert {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "setup.py"} <= names


HOUR = {
    "copy": "recipes copy qa my.yaml",
    "check": f"check --config my.yaml {SMALL}",
    "train": f"train --config my.yaml {SMALL}",
    "generate": "generate --model out/qa --chat --prompt '3 plus 4 is' --max_new_tokens 3 --show-thoughts",
    "eval": "eval --model out/qa --chat --dataset_name data.jsonl --max_eval_samples 8 --use_cpu",
    "merge": "merge out/qa merged",
    "again": "generate --model merged --chat --prompt '3 plus 4 is' --max_new_tokens 3",
    "compare": "compare out/qa",
}
# one process for all, since PyTorch takes longer to import than a tiny model to train
SCRIPT = """
import sys, trl_quietstar
from pathlib import Path
from trl_quietstar.cli import main
assert Path(trl_quietstar.__file__).is_relative_to({installed!r}), trl_quietstar.__file__
for name, argv in {commands!r}.items():
    sys.stdout = open(name + ".txt", "w")
    assert main(argv) == 0
    sys.stdout.close()
"""


@pytest.fixture(scope="module")
def first_hour(distributions, tmp_path_factory) -> Path:
    """A folder with sixty questions and answers, in which each command has run with what the wheel holds, and with what each
    printed."""
    folder = tmp_path_factory.mktemp("hour")
    (wheel,) = distributions.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    saved_model(folder / "model")
    rows = [{"question": f"{a} plus {b} is", "answer": f"{a + b} ."} for a in range(6) for b in range(10)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = SCRIPT.format(
        installed=str(folder / "installed"), commands={name: shlex.split(line) for name, line in HOUR.items()}
    )
    environment = {**os.environ, "PYTHONPATH": str(folder / "installed")}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, words",
    [
        ("copy", "Train by it: `trl-quietstar train --config my.yaml`"),
        ("check", "A step of 8 rows takes about"),
        ("train", "6 are set apart for evaluation"),
        ("train", "After 4 steps"),
        ("generate", "3 plus 4 is"),
        ("eval", "NLL with thoughts"),
        ("merge", "Saved to merged"),
        ("again", "3 plus 4 is"),
        ("compare", "one setting"),
    ],
)
def test_the_first_hour_with_the_wheel_alone(command, words, first_hour):
    """A recipe that came with it, on a file of questions and answers; then each command on what came out."""
    assert words in " ".join((first_hour / f"{command}.txt").read_text().split())


@pytest.mark.slow
def test_what_the_first_hour_leaves(first_hour):
    """An adapter with its heads, its history and a plot; a merged model; a plot of the comparison."""
    for name in ("quietstar.safetensors", "adapter_model.safetensors", "history.jsonl", "history.svg", "run.json"):
        assert (first_hour / "out/qa" / name).is_file()
    assert (first_hour / "merged/model.safetensors").is_file() and (first_hour / "compare.svg").is_file()
