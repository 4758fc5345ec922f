"""What a dry run says: what would be done, how long it takes, in how much memory, and what can be gained.

Times come from one batch of the user's own on this machine, after one to warm up, and the number of passes that the
work is made of; so they are as good as that batch is typical. Memory is the process's peak after that batch, to which
what the work keeps besides is added. Nothing is written.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elision.report.verdict import duration

if TYPE_CHECKING:
    from pathlib import Path

    from elision.sparselora import Factors, SparsityPlan
    from elision.spd import SyncPlan, Workload
    from elision.spd.distill import Recipe

Batch = Mapping[str, Tensor]
MB = 2**20


def fine_tuning(
    model: Any, batches: Sequence[Batch], plan: SparsityPlan | None, steps: int, factors: Factors | None = None
) -> dict[str, Any]:
    """Of `elision sparselora train`: a step of the longest batch, dense and, where there is one, under the plan."""
    from elision.sparselora import forecast
    from elision.sparselora.stopwatch import step_seconds

    longest = max(batches, key=lambda batch: batch["input_ids"].numel())
    variants = {"LoRA": None} | ({} if plan is None else {"plan": replace(plan, dense_steps=0.0)})
    took = step_seconds(model, [longest], variants, turns=1, factors=factors)
    first = 0.0 if plan is None else plan.dense_steps
    seconds = steps * (first * took["LoRA"] + (1 - first) * took.get("plan", took["LoRA"]))
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    found = {"steps": steps, "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    found |= _costs(seconds, 2 * trained)  # AdamW's two moments
    if plan is not None:
        told = forecast(model, batches, plan)
        found |= {"plan": plan.describe(), "gain": told.line()}
        found["gain_timed"] = (
            f"{took['LoRA'] / took['plan']:.2f}x over LoRA's step with padding and all logits, timed once"
        )
    return found


def sparsity_calibration(
    model: Any, batches: Sequence[Batch], share: float | None, settings: Mapping[str, Any], lessons: Sequence[Batch]
) -> dict[str, Any]:
    """Of `elision sparselora calibrate`: a dense walk of one batch, one with the last layer's parts sparse, and a step
    of those that are rehearsed. How many legs a budget of loss will walk is not known before: all are counted.
    """
    from elision.sparselora import SparsityPlan, calibration, forecast, sweep
    from elision.sparselora.plan import PARTS
    from elision.sparselora.stopwatch import step_seconds

    data = sweep.check(batches, model.config)
    grid = calibration.GRID
    most = SparsityPlan.uniform(model, grid[-1], **settings)
    layers, variants = most.model.layers, len(PARTS) * len(grid)
    choices = sweep.singles(most, grid)
    last = SparsityPlan.uniform(model, grid[-1], layers=[layers - 1], **settings)
    start = time.perf_counter()
    factors = _factors(model, data[:1], last)
    selecting = time.perf_counter() - start  # timed once: they take long, and no warming up

    def walk(count: int) -> Callable[[], Any]:
        chosen = [choices[0], *choices[len(choices) - count :]]
        return lambda: sweep.losses(model, data[:1], most, chosen, sweep.Journal(None), factors=factors, quiet=True)

    dense = _timed(walk(0))
    sparse = max(0.0, _timed(walk(variants)) - dense) / variants  # a pass through one block, and the head
    passes = layers * (1 + variants * (layers - 1) / 2)  # of dense blocks: each stream is sparse in one block alone
    told = forecast(model, data, most)
    can = 1 - told.flops["full"]
    legs = sum(share is None or 1 - share > end * can for end in calibration.LEGS)
    whole = 1 + legs / 2  # a leg has about half the points of the first walk left to measure
    seconds = whole * (dense / layers * passes + sparse * variants * layers) * _ratio(data)
    passed = dense if last.selection == "whitened" else 0.0  # over the data, once for all layers
    seconds += passed * _ratio(data) + max(0.0, selecting - passed) * layers
    if lessons:
        seconds += len(lessons) * step_seconds(model, lessons[:1], {"LoRA": None}, turns=1)["LoRA"]
    ids = data[0]["input_ids"]
    stream = ids.numel() * model.config.hidden_size * next(model.parameters()).element_size()
    found: dict[str, Any] = {
        "rehearsed_steps": len(lessons),
        "batches": len(data),
        "forward_passes_a_batch": round(whole * (passes / layers + variants)),
    }
    found |= _costs(seconds, (1 + variants * layers) * stream)
    found["gain"] = (
        f"at most {told.speedup:.2f}x, with {grid[-1]:.0%} of the channels left out everywhere: "
        f"{told.output_share:.0%} of the tokens are outputs and stay dense"
    )
    return found if share is None else found | {"budget": f"{share:.0%} of LoRA's, so {1 / share:.2f}x at most"}


def _factors(model: Any, data: Sequence[Batch], plan: SparsityPlan) -> Factors | None:
    """Those that `plan` selects by; None: it needs none."""
    from elision.sparselora import Factors

    if plan.selection == "whitened":
        return Factors.whitened(model, data, plan.rank, plan)
    return Factors.compute(model, plan.rank, plan) if plan.selection == "svd" else None


def sync_calibration(
    model: Any,
    batches: Sequence[Batch],
    apart: Sequence[Batch] | None,
    ranks: Sequence[int],
    method: str,
    workload: Workload | None,
) -> dict[str, Any]:
    """Of `elision spd calibrate`: one batch with all syncs in place, and one with all dropped on the most ranks."""
    from elision import spd
    from elision.spd.sensitivity import covered_by_all
    from elision.spd.streams import measure

    view = covered_by_all(model, ranks)
    layers, data = len(view.blocks), list(batches)

    def forward(plan: SyncPlan) -> Callable[[], Any]:
        return lambda: measure(view, data[:1], [plan], quiet=True)

    dense = _timed(forward(spd.SyncPlan(1)))
    dropped = max(dense, _timed(forward(spd.SyncPlan(max(ranks), tuple(range(layers))))) - dense)
    ordering = {"integrated": 6.0, "fisher": 3.0, "output_error": 2.0}.get(method, layers / 2 + 1.5)
    passes = ordering + layers / 2 + 1.5 + (len(ranks) - 1) * (ordering + layers / 2 + 0.5)
    seconds = passes * (dense + dropped) / 2 * _ratio(data)
    if apart:
        seconds += (1 + len(ranks)) * dropped * len(apart)
    ids = data[0]["input_ids"]
    stream = ids.numel() * view.blocks[0].hidden_size * next(model.parameters()).element_size()
    found = {"batches": len(data), "forward_passes_a_batch": round(passes, 1)}
    found |= _costs(seconds, (layers + 1) * len(ranks) * stream)
    found["gain"] = f"up to {layers} of {2 * layers} all-reduces of a forward pass"
    if workload is not None:
        found["gain"] += f", {workload.saving(['dropped'] * layers).share:.1%} of a step on this link"
    return found


def healing(
    model: Any, plan: SyncPlan, batches: Sequence[Batch], apart: Sequence[Batch] | None, recipe: Recipe, state: Path
) -> dict[str, Any]:
    """Of `elision spd heal`: one block's step of training on one batch. What healing refuses is refused."""
    from elision.spd.activations import sources
    from elision.spd.calibration import expected, on_curve
    from elision.spd.healing import ready, treatments
    from elision.spd.student import Student, cut, training
    from elision.streaming import resident

    view, _ = ready(model, plan, batches, recipe, state)
    wanted = treatments(plan)
    distilled = [block for block, how in wanted.items() if how != "correct"]
    bare = replace(plan, healing={}, calibration=None, verified=None)
    found: dict[str, Any] = {"blocks": len(wanted), "distilled": distilled, "batches": len(batches)}
    layers, seconds, kept = len(view.blocks), 0.0, 0
    if distilled:
        (source,) = sources(view, batches[:1])
        block = view.blocks[distilled[0]]
        with resident(block.layer), training([student := Student(block, bare)]):
            target = student(source.embedded, source.kwargs[block.index]).detach() * 1.1  # any: the work is the same
            step = _timed(lambda: student.loss(source.embedded, target, source).backward())
        count = cut(recipe.held_out, len(batches))
        judged = (len(batches) - count) / 3  # forward alone
        passes = len(distilled) * recipe.epochs * (count + judged) + layers * recipe.polish * len(batches)
        seconds = step * (passes + 2 / 3 * layers * len(batches) + layers * len(apart or ()))
        trained = sum(p.numel() * max(4, p.element_size()) for p in student.trained.values())
        kept = 4 * trained  # its gradient, two moments and the best values
    width = view.blocks[0].hidden_size * next(model.parameters()).element_size()
    rows = [*batches, *batches, *(apart or ())]  # the teacher's stream, the student's, and the end of the held-out one
    kept += width * sum(batch["input_ids"].numel() for batch in rows)
    found |= _costs(seconds, kept)
    if on_curve(plan):
        before, after = (expected(replace(plan, healing=how)) for how in ({}, wanted))
        found["gain"] = f"perplexity {after:+.2%} is expected where dropping alone costs {before:+.2%}"
    return found


def weights_mb(models: Sequence[Any]) -> float:
    """Of all parameters."""
    return round(sum(p.numel() * p.element_size() for model in models for p in model.parameters()) / MB, 1)


def _costs(seconds: float, kept: float) -> dict[str, Any]:
    """Time, and memory: the peak until now and `kept` bytes besides."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": round(seconds, 3), "time": f"about {duration(seconds)}", "memory_mb": round((peak + kept) / MB)}


def _timed(work: Callable[[], Any]) -> float:
    """Seconds of the second of two times."""
    took = 0.0
    for _ in range(2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took = time.perf_counter() - start
    return took


def _ratio(data: Sequence[Batch]) -> float:
    """How many times the first batch's tokens all batches have."""
    return sum(batch["input_ids"].numel() for batch in data) / data[0]["input_ids"].numel()
