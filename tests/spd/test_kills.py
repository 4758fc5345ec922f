"""`kill -9` at random moments of calibration and healing, then the same again: the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = os.environ.get("ELISION_KILLS", "20")


def survives(module: str, *words: str | Path, kills: str = KILLS) -> None:
    """Run `module`, whose words end with how often to kill its job and a seed; every run left the same bytes."""
    root = Path(__file__).parents[2]
    paths = [str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *map(str, words), kills, "7"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{kills} kills, ")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("job", ["calibrate", "heal", "heal-streamed"])
def test_killed_at_random_moments_it_writes_the_same_bytes(job, tmp_path):
    survives("tests.spd.killed_often", job, tmp_path / "out")
