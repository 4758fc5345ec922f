"""The norm in front of a frozen product: forward, the same again from saved statistics, and backward.

    RMS     x = h / rms(h) * weight                         Llama and its kin; Gemma stores weight - 1
    layer   x = (h - mean(h)) / std(h) * weight + bias      OPT
    None    x = h                                           OLMo 2, whose norms come after

Statistics are taken in at least single precision. The dtype of `weight` is the one in which it multiplies: a model
that rounds before it multiplies gives it in the dtype of the rows, one that rounds after it in single precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Norm:
    """A frozen norm over the last dimension; `centred` takes the mean away."""

    weight: Tensor | None
    eps: float
    bias: Tensor | None = None
    centred: bool = False


Statistics = tuple[Tensor | None, Tensor | None]  # mean and 1 / rms of every row, (T, 1)


def normalize(h: Tensor, norm: Norm | None) -> tuple[Tensor, Statistics]:
    """Normed rows (T, inputs) in h's dtype, and what `again` and `backward` need of them."""
    if norm is None:
        return h, (None, None)
    rows = h.to(torch.promote_types(h.dtype, torch.float32))
    mean = rows.mean(dim=1, keepdim=True) if norm.centred else None
    centred = rows if mean is None else rows - mean
    statistics = mean, torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + norm.eps)
    return again(h, norm, statistics), statistics


def again(h: Tensor, norm: Norm | None, statistics: Statistics) -> Tensor:
    """Normed rows, from what `normalize` found."""
    if norm is None:
        return h
    x = _unit(h, statistics)
    if norm.weight is not None:
        x = x.to(norm.weight.dtype) * norm.weight
    return (x if norm.bias is None else x + norm.bias).to(h.dtype)


def backward(grad: Tensor, h: Tensor, norm: Norm | None, statistics: Statistics) -> Tensor:
    """Gradient of h from that of the normed rows."""
    inverse = statistics[1]
    if norm is None or inverse is None:
        return grad
    unit = _unit(h, statistics)
    grad = (grad if norm.weight is None else grad * norm.weight).to(inverse.dtype)
    along = (grad * unit).mean(dim=1, keepdim=True)
    found = torch.addcmul(grad, unit, along, value=-1)
    if norm.centred:
        found -= grad.mean(dim=1, keepdim=True)
    return found.mul_(inverse).to(h.dtype)


def _unit(h: Tensor, statistics: Statistics) -> Tensor:
    mean, inverse = statistics
    assert inverse is not None
    return (h if mean is None else h - mean) * inverse
