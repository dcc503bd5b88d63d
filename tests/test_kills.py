"""A run that is killed at any moment, and goes on from its last whole checkpoint, ends as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "steps"), [(3, 4), (60, 8)], ids=["few", "many"])
def test_a_killed_run_is_the_run(kills, steps, tmp_path):
    """Weights, heads, reference, optimizer, schedule, logs and thoughts are those of the undisturbed run."""
    outcome = subprocess.run(
        [sys.executable, "-m", "tests.kills", str(tmp_path), "--kills", str(kills), "--steps", str(steps)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # no thread may be lost in a fork
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    found = json.loads(outcome.stdout.splitlines()[-1])
    print(found)
    assert found["differences"] == []
    assert found["kills"] == kills
    assert kills < 10 or {"training", "evaluating", "saving", "keeping"} <= set(found["by phase"])
