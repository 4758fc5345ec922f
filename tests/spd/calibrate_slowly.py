"""A calibration that takes long enough to be killed: `python -m tests.spd.calibrate_slowly FOLDER`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from elision import files
from elision.spd import calibrate
from tests.spd.tiny import tiny, token_ids

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_json = files.write_json

    def slow_write(path, value):
        time.sleep(0.05)
        return write_json(path, value)

    files.write_json = slow_write
    batches = [{"input_ids": token_ids(2, 9, seed)} for seed in range(12)]
    calibrate(tiny("llama"), batches, 3, state=folder / "state.json", quiet=True).save(folder / "plan.json")
