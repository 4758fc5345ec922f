"""The int8 all-reduce: error bounds, invariances, and real ranks that send real bytes."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from elision.spd import SyncPlan, int8, simulate
from tests.spd.tiny import bits, tiny, token_ids

simulation = sys.modules["elision.spd.simulate"]  # the function of that name hides the module


def shares(ranks: int, channels: int = 24, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(ranks)
    return [(torch.randn(2, 5, channels, generator=generator) * (rank + 1)).to(dtype) for rank in range(ranks)]


def test_a_number_is_within_half_a_scale_of_what_it_becomes():
    x = torch.randn(1000, 33) * torch.logspace(-20, 20, 1000)[:, None]
    values, scale = int8.quantise(x)
    assert values.dtype == torch.int8 and scale.shape == (1000, 1)
    assert ((int8.dequantise(values, scale) - x).abs() <= scale * (0.5 + 1e-4)).all()
    assert (values.abs().amax(-1) == 127).all()
    assert torch.equal(int8.dequantise(*int8.quantise(-x)), -int8.dequantise(values, scale))


def test_what_is_next_to_nothing_does_not_change_its_sign():
    tiny_ones = (
        torch.tensor([[190.0, -190.0, 3.0]]) * 2.0**-149
    )  # a scale of 1.5 steps of fp32 is rounded to one of them
    values, scale = int8.quantise(tiny_ones)
    assert values.tolist() == [[127, -127, 3]] and scale.item() == 2.0**-149


def test_zeros_stay_zero_and_alone_in_their_token():
    x = torch.randn(3, 8)
    x[1] = 0
    assert torch.equal(int8.all_reduce([x, 0 * x])[1], torch.zeros(8))
    changed = x.clone()
    changed[0, 3] = 1e6  # an outlier reaches no other token
    assert torch.equal(int8.all_reduce([x, x])[2], int8.all_reduce([changed, changed])[2])


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("channels", [24, 25])
def test_the_sum_is_within_the_bound_of_its_messages(ranks, channels):
    given = shares(ranks, channels)
    exact, got = sum(given), int8.all_reduce(given)
    sent = sum(int8.quantise(share)[1] for share in given) / 2
    returned = (exact.abs().amax(-1, keepdim=True) + sent) / 127 / 2
    assert ((got - exact).abs() <= (sent + returned) * 1.001).all()
    relative = (got - exact).norm() / exact.norm()
    assert 1e-4 < relative < 0.02  # it does round
    worse = torch.stack([(share / share.abs().max() * 7).round() / 7 * share.abs().max() for share in given]).sum(0)
    assert (worse - exact).norm() > 3 * (got - exact).norm()  # four bits would be seen


def test_scaling_by_a_power_of_two_and_dtype_commute_with_it():
    given = shares(3)
    assert torch.equal(int8.all_reduce([share * 4 for share in given]), int8.all_reduce(given) * 4)
    for dtype in (torch.bfloat16, torch.float64):
        low = [share.to(dtype) for share in given]
        assert int8.all_reduce(low).dtype == dtype
        assert torch.equal(int8.all_reduce(low), int8.all_reduce([share.float() for share in low]).to(dtype))


def rank_body(rank: int, ranks: int, store: str, out: str) -> None:
    """One process: quantise, all-to-all, sum in rank order, requantise, all-gather, written out with gloo."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    own = shares(ranks, 25)[rank]
    values, scale = int8.quantise(own)
    sizes = [part.shape[-1] for part in values.tensor_split(ranks, -1)]

    def gather(tensor: torch.Tensor) -> list[torch.Tensor]:
        everyone = [torch.empty_like(tensor) for _ in range(ranks)]
        dist.all_gather(everyone, tensor.contiguous())
        return everyone

    padded = [torch.nn.functional.pad(part, (0, sizes[0] - part.shape[-1])) for part in values.tensor_split(ranks, -1)]
    received = [sent[rank] for sent in gather(torch.stack(padded))]  # an all-to-all, which gloo has not on every build
    mine = sum(part.float() * s for part, s in zip(received, gather(scale), strict=True))
    back, back_scale = int8.quantise(mine[..., : sizes[rank]])
    padded_back = torch.nn.functional.pad(back, (0, sizes[0] - sizes[rank]))
    total = [
        (part.float() * s)[..., :size]
        for part, s, size in zip(gather(padded_back), gather(back_scale), sizes, strict=True)
    ]
    result = gather(torch.cat(total, -1))
    assert all(torch.equal(result[0], other) for other in result)

    def all_to_all(messages: torch.Tensor) -> torch.Tensor:
        received = torch.empty_like(messages)
        dist.all_to_all_single(received, messages)
        return received

    ours = int8.all_reduce_on_rank(own, rank, ranks, all_to_all, lambda message: torch.stack(gather(message)))
    assert torch.equal(ours, result[0])
    if rank == 0:
        torch.save(result[0], out)
    dist.destroy_process_group()


def test_gloo_ranks_agree_bit_for_bit(tmp_path):
    arguments = (3, str(tmp_path / "store"), str(tmp_path / "out.pt"))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=rank_body, args=(rank, *arguments)) for rank in range(3)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=120)
        assert [process.exitcode for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
    assert torch.equal(torch.load(tmp_path / "out.pt"), int8.all_reduce(shares(3, 25)))


@pytest.mark.parametrize("family", ["llama", "granite", "opt"])
def test_a_simulated_block_sends_its_attention_in_int8_and_nothing_else(family, monkeypatch):
    model, ids = tiny(family), token_ids()
    before = bits(model)
    plan = SyncPlan(3, (2,), int8=(0, 1))
    with torch.no_grad():
        with simulate(model, SyncPlan(3, (2,))):
            exact = model(ids).logits
        with simulate(model, plan):
            quantised = model(ids).logits
        sent = []
        monkeypatch.setattr(simulation, "all_reduce", lambda parts: sent.append(parts) or sum(parts))
        with simulate(model, plan):
            torch.testing.assert_close(model(ids).logits, exact, rtol=0, atol=1e-12)  # int8 is all the difference
    assert [len(parts) for parts in sent] == [3, 3]
    assert 1e-5 < (quantised - exact).norm() / exact.norm() < 0.05
    assert bits(model) == before
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny(family)(ids).logits)


def test_an_int8_plan_keeps_the_original_weights():
    assert SyncPlan(3, int8=(1,)).original_weights
    assert SyncPlan.from_dict(SyncPlan(3, int8=(1,)).to_dict()).int8 == (1,)
