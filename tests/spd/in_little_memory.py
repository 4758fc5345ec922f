"""Work under a memory limit: `python -m tests.spd.in_little_memory JOB CHECKPOINT OUT MEGABYTES [whole]`.

JOB is "calibrate" or "heal", or "sparselora" for the calibration of the other method. The limit is on the address space
beyond what the imports take. "whole" loads the model at once instead.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from elision import sparselora
from elision.spd import Recipe, SyncPlan, calibrate, heal, open_streamed
from tests.spd.tiny import token_ids

SPARSE: dict[str, Any] = {"grid": (0.9,), "selection": "sampled", "dense_steps": 0.0, "quiet": True}

if __name__ == "__main__":
    torch.set_num_threads(1)
    job, checkpoint, out, megabytes, *rest = sys.argv[1:]
    batches = [{"input_ids": token_ids(2, 9, seed)} for seed in range(2 if job == "heal" else 1)]
    measure: Any = sparselora.calibrate if job == "sparselora" else calibrate  # imported here
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    limit = taken + int(float(megabytes) * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    load = AutoModelForCausalLM.from_pretrained if rest == ["whole"] else open_streamed
    model = load(checkpoint)
    if job == "calibrate":
        measure(model, batches, 2, drop=0.5, method="fisher", quiet=True).save(out)
    elif job == "sparselora":
        labels = batches[0]["input_ids"].clone()
        labels[:, :5] = -100
        measure(model, [{**batches[0], "labels": labels}], flops=0.9, **SPARSE).save(out)
    else:
        plan = SyncPlan(2, (3, 4, 5, 6), healing={3: "correct", 4: "hg+b2b", 5: "b2b", 6: "b2b"})
        healed = heal(model, plan, batches, recipe=Recipe(epochs=1), state=Path(f"{out}.state"), quiet=True)
        healed.save_pretrained(out)
