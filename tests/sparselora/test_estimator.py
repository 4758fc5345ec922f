"""Channel scores: exact, through the Gram matrix, and through rank-k factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from elision.sparselora import estimator


def exact(weight: Tensor, bias: Tensor | None = None) -> estimator.Exact:
    return estimator.Exact(lambda: weight, lambda: bias)


def low_rank(weight: Tensor, rank: int, bias: Tensor | None = None) -> estimator.LowRank:
    b, a = estimator.truncated_svd(weight, rank)
    return estimator.LowRank(b, a, lambda: bias)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("biased", [False, True])
def test_gram_norms_equal_the_product_s(biased: bool) -> None:
    x, b, a = randn(50, 12), randn(20, 4), randn(4, 12)
    bias = randn(20) if biased else None
    product = x @ a.T @ b.T + (bias if bias is not None else 0.0)
    found = estimator.low_rank_norms(x, b, a, bias)
    assert torch.allclose(found, product.norm(dim=0), rtol=1e-12)
    if bias is not None:
        assert not torch.allclose(found, estimator.low_rank_norms(x, b, a, None), rtol=1e-3)


def test_a_bias_that_cancels_the_product_leaves_no_nan() -> None:
    x, b, a = randn(1, 12).expand(50, 12).float(), randn(200, 4).float(), randn(4, 12).float()
    bias = -(x @ a.T @ b.T)[0]
    squared = ((b @ (a @ x.T @ x @ a.T)) * b).sum(dim=1) + 2 * bias * (b @ (x @ a.T).sum(dim=0)) + 50 * bias.square()
    assert bool((squared < 0).any())  # by rounding
    found = estimator.low_rank_norms(x, b, a, bias)
    assert bool((found < 1e-2 * (50**0.5 * bias.abs()).max()).all())


@pytest.mark.parametrize("biased", [False, True])
def test_full_rank_is_the_oracle(biased: bool) -> None:
    x, wg, wu = randn(3000, 10), randn(24, 10), randn(24, 10)  # more than one slice of tokens
    bias = randn(24) if biased else None
    hidden = silu(x @ wg.T + (0 if bias is None else bias)) * (x @ wu.T)
    for make in (exact, lambda w, b=None: low_rank(w, 99, b)):
        assert torch.allclose(
            estimator.linear_scores(x, make(wg, bias)), (x @ wg.T + (0 if bias is None else bias)).norm(dim=0)
        )
        assert torch.allclose(estimator.ffn_scores(x, silu, make(wg, bias), make(wu)), hidden.norm(dim=0))
        assert torch.allclose(estimator.ffn_scores(x, silu, None, make(wu)), silu(x @ wu.T).norm(dim=0))


def test_the_ffn_score_is_a_norm_over_tokens_and_not_a_mean() -> None:
    weight = torch.eye(2, dtype=torch.float64)
    x = torch.tensor([[3.0, 1.0], [-3.0, 1.0]], dtype=torch.float64)  # channel 0 is larger, and vanishes in the mean
    scores = estimator.linear_scores(x, exact(weight))
    assert scores[0] > scores[1]


def test_truncation_is_the_best_of_its_rank() -> None:
    weight = randn(40, 30)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    b, a = estimator.truncated_svd(weight, 5)
    assert b.shape == (40, 5) and a.shape == (5, 30)
    assert torch.allclose(b @ a, u[:, :5] @ torch.diag(s[:5]) @ v[:5])
    assert torch.allclose(b.norm(dim=0), s[:5].sqrt()) and torch.allclose(a.norm(dim=1), s[:5].sqrt())


@pytest.mark.parametrize("shape", [(300, 310), (500, 200)])
@pytest.mark.parametrize("decaying", [True, False])
def test_large_matrices_are_iterated_to_the_same_result(
    shape: tuple[int, int], decaying: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimator, "_DIRECT", 100)
    weight = torch.randn(shape) / shape[1] ** 0.5
    if decaying:
        weight = weight * (1.0 + torch.arange(shape[1])) ** -0.5
    values = torch.linalg.svdvals(weight)[:8]
    state = torch.random.get_rng_state()
    b, a = estimator.truncated_svd(weight, 8)
    assert torch.equal(torch.random.get_rng_state(), state)  # deterministic, and nobody else's numbers are drawn
    again = estimator.truncated_svd(weight, 8)
    assert torch.equal(b, again[0]) and torch.equal(a, again[1])
    best, found = values.square().sum(), (b @ a).square().sum()
    assert found > best * (0.99999 if decaying else 0.99)  # a flat spectrum has no leading directions to find
    if decaying:
        assert torch.allclose(a.square().sum(dim=1), values, rtol=1e-4)


def test_signs_are_fixed() -> None:
    weight = randn(20, 10)
    b, a = estimator.truncated_svd(weight, 3)
    assert (b.gather(0, b.abs().argmax(dim=0, keepdim=True)) > 0).all()
    negative_b, negative_a = estimator.truncated_svd(-weight, 3)
    assert torch.allclose(negative_b @ negative_a, -(b @ a))
    assert torch.allclose(negative_b, b)


def test_low_precision_is_normed_in_single() -> None:
    x, weight = torch.randn(64, 16).bfloat16(), torch.randn(24, 16).bfloat16()
    found = estimator.linear_scores(x, exact(weight))
    assert found.dtype == torch.float32
    assert torch.allclose(found, (x @ weight.T).float().norm(dim=0))
    b, a = estimator.truncated_svd(weight, 2)
    assert b.dtype == a.dtype == torch.float32


def test_whitening_is_the_best_of_its_rank_on_the_inputs_it_knows() -> None:
    x, weight = randn(200, 12) @ randn(12, 30), randn(20, 30)  # inputs in 12 of 30 directions
    moment = x.T @ x / len(x)

    def error(pair: tuple[Tensor, Tensor]) -> Tensor:
        return (x @ weight.T - x @ pair[1].T @ pair[0].T).norm()

    b, a = estimator.whitened_svd(weight, moment, 4)
    assert b.shape == (20, 4) and a.shape == (4, 30)
    best = torch.linalg.svdvals(x @ weight.T)[4:].norm()  # no product of rank 4 is closer
    assert error((b, a)) < 1.01 * best < error(estimator.truncated_svd(weight, 4))
    white = estimator.whitened_svd(weight, torch.eye(30, dtype=torch.float64), 4)
    plain = estimator.truncated_svd(weight, 4)
    assert torch.allclose(white[0] @ white[1], plain[0] @ plain[1])


def test_a_sample_is_spread_over_the_tokens() -> None:
    x = torch.arange(10.0)[:, None]
    assert estimator.sample(x, None) is x
    assert estimator.sample(x, 10).flatten().tolist() == x.flatten().tolist()
    assert estimator.sample(x, 4).flatten().tolist() == [0, 3, 6, 9]
    assert estimator.sample(x, 3).flatten().tolist() == [0, 4, 8]
    assert len(estimator.sample(x[:0], 3)) == 0


def test_weight_norms_are_the_norms_on_white_inputs() -> None:
    weight = randn(6, 8)
    x = torch.linalg.qr(randn(8, 8)).Q
    assert torch.allclose(estimator.weight_norms(weight), estimator.linear_scores(x, exact(weight)))
