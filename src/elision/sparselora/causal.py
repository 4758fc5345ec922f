"""Causal attention on CPUs, with a backward that is not the slow part of the step.

torch's fused kernel is hard to beat forward, but its backward took five to seven times as long as its forward where
the arithmetic asks for two and a half (docs/lab-notes.md). Here backward goes by tiles of queries, each against the
keys that it sees: batched products, for which CPUs have matrix units, and the fused softmax and its derivative.
Probabilities are computed again, so nothing is saved but q, k and v.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

TILE = 128  # queries: fewer compute less behind the diagonal, more make larger products
SCORES = 1 << 20  # of queries and keys at a time and thread: 2 MB in bfloat16, a core's cache


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """softmax(scaling q k^T) v of the last n positions of each sequence over all positions up to their own.

    Args:
        q: (batch, n, heads, head_dim), n <= length.
        k: (batch, length, kv heads, head_dim); the kv heads divide the heads.
        v: likewise.
        scaling: of the scores.

    Returns:
        (batch, n, heads, head_dim).
    """
    return _Causal.apply(q, k, v, scaling)  # type: ignore[return-value]


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """(batch * kv heads, queries per kv head, length, head_dim) of (batch, length, heads, head_dim)."""
    batch, length, heads, dimension = x.shape
    split = x.view(batch, length, kv_heads, heads // kv_heads, dimension)
    return split.permute(0, 2, 3, 1, 4).reshape(batch * kv_heads, heads // kv_heads, length, dimension)


def _by_token(x: Tensor, batch: int) -> Tensor:
    """The inverse of `_by_head`, as a view."""
    pairs, group, length, dimension = x.shape
    split = x.view(batch, pairs // batch, group, length, dimension).permute(0, 3, 1, 2, 4)
    return split.flatten(2, 3)


def _tiles(queries: int, keys: int) -> Iterator[tuple[slice, int]]:
    """Runs of queries, and how many keys the last of each sees."""
    for start in range(0, queries, TILE):
        stop = min(start + TILE, queries)
        yield slice(start, stop), keys - queries + stop


def _chunks(pairs: int, group: int, keys: int) -> Iterator[slice]:
    """Runs of (sequence, kv head) pairs whose scores of one tile fit in the cache."""
    step = max(1, SCORES * torch.get_num_threads() // (group * TILE * keys))
    for start in range(0, pairs, step):
        yield slice(start, min(start + step, pairs))


def _product(x: Tensor, y: Tensor, scaling: float) -> Tensor:
    """Scaling * x y, batched, rounded once."""
    return torch.baddbmm(x.new_zeros(1, 1, 1), x, y, beta=0, alpha=scaling)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scaling = scaling
        asked, length, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
        seen = None if asked == length else q.new_ones(asked, length, dtype=torch.bool).tril(length - asked)
        k, v = (x if group == 1 else x.repeat_interleave(group, dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=scaling).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        (batch, length, kv_heads, _), asked, scaling = k.shape, q.shape[1], ctx.scaling
        unseen = q.new_full((TILE, TILE), float("-inf")).triu(1)
        q, k, v, grad = (_by_head(x, kv_heads) for x in (q, k, v, grad))
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        exact = torch.promote_types(q.dtype, torch.float32)  # what tiles add up in
        for pairs in _chunks(len(q), q.shape[1], length):
            keys, values = k[pairs, 0], v[pairs, 0]
            sum_k, sum_v = (torch.zeros_like(x, dtype=exact) for x in (keys, values))
            for tile, seen in _tiles(asked, length):
                queries, back = (x[pairs, :, tile].flatten(1, 2) for x in (q, grad))
                near = keys[:, :seen].contiguous()
                scores = _product(queries, near.transpose(1, 2), scaling)
                count = tile.stop - tile.start
                scores.unflatten(1, (-1, count))[..., -count:] += unseen[:count, :count]
                p = torch.softmax(scores, dim=-1)
                grad_p = torch.bmm(back, values[:, :seen].transpose(1, 2))
                grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
                grad_q[pairs, :, tile] = _product(grad_scores, near, scaling).unflatten(1, (-1, count))
                sum_k[:, :seen] += _product(grad_scores.transpose(1, 2), queries, scaling)
                sum_v[:, :seen] += torch.bmm(p.transpose(1, 2), back)
            grad_k[pairs, 0], grad_v[pairs, 0] = sum_k, sum_v
        return _by_token(grad_q, batch), _by_token(grad_k, batch), _by_token(grad_v, batch), None
