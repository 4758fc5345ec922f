"""What every rank of a command does; launch.py starts them."""

from __future__ import annotations

import os
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from elision.progress import progress
from elision.spd.costs import saving, treatments
from elision.spd.plan import SyncPlan
from elision.spd.runtimes import latency, launch, ranks
from elision.spd.runtimes import transformers as runtime


def generate(
    source: str,
    plan: SyncPlan,
    inputs: dict[str, Tensor],
    options: dict[str, Any],
    dtype: str,
    timeout: float,
) -> Tensor:
    """Token ids (rows, sequence), prompts included, that the ranks generate after `inputs` under `plan`."""
    _quiet()
    model = runtime.load(source, plan, dtype=dtype, timeout=timeout)
    torch.manual_seed(options.pop("seed", 0))
    with progress("Generating", options["max_new_tokens"], quiet=not launch.is_first()) as advance:
        counted = model.register_forward_hook(lambda *_: advance(1))  # one pass a token
        try:
            return runtime.generate(model, inputs, **options).cpu()
        finally:
            counted.remove()


def bench(
    source: str,
    plan: SyncPlan,
    workloads: Sequence[latency.Workload],
    turns: int,
    dtype: str,
    timeout: float = runtime.TIMEOUT,
) -> list[dict[str, Any]]:
    """Milliseconds under all syncs, `plan`, all syncs dropped and all in int8, by workload and plan.

    `ideal_ms` is the time with all syncs less a cold all-reduce for each that is dropped (None with int8, and where
    blocks are skipped, which saves computation too), `model_ms` what alpha and beta, fitted to cold all-reduces of
    other sizes, say instead.
    """
    _quiet()
    model = runtime.load(source, plan, dtype=dtype, timeout=timeout, drop=False)
    layers, hidden, width = model.config.num_hidden_layers, model.config.hidden_size, model.dtype.itemsize
    everything = tuple(range(layers))
    plans = {
        "all syncs": SyncPlan(plan.ranks),
        "plan": plan,
        "all dropped": SyncPlan(plan.ranks, everything),
        "all in int8": SyncPlan(plan.ranks, int8=everything),
    }
    if not (plan.dropped or plan.int8 or plan.skipped):
        del plans["plan"]
    variants = {name: latency.under(model, each) for name, each in plans.items()}
    total = len(variants) * len(workloads) * (turns + 1)
    with progress("Timing passes", total, quiet=not launch.is_first()) as advance:
        times = latency.compare(variants, workloads, turns, advance)
    link, _ = latency.probe()
    rows = []
    for workload in workloads:
        sync = latency.cold_all_reduce(width * hidden * workload.passing, 10 * turns)
        took = {name: statistics.median(seconds) for name, seconds in times[workload.name].items()}
        for name, each in plans.items():
            kinds = treatments(each, layers)
            ideal = took["all syncs"] - len(each.dropped) * sync
            saved = saving(kinds, link, hidden, workload.passing, width=width).seconds
            rows.append(
                {
                    "workload": workload.name,
                    "variant": name,
                    "ms": 1e3 * took[name],
                    "saved": 1 - took[name] / took["all syncs"],
                    "all_reduce_ms": 1e3 * sync,
                    "ideal_ms": None if each.int8 or each.skipped else 1e3 * ideal,
                    "model_ms": 1e3 * (took["all syncs"] - saved),
                }
            )
    return rows


def probe(turns: int) -> dict[str, Any]:
    """Alpha and beta of the links between the ranks, and the cold all-reduces that they were fitted to."""
    ranks.join()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    link, seconds = latency.probe(turns=turns)
    rows = [
        {"bytes": size, "seconds": took, "fitted": link.all_reduce(size)}
        for size, took in zip(latency.SIZES, seconds, strict=True)
    ]
    return {"ranks": link.ranks, "alpha": link.alpha, "beta": link.beta, "all_reduces": rows}


def _quiet() -> None:
    """Keep libraries' bars and warnings of every rank from the terminal that all share."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
