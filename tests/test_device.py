"""What runs on a GPU, by a faked one: nothing fails there, the host seldom waits, and few kernels are launched."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parent.parent
WITHOUT_COMPILER = "the hooks of the faked device are compiled with `g++`, which this machine does not have"
WITH_CUDA = (
    "the faked device takes the place of CUDA, which this build of PyTorch has; `make gpu-test` uses a real one"
)
# most waits of the host for the device, in a steady step, or a generated token for two rows
WAITS = {
    **{"train/default": 5, "train/single_pass": 5, "train/groups": 6, "train/lora": 6, "train/logging": 12},
    **{"generate/greedy": 1, "generate/adaptive": 2, "evaluate": 10, "inspect": 70},
}
# most kernels of the same, and of a step of the shapes that docs/results.md counts
KERNELS = {
    "train/default": 2_850,
    "train/early_ends_ahead": 3_450,  # most tokens of thoughts in one launch each
    "generate/greedy": 900,
    "launches/all-positions": 2_950,
    "launches/llama-1b-full": 81_000,
    "launches/llama-1b-lora": 78_000,
    "launches/llama-1b-two-passes": 38_000,
    "launches/llama-1b-groups": 62_000,
}
QUICK = ("train/default", "train/early_ends_ahead", "replayed", "float32/train", "generate/greedy", "score")

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason=WITHOUT_COMPILER),
    pytest.mark.skipif(torch.version.cuda is not None, reason=WITH_CUDA),
]


def figures(folder: Path, *arguments: str) -> dict[str, dict]:
    """What the scenarios came to, in a process of their own: the faked device comes before PyTorch."""
    file = folder / "figures.json"
    command = [sys.executable, "-m", "tests.device_check", *arguments, "--output", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert file.exists(), found.stderr[-3000:]
    return json.loads(file.read_text())


def faults(found: dict[str, dict]) -> list[str]:
    """What failed, and which figures are above their limits."""
    failed = [f"{name}: {x['error']}" for name, x in found.items() if x["error"]]
    for kind, limits in (("waits", WAITS), ("kernels", KERNELS)):
        measured = {name: x[kind] for name, x in found.items() if name in limits}
        failed += [
            f"{name}: {value} {kind}, limit {limits[name]}" for name, value in measured.items() if value > limits[name]
        ]
    return failed


def test_what_users_do_most(tmp_path):
    assert faults(figures(tmp_path, *QUICK)) == []


@pytest.mark.slow
def test_everything(tmp_path):
    found = figures(tmp_path)
    assert {"train/default", "evaluate", "generate/greedy", "score", "inspect", "lm-eval"} <= found.keys()
    assert faults(found) == []


@pytest.mark.slow
def test_large_models(tmp_path):
    assert faults(figures(tmp_path, "launches")) == []
