"""A budget over curves: optimal, monotone, met, and right where the right answer is known."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from elision.errors import InputError
from elision.sparselora.allotment import Allotment, Point, Walk, allot, hull, isotonic, segments

GRID = (0.5, 0.75, 0.9, 0.99)


def curve(increases: list[float], worth: float = 1.0) -> list[Point]:
    return [Point(s, worth * s, i) for s, i in zip(GRID, increases, strict=True)]


def noisy(seed: int, items: int = 4) -> list[list[Point]]:
    """Curves that are neither monotone nor convex."""
    rng = random.Random(seed)
    return [
        curve([rng.choice([1.0, 0.01]) * s**2 * rng.uniform(-0.2, 1.2) for s in GRID], rng.uniform(0.5, 2.0))
        for _ in range(items)
    ]


def test_isotonic_is_the_closest_curve_that_does_not_fall() -> None:
    assert isotonic([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]
    assert isotonic([-1.0, -2.0, 1.0]) == [0.0, 0.0, 1.0]  # sparsity does not truly help
    assert isotonic([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    values = [0.3, 0.1, 0.5, 0.2, 0.9]
    best = min(
        sum((a - b) ** 2 for a, b in zip(values, found, strict=True))
        for found in itertools.product([i / 20 for i in range(20)], repeat=5)
        if list(found) == sorted(found)
    )
    assert sum((a - b) ** 2 for a, b in zip(values, isotonic(values), strict=True)) <= best + 1e-12


def test_hull_keeps_what_some_price_would_pick() -> None:
    points = [Point(0, 0, 0), Point(0.5, 1, 0.9), Point(0.7, 2, 1.0), Point(0.8, 3, 2.5), Point(0.9, 4, 4.0)]
    vertices = hull(points)
    prices = [0.01 * i for i in range(500)]
    picked = {min(points, key=lambda p: p.increase - price * p.saving) for price in prices}
    assert set(vertices) == picked


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_of_measured_points_is_better(seed: int) -> None:
    """Exhaustively: whatever saves as much adds at least as much loss, on the monotone curves."""
    curves = noisy(seed)
    monotone = [
        [Point(p.sparsity, p.saving, i) for p, i in zip(c, isotonic([p.increase for p in c]), strict=True)]
        for c in curves
    ]
    everything = sum(c[-1].saving for c in curves)
    for share in (0.2, 0.5, 0.8):
        found = allot(curves, saving=share * everything)
        assert found.saving == pytest.approx(share * everything)
        best = min(
            math.fsum(p.increase for p in chosen)
            for chosen in itertools.product(*([Point(0, 0, 0), *c] for c in monotone))
            if math.fsum(p.saving for p in chosen) >= share * everything
        )
        assert found.increase <= best + 1e-12
        between = [p for p, c in zip(found.points, curves, strict=True) if p.sparsity not in (0.0, *GRID)]
        assert len(between) <= 1  # all others are points that were measured


@pytest.mark.parametrize("seed", range(8))
def test_more_budget_never_takes_anything_back(seed: int) -> None:
    curves = noisy(seed)
    everything = sum(c[-1].saving for c in curves)
    for name, limits in (
        ("saving", [i / 20 * everything for i in range(22)]),
        ("increase", [i / 20 for i in range(40)]),
    ):
        found = [allot(curves, **{name: limit}) for limit in limits]
        for one, other in itertools.pairwise(found):
            assert all(a <= b + 1e-12 for a, b in zip(one.sparsities, other.sparsities, strict=True))
            assert one.increase <= other.increase + 1e-12 and one.saving <= other.saving + 1e-12
        assert found[0].sparsities != found[-1].sparsities


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.4, 100.0])
def test_the_loss_stays_within_its_limit(limit: float) -> None:
    found = allot(noisy(3), increase=limit)
    assert found.increase <= limit + 1e-12
    assert found.increase == pytest.approx(min(limit, allot(noisy(3)).increase))


def test_what_costs_nothing_is_sparse_first_and_the_deeper_before_the_shallower() -> None:
    free, dear = [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]
    curves = [curve(dear), curve(free), curve(free), curve(dear)]
    assert allot(curves, saving=0.5).sparsities == (0.0, 0.0, pytest.approx(0.5), 0.0)
    assert allot(curves, saving=2 * 0.99).sparsities == (0.0, 0.99, 0.99, 0.0)
    assert allot(curves, increase=0.0).sparsities == (0.0, 0.99, 0.99, 0.0)
    assert allot(curves).sparsities == (0.99,) * 4
    assert allot(curves, saving=1e9) == allot(curves)


def test_dear_savings_are_told_from_cheap_ones_by_what_they_save() -> None:
    curves = [curve([0.1] * 4, worth=1.0), curve([0.15] * 4, worth=10.0)]
    assert allot(curves, saving=5.0).sparsities == (0.0, pytest.approx(0.5))


def test_segments_are_convex_and_sorted() -> None:
    slopes = [segment.slope for segment in segments(noisy(1))]
    assert slopes == sorted(slopes)
    with pytest.raises(InputError, match=r"savings \[1, 1\] of item 0 do not grow"):
        segments([[Point(0.5, 1, 0.0), Point(0.9, 1, 0.0)]])


@pytest.mark.parametrize("seed", range(8))
def test_a_way_walked_in_two_is_the_same_way(seed: int) -> None:
    rng = random.Random(seed)
    curves = [curve([dear * s**2 for s in GRID]) for dear in (rng.random() for _ in range(4))]
    for first in (0.5, 1.3, 2.2):
        start = allot(curves, saving=first, whole=True)
        assert start.saving >= first and set(start.sparsities) <= {0.0, *GRID}
        for then in (2.5, 3.1, math.inf):
            if then > start.saving:
                there, straight = allot(curves, saving=then, start=start), allot(curves, saving=then)
                assert there.sparsities == pytest.approx(straight.sparsities)
                assert there.increase == pytest.approx(straight.increase)
    assert allot(curves, increase=0.2, start=allot(curves, increase=0.1)).increase == pytest.approx(0.2)


class Company:
    """Losses that do not add up: those of items in `pairs` come only with both of a pair left out."""

    def __init__(self, alone: list[float], pairs: dict[tuple[int, int], float]) -> None:
        self.alone, self.pairs, self.asked = alone, pairs, 0

    def loss(self, sparsities: list[float]) -> float:
        singles = sum(a * s**2 for a, s in zip(self.alone, sparsities, strict=True))
        return singles + sum(k * sparsities[i] * sparsities[j] for (i, j), k in self.pairs.items())

    def curves(self, taken: Allotment) -> list[list[Point]]:
        self.asked += 1
        found = []
        for item, point in enumerate(taken.points):
            here = list(taken.sparsities)
            now = self.loss(here)
            found.append([])
            for s in GRID:
                if s > point.sparsity:
                    more = self.loss([*here[:item], s, *here[item + 1 :]]) - now
                    found[item].append(Point(s, s, point.increase + more))
        return found

    def walk(self, ends: tuple[float, ...]) -> Walk:
        walk = Walk(self.curves(Allotment.nothing(len(self.alone))), self.curves, ends)
        self.asked = 0
        return walk


def test_what_another_makes_good_is_not_left_out_with_it() -> None:
    company = Company([0.0, 0.0, 0.3, 0.3], {(0, 1): 10.0})
    blind = company.walk(()).at(2.0)
    seeing = company.walk((0.2,)).at(2.0)
    assert min(blind.sparsities[:2]) > 0.9 and company.loss(list(blind.sparsities)) > 9
    assert min(seeing.sparsities[:2]) == 0.0 and company.loss(list(seeing.sparsities)) < 0.5
    assert seeing.increase == pytest.approx(company.loss(list(seeing.sparsities)), abs=0.02)  # off by the chord alone
    assert blind.increase < 0.1


@pytest.mark.parametrize("seed", range(8))
def test_on_a_walk_too_more_budget_never_takes_anything_back(seed: int) -> None:
    rng = random.Random(seed)
    company = Company(
        [rng.random() for _ in range(5)],
        {(i, j): rng.uniform(-0.5, 1.0) for i, j in itertools.combinations(range(5), 2)},
    )
    walk = company.walk((0.3, 0.6, 0.9))
    savings = [i / 20 * 5 for i in range(22)]
    found = [walk.at(saving) for saving in savings]
    for saving, one in zip(savings, found, strict=True):
        assert one.saving == pytest.approx(min(saving, 5 * 0.99))
        assert sum(s not in (0.0, *GRID) for s in one.sparsities) <= 1
    for one, other in itertools.pairwise(found):
        assert all(a <= b + 1e-12 for a, b in zip(one.sparsities, other.sparsities, strict=True))
    assert company.asked == 3
    rng.shuffle(savings)  # nor does it matter what was asked before
    again = company.walk((0.3, 0.6, 0.9))
    assert {saving: again.at(saving) for saving in savings} == dict(zip(sorted(savings), found, strict=True))


def test_only_the_legs_that_a_budget_walks_are_measured() -> None:
    company = Company([1.0] * 4, {})
    walk = company.walk((0.25, 0.5))
    asked = []
    for saving in (0.0, 0.9, 1.2, 1.9, 2.5, 4.0, 0.5):
        walk.at(saving)
        asked.append(company.asked)
    assert asked == sorted(asked) and asked[0] == 0 and asked[-1] == 2 and 1 in asked
