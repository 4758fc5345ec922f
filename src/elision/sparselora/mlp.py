"""The frozen MLP with its norm, residual and adapters, pruned on the first rows: forward and exact backward.

With x = norm(h), the kept channels K and the adapters' (A, B), a row computes

    g = x Wg' + (x Ag') Bg',   u = x Wu' + (x Au') Bu',   a = act(g) * u          without a gate: a = act(u)
    h + r (a Wd' + bias + (a Ad') Bd')

and a sparse row has the base products at the channels K only. What is left at the others depends on the adapters:

    none, or not all of them   g or u is exactly 0 there, so a = act(g) * u is (act(0) = 0), and so are its gradients
                               unless both g and u are adapted and down's adapter reads them: channels K do for all
    gate, up and down          a = act(dg) * du of the adapters alone is read by down's adapter: full width, the
                               frozen products still at K only

That act(0) is 0 is for obstacles.py to see to.

Saved for backward: h, the norm's statistics, x A', (g | u) of the width computed (before DoRA's factor, where there is
one), a Ad', indices. Weights are read again, by rows (gate and up stacked, down transposed; layout.py), and the
activation is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elision.sparselora import narrow, norms
from elision.sparselora.linear import Choose, Weight, onto, scaled, scaled_backward, spans
from elision.sparselora.narrow import Adapters
from elision.sparselora.norms import Norm


@dataclass
class MLP:
    """The frozen side. `up` gives (halves * channels, hidden), gate first; `down` is transposed, (channels, hidden)."""

    norm: Norm | None
    up: Weight
    up_bias: Tensor | None
    down: Weight
    down_bias: Tensor | None
    activation: Callable[[Tensor], Tensor]  # with act(0) = 0
    channels: int
    gated: bool = True
    multiplier: float = 1.0
    residual: bool = True  # whether h is added

    @property
    def halves(self) -> int:
        """How many maps of the input there are: gate and up, or up alone."""
        return 2 if self.gated else 1


def mlp_residual(
    h: Tensor, mlp: MLP, up: Adapters, down: Adapters, sparse: int = 0, choose: Choose | None = None
) -> Tensor:
    """(T, hidden): h + multiplier * MLP(norm(h)), without h where `mlp.residual` is off.

    `up` has adapters with outputs in the first half (gate), the second (up) or both; `down` has one or none. `choose`
    is handed the first `sparse` rows of the normed input, and returns the channels that they compute.
    """
    job = (mlp, up, down, sparse, choose)
    return _Mlp.apply(job, h, up.a, down.a, up.scale, down.scale, *up.b, *down.b)  # type: ignore[return-value]


@dataclass
class _Part:
    """What a span of rows computes with: weights gathered by rows, and the channels that they stand for."""

    up: Tensor
    bias: Tensor | None
    down: Tensor
    held: Tensor | None = None  # channels that (g | u) has columns for; None: all
    computed: Tensor | None = None  # where it has all: those with a base product; None: all
    factors: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)  # of each adapter: b, its rows if not all
    adapters: Adapters = field(default_factory=Adapters)  # with their columns of (g | u)

    def narrowed(self, scale: Tensor | None, halves: int, channels: int) -> Tensor | None:
        """A vector over (g | u), at the channels held."""
        return scale if scale is None or self.held is None else scale.index_select(0, _all(self.held, halves, channels))


def _part(mlp: MLP, adapters: Adapters, b: list[Tensor], up: Tensor, down: Tensor, kept: Any, wide: bool) -> _Part:
    if kept is None:
        return _Part(up, mlp.up_bias, down, factors=[(factor, None) for factor in b], adapters=adapters)
    every, width = _all(kept, mlp.halves, mlp.channels), mlp.halves * mlp.channels
    bias = None if mlp.up_bias is None else mlp.up_bias.index_select(0, every)
    if wide:
        bias = None if bias is None else _spread(bias[None], every, width)[0]  # a channel left out has none
    part = _Part(up.index_select(0, every), bias, down.index_select(0, kept))
    if wide:
        part.computed, part.adapters, part.factors = kept, adapters, [(factor, None) for factor in b]
        return part
    part.held, n, outputs = kept, len(kept), []
    for factor, output in zip(b, adapters.outputs, strict=True):
        whole = output.stop - output.start == width  # a fused gate_up_proj has one adapter
        rows, first = (every, 0) if whole else (kept, output.start // mlp.channels * n)
        outputs.append(slice(first, first + len(rows)))
        part.factors.append((factor.index_select(0, rows), rows))
    part.adapters = Adapters(ranks=adapters.ranks, outputs=outputs)
    return part


def _all(kept: Tensor, halves: int, channels: int) -> Tensor:
    """Channels of every half of (g | u)."""
    return torch.cat([kept + half * channels for half in range(halves)])


def _spread(x: Tensor, index: Tensor, width: int) -> Tensor:
    """`x` at the columns `index` of zeros."""
    return x.new_zeros(len(x), width).index_copy_(1, index, x)


def _mask(adapters: Adapters, rows: slice, held: Tensor | None) -> Tensor | None:
    """Which of the channels held the adapter of down sees, where it drops some."""
    if not adapters.drops or (mask := adapters.masks[0]) is None:
        return None
    return mask[rows] if held is None else mask[rows].index_select(1, held)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: tuple, h: Tensor, *trained: Any) -> Tensor:
        mlp, adapters, below, sparse, choose = job
        a, down_a, scale, down_scale, *b = trained
        count, channels = len(adapters.b), mlp.channels
        x, statistics = norms.normalize(h, mlp.norm)
        kept = choose(x[:sparse]) if sparse and choose is not None else None
        up, down = mlp.up(), mlp.down()
        x = x.to(up.dtype)
        p = narrow.project(x, a, adapters)
        starts = range(0, mlp.halves * channels, channels)
        adapted = {start for output in adapters.outputs for start in starts if output.start <= start < output.stop}
        wide = len(adapted) == mlp.halves and down_a is not None
        y = torch.empty_like(x)
        saved: list[Tensor | None] = []
        for rows, chosen in spans(len(x), sparse, kept):
            part = _part(mlp, adapters, b[:count], up, down, chosen, wide)
            z = x[rows] @ part.up.T
            if part.computed is not None:
                z = _spread(z, _all(part.computed, mlp.halves, channels), mlp.halves * channels)
            narrow.add(z, None if p is None else p[rows], [factor for factor, _ in part.factors], part.adapters)
            product, z = z, scaled(z, part.narrowed(scale, mlp.halves, channels), part.bias)
            hidden = _hidden(z, mlp)
            torch.mm(hidden if part.computed is None else hidden.index_select(1, part.computed), part.down, out=y[rows])
            q = None
            if down_a is not None:
                seen = narrow.dropped(hidden, _mask(below, rows, part.held))
                q = seen @ (down_a if part.held is None else down_a.index_select(1, part.held)).T
                y[rows].addmm_(q, b[count].T)
            saved += [product, q]
        ctx.job = (mlp, adapters, below, sparse, wide, len(saved))
        ctx.save_for_backward(h, *statistics, p, kept, None if down_scale is None else y, *saved, *trained)
        y = scaled(y, down_scale, mlp.down_bias)
        if mlp.multiplier != 1.0:
            y *= mlp.multiplier
        return onto(h, y) if mlp.residual else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        mlp, adapters, below, sparse, wide, kept_back = ctx.job
        h, mean, inverse, p, kept, y, *rest = ctx.saved_tensors
        saved, (a, down_a, scale, down_scale, *b) = rest[:kept_back], rest[kept_back:]
        statistics, count, channels = (mean, inverse), len(adapters.b), mlp.channels
        up, down = mlp.up(), mlp.down()
        grad_y = (grad if mlp.multiplier == 1.0 else grad * mlp.multiplier).to(up.dtype)
        grad_y, grad_down_scale = scaled_backward(grad_y, y, down_scale)
        grad_b = [torch.zeros_like(factor) for factor in b]
        grad_scale = None if scale is None else torch.zeros_like(scale)
        grad_down_a = None if down_a is None else torch.zeros_like(down_a)
        grad_x = grad_y.new_empty(h.shape) if ctx.needs_input_grad[1] else None
        u = None if p is None else torch.empty_like(p)
        for index, (rows, chosen) in enumerate(spans(len(h), sparse, kept)):
            part = _part(mlp, adapters, b[:count], up, down, chosen, wide)
            product, q = saved[2 * index], saved[2 * index + 1]
            own = part.narrowed(scale, mlp.halves, channels)
            z = product if own is None else scaled(product, own, part.bias)
            grad_hidden = grad_y[rows] @ part.down.T
            if part.computed is not None:
                grad_hidden = _spread(grad_hidden, part.computed, channels)
            if down_a is not None:
                assert grad_down_a is not None
                s, hidden = grad_y[rows] @ b[count], _hidden(z, mlp)
                through = s @ (down_a if part.held is None else down_a.index_select(1, part.held))
                mask = _mask(below, rows, part.held)
                grad_hidden += narrow.dropped(through, mask)
                grad_b[count].addmm_(grad_y[rows].T, q)
                _collect(grad_down_a, s.T @ narrow.dropped(hidden, mask), part.held, 1)
            grad_z = _hidden_backward(z, mlp, grad_hidden)
            grad_z, found = scaled_backward(grad_z, product, own)
            if found is not None and grad_scale is not None:
                _collect(grad_scale, found, None if part.held is None else _all(part.held, mlp.halves, channels), 0)
            if p is not None and u is not None:
                factors = [factor for factor, _ in part.factors]
                narrowed, found_b = narrow.gradients(grad_z, factors, p[rows], part.adapters)
                assert narrowed is not None
                u[rows] = narrowed
                for i, (gradient, (_, selected)) in enumerate(zip(found_b, part.factors, strict=True)):
                    _collect(grad_b[i], gradient, selected, 0)
            if grad_x is not None:
                if part.computed is not None:
                    grad_z = grad_z.index_select(1, _all(part.computed, mlp.halves, channels))
                torch.mm(grad_z, part.up, out=grad_x[rows])
        unit = norms.unit(h, statistics)
        grad_a = None
        if u is not None:
            x = norms.finish(unit, mlp.norm, h.dtype).to(u.dtype)
            grad_a = narrow.gradient_of_a(u, x, adapters)
        grad_h = None
        if grad_x is not None:
            narrow.add_input_gradient(grad_x, u, a, adapters)
            grad_h = norms.backward(grad_x, unit, mlp.norm, statistics, h.dtype)
            grad_h = grad_h + grad if mlp.residual else grad_h
        return None, grad_h, grad_a, grad_down_a, grad_scale, grad_down_scale, *grad_b


def _collect(total: Tensor, part: Tensor, index: Tensor | None, dimension: int) -> None:
    """Add `part` to `total`, at `index` where it has only these."""
    if index is None:
        total += part
    else:
        total.index_add_(dimension, index, part)


def _hidden(z: Tensor, mlp: MLP) -> Tensor:
    if not mlp.gated:
        return mlp.activation(z)
    gate, up = z.chunk(2, dim=1)
    return mlp.activation(gate) * up


def _hidden_backward(z: Tensor, mlp: MLP, grad: Tensor) -> Tensor:
    """Gradient of z from that of `_hidden`, through the activation's own derivative."""
    first = z[:, : z.shape[1] // mlp.halves]
    with torch.enable_grad():
        first = first.detach().requires_grad_()
        activated = mlp.activation(first)
    if not mlp.gated:
        return torch.autograd.grad(activated, first, grad)[0]
    out = torch.empty_like(z)
    grad_gate, grad_up = out.chunk(2, dim=1)
    grad_gate.copy_(torch.autograd.grad(activated, first, grad * z[:, z.shape[1] // 2 :])[0])
    torch.mul(grad, activated.detach(), out=grad_up)
    return out
