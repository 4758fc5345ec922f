"""Loss of the loss-bearing rows through a frozen output head, slice by slice.

The mean (or the sum over a given number) of cross-entropies of n rows needs n x vocabulary logits, more than any other
tensor of a step. Here they live for a slice of rows: the slice's loss and, where a gradient is asked for, its
gradient with respect to the rows, (softmax - onehot) W, are made while its logits are there. Backward only scales.
The head gets no gradient; a head that is trained takes the model's own way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ELEMENTS = 1 << 23  # logits at a time


def head_loss(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scaling: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Sum of cross-entropies, a scalar in at least single precision.

    Args:
        rows: (n, hidden), normed.
        weight: (vocabulary, hidden).
        bias: (vocabulary,) or None.
        targets: (n,) token numbers.
        scaling: logits are divided by it.
        softcap: then they are bent to softcap * tanh(logits / softcap).
    """
    return _HeadLoss.apply(rows, weight, bias, targets, scaling, softcap)  # type: ignore[return-value]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=rows.device)
        needs = ctx.needs_input_grad[0]
        grad = torch.empty_like(rows) if needs else None
        size = max(1, _ELEMENTS // len(weight))
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            logits = torch.nn.functional.linear(rows[part], weight, bias)
            if scaling != 1.0:
                logits = logits / scaling
            bent = None if softcap is None else torch.tanh(logits / softcap)
            if bent is not None and softcap is not None:
                logits = bent * softcap
            wanted = targets[part, None]
            log_probability = torch.log_softmax(logits, dim=1, dtype=wide)
            total -= log_probability.gather(1, wanted).sum()
            if grad is not None:
                probability = log_probability.exp_()
                probability.scatter_add_(1, wanted, torch.full_like(probability[:, :1], -1.0))
                if bent is not None:
                    probability.mul_(1 - bent.to(wide).square())
                torch.mm(probability.to(rows.dtype), weight, out=grad[part])
        if grad is not None:
            ctx.save_for_backward(grad if scaling == 1.0 else grad.div_(scaling))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        (unit,) = ctx.saved_tensors
        return (unit * grad).to(unit.dtype), None, None, None, None, None
