"""Sparsities from the user's own data: measured curves, a budget, the least loss that meets it.

    curves   the loss on the data with one part of one layer sparse, everything else dense (sweep.py)
    savings  what that part at that sparsity saves of a training step: operations (flops.py), or seconds
    plan     the allotment of least total increase within the budget (allotment.py)

Three budgets: `flops`, the share of dense LoRA's operations that the run may cost, dense first steps included; `time`,
the like share of its time; `max_loss`, how much the perplexity of the answers may grow. Nothing else shapes the plan:
first and last layers stay dense if their curves say so.

The curves are of single parts, all else dense, and what they add to the loss does not simply add up: what one layer
leaves out another may have made good. So the way to a tight budget is walked in legs (LEGS), and at the end of each the
curves of what is left are measured again, in the company of all that is already left out. The plan's loss is measured
with all parts sparse together, and for `max_loss` that figure is held to the limit, not the sum.

The loss is that of a model that has begun to learn the data: `rehearse` trains its adapter for some dense steps first,
and takes them back. Without, it is that of the model as it is given; the bare base works too, but what learning will
need does not show there (rehearsal.py).

Time is read off this machine: three real steps, dense, with the FFN alone pruned and with attention alone pruned, tell
how many seconds an operation left out is worth in each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import elision
from elision import blocks
from elision.errors import InputError
from elision.facts import ModelFacts
from elision.layerwise import fingerprint
from elision.sparselora import flops as counting
from elision.sparselora import rehearsal, stopwatch, sweep
from elision.sparselora.allotment import Allotment, Point, Walk, allot
from elision.sparselora.coverage import check_bases, check_dense, check_whole
from elision.sparselora.factors import Factors, check_used, estimated
from elision.sparselora.flops import Shape, Workload
from elision.sparselora.forecasts import adapters_or_usual, compare, under, workloads
from elision.sparselora.plan import PARTS, Calibration, Part, SparsityPlan
from elision.sparselora.sweep import Batch, Choice, Journal

GRID = (0.5, 0.75, 0.9, 0.99)
LEGS = (0.4, 0.7, 0.85)  # shares of the most that can be saved, after which curves are measured again
COUNTED = ("base", "adapters", "attention", "estimator", "head")

_TIGHTENINGS = 6  # measurements of a plan at most, to bring its increase within max_loss


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    flops: float | None = None,
    time: float | None = None,
    max_loss: float | None = None,
    grid: Sequence[float] = GRID,
    count: Sequence[str] = COUNTED,
    factors: Factors | None = None,
    rehearse: Iterable[Batch] = (),
    learning_rate: float = 3e-4,
    state: str | Path | None = None,
    quiet: bool = False,
    **settings: Any,
) -> SparsityPlan:
    """Measure what each layer and part can spare on `batches`, and plan within one budget (maths: What is spared).

    About layers * 3 * len(grid) / 2 forward passes over the data, and up to half as many for each leg that a tight
    budget walks; a bar says how long that takes.

    Args:
        model: a transformers causal LM or a PEFT model around one; left as it was.
        batches: dicts with input_ids and labels (batch, sequence), optionally attention_mask and position_ids; other
            fields are not read.
        flops: share of dense LoRA's operations that the run may cost, in (0, 1].
        time: share of its time, in (0, 1]; needs a model with an adapter, since steps are timed.
        max_loss: allowed relative increase of the answers' perplexity; 0.01 is one percent. The default budget.
        grid: sparsities to measure, ascending, in (0, 1); the highest is the most that a part may get.
        count: what `flops` counts, of the fields of flops.Cost.
        factors: of the selection "whitened"; those of "svd" are computed here.
        rehearse: other batches of the data, to train the adapter on for a dense step each before measuring; 16 to 32
            of them are enough. The adapter is as before when this returns.
        learning_rate: of those steps: that of the fine-tuning to come.
        state: file that keeps what was measured: give the same path again and a killed run goes on. What was
            rehearsed is kept beside it, in `<state>.safetensors`.
        quiet: show no progress bar.
        settings: the other fields of a plan (selection, dense_steps, rotary_pairs, ...).

    Raises:
        InputError: an uncovered model, no budget or several or one that cannot be met, unusable data or grid.
    """
    budget, limit = _budget(flops, time, max_loss)
    grid = _grid(grid)
    view = blocks.decoder(model)
    if reason := blocks.refusal(view.model.config, "sparselora"):
        raise InputError(reason)
    check_dense(view)
    check_whole(view)
    check_bases(view)
    facts = ModelFacts.of(model)
    zeros = (0.0,) * facts.layers
    try:
        base = SparsityPlan(facts, zeros, zeros, zeros, **settings)
    except TypeError:
        unknown = sorted(set(settings) - {"selection", "rank", "dense_steps", "rotary_pairs", "dense_outputs", "seed"})
        raise InputError(f"setting {unknown[0]!r} is not known: it is no field of a plan") from None
    data = sweep.check(batches, view.config)
    lessons = sweep.check(lessons, view.config) if (lessons := list(rehearse)) else []
    rehearsal.check(model, lessons, learning_rate)
    works = workloads(data)
    factors = _factors(model, base, grid, factors)
    cost = _Cost(model, [under(work, base) for work in works], base, grid, count)
    if budget == "time":
        cost.time_steps(model, data, factors)
    if budget != "max_loss":
        cost.check(limit, budget)

    journal = Journal(state)
    learned = None if state is None else f"{state}.safetensors"
    choices = sweep.singles(base, grid)
    with rehearsal.rehearsed(model, lessons, learning_rate, learned, quiet):
        measured = sweep.losses(
            model, data, base, choices, journal, factors=factors, quiet=quiet, title="Measuring layers"
        )
        dense, rest = measured[0], iter(measured[1:])
        curves: dict[tuple[int, Part], tuple[float, ...]] = {  # in the order of `singles`
            (layer, part): tuple(next(rest) - dense for _ in grid) for layer in range(facts.layers) for part in PARTS
        }
        items = list(curves)
        steps = {item: _growing(grid, [cost.saving(*item, sparsity) for sparsity in grid]) for item in items}

        def plan_of(found: Allotment) -> SparsityPlan:
            by_item = {item: cost.sparsity(*item, point) for item, point in zip(items, found.points, strict=True)}
            return replace(
                base, **{part: tuple(by_item[layer, part] for layer in range(facts.layers)) for part in PARTS}
            )

        def losses_of(plans: Sequence[SparsityPlan], title: str) -> list[float]:
            together: list[Choice] = [(*plan.ffn, *plan.qk, *plan.vo) for plan in plans]
            return sweep.losses(model, data, base, together, journal, factors=factors, quiet=quiet, title=title)

        def increase_of(plan: SparsityPlan) -> float:
            return losses_of([plan], "Measuring the plan")[0] - dense

        def in_company(taken: Allotment) -> list[list[Point]]:
            plan = plan_of(taken)
            left = [
                [Point(grid[i], saving, 0.0) for i, saving in steps[item] if saving > point.saving]
                for item, point in zip(items, taken.points, strict=True)
            ]
            more = [
                _changed(plan, *item, point.sparsity)
                for item, curve in zip(items, left, strict=True)
                for point in curve
            ]
            now, *then = losses_of([plan, *more], "Measuring them together")
            rest = iter(then)
            return [
                [replace(point, increase=before.increase + next(rest) - now) for point in curve]
                for before, curve in zip(taken.points, left, strict=True)
            ]

        alone = [[Point(grid[i], saving, curves[item][i]) for i, saving in steps[item]] for item in items]
        walk = Walk(alone, in_company, LEGS)
        if budget == "max_loss":
            hoped = allot(alone, increase=math.log1p(limit)).saving
            found, plan, increase = _within(math.log1p(limit), hoped, walk, plan_of, increase_of)
        else:
            found = walk.at(cost.needed(limit))
            plan = plan_of(found)
            increase = increase_of(plan)
    told = compare(Shape.of(model), works, cost.adapters, plan)
    share = cost.share(plan)
    return replace(
        plan,
        calibration=Calibration(
            data=fingerprint(data),
            output_tokens=sum(work.logits for work in works),
            output_share=told.output_share,
            loss=dense,
            grid=grid,
            **{part: tuple(curves[layer, part] for layer in range(facts.layers)) for part in PARTS},
            budget=budget,
            limit=limit,
            expected_increase=found.increase,
            measured_increase=increase,
            flops=told.flops,
            speedup=1 / share if budget == "time" else told.speedup,
            speedup_from="timed steps" if budget == "time" else "operations",
            versions={
                "elision": elision.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            rehearsed=len(lessons),
        ),
    )


def _growing(grid: Sequence[float], savings: Sequence[float]) -> list[tuple[int, float]]:
    """Places in the grid with their saving, where that exceeds all before: of few channels as many may be kept."""
    found: list[tuple[int, float]] = []
    for place, _ in enumerate(grid):
        if savings[place] > (found[-1][1] if found else 0.0):
            found.append((place, savings[place]))
    return found


def _changed(plan: SparsityPlan, layer: int, part: Part, sparsity: float) -> SparsityPlan:
    """`plan` with that part of that layer at `sparsity`."""
    own = getattr(plan, part)
    return replace(plan, **{part: (*own[:layer], sparsity, *own[layer + 1 :])})


def _within(
    limit: float,
    saving: float,
    walk: Walk,
    plan_of: Callable[[Allotment], SparsityPlan],
    increase_of: Callable[[SparsityPlan], float],
) -> tuple[Allotment, SparsityPlan, float]:
    """The allotment that saves most, of those tried, with a measured increase in `limit`; `saving` is the most tried.

    Where that much is not borne out by the measurement, it is halved between a saving that holds and one that does
    not: allotments lie on one path, on which each takes in those before it.
    """
    low, high = 0.0, saving
    best = walk.at(0.0)
    held = plan_of(best), 0.0
    for _ in range(_TIGHTENINGS):
        found = walk.at(saving)
        plan = plan_of(found)
        increase = increase_of(plan)
        if increase <= limit:
            best, held, low = found, (plan, increase), saving
        else:
            high = saving
        if low == high:
            break
        saving = (low + high) / 2
    return best, *held


class _Cost:
    """What parts cost in the training steps of this data, in operations or, after `time_steps`, in seconds."""

    def __init__(
        self,
        model: nn.Module,
        works: Sequence[Workload],
        base: SparsityPlan,
        grid: Sequence[float],
        count: Sequence[str] = COUNTED,
    ) -> None:
        names = [item for item in COUNTED if item in count]
        if not names or set(count) - set(COUNTED):
            raise InputError(f"count {tuple(count)!r} is not of {', '.join(COUNTED)}: name some of them")
        self.shape, self.adapters = Shape.of(model), adapters_or_usual(model)
        self.works, self.base, self.grid, self.names = works, base, grid, names
        self.dense = self.operations(base)
        self.worth: dict[Part, float] = dict.fromkeys(PARTS, 1.0)  # unit of cost of an operation left out
        self.whole = self.dense  # the dense step in that unit

    def operations(self, plan: SparsityPlan) -> float:
        """Of one pass over the data, forward and backward."""
        steps = [counting.step(self.shape, work, self.adapters, plan) for work in self.works]
        return sum(getattr(step, name) for step in steps for name in self.names)

    def saving(self, layer: int, part: Part, sparsity: float) -> float:
        """What that part of that layer saves at `sparsity`, its selection paid for."""
        alone = replace(self.base, **{part: tuple(sparsity if i == layer else 0.0 for i in range(self.shape.layers))})
        own, last = self.adapters[layer], layer == self.shape.layers - 1
        flows = any(any(below) for below in self.adapters[:layer])  # whether gradient flows below the layer
        saved = 0.0
        for work in self.works:
            dense, _ = counting.layer_step(self.shape, work, own, None, layer, flows, last=last)
            sparse, _ = counting.layer_step(self.shape, work, own, alone, layer, flows, last=last)
            saved += sum(getattr(dense, name) - getattr(sparse, name) for name in self.names)
        return saved * self.worth[part]

    def sparsity(self, layer: int, part: Part, point: Point) -> float:
        """The least sparsity, in whole channels, that saves what `point` promises; its own where it was measured."""
        if point.sparsity in (0.0, *self.grid):
            return point.sparsity
        channels = self.shape.intermediate if part == "ffn" else self.shape.kv_heads * self.shape.head_dim
        low, high = 1, channels  # kept channels: the most of them with which the saving is reached
        while low < high:
            kept = (low + high + 1) // 2
            if self.saving(layer, part, 1 - kept / channels) >= point.saving * (1 - 1e-9):
                low = kept
            else:
                high = kept - 1
        return 1 - low / channels

    def share(self, plan: SparsityPlan) -> float:
        """Of dense LoRA's cost that a run under `plan` has, dense first steps included."""
        saved = sum(
            self.saving(layer, part, sparsity)
            for part in PARTS
            for layer, sparsity in enumerate(getattr(plan, part))
            if sparsity > 0
        )
        return plan.dense_steps + (1 - plan.dense_steps) * (1 - saved / self.whole)

    def needed(self, limit: float) -> float:
        """What has to be saved of a sparse step so that the whole run costs `limit`."""
        first = self.base.dense_steps
        return self.whole * (1 - (limit - first) / (1 - first)) if first < 1 else math.inf

    def check(self, limit: float, budget: str) -> None:
        """Raise InputError where not even the highest sparsity everywhere meets the budget."""
        most = max(self.grid)
        everywhere = (most,) * self.shape.layers
        least = self.share(replace(self.base, ffn=everywhere, qk=everywhere, vo=everywhere))
        if least > limit:
            reachable = f"give at least {math.ceil(100 * least) / 100:g}, or fewer dense_steps"
            raise InputError(
                f"{budget}={limit:g} cannot be met: {100 * most:g}% everywhere, with {100 * self.base.dense_steps:g}% "
                f"dense steps, still costs {least:.3f} of dense LoRA on this data: "
                + (reachable if least < 1 else "nothing is to be saved there, give data with longer prompts")
            )

    def time_steps(self, model: nn.Module, data: Sequence[Batch], factors: Factors | None) -> None:
        """Make seconds the unit: the dense step's, and what an operation left out is worth in the FFN and around
        attention, from steps timed in turns.
        """
        batch = max(data, key=lambda each: each["input_ids"].numel())
        works = [under(workloads([batch])[0], self.base)]
        high = (max(self.grid),) * self.shape.layers
        now = replace(self.base, dense_steps=0.0)
        plans = {"dense": now, "ffn": replace(now, ffn=high), "attention": replace(now, qk=high, vo=high)}
        took = stopwatch.step_seconds(model, [batch], plans, factors=factors)
        one = _Cost(model, works, self.base, self.grid)
        saved = {name: one.dense - one.operations(plan) for name, plan in plans.items()}
        self.names = list(COUNTED)
        self.whole = took["dense"] * self.operations(self.base) / one.dense
        for part in PARTS:
            kind = "ffn" if part == "ffn" else "attention"
            gained = max(0.0, took["dense"] - took[kind])
            self.worth[part] = gained / saved[kind] if saved[kind] > 0 else 0.0  # no context token: nothing is saved


