"""A budget over curves: optimal, monotone, met, and right where the right answer is known."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from elision.errors import InputError
from elision.sparselora.allotment import Point, allot, hull, isotonic, segments

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
