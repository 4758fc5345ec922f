"""What launched ranks do in tests; a module of its own, so that they can import it."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist
from transformers import StoppingCriteria

from elision.errors import InputError
from elision.spd.runtimes import ranks
from elision.spd.runtimes import transformers as runtime
from tests.spd.tiny import token_ids


def add_up(how: str) -> list[float]:
    """The sum of the ranks' numbers plus one, over the ranks; or a failure of rank 1, or of all."""
    ranks.join()
    rank = dist.get_rank()
    if how == "refused":
        raise InputError("value 7 is odd: give an even one")
    if how in ("failed", "failed late") and rank == 1:
        if how == "failed late":  # rank 0 hears of the lost connection long before the launcher of the error
            dist.destroy_process_group()
            time.sleep(2)
        raise MemoryError("no room")
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    return total.tolist()


class _Dying(StoppingCriteria):
    """Kills its process after the third token."""

    left = 3

    def __call__(self, *_, **__):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1, dtype=torch.bool)


def die(place: str) -> None:
    """Rank 1 is killed in mid-generation."""
    model = runtime.load(place)
    if dist.get_rank() == 1:
        inner = model.generate
        model.generate = lambda **options: inner(**options, stopping_criteria=[_Dying()])
    runtime.generate(model, token_ids(rows=1), max_new_tokens=40, min_new_tokens=40, do_sample=False)
