"""The frozen gated MLP with its norm, residual and adapters, pruned on the first rows: forward and exact backward.

With x = norm(h), the kept channels K and the adapters' (A, B), a row computes

    g = x Wg' + (x Ag') Bg',   u = x Wu' + (x Au') Bu',   a = act(g) * u
    h + r (a Wd' + bias + (a Ad') Bd')

and a sparse row has the base products at the channels K only. What is left at the others depends on the adapters:

    none, or not all three   g or u is exactly 0 there, so a = act(g) * u is (act(0) = 0), and so are its gradients
                             unless both g and u are adapted and down's adapter reads them: channels K do for all
    gate, up and down        a = act(dg) * du of the adapters alone is read by down's adapter: full width, the
                             frozen products still at K only

Saved for backward: h, 1 / rms, x A', (g | u) of the width computed, a Ad', indices. Weights are gathered again, by rows
(gate and up stacked, down transposed; layout.py), and the activation is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elision.sparselora.linear import Adapters, Choose, Norm, apply_norm, rms_norm, rms_norm_backward, spans


@dataclass
class GatedMLP:
    """The frozen side. `gate_up` is (2 channels, hidden), gate first; `down` is transposed, (channels, hidden)."""

    norm: Norm
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    activation: Callable[[Tensor], Tensor]  # with act(0) = 0
    multiplier: float = 1.0


def mlp_residual(
    h: Tensor, mlp: GatedMLP, gate_up: Adapters, down: Adapters, sparse: int = 0, choose: Choose | None = None
) -> Tensor:
    """(T, hidden): h + multiplier * MLP(norm(h)).

    `gate_up` has adapters with outputs in the first half (gate), the second (up) or both; `down` has one or none.
    `choose` is handed the first `sparse` rows of the normed input, and returns the channels that they compute.
    """
    job = (mlp, gate_up, len(gate_up.b), sparse, choose)
    return _Mlp.apply(job, h, gate_up.a, down.a, *gate_up.b, *down.b)  # type: ignore[return-value]


@dataclass
class _Part:
    """What a span of rows computes with: weights gathered by rows, and the channels that they stand for."""

    gate_up: Tensor
    bias: Tensor | None
    down: Tensor
    held: Tensor | None = None  # channels that (g | u) has columns for; None: all
    computed: Tensor | None = None  # where it has all: those with a base product; None: all

    @classmethod
    def of(cls, mlp: GatedMLP, kept: Tensor | None, wide: bool) -> _Part:
        if kept is None:
            return cls(mlp.gate_up, mlp.gate_up_bias, mlp.down)
        both = _both(kept, len(mlp.down))
        bias = None if mlp.gate_up_bias is None else mlp.gate_up_bias.index_select(0, both)
        held, computed = (None, kept) if wide else (kept, None)
        return cls(mlp.gate_up.index_select(0, both), bias, mlp.down.index_select(0, kept), held, computed)

    def adapters(
        self, b: tuple[Tensor, ...], outputs: list[slice], channels: int
    ) -> list[tuple[Tensor, slice, Tensor | None]]:
        """Each factor of gate and up for the channels held, its columns of (g | u), and its rows if not all."""
        if self.held is None:
            return [(factor, output, None) for factor, output in zip(b, outputs, strict=True)]
        found, n = [], len(self.held)
        for factor, output in zip(b, outputs, strict=True):
            whole = output.stop - output.start == 2 * channels  # a fused gate_up_proj has one adapter
            rows = _both(self.held, channels) if whole else self.held
            columns = slice(0, 2 * n) if whole else slice(0, n) if output.start == 0 else slice(n, 2 * n)
            found.append((factor.index_select(0, rows), columns, rows))
        return found


def _both(kept: Tensor, channels: int) -> Tensor:
    """Channels of gate, then of up, in (g | u)."""
    return torch.cat([kept, kept + channels])


def _spread(x: Tensor, index: Tensor, width: int) -> Tensor:
    """`x` at the columns `index` of zeros."""
    return x.new_zeros(len(x), width).index_copy_(1, index, x)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: tuple, h: Tensor, a: Tensor | None, down_a: Tensor | None, *b: Tensor) -> Tensor:
        mlp, adapters, count, sparse, choose = job
        channels = len(mlp.down)
        x, inverse = rms_norm(h, mlp.norm)
        kept = choose(x[:sparse]) if sparse and choose is not None else None
        p = None if a is None else x @ a.T
        adapted = {half for output in adapters.outputs for half in (0, channels) if output.start <= half < output.stop}
        wide = len(adapted) == 2 and down_a is not None
        y = torch.empty_like(h)
        saved: list[Tensor | None] = []
        for rows, chosen in spans(len(x), sparse, kept):
            part = _Part.of(mlp, chosen, wide)
            gate_up = x[rows] @ part.gate_up.T
            if part.bias is not None:
                gate_up += part.bias
            if part.computed is not None:
                gate_up = _spread(gate_up, _both(part.computed, channels), 2 * channels)
            for (factor, columns, _), rank in zip(
                part.adapters(b[:count], adapters.outputs, channels), adapters.ranks, strict=True
            ):
                assert p is not None
                gate_up[:, columns].addmm_(p[rows, rank], factor.T)
            hidden = _hidden(gate_up, mlp.activation)
            read = hidden if part.computed is None else hidden.index_select(1, part.computed)
            torch.mm(read, part.down, out=y[rows])
            q = None
            if down_a is not None:
                q = hidden @ (down_a if part.held is None else down_a.index_select(1, part.held)).T
                y[rows].addmm_(q, b[count].T)
            saved += [gate_up, q]
        if mlp.down_bias is not None:
            y += mlp.down_bias
        if mlp.multiplier != 1.0:
            y *= mlp.multiplier
        ctx.job = (mlp, adapters, count, sparse, wide)
        ctx.save_for_backward(h, inverse, p, kept, a, down_a, *b, *saved)
        return y.add_(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        mlp, adapters, count, sparse, wide = ctx.job
        h, inverse, p, kept, a, down_a, *rest = ctx.saved_tensors
        channels, factors = len(mlp.down), len(ctx.needs_input_grad) - 4
        b, saved = tuple(rest[:factors]), rest[factors:]
        needs_h = ctx.needs_input_grad[1]
        grad_y = grad if mlp.multiplier == 1.0 else grad * mlp.multiplier
        grad_b = [torch.zeros_like(factor) for factor in b]
        grad_down_a = None if down_a is None else torch.zeros_like(down_a)
        grad_x = torch.empty_like(h) if needs_h else None
        u = None if p is None else torch.empty_like(p)
        for index, (rows, chosen) in enumerate(spans(len(h), sparse, kept)):
            part = _Part.of(mlp, chosen, wide)
            gate_up, q = saved[2 * index], saved[2 * index + 1]
            grad_hidden = grad_y[rows] @ part.down.T
            if part.computed is not None:
                grad_hidden = _spread(grad_hidden, part.computed, channels)
            if down_a is not None:
                assert grad_down_a is not None
                s = grad_y[rows] @ b[count]
                grad_hidden.addmm_(s, down_a if part.held is None else down_a.index_select(1, part.held))
                grad_b[count].addmm_(grad_y[rows].T, q)
                grad_factor = s.T @ _hidden(gate_up, mlp.activation)
                if part.held is None:
                    grad_down_a += grad_factor
                else:
                    grad_down_a.index_add_(1, part.held, grad_factor)
            grad_gate_up = _hidden_backward(gate_up, mlp.activation, grad_hidden)
            for i, ((factor, columns, selected), rank) in enumerate(
                zip(part.adapters(b[:count], adapters.outputs, channels), adapters.ranks, strict=True)
            ):
                assert p is not None and u is not None
                torch.mm(grad_gate_up[:, columns], factor, out=u[rows, rank])
                found = grad_gate_up[:, columns].T @ p[rows, rank]
                if selected is None:
                    grad_b[i] += found
                else:
                    grad_b[i].index_add_(0, selected, found)
            if grad_x is not None:
                if part.computed is not None:
                    grad_gate_up = grad_gate_up.index_select(1, _both(part.computed, channels))
                torch.mm(grad_gate_up, part.gate_up, out=grad_x[rows])
        grad_a = None if u is None else u.T @ apply_norm(h, inverse, mlp.norm)
        grad_h = None
        if grad_x is not None:
            if u is not None:
                grad_x.addmm_(u, a)
            grad_h = rms_norm_backward(grad_x, h, inverse, mlp.norm).add_(grad)
        return None, grad_h, grad_a, grad_down_a, *grad_b


def _hidden(gate_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return activation(gate) * up


def _hidden_backward(gate_up: Tensor, activation: Callable[[Tensor], Tensor], grad: Tensor) -> Tensor:
    """Gradient of (g | u) from that of act(g) * u, through the activation's own derivative."""
    gate, up = gate_up.chunk(2, dim=1)
    with torch.enable_grad():
        gate = gate.detach().requires_grad_()
        activated = activation(gate)
    out = torch.empty_like(gate_up)
    grad_gate, grad_up = out.chunk(2, dim=1)
    grad_gate.copy_(torch.autograd.grad(activated, gate, grad * up)[0])
    torch.mul(grad, activated.detach(), out=grad_up)
    return out
