"""Channel scores: norms of base products over the context tokens, exact or through a low-rank stand-in.

A score is the L2 norm over the T context tokens of one output channel of X W' + bias, or, for the FFN, of
act(X Wg' + bias) * (X Wu' + bias) (maths: Which channels). Two things differ between estimators: which product
stands for X W', and how many of the T tokens are read.

    selection   product                                                              tokens read
    oracle      W itself                                                             all
    sampled     W itself                                                             SAMPLE, evenly spaced
    svd         B A: W = U S V' cut to rank k, B = U_k sqrt(S_k), A = sqrt(S_k) V_k' all; for the FFN FFN_SAMPLE
    whitened    B A that is closest to W on inputs like those of calibration data    likewise
    weights     none: the norms of the rows of W, whatever the tokens are            none

"sampled" is the default: against the oracle it chooses twice as well as the paper's SVD at the same time (lab notes;
benchmarks/estimators.py measures it).

A truncated SVD keeps the directions in which W is large; the inputs of a model lie in few directions of their own.
With C = X'X / T of calibration inputs and C = L L', the B A of rank k that minimises the error on such inputs,
E ||W x - B A x||^2 = ||(W - B A) L||_F^2, is the truncated SVD of W L, times L^-1. It costs the same online.

Linear scores of B A need no (T, out) product: with P = X A' (T, k), G = P'P (k, k) and row b_c of B

    norm_c^2 = b_c G b_c' + 2 beta_c (1'P) b_c' + T beta_c^2

so they cost T k (in + k) multiplications. The FFN's score is not linear; it needs the products, taken in slices of
tokens so that no (T, intermediate) tensor lives longer than its slice.

Products of W are computed in the model's own precision, as the model does it, norms and all else in at least single;
scores carry no gradient: selection has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from elision.shapes import Float

SLICE = 1024  # tokens at a time in a score that needs the product
SAMPLE = 128  # tokens that "sampled" reads
FFN_SAMPLE = 256  # tokens that the FFN's score reads through factors: there a token costs k (in + out), no Gram matrix

_DAMPING = 1e-3  # of the mean variance, added to every direction: calibration data may span fewer than there are

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
    """The base product itself, in the dtype of x, as the model computes it. `weight` is called for (out, in) and `bias`
    for (out,) or None, when needed.
    """

    weight: Callable[[], Tensor]
    bias: Callable[[], Tensor | None]

    def __call__(self, x: Tensor) -> Tensor:
        # The weight on the left: CPUs lay the right-hand factor out anew, and here x is the small one.
        product, bias = (self.weight().to(x.dtype) @ x.T).T, self.bias()
        return product if bias is None else product + bias.to(x.dtype)

    def norms(self, x: Tensor) -> Tensor:
        return _accumulated_norms(x, self)


@dataclass
class LowRank:
    """X A' B' + bias. `b` is (out, k), `a` (k, in); `bias` is called for (out,) or None, when needed.

    The factors stay where they were last read: a model may be moved after they were made, by a Trainer say.
    """

    b: Tensor
    a: Tensor
    bias: Callable[[], Tensor | None]

    def __call__(self, x: Tensor) -> Tensor:
        x, bias = self._beside(x), self.bias()
        product = x @ self.a.T @ self.b.T
        return product if bias is None else product + bias.to(x)

    def norms(self, x: Tensor) -> Tensor:
        x, bias = self._beside(x), self.bias()
        return low_rank_norms(x, self.b, self.a, None if bias is None else bias.to(x))

    def _beside(self, x: Tensor) -> Tensor:
        x = _at_least_single(x)
        self.b, self.a = self.b.to(x), self.a.to(x)
        return x


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
    return product.norms(x)


def ffn_scores(
    x: Float[Tensor, "tokens inputs"],
    activation: Callable[[Tensor], Tensor],
    gate: Product | None,
    up: Product,
) -> Float[Tensor, " channels"]:
    """Norm over the tokens of each input channel of the down projection: act(gate) * up, or act(up) without a gate."""

    def hidden(x: Tensor) -> Tensor:
        return activation(up(x)) if gate is None else activation(gate(x)) * up(x)

    return _accumulated_norms(x, hidden)


def weight_norms(weight: Float[Tensor, "outputs inputs"]) -> Float[Tensor, " outputs"]:
    """Norm of each row: what a channel's norm would be on white inputs."""
    return _at_least_single(weight).norm(dim=1)


def sample(x: Float[Tensor, "tokens inputs"], count: int | None) -> Float[Tensor, "read inputs"]:
    """At most `count` of the tokens, evenly spaced; None: all of them."""
    return x if count is None else x[:: max(1, -(-len(x) // count))]


def whitened_svd(
    weight: Float[Tensor, "outputs inputs"], moment: Float[Tensor, "inputs inputs"], rank: int
) -> tuple[Float[Tensor, "outputs rank"], Float[Tensor, "rank inputs"]]:
    """(B, A) of the given rank that minimises E ||W x - B A x||^2; single precision or more, deterministic.

    Args:
        weight: W.
        moment: E x x' of calibration inputs, on the weight's device.
        rank: of the product, cut to the weight's sides.
    """
    moment = moment.double()
    damping = _DAMPING * moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    root = torch.linalg.cholesky(moment + damping * torch.eye(len(moment), dtype=moment.dtype, device=moment.device))
    b, a = truncated_svd((_at_least_single(weight.detach()).double() @ root).to(_at_least_single(weight).dtype), rank)
    a = torch.linalg.solve_triangular(root, a.double(), upper=False, left=False)
    return b, a.to(b.dtype).contiguous()


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
    shape = weight.shape[1], rank + _OVERSAMPLING
    start = torch.randn(shape, generator=generator, dtype=weight.dtype, device="cpu")  # the same on every device
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
    squares = [_at_least_single(columns(part)).square().sum(dim=0) for part in x.split(SLICE)]
    return torch.stack(squares).sum(dim=0).sqrt()


def _at_least_single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
