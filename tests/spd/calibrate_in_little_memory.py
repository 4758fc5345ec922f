"""Calibrate under a memory limit: `python -m tests.spd.calibrate_in_little_memory CHECKPOINT PLAN MEGABYTES [whole]`.

The limit is on the address space beyond what the imports take. "whole" loads the model at once instead.
"""

from __future__ import annotations

import resource
import sys

import torch
from transformers import AutoModelForCausalLM

from elision.spd import calibrate, open_streamed
from tests.spd.tiny import token_ids

if __name__ == "__main__":
    torch.set_num_threads(1)
    batches = [{"input_ids": token_ids(2, 9, seed)} for seed in range(1)]
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    limit = taken + int(float(sys.argv[3]) * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    load = AutoModelForCausalLM.from_pretrained if "whole" in sys.argv else open_streamed
    model = load(sys.argv[1])
    calibrate(model, batches, 2, drop=0.5, method="fisher", quiet=True).save(sys.argv[2])
