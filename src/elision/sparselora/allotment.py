"""A budget over measured curves: how much of each layer and part to leave out (pure).

Each *item* (a part of a layer) has a curve: at sparsities s_1 < s_2 < ... it saves c_i(s) of the step's cost and raises
the loss by l_i(s). Increases of items are taken to add up. To minimise the sum of l_i under sum of c_i >= target is a
knapsack; with the curves made monotone and convex it is solved exactly by its Lagrangian: walk along the curves in the
order of their slopes, loss per saving, cheapest first, until the target is met.

    isotonic   measured increases are noisy, and more sparsity cannot truly help: the closest non-decreasing curve
               (pool adjacent violators), zero at zero
    hull       the lower convex hull of (saving, increase): the points that some price per saving would pick

Every item but the last one walked stops at a vertex, which is a measured point; that last one stops in between, on the
chord, since any sparsity can be had. So the budget is met and not overshot by a whole step, what an item leaves out
never shrinks when the budget grows tighter, and no other allotment on the hulls has a smaller sum.

Where two slopes are equal (several parts cost nothing), the later item goes first: deeper layers tolerate more.

Increases do not truly add up: what one layer leaves out another may have made good. So a long way is walked in legs
(Walk): at the end of each, the curves of what is left are measured again in the company of all that is already taken.
Legs end where they end whatever the budget, so the allotments of all budgets still lie on one path.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elision.errors import InputError


@dataclass(frozen=True)
class Point:
    """One sparsity of an item: what it saves, in any unit of cost, and the loss that it adds."""

    sparsity: float
    saving: float
    increase: float


@dataclass(frozen=True)
class Segment:
    """A straight piece of an item's convex curve, from `start` to `end`."""

    item: int
    start: Point
    end: Point

    @property
    def slope(self) -> float:
        """Loss per saving."""
        return (self.end.increase - self.start.increase) / (self.end.saving - self.start.saving)

    def at(self, share: float) -> Point:
        """The point that lies `share` of the way along."""
        return Point(
            *(
                getattr(self.start, name) + share * (getattr(self.end, name) - getattr(self.start, name))
                for name in ("sparsity", "saving", "increase")
            )
        )


@dataclass(frozen=True)
class Allotment:
    """One point per item, and the sums over them."""

    points: tuple[Point, ...]

    @classmethod
    def nothing(cls, items: int) -> Allotment:
        """Everything dense."""
        return cls((Point(0.0, 0.0, 0.0),) * items)

    @property
    def sparsities(self) -> tuple[float, ...]:
        return tuple(point.sparsity for point in self.points)

    @property
    def saving(self) -> float:
        return math.fsum(point.saving for point in self.points)

    @property
    def increase(self) -> float:
        return math.fsum(point.increase for point in self.points)


def isotonic(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence with the least squared distance to `values`, none of it below zero."""
    pools: list[tuple[float, int]] = []  # mean and size
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [max(0.0, mean) for mean, size in pools for _ in range(size)]


def hull(points: Sequence[Point]) -> list[Point]:
    """Vertices of the lower convex hull of (saving, increase), from the first point on; savings must grow."""
    kept: list[Point] = []
    for point in points:
        while len(kept) > 1 and _below(kept[-2], kept[-1], point):
            kept.pop()
        kept.append(point)
    return kept


def segments(curves: Sequence[Sequence[Point]], start: Allotment | None = None) -> list[Segment]:
    """Pieces of all items' convex curves, from `start` on, in the order in which a budget takes them.

    Args:
        curves: for each item, points of growing sparsity and saving, increases as measured.
        start: where the items are; all dense, (0, 0, 0), by default. Points that save no more than it are left out.

    Raises:
        InputError: savings of an item that do not grow.
    """
    start = start or Allotment.nothing(len(curves))
    found = []
    for item, (curve, first) in enumerate(zip(curves, start.points, strict=True)):
        savings = [0.0, *(point.saving for point in curve)]
        if any(b <= a for a, b in itertools.pairwise(savings)):
            raise InputError(f"savings {savings[1:]} of item {item} do not grow: give each sparsity once, ascending")
        rest = [point for point in curve if point.saving > first.saving]
        raised = isotonic([point.increase - first.increase for point in rest])
        points = [Point(p.sparsity, p.saving, first.increase + more) for p, more in zip(rest, raised, strict=True)]
        found += [Segment(item, a, b) for a, b in itertools.pairwise(hull([first, *points]))]
    return sorted(found, key=lambda segment: (segment.slope, -segment.item, segment.start.saving))


def allot(
    curves: Sequence[Sequence[Point]],
    *,
    saving: float = math.inf,
    increase: float = math.inf,
    start: Allotment | None = None,
    whole: bool = False,
) -> Allotment:
    """The least loss that saves `saving`, or the most saving that adds `increase` of loss at most; both: the first met.

    With neither, everything is taken. A `saving` that all items together do not reach takes everything. From `start`
    on, where one is given, whose saving and increase count. If `whole`, the last step is not cut short: every item
    stops at a point that was measured, and the budget is overshot by less than one step.
    """
    taken = list((start or Allotment.nothing(len(curves))).points)
    saved, added = (start.saving, start.increase) if start else (0.0, 0.0)
    for segment in segments(curves, start):
        more, worse = segment.end.saving - segment.start.saving, segment.end.increase - segment.start.increase
        share = min(1.0, (saving - saved) / more, (increase - added) / worse if worse > 0 else 1.0)
        if share > 0:
            taken[segment.item] = segment.end if share == 1 or whole else segment.at(share)
        if share < 1:
            break
        saved, added = saved + more, added + worse
    return Allotment(tuple(taken))


class Walk:
    """Allotments of all budgets, each within those that save more, with curves measured again at the end of each leg.

    Args:
        curves: for each item, measured with everything else dense.
        again: given an allotment at measured points, the curves in its company: for each item the points that save
            more, `increase` that of the item's point plus what the loss grows by from there.
        ends: of the legs, as shares of the most that can be saved, ascending.
    """

    def __init__(
        self,
        curves: Sequence[Sequence[Point]],
        again: Callable[[Allotment], Sequence[Sequence[Point]]],
        ends: Sequence[float],
    ) -> None:
        self._again, self._ends = again, ends
        self._most = math.fsum(curve[-1].saving for curve in curves if curve)
        self._legs = [(Allotment.nothing(len(curves)), curves)]

    def at(self, saving: float) -> Allotment:
        """The allotment that saves `saving`, or everything where that is less. Measures the legs up to there."""
        for number, end in enumerate(self._ends):
            start, curves = self._legs[number]
            stop = allot(curves, saving=end * self._most, start=start, whole=True)
            if saving <= stop.saving:
                break
            if number + 1 == len(self._legs):
                self._legs.append((stop, self._again(stop)))
        else:
            start, curves = self._legs[-1]
        return allot(curves, saving=saving, start=start)


def _below(a: Point, b: Point, c: Point) -> bool:
    """Whether b lies on or above the chord from a to c, so that it is no vertex."""
    return (b.increase - a.increase) * (c.saving - a.saving) >= (c.increase - a.increase) * (b.saving - a.saving)
