"""What to do to each block for a budget of quality: the most time saved whose losses add up to no more.

Every block has options: keep its first sync (nothing saved, nothing lost), send it in int8, drop it, skip attention.
An option saves seconds, by the alpha-beta model (costs.py), and loses quality, as calibration measured it for that
block alone. Choosing one option a block under a bound on the summed loss is the multiple-choice knapsack problem; with
the bound cut into STEPS equal parts and losses rounded up to them, dynamic programming solves it exactly, and never
spends more than the budget.

That losses of blocks add up is an assumption, so a plan made this way is measured as a whole before it is believed.

When all that could be saved is less than WORTHWHILE of the step, the answer is: do not bother.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elision.errors import InputError
from elision.spd.costs import Compute, Link, Saving, saving
from elision.spd.plan import EXCLUSIVE, HEALING

if TYPE_CHECKING:
    from elision.blocks import Decoder

STEPS = 4000  # parts of the budget: rounding wastes one of them a block at most
WORTHWHILE = 0.03  # share of a step below which nothing is worth the loss of quality

# Share of a dropped block's loss that each treatment is assumed to win back, for predictions made before it is tried:
# on the careful side of a first study, where constants won back 38 to 47% and distillation 73 to 77%, and of
# docs/results/spd_quality.md. What `heal` then measures on held-out text (`Verified.recovery`) belongs in `recovered`
# of the next calibration.
RECOVERED: Mapping[str, float] = {"correct": 0.35, "b2b": 0.75, "hg+b2b": 0.75}


def recoveries(measured: Mapping[str, float]) -> dict[str, float]:
    """RECOVERED, with what was measured in its place.

    Raises:
        InputError: a treatment that is not one of HEALING, or no share.
    """
    for how, share in measured.items():
        if how not in HEALING:
            raise InputError(f"recovered names {how!r}, which is no treatment: use one of {', '.join(HEALING)}")
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share <= 1:
            raise InputError(f"recovered {share!r} of {how} is not a share: give a number from 0 to 1")
    return {**RECOVERED, **measured}


@dataclass(frozen=True)
class Workload:
    """One step of the served model: what each block's syncs and computation cost.

    Raises:
        InputError: tokens, hidden or layers below 1.
    """

    link: Link
    layers: int
    hidden: int
    tokens: int  # through the blocks at once: batch in decode, batch x length in prefill
    width: int = 2  # bytes of a number in an all-reduce
    compute: Compute | None = None  # one block's; None: unknown, so shares are of communication alone
    rest: float = 0.0  # seconds outside the blocks

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "tokens", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} {value!r} is not a whole number of at least 1: give one")

    @classmethod
    def of_model(cls, view: Decoder, link: Link, *, tokens: int, step: float, width: int = 2) -> Workload:
        """The workload of a model whose step takes `step` seconds with every sync in place, all of it in the blocks.

        Of a block's computation, attention is taken to have the share of its weights, as in decode.

        Raises:
            InputError: a step that is shorter than its own syncs.
        """
        block, layers = view.blocks[0], len(view.blocks)
        syncs = 2 * layers * link.all_reduce(width * block.hidden_size * tokens)
        if not (math.isfinite(step) and step > syncs):
            raise InputError(
                f"step of {step * 1e3:g} ms is no longer than its {2 * layers} syncs ({syncs * 1e3:g} ms by the link's "
                "alpha and beta): time the step on the links that were probed"
            )
        sizes = {name: p.out_features * p.in_features for name, p in block.projections.items()}
        share = sum(sizes[name] for name in "qkvo") / sum(sizes.values())
        each = (step - syncs) / layers
        return cls(link, layers, block.hidden_size, tokens, width, Compute(each * share, each * (1 - share)))

    def saving(self, treatments: Sequence[str]) -> Saving:
        """Of a step whose blocks are treated so."""
        return saving(
            treatments, self.link, self.hidden, self.tokens, width=self.width, compute=self.compute, rest=self.rest
        )

    def seconds(self, treatment: str) -> float:
        """What `treatment` saves in one block; negative where it costs."""
        return self.saving([treatment]).seconds

    def refusal(self) -> str | None:
        """One line, "do not bother" and the numbers, where even dropping every sync saves too little; else None."""
        most = self.saving(["dropped"] * self.layers)
        if most.share >= WORTHWHILE:
            return None
        return (
            f"do not bother: with every sync after attention dropped, a step of {most.before * 1e3:.3g} ms would take "
            f"{most.after * 1e3:.3g} ms, {100 * most.share:.1f}% less, and below {100 * WORTHWHILE:.0f}% no loss of "
            "quality is worth it"
        )


@dataclass(frozen=True)
class Option:
    """One way to treat one block."""

    treatment: str
    loss: float  # relative increase of perplexity
    seconds: float  # saved a step
    healing: str | None = None


def options(
    losses: Mapping[str, Sequence[float]],
    workload: Workload,
    healing: Sequence[str] = (),
    recovered: Mapping[str, float] = RECOVERED,
) -> list[list[Option]]:
    """Every block's options that save time.

    Args:
        losses: treatment to the relative loss of each block alone.
        workload: what a step costs.
        healing: what may be done to dropped blocks besides dropping them as they are, some of HEALING.
        recovered: the share of the loss that each of these wins back.
    """
    found: list[list[Option]] = [[] for _ in range(workload.layers)]
    for treatment in (how for how in EXCLUSIVE if how in losses):
        seconds = workload.seconds(treatment)
        if seconds <= 0:
            continue
        for own, loss in zip(found, losses[treatment], strict=True):
            loss = max(loss, 0.0)  # a gain is noise, and must not buy a loss elsewhere
            own.append(Option(treatment, loss, seconds))
            if treatment == "dropped":
                own.extend(Option(treatment, loss * (1 - recovered[how]), seconds, how) for how in healing)
    return found


def choose(blocks: Sequence[Sequence[Option]], budget: float) -> list[Option | None]:
    """For each block one of its options or None, so that losses stay within `budget` and the most time is saved.

    Of choices that save the same, the one that heals fewer blocks is taken, then the one that loses less.
    """
    unit = budget / STEPS if budget > 0 else 1.0
    most = max((option.seconds for own in blocks for option in own), default=1.0)
    # best[c]: (saved, minus blocks to heal, minus loss) at a cost of at most c units; savings as whole numbers, so
    # that equal ones are equal.
    best: list[tuple[int, int, float]] = [(0, 0, 0.0)] * (STEPS + 1)
    chosen: list[list[int]] = []
    for own in blocks:
        costs = [math.ceil(option.loss / unit - 1e-9) for option in own]
        following, picks = list(best), [-1] * (STEPS + 1)
        for i, (option, cost) in enumerate(zip(own, costs, strict=True)):
            gain = round(option.seconds / most * 1e9)
            if option.loss > budget:
                continue
            for total in range(cost, STEPS + 1):
                saved, healed, loss = best[total - cost]
                candidate = (saved + gain, healed - (option.healing is not None), loss - option.loss)
                if candidate > following[total]:
                    following[total], picks[total] = candidate, i
        best = following
        chosen.append(picks)
    total, result = STEPS, []
    for own, picks in zip(reversed(blocks), reversed(chosen), strict=True):
        pick = picks[total]
        result.append(own[pick] if pick >= 0 else None)
        if pick >= 0:
            total -= math.ceil(own[pick].loss / unit - 1e-9)
    return result[::-1]
