"""Around attention: rows to the grid of sequences and back, rotation, the model's own attention function.

Each moves or rotates by a known map, so that backward is the same kind of operation with the inverse map: a gather of
whole rows (a generic index_select would add up row by row), and the opposite rotation. Nothing is saved but the maps.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from elision.sparselora.causal import causal_attention
from elision.sparselora.rows import Rows


def attend(
    attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, rows: Rows, window: int | None, implementation: str = "sdpa"
) -> Tensor:
    """(T, heads, head_dim): causal attention of `rows` within their segments, by the model's own function.

    q is (T, heads, head_dim) or, where only the last rows ask, (their number, heads, head_dim); k and v are
    (T, kv heads, head_dim). `window` is how many tokens a query sees, itself included; `attention` has the scaling,
    and the cap of the logits that some models (Gemma 2) have beside it. `implementation` is "sdpa" or "eager".
    """
    scaling = getattr(attention, "scaling", None)
    mask = window_mask(rows, window)
    if implementation == "sdpa" and mask is None and on_cpu(q):
        asking = rows if len(q) == rows.total else rows.tail()
        scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
        out = causal_attention(to_grid(q, asking), to_grid(k, rows), to_grid(v, rows), scaling)
        return from_grid(out, asking, len(q))
    grids = [to_grid(x, rows).transpose(1, 2) for x in (q, k, v)]
    if implementation == "sdpa":
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out, _ = function(attention, *grids, mask, dropout=0.0, scaling=scaling, is_causal=mask is None)
    else:
        mask = causal(rows) if mask is None else mask
        added = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        added.masked_fill_(~mask, torch.finfo(q.dtype).min)
        function = sys.modules[type(attention).__module__].eager_attention_forward
        softcap = getattr(attention, "attn_logit_softcapping", None)
        out, _ = function(attention, *grids, added, dropout=0.0, scaling=scaling, softcap=softcap)
    return from_grid(out, rows, len(q))


def on_cpu(x: Tensor) -> bool:
    """Whether causal.py is the way: not in float32, where torch's own backward is as fast."""
    return x.device.type == "cpu" and x.dtype != torch.float32


def causal(rows: Rows) -> Tensor:
    """(1, 1, length, length), True where a query sees a key."""
    return torch.ones(rows.length, rows.length, dtype=torch.bool, device=rows.columns.device).tril()[None, None]


def window_mask(rows: Rows, window: int | None) -> Tensor | None:
    """(1 or segments, 1, length, length), True where a query sees a key; None where causality is all there is."""
    if window is None or (window >= rows.length and len(rows.columns) == 1):
        return None
    distance = rows.columns[:, :, None] - rows.columns[:, None, :]
    return (distance < window)[:, None] & causal(rows)


def to_grid(x: Tensor, rows: Rows) -> Tensor:
    """(segments, length, ...) from (n, ...), n the last rows; slots without a row hold anything finite."""
    return _ToGrid.apply(x, rows)  # type: ignore[return-value]


def from_grid(grid: Tensor, rows: Rows, count: int) -> Tensor:
    """(count, ...): the last `count` rows of a (segments, length, ...) grid."""
    return _FromGrid.apply(grid, rows, count)  # type: ignore[return-value]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (n, heads, head_dim) in Hugging Face's layout; cos and sin are (n, rotary_dim).

    Where these are wider than x, as under autocast, so is what comes out.
    """
    return _Rotate.apply(x, cos[:, None], sin[:, None])  # type: ignore[return-value]


class _ToGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows, ctx.count = rows, len(x)
        if len(x) == rows.total:
            grid = x.index_select(0, rows.grid)
        else:
            grid = x.new_zeros(len(rows.grid), *x.shape[1:]).index_copy_(0, rows.slots[-len(x) :], x)
        return grid.view(rows.segments, rows.length, *x.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # Slots without a row have no part: as queries their outputs are dropped, as keys they come too late.
        return grad.flatten(0, 1).index_select(0, ctx.rows.slots[-ctx.count :]), None


class _FromGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grid: Tensor, rows: Rows, count: int) -> Tensor:
        ctx.rows = rows
        return grid.flatten(0, 1).index_select(0, rows.slots[-count:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        rows = ctx.rows
        if len(grad) == rows.total and rows.full:
            grid = grad.index_select(0, rows.grid)
        else:
            grid = grad.new_zeros(len(rows.grid), *grad.shape[1:]).index_copy_(0, rows.slots[-len(grad) :], grad)
        return grid.view(rows.segments, rows.length, *grad.shape[1:]), None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _rotated(x.to(torch.promote_types(x.dtype, cos.dtype)), cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1).to(ctx.dtype), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """The leading dimensions become x cos + sign * rotate_half(x) sin; cos and sin repeat their halves."""
    width = cos.shape[-1]
    half = width // 2
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(x[..., :width], cos, out=out[..., :width])
    out[..., :half].addcmul_(x[..., half:width], sin[..., :half], value=-sign)
    out[..., half:width].addcmul_(x[..., :half], sin[..., half:], value=sign)
    if width < x.shape[-1]:
        out[..., width:] = x[..., width:]
    return out
