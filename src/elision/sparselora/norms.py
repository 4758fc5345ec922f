"""The norm in front of a frozen product: forward, the same again from saved statistics, and backward.

    RMS     x = h / rms(h) * weight                         Llama and its kin; Gemma stores weight - 1
    layer   x = (h - mean(h)) / std(h) * weight + bias      OPT
    None    x = h                                           OLMo 2, whose norms come after

Statistics are taken in at least single precision. The dtype of `weight`, if it is wider than that of the rows, is the
one in which it multiplies: a model that rounds before it multiplies gives it in the dtype of the rows, one that rounds
after it in single precision.
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
    """Normed rows (T, inputs) in h's dtype, and what `unit` and `backward` need of them."""
    if norm is None:
        return h, (None, None)
    rows = h.to(torch.promote_types(h.dtype, torch.float32), copy=True)
    mean = rows.mean(dim=1, keepdim=True) if norm.centred else None
    if mean is not None:
        rows -= mean
    variance = torch.linalg.vector_norm(rows, dim=1, keepdim=True).square_().div_(rows.shape[1])
    inverse = variance.add_(norm.eps).rsqrt_()
    return finish(rows.mul_(inverse), norm, h.dtype), (mean, inverse)


def unit(h: Tensor, statistics: Statistics) -> Tensor:
    """Rows of mean square 1, in at least single precision, from what `normalize` found; h itself without a norm."""
    mean, inverse = statistics
    if inverse is None:
        return h
    # A copy that is then changed in place: operations on mixed dtypes make one for themselves, and a result besides.
    rows = h.to(inverse.dtype, copy=True)
    if mean is not None:
        rows -= mean
    return rows.mul_(inverse)


def finish(rows: Tensor, norm: Norm | None, dtype: torch.dtype) -> Tensor:
    """Normed rows in `dtype` of those that `unit` gives."""
    if norm is None:
        return rows
    if norm.weight is not None:
        rows = rows.to(torch.promote_types(dtype, norm.weight.dtype)) * norm.weight
    return (rows if norm.bias is None else rows + norm.bias).to(dtype)


def backward(grad: Tensor, rows: Tensor, norm: Norm | None, statistics: Statistics, dtype: torch.dtype) -> Tensor:
    """Gradient of h, in its `dtype`, from that of the normed rows and what `unit` gives."""
    inverse = statistics[1]
    if norm is None or inverse is None:
        return grad.to(dtype)
    found = grad.to(inverse.dtype, copy=True) if norm.weight is None else (grad * norm.weight).to(inverse.dtype)
    mean = found.mean(dim=1, keepdim=True) if norm.centred else None
    along = torch.linalg.vecdot(found, rows).div_(rows.shape[1])[:, None]
    found.addcmul_(rows, along, value=-1)
    if mean is not None:
        found -= mean
    return found.mul_(inverse).to(dtype)
