"""The frozen products of attention with their adapters, pruned on the first rows: forward and exact backward.

Rows [0, c) are sparse, the others dense (rows.py). With x = norm(h), W frozen, (A, B) the adapters and K the kept
channels, what the masked-dense reference computes on full width is computed here on the kept channels only:

    norm_linear       y = x W' + bias + (x A') B'            y[:c] = bias, + x[:c] W[K]' at the channels K, + (x A') B'
    linear_residual   h + r (z W' + bias + (z A') B')        with z[:c, K] (W')[K] for the product on the first rows

Both read rows of a stored matrix (layout.py stores O transposed for that), both in backward once more: of the frozen
side nothing is saved but indices. So a weight is a callable: a quantised one is dequantised for forward, again for
backward, and never kept. Saved for backward are the inputs h or z, the norm's statistics and the narrow x A'; with
DoRA (narrow.py) the product as well, whose factor is trained. The adapters see every row and every channel. Base
weights, norm weights and biases are frozen: they get no gradient.

Precision: norms in at least single precision, products in the dtype of what reads the weights, which z and the adapters
have too: that of the rows or, under autocast, a lower one than theirs; then the rows are cast behind the norm, as the
model itself does, and the residual stream keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elision.sparselora import narrow, norms
from elision.sparselora.narrow import Adapters
from elision.sparselora.norms import Norm

Choose = Callable[[Tensor], Tensor | None]  # normed sparse rows to the kept channels of the map; None: all
Weight = Callable[[], Tensor]  # a frozen matrix, read where it is needed


def spans(total: int, sparse: int, kept: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
    """The sparse rows with their channels, then the dense ones; one span where nothing is pruned."""
    start = 0 if kept is None else sparse
    if start:
        yield slice(0, start), kept
    if start < total:
        yield slice(start, total), None


def norm_linear(
    h: Tensor,
    norm: Norm | None,
    weight: Weight,
    bias: Tensor | None,
    adapters: Adapters,
    sparse: int = 0,
    choose: Choose | None = None,
) -> Tensor:
    """(T, outputs): norm and linear map of h (T, inputs); `weight` gives (outputs, inputs).

    `choose` is handed the first `sparse` rows of the normed input, and returns the outputs that they compute.
    """
    job = (norm, weight, bias, adapters, sparse, choose)
    return _NormLinear.apply(job, h, adapters.a, adapters.scale, *adapters.b)  # type: ignore[return-value]


def linear_residual(
    h: Tensor | None,
    z: Tensor,
    transposed: Weight,
    bias: Tensor | None,
    adapters: Adapters,
    multiplier: float = 1.0,
    sparse: int = 0,
    kept: Tensor | None = None,
) -> Tensor:
    """(T, outputs): h + multiplier * (linear map of z), h None: 0; `transposed` gives the weight as (inputs, outputs).

    The first `sparse` rows compute the product from the inputs `kept` alone.
    """
    job = (transposed, bias, adapters, multiplier, sparse, kept)
    return _LinearResidual.apply(job, h, z, adapters.a, adapters.scale, *adapters.b)  # type: ignore[return-value]


def onto(h: Tensor, y: Tensor) -> Tensor:
    """The stream h with y added, which is overwritten where its dtype is the stream's."""
    return y.add_(h) if y.dtype == h.dtype else h + y


