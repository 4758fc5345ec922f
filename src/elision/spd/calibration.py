"""From measurements to a plan: which blocks are treated, how, what that should cost, and what it costs elsewhere.

`calibrate` measures how much each block matters, drops blocks in that order, and reads off the measured curve how many
a limit allows (maths: Which blocks). Three tiers say how sensitive blocks are to be treated; where a link is given
(planner.py), the treatments are mixed instead, for the most time saved within the limit.

A prediction goes with every plan: the relative increase of perplexity on the calibration text, measured where blocks
are dropped as they are; where healing is to follow, it is assumed to win back the shares that the limit
names as `recovered` (planner.RECOVERED where none were measured), and the plan records them.
Held-out text, on which nothing was decided, then says how far off it was; `carry_out` does so again after healing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from torch import nn

import elision
from elision.blocks import Decoder
from elision.errors import InputError
from elision.layerwise import fingerprint
from elision.spd.plan import EXCLUSIVE, TIERS, Calibration, SyncPlan, Verified
from elision.spd.planner import RECOVERED, Workload, choose, options, recoveries
from elision.spd.proxies import Method, all_scores
from elision.spd.sensitivity import ascending, covered_by_all, curves
from elision.spd.simulate import facts
from elision.spd.streams import IGNORED, Batch, Journal, Quality, check_batches, measure, next_tokens

DEFAULT_LOSS = 0.01
TRIES = 8  # plans measured at most before a mixed one is given up
ALLOWED = ("dropped", "int8")  # treatments to mix where none are named: those that every runtime serves


@dataclass(frozen=True)
class Limit:
    """How far a plan may go. Without any, perplexity may rise by one percent.

    Raises:
        InputError: more than one of max_loss, max_kl and drop; a value out of range; an unknown treatment.
    """

    max_loss: float | None = None  # relative increase of perplexity after the planned treatment
    max_kl: float | None = None  # mean KL divergence from the dense model likewise, nats a token
    drop: float | None = None  # share of the blocks, rounded to whole ones
    tiers: tuple[float, float] | None = None  # t1 <= t2, shares of the dense perplexity
    healing: bool = False  # `heal` will follow, so more blocks may be dropped
    recovered: Mapping[str, float] = field(default_factory=dict, hash=False)  # treatment to the share it wins back
    treatments: tuple[str, ...] = ALLOWED  # that may be mixed for a workload, some of plan.EXCLUSIVE

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("max_loss", "max_kl", "drop")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            raise InputError(f"{' and '.join(f'{n}={v}' for n, v in given.items())} are both given: give one limit")
        if self.drop is not None and not 0 <= self.drop <= 1:
            raise InputError(f"drop={self.drop} is not a share of the blocks: give a number from 0 to 1")
        for name, what in (("max_loss", "an increase of perplexity"), ("max_kl", "a divergence")):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{name}={value} is not {what}: give 0.01, say")
        if self.tiers is not None and not (len(self.tiers) == 2 and 0 <= self.tiers[0] <= self.tiers[1] < math.inf):
            raise InputError(
                f"tiers={','.join(map(str, self.tiers))} are not two ascending thresholds: give t1,t2 as shares of the "
                "dense perplexity, 0.001,0.01 say"
            )
        object.__setattr__(self, "recovered", recoveries(self.recovered))
        unknown = sorted(set(self.treatments) - set(EXCLUSIVE))
        if unknown or not self.treatments:
            named = repr(unknown[0]) if unknown else "none"
            raise InputError(f"treatments name {named}: give some of {', '.join(EXCLUSIVE)}")
        object.__setattr__(self, "treatments", tuple(dict.fromkeys(self.treatments)))

    def count(self, found: Sequence[Quality], healing: Mapping[int, str], order: Sequence[int]) -> int:
        """How many blocks of `order` the limit allows; found[k] is measured with the first k dropped as they are."""
        if self.drop is not None:
            return math.floor(self.drop * len(order) + 0.5)
        if self.max_loss is None and self.max_kl is None and self.tiers is not None:
            return len(order)  # the tiers alone: every block, each treated as its tier says
        expected = [predicted(found, order, k, healing, self.recovered) for k in range(len(found))]
        if self.max_kl is not None:
            return max(k for k, quality in enumerate(expected) if quality.kl <= self.max_kl)
        limit = DEFAULT_LOSS if self.max_loss is None else self.max_loss
        return max(k for k, quality in enumerate(expected) if quality.perplexity <= found[0].perplexity * (1 + limit))


def predicted(
    found: Sequence[Quality],
    order: Sequence[int],
    count: int,
    healing: Mapping[int, str],
    recovered: Mapping[str, float] = RECOVERED,
) -> Quality:
    """What dropping the first `count` blocks of `order` should come to when those in `healing` are treated so.

    Each block is charged what the zero-shot curve rises by at it; healing wins back the share of that in `recovered`.
    """
    if not any(block in healing for block in order[:count]):
        return found[count]
    perplexity, kl = found[0]
    for block, before, after in zip(order[:count], found, found[1:], strict=False):
        left = 1 - (recovered[healing[block]] if block in healing else 0.0)
        perplexity += left * (after.perplexity - before.perplexity)
        kl += left * (after.kl - before.kl)
    return Quality(perplexity, kl)


def tiers_of(scores: Sequence[float], dense: float, thresholds: tuple[float, float]) -> tuple[str, ...]:
    """Each block's tier by sensitivity: ISB up to t1, SB up to t2, ESB beyond (maths: Which blocks)."""
    return tuple(TIERS[sum(score > t * dense for t in thresholds)] for score in scores)


