"""The frozen products of attention with their adapters, pruned on the first rows: forward and exact backward.

Rows [0, c) are sparse, the others dense (rows.py). With x = norm(h), W frozen, (A, B) the adapters and K the kept
channels, what the masked-dense reference computes on full width is computed here on the kept channels only:

    norm_linear       y = x W' + bias + (x A') B'            y[:c] = bias, + x[:c] W[K]' at the channels K, + (x A') B'
    linear_residual   h + r (z W' + bias + (z A') B')        with z[:c, K] (W')[K] for the product on the first rows

Both read rows of a stored matrix (layout.py stores O transposed for that), both in backward once more: of the frozen
side nothing is saved but indices. Saved for backward are the inputs h or z, the inverse norms and the narrow x A'.
The adapters see every row and every channel. Base weights, norm weights and biases are frozen: they get no gradient.

Precision: norms in at least single precision, products in the dtype of the rows, as the model itself does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Choose = Callable[[Tensor], Tensor | None]  # normed sparse rows to the kept channels of the map; None: all


@dataclass
class Adapters:
    """LoRA factors on one input, in the dtype of the rows, the scaling in b: adapter i adds x a[ranks[i]]' b[i]'."""

    a: Tensor | None = None  # (sum of ranks, inputs)
    b: list[Tensor] = field(default_factory=list)  # (outputs of i, rank of i)
    ranks: list[slice] = field(default_factory=list)
    outputs: list[slice] = field(default_factory=list)


@dataclass
class Norm:
    """RMS norm: x = h / rms(h) * weight."""

    weight: Tensor
    eps: float


def rms_norm(h: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Normed rows in h's dtype and 1 / rms (T, 1) in at least single precision."""
    wide = torch.promote_types(h.dtype, torch.float32)
    inverse = torch.rsqrt(h.to(wide).square().mean(dim=1, keepdim=True) + norm.eps)
    return apply_norm(h, inverse, norm), inverse


def apply_norm(h: Tensor, inverse: Tensor, norm: Norm) -> Tensor:
    """Normed rows, from what `rms_norm` found."""
    return (h * inverse).to(h.dtype) * norm.weight


def rms_norm_backward(grad: Tensor, h: Tensor, inverse: Tensor, norm: Norm) -> Tensor:
    """Gradient of h from that of the normed rows."""
    unit = h * inverse
    grad = (grad * norm.weight).to(inverse.dtype)
    along = (grad * unit).mean(dim=1, keepdim=True)
    return torch.addcmul(grad, unit, along, value=-1).mul_(inverse).to(h.dtype)


