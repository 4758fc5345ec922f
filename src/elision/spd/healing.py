"""A plan carried out and measured: `heal` does what it still says of `healing`, held-out text says what came back.

Before and after are measured on the same text, and divergence is taken from the original model, whose last hidden
states are kept for that: healing changes blocks, never the norm and the head behind them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from elision.blocks import Decoder
from elision.errors import InputError
from elision.spd.artifact import Treated
from elision.spd.calibration import expected, on_curve, verified
from elision.spd.distill import Recipe, check_enough, check_streamed, heal
from elision.spd.plan import SyncPlan
from elision.spd.planner import recoveries
from elision.spd.regroup import check_movable
from elision.spd.simulate import covered, facts
from elision.spd.streams import Batch, check_batches, check_weights, last_hidden, measure


def carry_out(
    model: nn.Module,
    plan: SyncPlan,
    batches: Iterable[Batch],
    *,
    held_out: Iterable[Batch] | None = None,
    recipe: Recipe | None = None,
    state: str | Path | None = None,
    quiet: bool = False,
) -> Treated:
    """Do to the model, in place, what `plan.healing` says; where it says nothing, distil every dropped block.

    Args:
        model: the original model that `plan` was calibrated on.
        plan: with blocks dropped and none treated yet.
        batches: calibration text, as for `heal`.
        held_out: further text, to verify the result on; what is found is in the plan's `verified`.
        recipe: how to train; its `correction` is the kind for blocks that are to be corrected.
        state: directory that keeps each distilled block, as in `heal`: a killed run goes on, to the same bytes.
        quiet: show no progress bars.

    Raises:
        InputError: a plan that drops nothing, a plan or a model on which one is carried out already, or what `heal`
            refuses.
    """
    view, checked = ready(model, plan, batches, recipe or Recipe(), state)
    apart = None if held_out is None else check_batches(held_out, view.config)
    wanted = treatments(plan)
    bare = replace(plan, healing={}, verified=None)
    dense = zero_shot = None
    reference: list[Tensor] = []
    if apart is not None:
        title = "Held-out text, before"
        dense, zero_shot = measure(view, apart, [SyncPlan(1), bare], quiet=quiet, title=title)
        reference = last_hidden(view, apart)
    treated = heal(view.model, replace(bare, healing=wanted), checked, recipe=recipe, state=state, quiet=quiet)
    if apart is None or dense is None or zero_shot is None:
        return treated
    title = "Held-out text, after"
    (after,) = measure(view, apart, [treated.plan], reference=reference, quiet=quiet, title=title)
    loss = _predicted(plan, wanted, zero_shot.perplexity / dense.perplexity - 1)
    return Treated(view.model, replace(treated.plan, verified=verified(apart, dense, zero_shot, after, loss)))


def treatments(plan: SyncPlan) -> Mapping[int, str]:
    """What is done to which block where `plan` is carried out."""
    return plan.healing or dict.fromkeys(plan.dropped, "b2b")


def ready(
    model: nn.Module, plan: SyncPlan, batches: Iterable[Batch], recipe: Recipe, state: str | Path | None
) -> tuple[Decoder, list[Batch]]:
    """The model's view and the batches, checked before held-out text is measured: that takes long. A dry run asks too.

    Raises:
        InputError: as `carry_out` does, the held-out text aside.
    """
    view = covered(model, plan.ranks)
    plan.check(facts(view))
    if not plan.dropped:
        raise InputError("plan drops no sync, so there is nothing to heal: calibrate with a wider limit")
    if not plan.original_weights:
        raise InputError("plan is carried out already, its checkpoint is healed: give the plan that calibrate wrote")
    check_weights(view)
    if "hg+b2b" in plan.healing.values():
        check_movable(view, plan.ranks)
    check_streamed(view, recipe, state)
    checked = check_batches(batches, view.config)
    check_enough(checked, [index for index, how in treatments(plan).items() if how != "correct"], recipe)
    return view, checked


def _predicted(plan: SyncPlan, wanted: Mapping[int, str], zero_shot: float) -> float:
    """The relative loss to be expected of `wanted`, where `zero_shot` is what dropping alone costs on this text."""
    if plan.int8 or plan.skipped:  # a mixture's prediction is its own
        return zero_shot if plan.verified is None else plan.verified.predicted
    if not on_curve(plan):  # blocks named by hand
        shares = recoveries((plan.calibration and plan.calibration.recovered) or {})
        return zero_shot * (1 - min(shares[how] for how in wanted.values()))
    return expected(replace(plan, healing=wanted))
