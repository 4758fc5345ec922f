"""The fast path's functions against the masked-dense formula in plain autograd, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, silu

from elision.sparselora import linear as fast_linear
from elision.sparselora import norms
from elision.sparselora.attend import from_grids, rotate, to_grids
from elision.sparselora.head import head_loss
from elision.sparselora.linear import linear_residual, norm_linear
from elision.sparselora.mlp import MLP, mlp_residual
from elision.sparselora.narrow import Adapters
from elision.sparselora.norms import Norm
from elision.sparselora.rows import Grid, Rows
from elision.sparselora.select import mask

T, HIDDEN, INNER, RANK = 11, 8, 12, 3


def rand(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def normed(h: Tensor, norm: Norm) -> Tensor:
    return h * torch.rsqrt(h.square().mean(1, keepdim=True) + norm.eps) * norm.weight


def sparse_rows(sparse: int) -> Tensor:
    return (torch.arange(T) < sparse)[:, None]


def agree(one: Tensor, other: Tensor, leaves: list[Tensor], tolerance: float = 1e-12) -> bool:
    """Whether two expressions of `leaves` have equal values and gradients."""
    upstream = torch.randn_like(one)
    results = []
    for value in (one, other):
        found = torch.autograd.grad(value, leaves, upstream, retain_graph=True, allow_unused=True)
        results.append([value, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))])
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(*results, strict=True))


def adapters(inputs: int, *outputs: slice) -> tuple[Adapters, list[Tensor]]:
    if not outputs:
        return Adapters(), []
    a = rand(RANK * len(outputs), inputs, grad=True)
    b = [rand(output.stop - output.start, RANK, grad=True) for output in outputs]
    return Adapters(a, b, [slice(RANK * i, RANK * (i + 1)) for i in range(len(b))], list(outputs)), [a, *b]


def delta(x: Tensor, adapters: Adapters, width: int) -> Tensor:
    total = x.new_zeros(len(x), width)
    for b, rank, output in zip(adapters.b, adapters.ranks, adapters.outputs, strict=True):
        assert adapters.a is not None
        total = total + torch.nn.functional.pad(x @ adapters.a[rank].T @ b.T, (output.start, width - output.stop))
    return total


SPLITS = [(0, None), (5, 4), (T, 4), (5, 0), (4, INNER)]
SOME = [(), (slice(0, 5),), (slice(0, 5), slice(5, INNER)), (slice(0, INNER),)]


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("outputs", SOME, ids=str)
@pytest.mark.parametrize(("sparse", "count"), SPLITS)
def test_norm_linear(sparse: int, count: int | None, outputs: tuple[slice, ...], biased: bool) -> None:
    h, norm, weight = rand(T, HIDDEN, grad=True), Norm(rand(HIDDEN), 1e-5), rand(INNER, HIDDEN)
    bias = rand(INNER) if biased else None
    own, factors = adapters(HIDDEN, *outputs)
    kept = None if count is None else torch.randperm(INNER)[:count].sort().values
    seen: list[Tensor] = []

    def choose(x: Tensor) -> Tensor | None:
        seen.append(x)
        return kept

    y = norm_linear(h, norm, lambda: weight, bias, own, sparse, choose)
    x = normed(h, norm)
    base = linear(x, weight)
    if kept is not None:
        base = base.masked_fill(sparse_rows(sparse) & ~mask(kept, INNER), 0.0)
    expected = base + (0 if bias is None else bias) + delta(x, own, INNER)
    assert agree(y, expected, [h, *factors])
    assert len(seen) == (sparse > 0) and all(torch.allclose(x[:sparse], part) for part in seen)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "LoRA"])
@pytest.mark.parametrize(("sparse", "count"), SPLITS)
def test_linear_residual(sparse: int, count: int | None, adapted: bool, biased: bool) -> None:
    h, z, weight = rand(T, HIDDEN, grad=True), rand(T, INNER, grad=True), rand(HIDDEN, INNER)
    bias = rand(HIDDEN) if biased else None
    own, factors = adapters(INNER, *[slice(0, HIDDEN)] * adapted)
    kept = None if count is None else torch.randperm(INNER)[:count].sort().values
    y = linear_residual(h, z, lambda: weight.T, bias, own, 0.7, sparse, kept)
    read = z if kept is None else z.masked_fill(sparse_rows(sparse) & ~mask(kept, INNER), 0.0)
    assert agree(y, h + 0.7 * (linear(read, weight, bias) + delta(z, own, HIDDEN)), [h, z, *factors])


GATE, UP = slice(0, INNER), slice(INNER, 2 * INNER)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("down", [False, True], ids=["down bare", "down"])
@pytest.mark.parametrize("outputs", [(), (GATE,), (UP,), (GATE, UP), (slice(0, 2 * INNER),)], ids=str)
@pytest.mark.parametrize(("sparse", "count"), SPLITS)
def test_mlp_residual(sparse: int, count: int | None, outputs: tuple[slice, ...], down: bool, biased: bool) -> None:
    h, found, expected, factors = mlp_case(sparse, count, outputs, down, biased)
    assert agree(found, expected, [h, *factors])


def mlp_case(
    sparse: int, count: int | None, outputs: tuple[slice, ...], down: bool, biased: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    h, norm = rand(T, HIDDEN, grad=True), Norm(rand(HIDDEN), 1e-5)
    gate_up, weight = rand(2 * INNER, HIDDEN), rand(HIDDEN, INNER)
    biases = (rand(2 * INNER), rand(HIDDEN)) if biased else (None, None)
    first, factors = adapters(HIDDEN, *outputs)
    second, more = adapters(INNER, *[slice(0, HIDDEN)] * down)
    kept = None if count is None else torch.randperm(INNER)[:count].sort().values
    mlp = MLP(norm, lambda: gate_up, biases[0], lambda: weight.T, biases[1], silu, INNER, multiplier=0.7)
    found = mlp_residual(h, mlp, first, second, sparse, lambda x: kept)
    x = normed(h, norm)
    base = linear(x, gate_up, biases[0])
    pruned = torch.zeros(T, INNER, dtype=torch.bool)
    if kept is not None:
        pruned = sparse_rows(sparse) & ~mask(kept, INNER)
        base = base.masked_fill(pruned.repeat(1, 2), 0.0)
    gate, up = (base + delta(x, first, 2 * INNER)).chunk(2, dim=1)
    hidden = silu(gate) * up
    y = linear(hidden.masked_fill(pruned, 0.0), weight, biases[1]) + delta(hidden, second, HIDDEN)
    return h, found, h + 0.7 * y, [*factors, *more]


def test_a_gradient_that_stops_at_pruned_rows_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fast_linear.spans

    def dense_first(total: int, sparse: int, kept: Tensor | None) -> Any:
        return right(total, 0, None)

    h, norm, weight = rand(T, HIDDEN, grad=True), Norm(rand(HIDDEN), 1e-5), rand(INNER, HIDDEN)
    y = norm_linear(h, norm, lambda: weight, None, Adapters(), 5, lambda x: torch.tensor([1, 4]))
    expected = linear(normed(h, norm), weight).masked_fill(sparse_rows(5) & ~mask(torch.tensor([1, 4]), INNER), 0.0)
    assert agree(y, expected, [h])
    monkeypatch.setattr(fast_linear, "spans", dense_first)  # backward runs after this
    assert not agree(y, expected, [h], 1e-6)


@pytest.mark.parametrize("grad", [False, True], ids=["no input gradient", "input gradient"])
def test_no_input_gradient_is_computed_where_none_is_asked_for(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    right = norms.backward

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return right(*args)

    monkeypatch.setattr(norms, "backward", counted)
    own, _ = adapters(HIDDEN, slice(0, INNER))
    h, weight = rand(T, HIDDEN, grad=grad), rand(INNER, HIDDEN)
    norm_linear(h, Norm(rand(HIDDEN), 1e-5), lambda: weight, None, own).sum().backward()
    assert len(calls) == grad


def rows_of(slots: Tensor, segments: int, length: int) -> Rows:
    grid = torch.zeros(segments * length, dtype=torch.long).index_copy_(0, slots, torch.arange(len(slots)))
    empty = torch.zeros(0, dtype=torch.long)
    return Rows(torch.arange(len(slots)), 0, 0, empty, (Grid(segments, length, 0),), grid, slots)


@pytest.mark.parametrize("count", [6, 2], ids=["all rows", "the last rows"])
@pytest.mark.parametrize("length", [3, 4], ids=["full", "padded"])
def test_grid_and_back(length: int, count: int) -> None:
    slots = torch.tensor([1, 2, length, 0, length + 2, length + 1])
    rows, x = rows_of(slots, 2, length), rand(6, 2, 5, grad=True)
    part, weights = x[-count:], rand(6, 2, 5)
    (grid,) = to_grids(part, rows)
    assert torch.equal(grid.flatten(0, 1)[slots[-count:]], part)
    back = from_grids([grid * 2], rows, count)
    assert agree(back * weights[-count:], 2 * part * weights[-count:], [x])


@pytest.mark.parametrize("rotary", [6, 4], ids=["all", "partial"])
def test_rotation(rotary: int) -> None:
    x, angles = rand(T, 2, 6, grad=True), rand(T, rotary // 2).repeat(1, 2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., : rotary // 2], x[..., rotary // 2 : rotary]
    turned = x[..., :rotary] * cos + torch.cat([-second, first], dim=-1) * sin
    expected = torch.cat([turned, x[..., rotary:]], dim=-1)
    assert agree(rotate(x, angles.cos(), angles.sin()), expected, [x])
    assert not agree(rotate(x, angles.cos(), -angles.sin()), expected, [x], 1e-6)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_head_loss_in_slices(monkeypatch: pytest.MonkeyPatch, biased: bool) -> None:
    rows, weight, targets = rand(T, HIDDEN, grad=True), rand(13, HIDDEN), torch.randint(0, 13, (T,))
    bias = rand(13) if biased else None
    expected = cross_entropy(linear(rows, weight, bias) / 3.0, targets, reduction="sum")
    for elements in (1 << 23, 4 * 13, 1):
        monkeypatch.setattr("elision.sparselora.head._ELEMENTS", elements)
        assert agree(head_loss(rows, weight, bias, targets, 3.0), expected, [rows])
