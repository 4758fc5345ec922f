"""Scores to channels: which channels of a part a batch of context tokens keeps.

Pure and deterministic: the n highest scores win, over all heads together, and of equal scores the lower channel.
Choices are sorted index tensors, since a fast path gathers rows by them; `mask` turns one into a boolean.

Grouped-query attention has fewer channels of K and V than of Q and O. Kv channel (h, d) serves the query channels
(h * groups + g, d), g = 0..groups-1, so a choice is made on the kv side and expanded head by head: what Q keeps then
always meets the K that was kept, and O reads the V that was kept (maths: Which channels).

Rotary embeddings mix dimension d of a head with d + head_dim / 2. A choice that keeps both halves of a pair or
neither computes whole rotations only; the price is a coarser choice. A pair's score is the sum of its channels'
scores: both are bounds on what the channel adds to the attention logits, and these add.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elision.shapes import Bool, Float, Int


def keep_count(channels: int, sparsity: float, *, even: bool = False) -> int:
    """How many channels stay: floor((1 - sparsity) * channels + 0.5), in [1, channels]; `even` rounds an odd count up.

    `channels` must be even where `even` is asked for.
    """
    count = min(max(math.floor((1.0 - sparsity) * channels + 0.5), 1), channels)
    return count + count % 2 if even else count


def top(scores: Float[Tensor, " channels"], count: int) -> Int[Tensor, " kept"]:
    """The `count` channels with the highest scores, ascending; of equal scores the lower channel is kept."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


def top_pairs(scores: Float[Tensor, " channels"], count: int, head_dim: int) -> Int[Tensor, " kept"]:
    """Like `top`, with channels d and d + head_dim / 2 of a head kept or dropped together. `count` is even."""
    half = head_dim // 2
    pairs = scores.view(-1, 2, half).sum(dim=1)  # (heads, half)
    best = top(pairs.flatten(), count // 2)
    first = best // half * head_dim + best % half
    return torch.cat([first, first + half]).sort().values


def combine_groups(query: Float[Tensor, " query"], kv_heads: int, head_dim: int) -> Float[Tensor, " kv"]:
    """Norms of query channels on the kv side: root of the mean of squares over the groups that share a kv channel."""
    grouped = query.view(kv_heads, -1, head_dim)  # (kv head, group, dimension)
    return grouped.square().mean(dim=1).sqrt().flatten()


def expand(kept: Int[Tensor, " kv"], groups: int, head_dim: int) -> Int[Tensor, " query"]:
    """Query channels (ascending) that belong to the kept kv channels: (h * groups + g, d) for every kept (h, d)."""
    head, dimension = kept // head_dim, kept % head_dim
    group = torch.arange(groups, device=kept.device)
    return (((head[:, None] * groups + group) * head_dim) + dimension[:, None]).flatten().sort().values


def mask(kept: Int[Tensor, " kept"], channels: int) -> Bool[Tensor, " channels"]:
    """True at the kept channels."""
    return torch.zeros(channels, dtype=torch.bool, device=kept.device).index_fill_(0, kept, True)
