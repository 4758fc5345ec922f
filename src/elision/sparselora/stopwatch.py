"""Seconds of real fine-tuning steps: what `calibrate` needs for a budget of time, and `elision sparselora bench`.

Variants take turns, each with a step to warm up before the timed one, and the median over the turns counts, so that a
machine that slows down slows all of them. Forward and backward are timed; the optimizer's step is the same for all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from elision import blocks
from elision.progress import progress
from elision.sparselora.apply import sparsify
from elision.sparselora.factors import Factors
from elision.sparselora.obstacles import autocast_dtype
from elision.sparselora.plan import SparsityPlan


def measure(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    plan: SparsityPlan,
    turns: int = 5,
    factors: Factors | None = None,
) -> dict[str, float]:
    """Median seconds a step of LoRA as PEFT runs it, of "dense + lossless" and of "sparse + lossless" under `plan`.

    Raises:
        InputError: what `sparsify` refuses.
    """
    now = replace(plan, dense_steps=0.0)
    zeros = (0.0,) * plan.model.layers
    dense = replace(now, ffn=zeros, qk=zeros, vo=zeros)
    variants = {"LoRA": None, "dense + lossless": dense, "sparse + lossless": now}
    with progress("Timing steps", turns * len(variants)) as advance:
        return step_seconds(model, batches, variants, turns, factors, advance)


def step_seconds(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    plans: Mapping[str, SparsityPlan | None],
    turns: int = 3,
    factors: Factors | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> dict[str, float]:
    """Median seconds of forward and backward of `model` under each plan (None: as it is), over turns and batches.

    Under autocast where 4-bit maps compute in a lower precision than the rest, as they are trained. The model is left
    as it was, its gradients too. `advance` is called with 1 after each plan's turn.

    Raises:
        InputError: what `sparsify` refuses.
    """
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    lower = autocast_dtype(blocks.decoder(model))
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    model.train()
    try:
        for turn in range(turns):
            batch = {name: tensor.to(_device(model)) for name, tensor in batches[turn % len(batches)].items()}
            for name, plan in plans.items():
                with nullcontext() if plan is None else sparsify(model, plan, factors):
                    _step(model, batch, lower)
                    seconds[name].append(_step(model, batch, lower))
                advance(1)
    finally:
        for module, mode in modes:
            module.training = mode
        for p, gradient in gradients:
            p.grad = gradient
    return {name: statistics.median(each) for name, each in seconds.items()}


def _step(model: Any, batch: Mapping[str, Tensor], lower: torch.dtype | None) -> float:
    start = time.perf_counter()
    with nullcontext() if lower is None else torch.autocast(_device(model).type, lower):
        loss = model(**batch, use_cache=False).loss  # as Trainer has it
    loss.backward()
    if _device(model).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