def spans(total: int, sparse: int, kept: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
    """The sparse rows with their channels, then the dense ones; one span where nothing is pruned."""
    start = 0 if kept is None else sparse
    if start:
        yield slice(0, start), kept
    if start < total:
        yield slice(start, total), None


def norm_linear(
    h: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Adapters,
    sparse: int = 0,
    choose: Choose | None = None,
) -> Tensor:
    """(T, outputs): norm and linear map of h (T, inputs); `weight` is (outputs, inputs).

    `choose` is handed the first `sparse` rows of the normed input, and returns the outputs that they compute.
    """
    return _NormLinear.apply((norm, weight, bias, adapters, sparse, choose), h, adapters.a, *adapters.b)  # type: ignore[return-value]


def linear_residual(
    h: Tensor,
    z: Tensor,
    transposed: Tensor,
    bias: Tensor | None,
    adapters: Adapters,
    multiplier: float = 1.0,
    sparse: int = 0,
    kept: Tensor | None = None,
) -> Tensor:
    """(T, outputs): h + multiplier * (linear map of z); `transposed` is the weight as (inputs, outputs).

    The first `sparse` rows compute the product from the inputs `kept` alone.
    """
    job = (transposed, bias, adapters, multiplier, sparse, kept)
    return _LinearResidual.apply(job, h, z, adapters.a, *adapters.b)  # type: ignore[return-value]


def narrow_gradients(
    grad: Tensor, b: list[Tensor], p: Tensor | None, adapters: Adapters
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of p = x a' and of each b, from that of the outputs."""
    if p is None:
        return None, []
    u = torch.empty_like(p)
    for factor, rank, output in zip(b, adapters.ranks, adapters.outputs, strict=True):
        torch.mm(grad[:, output], factor, out=u[:, rank])
    pairs = zip(adapters.ranks, adapters.outputs, strict=True)
    return u, [grad[:, output].T @ p[:, rank] for rank, output in pairs]


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: tuple, h: Tensor, a: Tensor | None, *b: Tensor) -> Tensor:
        norm, weight, bias, adapters, sparse, choose = job
        x, inverse = rms_norm(h, norm)
        kept = choose(x[:sparse]) if sparse and choose is not None else None
        p = None if a is None else x @ a.T
        y = x.new_empty(len(x), len(weight))
        for rows, channels in spans(len(x), sparse, kept):
            part = y[rows]
            if channels is None:
                torch.mm(x[rows], weight.T, out=part)
            else:
                part.zero_().index_copy_(1, channels, x[rows] @ weight.index_select(0, channels).T)
            if bias is not None:
                part += bias
        for factor, rank, output in zip(b, adapters.ranks, adapters.outputs, strict=True):
            assert p is not None
            y[:, output].addmm_(p[:, rank], factor.T)
        ctx.job = (norm, weight, adapters, sparse)
        ctx.save_for_backward(h, inverse, p, kept, a, *b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        norm, weight, adapters, sparse = ctx.job
        h, inverse, p, kept, a, *b = ctx.saved_tensors
        u, grad_b = narrow_gradients(grad, b, p, adapters)
        grad_a = None if u is None else u.T @ apply_norm(h, inverse, norm)
        if not ctx.needs_input_grad[1]:
            return None, None, grad_a, *grad_b
        grad_x = torch.empty_like(h)
        for rows, channels in spans(len(h), sparse, kept):
            if channels is None:
                torch.mm(grad[rows], weight, out=grad_x[rows])
            else:
                chosen = grad[rows].index_select(1, channels)
                torch.mm(chosen, weight.index_select(0, channels), out=grad_x[rows])
        if u is not None:
            grad_x.addmm_(u, a)
        return None, rms_norm_backward(grad_x, h, inverse, norm), grad_a, *grad_b


class _LinearResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: tuple, h: Tensor, z: Tensor, a: Tensor | None, *b: Tensor) -> Tensor:
        transposed, bias, adapters, multiplier, sparse, kept = job
        y = z.new_empty(len(z), transposed.shape[1])
        for rows, channels in spans(len(z), sparse, kept):
            if channels is None:
                torch.mm(z[rows], transposed, out=y[rows])
            else:
                torch.mm(z[rows].index_select(1, channels), transposed.index_select(0, channels), out=y[rows])
        p = None if a is None else z @ a.T
        for factor, rank, output in zip(b, adapters.ranks, adapters.outputs, strict=True):
            assert p is not None
            y[:, output].addmm_(p[:, rank], factor.T)
        if bias is not None:
            y += bias
        if multiplier != 1.0:
            y *= multiplier
        ctx.job = (transposed, adapters, multiplier, sparse)
        ctx.save_for_backward(z, p, kept, a, *b)
        return y.add_(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        transposed, adapters, multiplier, sparse = ctx.job
        z, p, kept, a, *b = ctx.saved_tensors
        grad_y = grad if multiplier == 1.0 else grad * multiplier
        u, grad_b = narrow_gradients(grad_y, b, p, adapters)
        grad_a = None if u is None else u.T @ z
        if not ctx.needs_input_grad[2]:
            return None, grad, None, grad_a, *grad_b
        grad_z = torch.empty_like(z)
        for rows, channels in spans(len(z), sparse, kept):
            if channels is None:
                torch.mm(grad_y[rows], transposed.T, out=grad_z[rows])
            else:
                part = grad_y[rows] @ transposed.index_select(0, channels).T
                grad_z[rows].zero_().index_copy_(1, channels, part)
        if u is not None:
            grad_z.addmm_(u, a)
        return None, grad, grad_z, grad_a, *grad_b
