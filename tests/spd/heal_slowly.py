"""A healing that takes long enough to be killed: `python -m tests.spd.heal_slowly FOLDER`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from elision import files
from elision.spd import Recipe, SyncPlan, correct, heal
from tests.spd.tiny import tiny, token_ids

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write = files.write

    def slow_write(path, fill):
        time.sleep(0.5)
        return write(path, fill)

    files.write = slow_write
    batches = [{"input_ids": token_ids(2, 9, seed)} for seed in range(4)]
    plan = SyncPlan(3, (0, 1, 2))
    model, plan = correct(tiny("llama"), plan, batches, blocks=[1], quiet=True)
    heal(model, plan, batches, recipe=Recipe(epochs=2), state=folder / "state", quiet=True).save_pretrained(
        folder / "model"
    )