def scaled(y: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Y * scale + bias; y itself is overwritten where there is no scale."""
    if scale is None:
        return y if bias is None else y.add_(bias)
    return y * scale if bias is None else torch.addcmul(bias, y, scale)


def scaled_backward(grad: Tensor, y: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of y and scale."""
    if scale is None or y is None:
        return grad, None
    return grad * scale, (grad * y).sum(dim=0)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: tuple, h: Tensor, a: Tensor | None, scale: Tensor | None, *b: Tensor) -> Tensor:
        norm, read, bias, adapters, sparse, choose = job
        x, statistics = norms.normalize(h, norm)
        kept = choose(x[:sparse]) if sparse and choose is not None else None
        weight = read()
        x = x.to(weight.dtype)
        y = x.new_empty(len(x), len(weight))
        for rows, channels in spans(len(x), sparse, kept):
            if channels is None:
                torch.mm(x[rows], weight.T, out=y[rows])
            else:
                y[rows].zero_().index_copy_(1, channels, x[rows] @ weight.index_select(0, channels).T)
        p = narrow.project(x, a, adapters)
        narrow.add(y, p, list(b), adapters)
        ctx.job = (norm, read, adapters, sparse)
        ctx.save_for_backward(h, *statistics, p, kept, None if scale is None else y, a, scale, *b)
        return scaled(y, scale, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        norm, read, adapters, sparse = ctx.job
        h, mean, inverse, p, kept, y, a, scale, *b = ctx.saved_tensors
        statistics = (mean, inverse)
        grad, grad_scale = scaled_backward(grad, y, scale)
        u, grad_b = narrow.gradients(grad, b, p, adapters)
        unit = norms.unit(h, statistics)
        grad_a = None
        if u is not None:
            x = norms.finish(unit, norm, h.dtype).to(u.dtype)
            grad_a = narrow.gradient_of_a(u, x, adapters)
        if not ctx.needs_input_grad[1]:
            return None, None, grad_a, grad_scale, *grad_b
        weight = read()
        grad_x = grad.new_empty(h.shape)
        for rows, channels in spans(len(h), sparse, kept):
            if channels is None:
                torch.mm(grad[rows], weight, out=grad_x[rows])
            else:
                chosen = grad[rows].index_select(1, channels)
                torch.mm(chosen, weight.index_select(0, channels), out=grad_x[rows])
        narrow.add_input_gradient(grad_x, u, a, adapters)
        return None, norms.backward(grad_x, unit, norm, statistics, h.dtype), grad_a, grad_scale, *grad_b


class _LinearResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, job: tuple, h: Tensor | None, z: Tensor, a: Tensor | None, scale: Tensor | None, *b: Tensor
    ) -> Tensor:
        read, bias, adapters, multiplier, sparse, kept = job
        transposed = read()
        y = z.new_empty(len(z), transposed.shape[1])
        for rows, channels in spans(len(z), sparse, kept):
            if channels is None:
                torch.mm(z[rows], transposed, out=y[rows])
            else:
                torch.mm(z[rows].index_select(1, channels), transposed.index_select(0, channels), out=y[rows])
        p = narrow.project(z, a, adapters)
        narrow.add(y, p, list(b), adapters)
        ctx.job = (read, adapters, multiplier, sparse)
        ctx.save_for_backward(z, p, kept, None if scale is None else y, a, scale, *b)
        y = scaled(y, scale, bias)
        if multiplier != 1.0:
            y *= multiplier
        return y if h is None else onto(h, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        read, adapters, multiplier, sparse = ctx.job
        z, p, kept, y, a, scale, *b = ctx.saved_tensors
        grad_h = grad if ctx.needs_input_grad[1] else None
        grad = (grad if multiplier == 1.0 else grad * multiplier).to(z.dtype)
        grad_y, grad_scale = scaled_backward(grad, y, scale)
        u, grad_b = narrow.gradients(grad_y, b, p, adapters)
        grad_a = narrow.gradient_of_a(u, z, adapters)
        if not ctx.needs_input_grad[2]:
            return None, grad_h, None, grad_a, grad_scale, *grad_b
        transposed = read()
        grad_z = torch.empty_like(z)
        for rows, channels in spans(len(z), sparse, kept):
            if channels is None:
                torch.mm(grad_y[rows], transposed.T, out=grad_z[rows])
            else:
                part = grad_y[rows] @ transposed.index_select(0, channels).T
                grad_z[rows].zero_().index_copy_(1, channels, part)
        narrow.add_input_gradient(grad_z, u, a, adapters)
        return None, grad_h, grad_z, grad_a, grad_scale, *grad_b
