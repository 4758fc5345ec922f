"""Channel scores: norms of base products over the context tokens, exact or through a low-rank stand-in.

A score is the L2 norm over the T context tokens of one output channel of X W' + bias, or, for the FFN, of
act(X Wg' + bias) * (X Wu' + bias) (METHODS 1.1). Two products give them:

    Exact     W itself: the oracle
    LowRank   W = U S V' cut to rank k, B = U_k sqrt(S_k) (out, k), A = sqrt(S_k) V_k' (k, in): X A' B' for X W'

Linear scores of the second need no (T, out) product: with P = X A' (T, k), G = P'P (k, k) and row b_c of B

    norm_c^2 = b_c G b_c' + 2 beta_c (1'P) b_c' + T beta_c^2

so they cost T k (in + k) multiplications. The FFN's score is not linear; it needs the products, taken in slices of
tokens so that no (T, intermediate) tensor lives longer than its slice.

Scores are computed in at least single precision and carry no gradient: selection has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from elision.shapes import Float

SLICE = 1024  # tokens at a time in a score that needs the product

_DIRECT = 1024  # from this smaller side on, iterate for the leading singular vectors instead of decomposing in full
_OVERSAMPLING = 24
_MAX_ITERATIONS = 60
_TOLERANCE = 1e-5  # relative change of the leading singular values between two iterations


@runtime_checkable
class Product(Protocol):
    """What stands for a frozen linear map when channels are scored."""

    def __call__(self, x: Tensor) -> Tensor:
        """(T, in) to (T, out), the bias included."""
        ...

    def norms(self, x: Tensor) -> Tensor:
        """(T, in) to (out,): the norm of each output channel over the T tokens."""
        ...


@dataclass(frozen=True)
class Exact:
    """The base product itself. `weight` is called for (out, in) and `bias` for (out,) or None, when needed."""

    weight: Callable[[], Tensor]
    bias: Callable[[], Tensor | None]

    def __call__(self, x: Tensor) -> Tensor:
        bias = self.bias()
        return torch.nn.functional.linear(x, self.weight().to(x.dtype), None if bias is None else bias.to(x.dtype))

    def norms(self, x: Tensor) -> Tensor:
        return _accumulated_norms(x, self)


@dataclass(frozen=True)
class LowRank:
    """X A' B' + bias. `b` is (out, k), `a` (k, in); `bias` is called for (out,) or None, when needed."""

    b: Tensor
    a: Tensor
    bias: Callable[[], Tensor | None]

    def __call__(self, x: Tensor) -> Tensor:
        product = x @ self.a.to(x).T @ self.b.to(x).T
        bias = self.bias()
        return product if bias is None else product + bias.to(x)

    def norms(self, x: Tensor) -> Tensor:
        bias = self.bias()
        return low_rank_norms(x, self.b.to(x), self.a.to(x), None if bias is None else bias.to(x))


def low_rank_norms(
    x: Float[Tensor, "tokens inputs"],
    b: Float[Tensor, "outputs rank"],
    a: Float[Tensor, "rank inputs"],
    bias: Float[Tensor, " outputs"] | None,
) -> Float[Tensor, " outputs"]:
    """Norm over the tokens of each column of x a' b' + bias, through the Gram matrix of x a'."""
    p = x @ a.T
    squared = ((b @ (p.T @ p)) * b).sum(dim=1)
    if bias is not None:
        squared = squared + 2 * bias * (b @ p.sum(dim=0)) + x.shape[0] * bias.square()
    return squared.clamp_min(0).sqrt()  # rounding may leave a tiny negative


def linear_scores(x: Float[Tensor, "tokens inputs"], product: Product) -> Float[Tensor, " outputs"]:
    """Norm over the tokens of each channel of one base product (the scores of Q, K and V)."""
    return product.norms(_at_least_single(x))


def ffn_scores(
    x: Float[Tensor, "tokens inputs"],
    activation: Callable[[Tensor], Tensor],
    gate: Product | None,
    up: Product,
) -> Float[Tensor, " channels"]:
    """Norm over the tokens of each input channel of the down projection: act(gate) * up, or act(up) without a gate."""

    def hidden(x: Tensor) -> Tensor:
        return activation(up(x)) if gate is None else activation(gate(x)) * up(x)

    return _accumulated_norms(_at_least_single(x), hidden)


def truncated_svd(
    weight: Float[Tensor, "outputs inputs"], rank: int
) -> tuple[Float[Tensor, "outputs rank"], Float[Tensor, "rank inputs"]]:
    """(B, A) of rank min(rank, outputs, inputs) with B A the best approximation of `weight`; single precision or more.

    Deterministic: a small matrix is decomposed in full, a large one by subspace iteration from a fixed start (some
    hundred products with a thin matrix, where a full decomposition takes minutes). The larger entry of each left
    singular vector is made positive.
    """
    weight = _at_least_single(weight.detach())
    rank = min(rank, *weight.shape)
    u, s, v = torch.linalg.svd(weight, full_matrices=False) if min(weight.shape) < _DIRECT else _leading(weight, rank)
    u, root, v = u[:, :rank], s[:rank].sqrt(), v[:rank]
    sign = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign()
    return (u * sign * root).contiguous(), (v * sign.T * root[:, None]).contiguous()


def _leading(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets by block subspace iteration, ended when the leading singular values stand still."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(weight.shape[1], rank + _OVERSAMPLING, generator=generator, dtype=weight.dtype)
    basis = torch.linalg.qr(weight @ start.to(weight.device)).Q
    previous = torch.zeros(rank, dtype=weight.dtype, device=weight.device)
    for _ in range(_MAX_ITERATIONS):
        other, triangle = torch.linalg.qr(weight.T @ basis)
        values = torch.linalg.svdvals(triangle)[:rank]
        basis = torch.linalg.qr(weight @ other).Q
        if bool(((values - previous).abs() <= _TOLERANCE * values).all()):
            break
        previous = values
    u, s, v = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ u, s, v


def _accumulated_norms(x: Tensor, columns: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([columns(part).square().sum(dim=0) for part in x.split(SLICE)]).sum(dim=0).sqrt()


def _at_least_single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
