"""Causal attention by tiles against torch's own, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from elision.sparselora import causal
from elision.sparselora.causal import causal_attention

SHAPES = [
    (2, 12, 12, 4, 4, 8),
    (2, 50, 50, 6, 2, 4),
    (1, 300, 300, 2, 1, 4),
    (2, 50, 13, 4, 2, 8),
    (1, 300, 140, 2, 2, 4),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and a gradient of the output, of (batch, length, queries, heads, kv heads, head_dim)."""
    torch.manual_seed(0)
    batch, length, asked, heads, kv_heads, dim = shape
    shapes = [(batch, asked, heads, dim), *[(batch, length, kv_heads, dim)] * 2, (batch, asked, heads, dim)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def plain(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """The same by torch's attention, with a mask."""
    asked, length = q.shape[1], k.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()[-asked:]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, seen, scale=scaling, enable_gqa=True).transpose(1, 2)


def run(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, 0.3)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_equals_torch(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for scores in (causal.SCORES, 1):  # all pairs at a time, then one by one
        monkeypatch.setattr(causal, "SCORES", scores)
        given = inputs(shape, torch.float64)
        for own, theirs in zip(run(causal_attention, *given), run(plain, *given), strict=True):
            assert (own - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_errs_at_most_twice_as_much_as_torch(shape: tuple[int, ...]) -> None:
    given = inputs(shape, torch.bfloat16)
    exact = run(plain, *(x.double() for x in given))
    for own, theirs, right in zip(run(causal_attention, *given), run(plain, *given), exact, strict=True):
        assert (own.double() - right).norm() <= 2 * (theirs.double() - right).norm()


def test_a_wrong_diagonal_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(SHAPES[1], torch.float64)
    right = run(causal_attention, *given)
    tiles = causal._tiles
    monkeypatch.setattr(causal, "_tiles", lambda n, keys: ((tile, max(seen - 1, 1)) for tile, seen in tiles(n, keys)))
    with pytest.raises(RuntimeError):
        run(causal_attention, *given)
    monkeypatch.setattr(causal, "_tiles", tiles)
    monkeypatch.setattr(torch.Tensor, "triu", lambda x, k: torch.triu(x, k + 1))
    wrong = run(causal_attention, *given)
    assert (wrong[1] - right[1]).abs().max() > 1e-3


def test_what_no_query_sees_gets_no_gradient() -> None:
    q, k, v, grad = inputs((1, 40, 40, 2, 2, 4), torch.float64)
    grad[:, 20:] = 0
    _, grad_q, grad_k, grad_v = run(causal_attention, q, k, v, grad)
    assert all(not x[:, 20:].any() for x in (grad_q, grad_k, grad_v))
