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
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
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


def segments(curves: Sequence[Sequence[Point]]) -> list[Segment]:
    """Pieces of all items' convex curves in the order in which a budget takes them.

    Args:
        curves: for each item, points of growing sparsity and saving, increases as measured; (0, 0, 0) is added.

    Raises:
        InputError: savings of an item that do not grow.
    """
    found = []
    for item, curve in enumerate(curves):
        savings = [0.0, *(point.saving for point in curve)]
        if any(b <= a for a, b in itertools.pairwise(savings)):
            raise InputError(f"savings {savings[1:]} of item {item} do not grow: give each sparsity once, ascending")
        raised = isotonic([point.increase for point in curve])
        points = [Point(p.sparsity, p.saving, i) for p, i in zip(curve, raised, strict=True)]
        vertices = hull([Point(0.0, 0.0, 0.0), *points])
        found += [Segment(item, a, b) for a, b in itertools.pairwise(vertices)]
    return sorted(found, key=lambda segment: (segment.slope, -segment.item, segment.start.saving))


def allot(curves: Sequence[Sequence[Point]], *, saving: float = math.inf, increase: float = math.inf) -> Allotment:
    """The least loss that saves `saving`, or the most saving that adds `increase` of loss at most; both: the first met.

    With neither, everything is taken. A `saving` that all items together do not reach takes everything.
    """
    taken = [Point(0.0, 0.0, 0.0)] * len(curves)
    saved = added = 0.0
    for segment in segments(curves):
        more, worse = segment.end.saving - segment.start.saving, segment.end.increase - segment.start.increase
        share = min(1.0, (saving - saved) / more, (increase - added) / worse if worse > 0 else 1.0)
        if share > 0:
            taken[segment.item] = segment.end if share == 1 else segment.at(share)
        if share < 1:
            break
        saved, added = saved + more, added + worse
    return Allotment(tuple(taken))


def _below(a: Point, b: Point, c: Point) -> bool:
    """Whether b lies on or above the chord from a to c, so that it is no vertex."""
    return (b.increase - a.increase) * (c.saving - a.saving) >= (c.increase - a.increase) * (b.saving - a.saving)