def on_curve(plan: SyncPlan) -> bool:
    """Whether the plan's calibration measured just what it drops: not where it mixes treatments or was edited."""
    found, count = plan.calibration, len(plan.dropped)
    return bool(found and not plan.int8 and not plan.skipped and set(found.order[:count]) == set(plan.dropped))


def expected(plan: SyncPlan) -> float:
    """The relative increase of perplexity that a plan's calibration predicts.

    Raises:
        InputError: the plan carries none, or drops other blocks than the first ones of its order.
    """
    found = plan.calibration
    if found is None or not on_curve(plan):
        raise InputError("plan carries no measurement of its blocks: make it with elision.spd.calibrate")
    curve = [Quality(value, 0.0) for value in found.perplexities]
    shares = recoveries(found.recovered or {})
    return predicted(curve, found.order, len(plan.dropped), plan.healing, shares).perplexity / found.perplexities[0] - 1


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    ranks: int,
    *,
    max_loss: float | None = None,
    max_kl: float | None = None,
    drop: float | None = None,
    tiers: tuple[float, float] | None = None,
    healing: bool = False,
    recovered: Mapping[str, float] | None = None,
    method: Method = "sequential",
    workload: Workload | None = None,
    treatments: Sequence[str] = ALLOWED,
    held_out: Iterable[Batch] | None = None,
    state: str | Path | None = None,
    quiet: bool = False,
) -> SyncPlan:
    """Measure sensitivities and the zero-shot curve, and plan as many dropped syncs as the limit allows.

    Args:
        model: as in `sensitivity`, likewise `batches` and `quiet`.
        batches: see there; gone through more than once.
        ranks: tensor-parallel ranks.
        max_loss: allowed relative increase of perplexity after the planned treatment. The plan is the longest prefix
            of the order that stays within it. 0.01 (one percent) where no limit is given.
        max_kl: the same for the mean KL divergence from the dense model, in nats a token.
        drop: share of the blocks to drop instead, 0 to 1, rounded to whole blocks.
        tiers: (t1, t2), shares of the dense perplexity: dropped blocks whose sensitivity is above t1 are to be
            distilled, those above t2 have their heads grouped first, unless `ranks` replicate the key/value heads.
            Without another limit, all blocks are dropped.
        healing: dropped blocks may be distilled where that lets more be dropped; implied by `tiers`.
        recovered: share of a block's loss that each of "correct", "b2b" and "hg+b2b" is expected to win back, as
            `verified.recovery` of an earlier healing says; planner.RECOVERED where it is not given.
        method: how blocks are ordered (proxies.py): "sequential" is exact, the others fast.
        workload: what a step costs on the links that will serve (planner.py): `treatments` then compete for the most
            time saved within max_loss. `ranks` must be the link's.
        treatments: some of "dropped", "int8" and "skipped", the first two by default: a plan with skipped attention is
            served with transformers alone.
        held_out: further batches, to verify the plan on; what is found is in `plan.verified`.
        state: file that keeps what was measured: give the same path again and a killed run goes on.
        quiet: show no progress bars.

    Raises:
        InputError: as in `sensitivity`; two limits or one out of range; an unknown treatment, or some without a
            workload; a workload with another limit than max_loss, for another model or number of ranks, or one where
            nothing is worth saving ("do not bother"); a model with healed or regrouped blocks.
    """
    limit = Limit(max_loss, max_kl, drop, tiers, healing, recovered or {}, tuple(treatments))
    return calibrations(
        model, batches, (ranks,), limit, method=method, workload=workload, held_out=held_out, state=state, quiet=quiet
    )[0]


