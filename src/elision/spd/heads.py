"""Which heads share a rank: the two optimisation problems of head grouping (maths: Healing).

A dropped block's rank sees its own heads alone, so heads that say the same are better spread over the ranks, and every
group of heads belongs beside the MLP shard that makes most of it. That is

    scatter    units into equal groups, the summed distance within groups as large as possible: the maximally diverse
               grouping problem, NP-hard; greedy construction, then swaps of two units while one helps
    assign     groups to MLP shards, the summed score as large as possible: an assignment problem, solved exactly by
               shortest augmenting paths

A unit is a key/value head with the query heads that read it, because these must stay together: one head where there
are no grouped queries. Everything here is a function of its arguments; ties go to the lowest index.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elision.shapes import Float


def distances(gram: Float[Tensor, "heads heads"], units: int) -> Float[Tensor, "units units"]:
    """Summed Euclidean distance between the score maps of two units' heads; 0 on the diagonal.

    Args:
        gram: inner products of the heads' attention score maps, heads of a unit side by side.
        units: how many units the heads form.

    Returns:
        In memory, where `scatter` swaps unit by unit, wherever `gram` is.
    """
    gram = gram.cpu()
    squares = gram.diagonal()
    between = (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * gram).clamp_min(0).sqrt()
    size = len(gram) // units
    return between.view(units, size, units, size).sum((1, 3)).fill_diagonal_(0)


def scatter(between: Float[Tensor, "units units"], groups: int) -> tuple[tuple[int, ...], ...]:
    """Equal groups of units, ascending within and by their first, whose summed distances are locally the largest.

    No swap of two units makes them larger; `groups` must divide the units.
    """
    units = len(between)
    assert units % groups == 0
    group = _construct(between, groups)
    while True:
        to = between @ torch.nn.functional.one_hot(group, groups).to(between.dtype)  # (units, groups): summed distance
        there = to[:, group]  # [u, v]: from u to the group of v
        gain = there + there.T - to[torch.arange(units), group].unsqueeze(1) - to[torch.arange(units), group]
        gain = (gain - 2 * between).masked_fill(group.unsqueeze(1) == group, 0.0)
        best = int(gain.argmax())
        if not gain.flatten()[best] > 1e-9 * between.sum():  # rounding alone, or a nan, must not swap for ever
            break
        u, v = divmod(best, units)
        group[[u, v]] = group[[v, u]]
    members = [tuple(torch.nonzero(group == g).flatten().tolist()) for g in range(groups)]
    return tuple(sorted(members))


def _construct(between: Tensor, groups: int) -> Tensor:
    """(units,) group of each: units that are far from all others first, each to the group where it adds most."""
    room = [len(between) // groups] * groups
    group = torch.full((len(between),), -1)
    for unit in between.sum(1).argsort(descending=True, stable=True).tolist():
        gains = [
            float(between[unit, group == g].mean()) if bool((group == g).any()) else math.inf  # open every group first
            for g in range(groups)
        ]
        chosen = max((g for g in range(groups) if room[g]), key=lambda g: gains[g])
        group[unit] = chosen
        room[chosen] -= 1
    return group


def assign(scores: Float[Tensor, "n n"]) -> tuple[int, ...]:
    """The column of each row that maximises the sum of `scores` over a one-to-one assignment, exactly.

    Shortest augmenting paths with potentials, O(n^3): row after row is added, along the cheapest path that rearranges
    the rows before it.
    """
    cost = [[-value for value in row] for row in scores.double().tolist()]
    n = len(cost)
    row_of = [-1] * (n + 1)  # of each column; column n stands for "none yet"
    of_row, of_column = [0.0] * n, [0.0] * (n + 1)
    for row in range(n):
        row_of[n], column = row, n
        slack, previous, done = [math.inf] * n, [n] * n, [False] * (n + 1)
        while row_of[column] >= 0:
            done[column] = True
            here = row_of[column]
            for j in range(n):
                reduced = cost[here][j] - of_row[here] - of_column[j]
                if not done[j] and reduced < slack[j]:
                    slack[j], previous[j] = reduced, column
            column = min((j for j in range(n) if not done[j]), key=slack.__getitem__)
            step = slack[column]
            for j in range(n + 1):
                if done[j]:
                    of_row[row_of[j]] += step
                    of_column[j] -= step
                elif j < n:
                    slack[j] -= step
        while column != n:
            row_of[column] = row_of[previous[column]]
            column = previous[column]
        row_of[n] = -1
    return tuple(row_of[:n].index(row) for row in range(n))