def check_budget(
    model: nn.Module,
    batches: Iterable[Batch],
    flops: float | None,
    time: float | None,
    max_loss: float | None,
    settings: Mapping[str, Any],
) -> None:
    """Raise InputError where `calibrate` would for its budget; steps are not timed, so one of time passes."""
    budget, limit = _budget(flops, time, max_loss)
    if budget == "flops":
        base = SparsityPlan.uniform(model, 0.0, **settings)
        works = [under(work, base) for work in workloads(list(batches))]
        _Cost(model, works, base, _grid(GRID), COUNTED).check(limit, budget)


def _budget(flops: float | None, time: float | None, max_loss: float | None) -> tuple[str, float]:
    given = {"flops": flops, "time": time, "max_loss": max_loss}
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} are both given: give one budget")
    name, value = next(iter(named.items()), ("max_loss", 0.01))
    if not isinstance(value, Real):
        raise InputError(f"{name}={value!r} is a {type(value).__name__}: give a number")
    if name == "max_loss" and not 0 <= value < math.inf:
        raise InputError(f"max_loss={value} is not an increase of perplexity: give 0.01 for one percent")
    if name != "max_loss" and not 0 < value <= 1:
        raise InputError(f"{name}={value} is not a share of dense LoRA's: give a number in (0, 1], such as 0.5")
    return name, float(value)


def _grid(grid: Sequence[float]) -> tuple[float, ...]:
    values = tuple(map(float, grid)) if all(isinstance(sparsity, Real) for sparsity in grid) else ()
    if not values or any(b <= a for a, b in zip((0.0, *values), values, strict=False)) or values[-1] >= 1:
        raise InputError(f"grid {tuple(grid)!r} does not ascend within (0, 1): give sparsities such as 0.5, 0.9")
    return values


def _factors(model: nn.Module, base: SparsityPlan, grid: Sequence[float], factors: Factors | None) -> Factors | None:
    """Factors for every projection where the selection needs them, checked."""
    view = blocks.decoder(model)
    high = (max(grid),) * base.model.layers
    everywhere = replace(base, ffn=high, qk=high, vo=high)
    if not any(estimated(everywhere, 0, name) for name in view.blocks[0].projections):
        check_used(factors, everywhere)
        return None
    if factors is None and base.selection == "whitened":
        raise InputError("selection 'whitened' needs factors made on data: give Factors.whitened(model, batches)")
    factors = factors or Factors.compute(model, base.rank, everywhere)
    factors.check(view, everywhere)
    return factors
