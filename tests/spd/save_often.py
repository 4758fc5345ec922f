"""Save a checkpoint over and over, to be killed at it: `python -m tests.spd.save_often DIRECTORY`."""

from __future__ import annotations

import sys

from elision.spd import SyncPlan, save
from tests.spd.tiny import tiny

if __name__ == "__main__":
    model = tiny("llama")
    while True:
        save(model, SyncPlan(ranks=3, dropped=(0, 2)), sys.argv[1])
