"""Processes that serve one model together: they join, agree on what they run, and name the one that is lost.

When a process dies, the collective operations of its neighbours fail with an address, not with a rank, and those of
ranks further off only after the timeout. So every rank that stops, for whatever reason, says so in the store through
which the processes met, and waits for the others to do the same. A rank that stays silent for longer than any
surviving one could is the lost one; a rank that failed on its own left its error there.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elision.errors import InputError
from elision.spd.int8 import all_reduce_on_rank

JOINING = timedelta(minutes=30)  # for loading: ranks may read their weights at different speed
IDLE = timedelta(days=30)  # that ranks wait for rank 0's next request: as long as nobody asks
MARGIN = 3.0  # seconds that a surviving rank may take from its timeout to its word in the store
_KEY = "elision/stopped"
_requests = count(1)  # of this process; every rank comes to each request, so that all count alike


class RankLostError(RuntimeError):
    """Another rank of this run died or failed, so this one cannot go on; the message names it."""


def join() -> None:
    """Meet the other processes that torchrun started, unless this one has already; alone, do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=JOINING)


def check_number(ranks: int) -> None:
    """Pass where this run has `ranks` processes.

    Raises:
        InputError: it has another number.
    """
    found = dist.get_world_size() if dist.is_initialized() else 1
    if found != ranks:
        raise InputError(
            f"plan is for {ranks} ranks, this run has {found}: start it with torchrun --nproc-per-node {ranks}, "
            "or calibrate a plan for the ranks that you have"
        )


def gather(value: Any) -> list[Any]:
    """`value` of every rank, in rank order; of this process alone where there are no others."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def idle_group() -> dist.ProcessGroup | None:
    """All ranks, for what they wait for without a limit; every rank calls this alike. None: there are no others."""
    if not dist.is_initialized():
        return None
    group = dist.new_group(backend="gloo", timeout=IDLE)
    assert isinstance(group, dist.ProcessGroup)  # as it is where all ranks are in it
    return group


def unsendable(options: Mapping[str, Any]) -> str | None:
    """The name of one of `options` that no rank can send to another, for pickle does not take it."""
    for name, value in options.items():
        try:
            pickle.dumps(value)
        except Exception:  # an object may raise anything
            return name
    return None


def from_first(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's `value`, on every rank of `group`; None: the default group."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def limit(seconds: float, *groups: dist.ProcessGroup) -> None:
    """From now on a collective operation of these groups, and of all ranks, fails after `seconds` without an answer.

    On GPUs it does not: NCCL would end every rank that waits, and so the healthy ones first.
    """
    if dist.is_initialized() and not torch.cuda.is_available():
        for group in (None, *groups):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


@contextmanager
def naming_the_lost(seconds: float) -> Iterator[None]:
    """Turn a failed collective operation inside into an error that names the rank which caused it.

    `seconds` is what `limit` was given: no surviving rank is silent for longer. That is gloo's way. A rank that waits
    in NCCL for another raises nothing here: the launcher finds the lost one, ends the others and names it (launch.py).

    Raises:
        RankLostError: another rank died, or failed with an error of its own.
    """
    request = next(_requests)
    try:
        yield
    except Exception as error:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        cut_off = isinstance(error, RuntimeError) and of_the_network(error)
        alive = cut_off or isinstance(error, InputError)  # which every rank refuses alike: it can go on
        word = "" if alive else f"{type(error).__name__}: {error}"
        blame = _roll_call(request, word, seconds + MARGIN if cut_off else 0.0)
        if not cut_off:
            raise
        raise RankLostError(blame) from error


def of_the_network(error: RuntimeError) -> bool:
    """Whether a collective operation failed, not this rank's own work."""
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in ("gloo", "NCCL", "Connection"))


def _roll_call(request: int, own_error: str, seconds: float) -> str:
    """Leave this rank's word on `request` in the store and wait up to `seconds` for the others'; who is to blame.

    Errors of earlier requests are no word on this one: what all ranks refused alike, all of them outlived.
    """
    own, everyone = dist.get_rank(), range(dist.get_world_size())
    deadline = time.monotonic() + seconds
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{_KEY}/{request}/{own}", own_error or "-")
        silent = [rank for rank in everyone if rank != own]
        while silent and time.monotonic() < deadline:
            time.sleep(0.05)
            silent = [rank for rank in silent if not store.check([f"{_KEY}/{request}/{rank}"])]
        words = {rank: store.get(f"{_KEY}/{request}/{rank}").decode() for rank in everyone if rank not in silent}
    except RuntimeError:
        return f"rank {own} lost the ranks' meeting point, which rank 0 or its launcher keeps: start all ranks again"
    failed = [f"rank {rank} stopped with {word}" for rank, word in words.items() if rank != own and word != "-"]
    if failed:
        return f"{failed[0]}; rank {own} cannot go on without it: start all ranks again"
    if silent:
        names = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
        return f"{names} died or hangs; rank {own} cannot go on without it: start all ranks again"
    return f"the ranks lost each other, though all {len(everyone)} are alive: look at the network and start them again"


def int8_all_reduce(share: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of all ranks' `share` (..., hidden), sent in int8 over `group` (maths: The block); None: the default."""
    ranks = dist.get_world_size(group)

    def all_to_all(messages: Tensor) -> Tensor:
        received = torch.empty_like(messages)
        dist.all_to_all_single(received, messages, group=group)
        return received

    def all_gather(message: Tensor) -> Tensor:
        everyone = message.new_empty((ranks, *message.shape))
        dist.all_gather(list(everyone.unbind()), message, group=group)
        return everyone

    return all_reduce_on_rank(share, dist.get_rank(group), ranks, all_to_all, all_gather)