def calibrations(
    model: nn.Module,
    batches: Iterable[Batch],
    ranks: Sequence[int],
    limit: Limit | None = None,
    *,
    method: Method = "sequential",
    workload: Workload | None = None,
    held_out: Iterable[Batch] | None = None,
    state: str | Path | None = None,
    quiet: bool = False,
) -> tuple[SyncPlan, ...]:
    """`calibrate` for several numbers of ranks, measured together: what does not depend on them is computed once."""
    limit, several = limit or Limit(), tuple(ranks)
    view = covered_by_all(model, several)
    check_workload(workload, view, several, limit)
    if workload is not None and (reason := workload.refusal()):
        raise InputError(reason)
    data = check_batches(batches, view.config)
    apart = None if held_out is None else check_batches(held_out, view.config)
    journal = Journal(state, view)
    scores = all_scores(view, data, [("dropped", n) for n in several], method, journal, quiet)
    orders = [ascending(each) for each in scores]
    found = curves(view, data, list(zip(several, orders, strict=True)), journal, quiet)
    versions = {
        "elision": elision.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    plans, losses = [], []
    for n, own, order, curve in zip(several, scores, orders, found, strict=True):
        tiered = () if limit.tiers is None else tiers_of(own, curve[0].perplexity, limit.tiers)
        measured = Calibration(
            data=fingerprint(data),
            sensitivities=own,
            order=order,
            perplexities=tuple(quality.perplexity for quality in curve),
            versions=versions,
            method=method,
            kls=tuple(quality.kl for quality in curve),
            thresholds=limit.tiers or (),
            tiers=tiered,
            recovered=limit.recovered if limit.healing or limit.tiers else None,
        )
        if workload is None:
            plan, loss = _prefix(n, limit, order, curve, tiered, view.blocks[0].kv_heads)
        else:
            plan, loss = _mixed(view, data, n, limit, workload, method, journal, quiet)
        plans.append(replace(plan, model=facts(view), calibration=measured))
        losses.append(loss)
    if apart is not None:
        plans = verify_all(view, apart, plans, losses, journal, quiet)
    return tuple(plans)


def _prefix(
    ranks: int, limit: Limit, order: Sequence[int], curve: Sequence[Quality], tiers: Sequence[str], kv_heads: int
) -> tuple[SyncPlan, float]:
    """The first blocks of `order` that the limit allows, what is to be done to them, and the predicted loss."""
    ways = {"SB": "b2b", "ESB": "hg+b2b" if ranks <= kv_heads else "b2b"}  # heads held in copies cannot move
    healing = {block: ways[tier] for block, tier in enumerate(tiers) if tier in ways}
    if limit.healing and not tiers:
        healing = dict.fromkeys(order, "b2b")
    count = limit.count(curve, healing, order)
    healing = {block: how for block, how in healing.items() if block in order[:count]}
    if limit.healing and not tiers and limit.drop is None:
        for block in order[:count]:  # what need not be healed is left alone, the least sensitive first
            fewer = {each: how for each, how in healing.items() if each != block}
            if limit.count(curve, fewer, order) < count:
                break
            healing = fewer
    loss = predicted(curve, order, count, healing, limit.recovered).perplexity / curve[0].perplexity - 1
    return SyncPlan(ranks, tuple(order[:count]), healing=healing), loss


def check_workload(workload: Workload | None, view: Decoder, ranks: Sequence[int], limit: Limit) -> None:
    """Raise InputError where `workload` does not go with the model, the ranks or the limit. A dry run asks too."""
    if workload is None:
        if set(limit.treatments) != set(ALLOWED):
            raise InputError(
                f"treatments {', '.join(limit.treatments)} are given without a workload, where syncs are dropped "
                "alone: give what a step costs (--probe, --step-ms), or leave them out"
            )
        return
    if limit.max_kl is not None or limit.drop is not None or limit.tiers is not None:
        raise InputError("workload is given with max_kl, drop or tiers: treatments are mixed within max_loss alone")
    if tuple(ranks) != (workload.link.ranks,):
        raise InputError(f"ranks {list(ranks)} are not the {workload.link.ranks} of the link: give the link's")
    block = view.blocks[0]
    if (workload.layers, workload.hidden) != (len(view.blocks), block.hidden_size):
        raise InputError(
            f"workload is of {workload.layers} blocks of width {workload.hidden}, the model has {len(view.blocks)} of "
            f"{block.hidden_size}: give the model's"
        )


def _mixed(
    view: Decoder,
    data: Sequence[Batch],
    ranks: int,
    limit: Limit,
    workload: Workload,
    method: str,
    journal: Journal,
    quiet: bool,
) -> tuple[SyncPlan, float]:
    """The mixture of treatments that saves most within max_loss, measured as a whole, and its predicted loss."""
    dense, losses = _alone(view, data, ranks, limit.treatments, method, journal, quiet)
    allowed = DEFAULT_LOSS if limit.max_loss is None else limit.max_loss
    blocks = options(losses, workload, ("b2b",) if limit.healing else (), limit.recovered)
    budget = allowed
    for _ in range(TRIES):
        picks = choose(blocks, budget)
        taken = {block: pick for block, pick in enumerate(picks) if pick is not None}
        healing = {block: pick.healing for block, pick in taken.items() if pick.healing is not None}
        plan = SyncPlan.of(ranks, {block: pick.treatment for block, pick in taken.items()}, healing)
        title = "Mixed treatments"
        measured = measure(view, data, [plan], state=journal, quiet=quiet, title=title)[0].perplexity / dense - 1
        # What healing should win back of the measured loss.
        won = sum(losses["dropped"][block] * limit.recovered[how] for block, how in plan.healing.items())
        loss = measured - won
        if loss <= allowed:
            return plan, loss
        budget *= max(0.1, min(0.7, allowed / loss))  # losses add up to more than their sum: allow less of it
    return SyncPlan(ranks), 0.0


def _alone(
    view: Decoder,
    data: Sequence[Batch],
    ranks: int,
    treatments: Sequence[str],
    method: str,
    journal: Journal,
    quiet: bool,
) -> tuple[float, dict[str, list[float]]]:
    """Dense perplexity, and the relative loss of each of `treatments` of each block alone.

    A block that happens to gain on this text is charged its KL divergence from the dense model, which is what text of
    the model's own would show and never negative.
    """
    if method not in ("sequential", "single"):  # of the fast ones, the one that covers every treatment
        (dense,) = measure(view, data, [SyncPlan(ranks)], state=journal, quiet=quiet, title="Dense perplexity")
        scores = all_scores(view, data, [(how, ranks) for how in treatments], "fisher", journal, quiet)
        return dense.perplexity, {
            how: [score / dense.perplexity for score in own] for how, own in zip(treatments, scores, strict=True)
        }
    plans = [SyncPlan.of(ranks, {block.index: how}) for how in treatments for block in view.blocks]
    title = f"Each treatment of each block, {ranks} ranks"
    dense, *found = measure(view, data, [SyncPlan(ranks), *plans], state=journal, quiet=quiet, title=title)
    losses = [max(each.perplexity / dense.perplexity - 1, each.kl) for each in found]
    size = len(view.blocks)
    return dense.perplexity, {how: losses[i * size : (i + 1) * size] for i, how in enumerate(treatments)}


def verify_all(
    view: Decoder,
    data: Sequence[Batch],
    plans: Sequence[SyncPlan],
    losses: Sequence[float],
    journal: Journal,
    quiet: bool,
) -> list[SyncPlan]:
    """Each plan with its `verified`; losses[i] is what was predicted of plan i, and the weights are the original's."""
    title = "Held-out text"
    dense, *found = measure(view, data, [SyncPlan(1), *plans], state=journal, quiet=quiet, title=title)
    return [
        replace(plan, verified=verified(data, dense, quality, quality, loss))
        for plan, loss, quality in zip(plans, losses, found, strict=True)
    ]


def verified(data: Sequence[Batch], dense: Quality, zero_shot: Quality, planned: Quality, predicted: float) -> Verified:
    """What was found on held-out `data`."""
    return Verified(
        data=fingerprint(data),
        tokens=sum(int((next_tokens(batch) != IGNORED).sum()) for batch in data),
        dense=dense.perplexity,
        zero_shot=zero_shot.perplexity,
        planned=planned.perplexity,
        kl=planned.kl,
        predicted=predicted,
    )
