"""`kill -9` at random moments of a calibration and its rehearsal, then the same again: the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.spd.test_kills import survives

KILLS = os.environ.get("ELISION_KILLS", "10")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_it_writes_the_same_bytes(tmp_path: Path) -> None:
    survives("tests.sparselora.killed_often", tmp_path / "out", kills=KILLS)
