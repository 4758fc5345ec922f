"""How long real ranks take: an all-reduce amid computation, a decoded token, a prompt; variants in turns, medians.

Every rank calls these functions alike and measures with its own clock. An all-reduce is timed "cold": computation
stands between two of them, as in a model, because one right after another finds caches warm and nobody late. A rank
that arrives early waits inside the call; the least of all ranks' times is what the last one spent there, the cost of
the all-reduce itself. What a dropped sync saves beyond that is the waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from elision.errors import InputError
from elision.spd.costs import Link
from elision.spd.plan import SyncPlan
from elision.spd.runtimes.transformers import drop_syncs

SIZES = tuple(4**k for k in range(5, 12))  # bytes of the all-reduces that a link is fitted to: 1 KiB to 4 MiB


@dataclass(frozen=True)
class Workload:
    """What is timed: a prompt of `tokens` in each of `batch` rows, or the `steps` tokens that are decoded after it."""

    batch: int
    tokens: int
    steps: int = 0

    @property
    def name(self) -> str:
        """For tables."""
        rows = f"batch {self.batch}"
        return f"decode, {rows}" if self.steps else f"prefill {self.tokens}, {rows}"

    @property
    def passing(self) -> int:
        """Tokens that go through a block at once."""
        return self.batch if self.steps else self.batch * self.tokens


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def clock() -> float:
    """Seconds, after all that was launched is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def cold(operation: Callable[[], Any], turns: int, between: int = 1024) -> float:
    """Median seconds of a collective operation with a product of a (between, between) matrix before each.

    Every rank must call it with the same operation.
    """
    weight = torch.randn(4, between, between, device=device())
    x = torch.randn(1, between, device=device())
    took = torch.empty(turns)
    for turn in range(turns + 2):
        for matrix in weight:
            x = F.linear(x, matrix).tanh()
        start = clock()
        operation()
        if turn >= 2:  # the first ones warm up
            took[turn - 2] = clock() - start
    return float(_over_ranks(took, dist.ReduceOp.MIN).median())


def _over_ranks(values: Tensor, operation: Any) -> Tensor:
    """Element by element over all ranks, the same on each."""
    values = values.to(device())
    dist.all_reduce(values, operation)
    return values.cpu()


def cold_all_reduce(size: int, turns: int, group: Any = None) -> float:
    """Median seconds of a cold all-reduce of `size` bytes in fp32."""
    tensor = torch.zeros(max(1, size // 4), device=device())
    return cold(lambda: dist.all_reduce(tensor, group=group), turns)


def probe(sizes: Sequence[int] = SIZES, turns: int = 50, group: Any = None) -> tuple[Link, list[float]]:
    """The links between these ranks, fitted to cold all-reduces of `sizes` bytes, and what each took in seconds.

    Raises:
        InputError: this process is alone.
    """
    if not dist.is_initialized() or dist.get_world_size(group) < 2:
        raise InputError("one rank has no links to measure: start two or more")
    seconds = [cold_all_reduce(size, turns, group) for size in sizes]
    return Link.fit(dist.get_world_size(group), sizes, seconds), seconds


@torch.no_grad()
def timed(model: Any, workload: Workload) -> list[float]:
    """Seconds of the prompt's pass, or of each decoded token, for random tokens; the same tokens at every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (workload.batch, workload.tokens)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=generator).to(device())
    start = clock()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    if not workload.steps:
        return [clock() - start]
    took = []
    for _ in range(workload.steps):
        ids = out.logits[:, -1:].argmax(-1)
        start = clock()
        out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        took.append(clock() - start)
    return took


def compare(
    variants: Mapping[str, Callable[[Workload], list[float]]],
    workloads: Sequence[Workload],
    turns: int,
    advance: Callable[[int], object] = lambda _: None,
) -> dict[str, dict[str, list[float]]]:
    """Seconds by workload's name and variant's, as the variants measure them; after one turn to warm up.

    Variants take turns within a workload, so that a machine which slows down slows all of them; every other turn goes
    backwards, so that none always follows the same one, whose heat or idleness it would inherit. `advance` is called
    with 1 after each variant's turn.
    """
    found: dict[str, dict[str, list[float]]] = {w.name: {name: [] for name in variants} for w in workloads}
    for workload in workloads:
        for turn in range(turns + 1):
            for name in list(variants)[:: -1 if turn % 2 else 1]:
                took = variants[name](workload)
                if turn:
                    found[workload.name][name] += took
                advance(1)
    return found


def under(model: Any, plan: SyncPlan) -> Callable[[Workload], list[float]]:
    """What measures `model`, all of whose syncs are in place, under `plan`."""

    def measure(workload: Workload) -> list[float]:
        with drop_syncs(model, plan):
            return timed(model, workload)

    return measure
