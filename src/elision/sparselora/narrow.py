"""The adapter branch: dense on every row and channel, at the width of the ranks. Pure functions.

Adapter i of a stack adds (x * mask_i) a_i' b_i' to its outputs. With p = x a' (T, sum of ranks) and u its gradient,

    u_i = g b_i     da_i = u_i' (x * mask_i)     db_i = g' p_i     dx += (u_i a_i) * mask_i

Masks are those of dropout, True where an input stays; what dropout multiplies by is in b, as LoRA's scaling is. DoRA
(Liu et al. 2024) multiplies base and adapter by magnitude / ||W + s B A||, the norm of every row of the full, unpruned
weight, taken as a constant by its definition: that factor is the stack's `scale`, and the bias is added behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Adapters:
    """LoRA factors on one input, in the dtype of the rows, scaling and dropout's factor in b."""

    a: Tensor | None = None  # (sum of ranks, inputs)
    b: list[Tensor] = field(default_factory=list)  # (outputs of i, rank of i)
    ranks: list[slice] = field(default_factory=list)
    outputs: list[slice] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)  # (T, inputs) boolean, of each adapter; None: no dropout
    scale: Tensor | None = None  # (outputs of the stack,): DoRA's factor, 1 where an output has none

    @property
    def drops(self) -> bool:
        """Whether any adapter has a mask."""
        return any(mask is not None for mask in self.masks)


def dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    """What an adapter sees of x."""
    return x if mask is None else x * mask


def project(x: Tensor, a: Tensor | None, adapters: Adapters) -> Tensor | None:
    """(T, sum of ranks): x a', each adapter's inputs dropped as its mask says."""
    if a is None or not adapters.drops:
        return None if a is None else x @ a.T
    pairs = zip(adapters.ranks, adapters.masks, strict=True)
    return torch.cat([dropped(x, mask) @ a[rank].T for rank, mask in pairs], dim=1)


def add(y: Tensor, p: Tensor | None, b: list[Tensor], adapters: Adapters) -> None:
    """Add the adapters' outputs to y (T, outputs)."""
    for factor, rank, output in zip(b, adapters.ranks, adapters.outputs, strict=True):
        assert p is not None
        y[:, output].addmm_(p[:, rank], factor.T)


def gradients(
    grad: Tensor, b: list[Tensor], p: Tensor | None, adapters: Adapters
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of p and of each b, from that of the outputs."""
    if p is None:
        return None, []
    u = torch.empty_like(p)
    for factor, rank, output in zip(b, adapters.ranks, adapters.outputs, strict=True):
        torch.mm(grad[:, output], factor, out=u[:, rank])
    pairs = zip(adapters.ranks, adapters.outputs, strict=True)
    return u, [grad[:, output].T @ p[:, rank] for rank, output in pairs]


def gradient_of_a(u: Tensor | None, x: Tensor, adapters: Adapters) -> Tensor | None:
    """Gradient of a from that of p."""
    if u is None or not adapters.drops:
        return None if u is None else u.T @ x
    pairs = zip(adapters.ranks, adapters.masks, strict=True)
    return torch.cat([u[:, rank].T @ dropped(x, mask) for rank, mask in pairs])


def add_input_gradient(grad_x: Tensor, u: Tensor | None, a: Tensor | None, adapters: Adapters) -> None:
    """Add to the gradient of x what comes through the adapters."""
    if u is None or a is None:
        return
    if not adapters.drops:
        grad_x.addmm_(u, a)
        return
    for rank, mask in zip(adapters.ranks, adapters.masks, strict=True):
        grad_x.add_(dropped(u[:, rank] @ a[rank], mask))


@torch.no_grad()
def weight_norm(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(outputs,): the norm of every row of weight + b a, in at least single precision, without making that sum.

    ||w + b_c a||^2 = ||w||^2 + 2 b_c (a w) + b_c (a a') b_c', at the cost of `rank` products of the weight with a row.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    cross = (weight @ a.T.to(weight.dtype)).to(wide)
    own = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    return (own + (b * (2 * cross + b @ (a @ a.T))).sum(dim=1)).clamp_min(0).sqrt()
