"""Around attention: rows to grids of sequences and back, rotation, the model's own attention function.

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
from elision.sparselora.rows import Grid, Rows


def attend(
    attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, rows: Rows, window: int | None, implementation: str = "sdpa"
) -> Tensor:
    """(T, heads, head_dim): causal attention of `rows` within their segments, by the model's own function.

    q is (T, heads, head_dim) or, where only the last rows ask, (their number, heads, head_dim); k and v are
    (T, kv heads, head_dim). `window` is how many tokens a query sees, itself included; `attention` has the scaling,
    and the cap of the logits that some models (Gemma 2) have beside it. `implementation` is "sdpa" or "eager".
    """
    tiled = implementation == "sdpa" and on_cpu(q) and all(plain(rows, grid, window) for grid in rows.grids)
    asking = rows.tail() if tiled and len(q) < rows.total else rows
    by_grid = zip(rows.grids, to_grids(q, asking), to_grids(k, rows), to_grids(v, rows), strict=True)
    if tiled:
        scaling = getattr(attention, "scaling", None) or q.shape[-1] ** -0.5
        outs = [causal_attention(x, y, z, scaling) if x.numel() else x for _, x, y, z in by_grid]
    else:
        outs = [_in_grid(attention, x, y, z, window_mask(rows, g, window), implementation) for g, x, y, z in by_grid]
    return from_grids(outs, asking, len(q))


def _in_grid(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, implementation: str) -> Tensor:
    """(segments, length, heads, head_dim) of such tensors; `mask` None: causality is all there is."""
    scaling = getattr(attention, "scaling", None)
    tensors = [x.transpose(1, 2) for x in (q, k, v)]
    if implementation == "sdpa":
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return function(attention, *tensors, mask, dropout=0.0, scaling=scaling, is_causal=mask is None)[0]
    mask = causal(q.shape[1], q.device) if mask is None else mask
    added = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
    added.masked_fill_(~mask, torch.finfo(q.dtype).min)
    function = sys.modules[type(attention).__module__].eager_attention_forward
    softcap = getattr(attention, "attn_logit_softcapping", None)
    return function(attention, *tensors, added, dropout=0.0, scaling=scaling, softcap=softcap)[0]


def on_cpu(x: Tensor) -> bool:
    """Whether causal.py is the way: not in float32, where torch's own backward is as fast."""
    return x.device.type == "cpu" and x.dtype != torch.float32


def causal(length: int, device: torch.device) -> Tensor:
    """(1, 1, length, length), True where a query sees a key."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


def plain(rows: Rows, grid: Grid, window: int | None) -> bool:
    """Whether causality alone says what the queries of `grid` see."""
    return window is None or (window >= grid.length and rows.columns is None)


def window_mask(rows: Rows, grid: Grid, window: int | None) -> Tensor | None:
    """(1 or segments, 1, length, length), True where a query sees a key; None where causality is all there is."""
    if window is None or plain(rows, grid, window):
        return None
    if rows.columns is None:
        columns = torch.arange(grid.length, device=rows.slots.device)[None]
    else:
        columns = rows.columns[grid.slots].view(grid.segments, grid.length)
    distance = columns[:, :, None] - columns[:, None, :]
    return (distance < window)[:, None] & causal(grid.length, columns.device)


def to_grids(x: Tensor, rows: Rows) -> list[Tensor]:
    """(segments, length, ...) each from (n, ...), n the last rows; slots without a row hold anything finite."""
    slots: Tensor = _ToSlots.apply(x, rows)  # type: ignore[assignment]
    sizes = [grid.segments * grid.length for grid in rows.grids]
    parts = [slots] if len(sizes) == 1 else slots.split(sizes)
    return [part.unflatten(0, (grid.segments, grid.length)) for part, grid in zip(parts, rows.grids, strict=True)]


def from_grids(grids: list[Tensor], rows: Rows, count: int) -> Tensor:
    """(count, ...): the last `count` rows of such grids."""
    slots = [grid.flatten(0, 1) for grid in grids]
    return _FromSlots.apply(slots[0] if len(slots) == 1 else torch.cat(slots), rows, count)  # type: ignore[return-value]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (n, heads, head_dim) in Hugging Face's layout; cos and sin are (n, rotary_dim).

    Where these are wider than x, as under autocast, so is what comes out.
    """
    return _Rotate.apply(x, cos[:, None], sin[:, None])  # type: ignore[return-value]


class _ToSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows, ctx.count = rows, len(x)
        if len(x) == rows.total:
            return x.index_select(0, rows.grid)
        return x.new_zeros(len(rows.grid), *x.shape[1:]).index_copy_(0, rows.slots[-len(x) :], x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # Slots without a row have no part: as queries their outputs are dropped, as keys they come too late.
        return grad.index_select(0, ctx.rows.slots[-ctx.count :]), None


class _FromSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slots: Tensor, rows: Rows, count: int) -> Tensor:
        ctx.rows = rows
        return slots.index_select(0, rows.slots[-count:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        rows = ctx.rows
        if len(grad) == rows.total and rows.full:
            return grad.index_select(0, rows.grid), None, None
        slots = grad.new_zeros(len(rows.grid), *grad.shape[1:]).index_copy_(0, rows.slots[-len(grad) :], grad)
        return slots, None, None


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
