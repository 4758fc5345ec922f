"""The two problems of head grouping: solved as well as exhaustive search where that is possible."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from elision.spd.heads import assign, distances, scatter


def symmetric(units: int, seed: int) -> torch.Tensor:
    points = torch.randn(units, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cdist(points, points)


def within(between: torch.Tensor, groups) -> float:
    return sum(float(between[list(g)][:, list(g)].sum()) / 2 for g in groups)


def partitions(units: tuple[int, ...], size: int):
    """Every way to cut `units` into groups of `size`."""
    if not units:
        yield ()
        return
    for rest in itertools.combinations(units[1:], size - 1):
        left = tuple(u for u in units[1:] if u not in rest)
        yield from (((units[0], *rest), *others) for others in partitions(left, size))


def test_distances_are_between_score_maps_and_summed_over_the_heads_of_two_units():
    maps = torch.rand(6, 50, dtype=torch.float64)
    pairwise = torch.cdist(maps, maps)
    found = distances(maps @ maps.T, 6)
    torch.testing.assert_close(found, pairwise.fill_diagonal_(0), rtol=0, atol=1e-6)
    grouped = distances(maps @ maps.T, 3)
    assert grouped[0, 2].item() == pytest.approx(pairwise[:2, 4:].sum().item(), abs=1e-6)
    assert grouped.diagonal().tolist() == [0.0] * 3


def test_distances_are_in_memory_where_heads_are_scattered():
    with FakeTensorMode():  # of a device that need not be there
        assert distances(torch.eye(6, device="cuda"), 3).device.type == "cpu"


@pytest.mark.parametrize(("units", "groups"), [(8, 1), (8, 2), (8, 4), (8, 8), (6, 2), (9, 3)])
def test_scatter_comes_close_to_the_best_of_all_groupings(units, groups):
    shares = []
    for seed in range(6):
        between = symmetric(units, seed)
        found = scatter(between, groups)
        assert sorted(itertools.chain(*found)) == list(range(units))
        assert {len(group) for group in found} == {units // groups}
        every = [within(between, p) for p in partitions(tuple(range(units)), units // groups)]
        share = 1.0 if groups in (1, units) else (within(between, found) - min(every)) / (max(every) - min(every))
        shares.append(share)
    assert min(shares) > 0.9 and sum(shares) / len(shares) > 0.97


def test_no_swap_improves_what_scatter_found():
    between = symmetric(24, 3)
    found = scatter(between, 4)
    best = within(between, found)
    where = {unit: g for g, group in enumerate(found) for unit in group}
    for u, v in itertools.combinations(range(24), 2):
        if where[u] != where[v]:
            swapped = [tuple(v if x == u else u if x == v else x for x in group) for group in found]
            assert within(between, swapped) <= best * (1 + 1e-6)
    contiguous = [tuple(range(6 * g, 6 * g + 6)) for g in range(4)]
    assert best > 1.05 * within(between, contiguous)


def test_like_units_are_put_apart():
    kinds = torch.eye(4, dtype=torch.float64).repeat(2, 1)  # units k and k + 4 are the same
    between = torch.cdist(kinds, kinds)
    assert all(a % 4 != b % 4 for a, b in scatter(between, 4))
    assert scatter(between, 2) == scatter(between, 2)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_assign_finds_the_best_of_all_permutations(n):
    for seed in range(8):
        scores = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
        if seed == 0:
            scores = scores.round()  # ties
        found = assign(scores)
        assert sorted(found) == list(range(n))
        best = max(sum(scores[i, p].item() for i, p in enumerate(perm)) for perm in itertools.permutations(range(n)))
        assert sum(scores[i, p].item() for i, p in enumerate(found)) == pytest.approx(best, abs=1e-5)
    assert assign(torch.eye(n).flip(1)) == tuple(reversed(range(n)))
