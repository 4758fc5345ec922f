"""Scores to channels: counts, ties, groups of heads, rotary pairs."""

from __future__ import annotations

import math

import pytest
import torch

from elision.sparselora import select


@pytest.mark.parametrize(
    ("channels", "sparsity", "count"),
    [
        (64, 0.0, 64),
        (64, 0.5, 32),
        (64, 0.99, 1),
        (14336, 0.99, 143),
        (10, 0.25, 8),
        (10, 0.35, 7),
        (3, 0.999, 1),
        (1, 0.9, 1),
    ],
)
def test_keep_count(channels: int, sparsity: float, count: int) -> None:
    assert select.keep_count(channels, sparsity) == count
    assert select.keep_count(channels, sparsity) == min(max(math.floor((1 - sparsity) * channels + 0.5), 1), channels)


def test_an_even_count_is_padded_up_never_down() -> None:
    for sparsity in torch.linspace(0, 0.99, 40).tolist():
        plain, even = select.keep_count(48, sparsity), select.keep_count(48, sparsity, even=True)
        assert even % 2 == 0 and plain <= even <= plain + 1


def test_fewer_are_kept_as_sparsity_grows() -> None:
    counts = [select.keep_count(100, s / 100) for s in range(100)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 100 and counts[-1] == 1


def test_top_keeps_the_highest_in_ascending_order() -> None:
    assert select.top(torch.tensor([0.1, 5.0, 3.0, 4.0]), 2).tolist() == [1, 3]
    assert select.top(torch.tensor([9.0, 5.0]), 2).tolist() == [0, 1]


def test_of_equal_scores_the_lower_channel_is_kept() -> None:
    scores = torch.ones(1000)
    scores[700] = 2.0
    assert select.top(scores, 5).tolist() == [0, 1, 2, 3, 700]


def test_expansion_is_head_by_head() -> None:
    # head_dim 4, 2 kv heads, 3 query heads for each: kv channel (1, 2) serves query heads 3, 4, 5 at dimension 2
    assert select.expand(torch.tensor([6]), 3, 4).tolist() == [14, 18, 22]
    assert select.expand(torch.tensor([1, 3, 4]), 2, 4).tolist() == [1, 3, 5, 7, 8, 12]
    assert select.expand(torch.tensor([1, 3, 4]), 1, 4).tolist() == [1, 3, 4]  # multi-head attention: itself


def test_groups_combine_as_root_of_the_mean_of_squares() -> None:
    query = torch.tensor([3.0, 0.0, 4.0, 2.0, 1.0, 1.0, 7.0, 1.0])  # 2 kv heads x 2 groups x head_dim 2
    expected = [math.sqrt((9 + 16) / 2), math.sqrt((0 + 4) / 2), math.sqrt((1 + 49) / 2), 1.0]
    assert torch.allclose(select.combine_groups(query, 2, 2), torch.tensor(expected))
    assert torch.equal(select.combine_groups(query, 4, 2), query)


def test_rotary_pairs_stay_together() -> None:
    scores = torch.rand(3 * 8)
    kept = select.top_pairs(scores, 10, head_dim=8)
    assert len(kept) == 10 and kept.tolist() == sorted(kept.tolist())
    chosen = set(kept.tolist())
    for channel in chosen:
        head, d = divmod(channel, 8)
        assert head * 8 + (d + 4) % 8 in chosen
    sums = {(h, d): float(scores[h * 8 + d] + scores[h * 8 + d + 4]) for h in range(3) for d in range(4)}
    best = sorted(sums, key=lambda pair: -sums[pair])[:5]
    assert chosen == {h * 8 + d + half for h, d in best for half in (0, 4)}
    assert set(select.top(scores, 10).tolist()) != chosen  # single channels would choose otherwise


def test_mask() -> None:
    assert select.mask(torch.tensor([1, 3]), 5).tolist() == [False, True, False, True, False]
    assert not select.mask(torch.empty(0, dtype=torch.long), 5).any()
