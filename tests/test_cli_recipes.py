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


@pytest.mark.slow
def test_the_first_hour_with_the_wheel_alone(distributions, tmp_path):
    """A recipe that came with it, trained on sixty questions and answers in a file; then each command on what came out."""
    (wheel,) = distributions.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    saved_model(tmp_path / "model")
    rows = [{"question": f"{a} plus {b} is", "answer": f" {a + b} ."} for a in range(6) for b in range(10)]
    for name, part in (("train", rows), ("test", rows[:4])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

    def command(line: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
        argv = [sys.executable, "-m", "trl_quietstar.cli", *shlex.split(line)]
        done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    command("recipes copy lora my.yaml")
    command(
        "train --config my.yaml --model_name_or_path model --dataset_name train.jsonl --eval_dataset_name test.jsonl --use_cpu "
        "--dataset_config none --max_steps 2 --thought_length 3 --thought_positions 3 --eval_steps 2 --save_steps 2 --warmup_steps 0"
    )
    assert "3 plus 4 is" in command("generate --model out/lora --prompt '3 plus 4 is' --max_new_tokens 3")
    mapping = '--column_mapping \'{"question": "prompt", "answer": "completion"}\''
    assert "NLL" in command(f"eval --model out/lora --dataset_name test.jsonl --use_cpu {mapping}")
    assert "Saved to merged" in command("merge out/lora merged")
    assert "3 plus 4 is" in command("generate --model merged --prompt '3 plus 4 is' --max_new_tokens 3")
