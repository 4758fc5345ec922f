"""Kill a calibration with a rehearsal as often: `python -m tests.sparselora.killed_often FOLDER KILLS SEED`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from elision.sparselora import calibrate
from tests.sparselora import tiny
from tests.spd.killed_often import strike


def job(folder: Path) -> None:
    batches = [tiny.batch((9 + i, 7), (2, 3)) for i in range(6)]
    plan = calibrate(
        tiny.lora(),
        batches[:3],
        flops=0.9,
        grid=(0.5, 0.9),
        selection="sampled",
        dense_steps=0.0,
        rehearse=batches[3:],
        state=folder / "state.json",
        quiet=True,
    )
    plan.save(folder / "plan.json")


if __name__ == "__main__":
    torch.set_num_threads(1)
    tiny.lora()  # imports what every child would
    strike(job, Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
