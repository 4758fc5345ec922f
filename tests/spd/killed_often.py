"""Kill a job at many moments, start it again each time: `python -m tests.spd.killed_often JOB FOLDER KILLS SEED`.

JOB is "calibrate", "heal" or "heal-streamed", of a model that is read block by block. A process of its own forks a
child for every start, so that a start costs no imports.
Whenever a child comes through, all that it wrote must be what an undisturbed run wrote, byte by byte.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from elision.spd import Recipe, SyncPlan, calibrations, carry_out, open_streamed
from elision.spd.calibration import Limit
from tests.spd.tiny import tiny, token_ids

BATCHES = [{"input_ids": token_ids(2, 9, seed)} for seed in range(8)]


def calibrate(folder: Path) -> None:
    limit = Limit(drop=0.5, tiers=(0.001, 0.01))
    made = calibrations(
        tiny("llama"), BATCHES[2:], (3, 6), limit, held_out=BATCHES[:2], state=folder / "state.json", quiet=True
    )
    for plan in made:
        plan.save(folder / f"plan-{plan.ranks}.json")


def heal(folder: Path, streamed: bool = False) -> None:
    plan = SyncPlan(3, (0, 1, 2), healing={0: "hg+b2b", 1: "correct", 2: "b2b"})
    healed = carry_out(
        open_streamed(folder.parent / "source") if streamed else tiny("llama"),
        plan,
        BATCHES[2:],
        held_out=BATCHES[:2],
        recipe=Recipe(epochs=4),
        state=folder / "state",
        quiet=True,
    )
    healed.save_pretrained(folder / "model")


def start(job: Callable[[Path], None], folder: Path) -> int:
    """The number of a child that does the job."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            job(folder)
            status = 0
        finally:
            os._exit(status)
    return child


def done(child: int) -> bool:
    """Whether the child came through; it is killed where it still runs."""
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "the job failed"
    return os.WIFEXITED(status)


def everything(folder: Path) -> dict[str, bytes]:
    """All files but a killed writer's temporary ones, whose names begin with a dot."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    relative = ((path.relative_to(folder), path) for path in paths)
    return {str(name): path.read_bytes() for name, path in relative if not any(p[0] == "." for p in name.parts)}


def kept(folder: Path) -> set[tuple[str, int]]:
    """Names and times of the files that are whole."""
    found = set()
    for path in folder.rglob("[!.]*"):
        with suppress(FileNotFoundError):
            found.add((str(path), path.stat().st_mtime_ns))
    return found


def strike(job: Callable[[Path], None], folder: Path, kills: int, seed: int) -> None:
    """Kill `job` so often, by turns at a random moment and where it has just kept something, and say how often it came
    through. This process must have one thread: its children fork.
    """
    draw = random.Random(seed)
    tqdm.set_lock(threading.RLock())  # its own is shared with the children: one killed while it holds it stops them all
    tqdm.monitor_interval = 0  # no thread beside, which may hold a lock at a fork
    whole, killed = folder / "whole", folder / "killed"
    whole.mkdir(parents=True)
    began = time.monotonic()
    assert os.waitpid(start(job, whole), 0)[1] == 0
    took, expected = time.monotonic() - began, everything(whole)
    assert len(expected) >= 3
    struck, runs = 0, 0
    while struck < kills or runs == 0:
        killed.mkdir(exist_ok=True)
        child = start(job, killed)
        if struck < kills and struck % 2 == 0:
            time.sleep(draw.uniform(0, 0.6 * took))
        elif struck < kills:
            before = kept(killed)
            while kept(killed) == before and not _over(child):
                time.sleep(0.001)
        else:
            while not _over(child):
                time.sleep(0.01)
        if done(child):
            assert everything(killed) == expected, "a run that was killed left other bytes"
            shutil.rmtree(killed)
            runs += 1
        else:
            struck += 1
    print(f"{struck} kills, {runs} runs came through to the same bytes")


def main() -> None:
    torch.set_num_threads(1)
    jobs = {"calibrate": calibrate, "heal": heal, "heal-streamed": partial(heal, streamed=True)}
    job, folder = jobs[sys.argv[1]], Path(sys.argv[2])
    folder.mkdir(parents=True)
    tiny("llama").save_pretrained(folder / "source")
    strike(job, folder, int(sys.argv[3]), int(sys.argv[4]))


def _over(child: int) -> bool:
    """Whether the child has ended, without taking its status."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


if __name__ == "__main__":
    main()
