"""The alpha-beta model: its equations, its fit, and what it must say at both ends."""

from __future__ import annotations

import pytest

from elision.errors import InputError
from elision.spd import SyncPlan
from elision.spd.costs import (
    TREATMENTS,
    Compute,
    Device,
    Link,
    Shape,
    block_seconds,
    saving,
    treatments,
)

LINK = Link(ranks=8, alpha=20e-6, beta=1 / 400e9)
LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128, 128_256)


def test_an_all_reduce_is_alpha_and_what_leaves_a_rank_over_the_bandwidth():
    assert LINK.all_reduce(0) == 20e-6
    assert LINK.all_reduce(16e6) == pytest.approx(20e-6 + 2 * 7 / 8 * 16e6 / 400e9, rel=1e-12)
    assert Link(1, 20e-6, 1e-9).all_reduce(1e9) == 0.0  # nobody to wait for


def test_int8_sends_a_byte_and_its_scales_a_number():
    hidden, tokens = 4096, 512
    exchanges = 2 * 7 * tokens * (hidden / 8 + 4)  # to each of seven others: its part and one scale a token, twice
    assert LINK.int8_all_reduce(hidden, tokens) == pytest.approx(20e-6 + exchanges / 400e9, rel=1e-12)


def test_the_fit_finds_what_made_the_times():
    sizes = [2.0**k for k in range(8, 26, 3)]
    found = Link.fit(8, sizes, [LINK.all_reduce(size) for size in sizes])
    assert (found.alpha, found.beta) == (pytest.approx(LINK.alpha, rel=1e-9), pytest.approx(LINK.beta, rel=1e-9))
    noisy = Link.fit(8, sizes, [LINK.all_reduce(size) * (1.1 if i % 2 else 0.9) for i, size in enumerate(sizes)])
    assert noisy.alpha == pytest.approx(LINK.alpha, rel=0.15) and noisy.beta == pytest.approx(LINK.beta, rel=0.15)


@pytest.mark.parametrize(
    ("seconds", "none", "other", "best"),
    # The one part left, fitted alone: with w_i = x_i / t_i (or 1 / t_i), sum(w) / sum(w^2).
    [([1.0, 1e3], "alpha", "beta", (1 + 0.1) / (1 + 0.01)), ([2.0, 1.0], "beta", "alpha", (0.5 + 1) / (0.25 + 1))],
)
def test_neither_part_of_a_fit_is_negative(seconds, none, other, best):
    found = Link.fit(2, [1.0, 100.0], seconds)
    assert getattr(found, none) == 0.0 and getattr(found, other) == pytest.approx(best, rel=1e-12)


def test_what_each_treatment_leaves_of_a_block():
    compute = Compute(attention=1e-3, mlp=3e-3)
    cost = {t: block_seconds(t, LINK, 4096, 512, compute=compute) for t in TREATMENTS}
    sync = LINK.all_reduce(2 * 4096 * 512)
    assert cost["dense"] == pytest.approx(4e-3 + 2 * sync, rel=1e-12)
    assert cost["dropped"] == pytest.approx(4e-3 + sync, rel=1e-12)
    assert cost["int8"] == pytest.approx(4e-3 + sync + LINK.int8_all_reduce(4096, 512), rel=1e-12)
    assert cost["skipped"] == pytest.approx(3e-3 + sync, rel=1e-12)


def test_int8_gains_in_prefill_and_nothing_in_decode():
    def gain(treatment: str, tokens: int) -> float:
        return saving([treatment] * 32, LINK, 4096, tokens).share

    assert gain("int8", 1) < 0.001 and gain("dropped", 1) == pytest.approx(0.5)
    assert 0.2 < gain("int8", 100_000) < 0.25 < gain("dropped", 100_000)


def test_a_plan_saves_by_the_block_and_nothing_where_it_is_empty():
    plan = SyncPlan(8, dropped=(1, 3), int8=(0,))
    treated = treatments(plan, 5)
    assert treated == ("int8", "dropped", "dense", "dropped", "dense")
    assert saving(treatments(SyncPlan(8), 5), LINK, 4096, 1).seconds == 0
    one = saving(["dropped"] + ["dense"] * 4, LINK, 4096, 1, rest=1e-3)
    two = saving(["dropped"] * 2 + ["dense"] * 3, LINK, 4096, 1, rest=1e-3)
    assert two.seconds == pytest.approx(2 * one.seconds) == pytest.approx(2 * LINK.all_reduce(8192))
    assert one.share < saving(["dropped"] + ["dense"] * 4, LINK, 4096, 1).share


def test_compute_follows_the_roofline():
    device = Device(flops=500e12, bandwidth=3e12)
    decode, head = LLAMA_8B.compute(device, 1, batch=1, new=1)
    weights = 32 * (LLAMA_8B.attention_weights + LLAMA_8B.mlp_weights) + 4096 * 128_256
    assert weights == pytest.approx(7.5e9, rel=0.01)  # 8.03 billion with the embedding
    total = 32 * (decode.attention + decode.mlp) + head
    assert total == pytest.approx(2 * weights / 3e12, rel=0.01)  # reads every weight once
    prefill, _ = LLAMA_8B.compute(device, 1, batch=8, new=512)
    flops = 32 * 2 * (weights - 4096 * 128_256) / 32 * 8 * 512
    assert 32 * (prefill.attention + prefill.mlp) == pytest.approx(flops / 500e12, rel=0.05)
    shared, _ = LLAMA_8B.compute(device, 4, batch=8, new=512)
    assert shared.mlp == pytest.approx(prefill.mlp / 4)
    later, _ = LLAMA_8B.compute(device, 1, batch=1, new=1, before=100_000)
    assert later.attention > 2 * decode.attention and later.mlp == decode.mlp


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Link(0, 1e-6, 0.0), "ranks 0 is not a whole number of at least 1"),
        (lambda: Link(2, -1e-6, 0.0), "alpha -1e-06 is not a time of at least 0: give seconds"),
        (lambda: Link(2, 1e-6, float("nan")), "beta nan is not a time"),
        (lambda: Link.fit(2, [8.0], [1.0]), "1 sizes with 1 times do not make a fit"),
        (lambda: block_seconds("gone", LINK, 8, 1), "treatment 'gone' is not known: use one of dense, dropped"),
        (lambda: Shape(0, 8, 8, 1, 1, 8, 8), "layers 0 is not a whole number of at least 1"),
    ],
)
def test_bad_numbers_are_refused_by_name(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()
