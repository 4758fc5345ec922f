"""The algebra of one rank: shards that cover everything once, biases that count once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from elision.blocks import decoder
from elision.spd import block
from elision.spd.simulate import local_block
from tests.spd.ranks import logits_in_threads
from tests.spd.tiny import tiny, token_ids


@pytest.mark.parametrize(("ranks", "heads", "kv_heads", "intermediate"), [(1, 4, 2, 7), (3, 6, 3, 40), (8, 16, 2, 33)])
def test_shards_cover_every_head_and_channel_once(ranks, heads, kv_heads, intermediate):
    shards = [block.shard(rank, ranks, heads, kv_heads, intermediate) for rank in range(ranks)]
    assert [head for own in shards for head in own.heads] == list(range(heads))
    assert [channel for own in shards for channel in own.channels] == list(range(intermediate))
    assert {len(own.heads) for own in shards} == {heads // ranks}
    sizes = [len(own.channels) for own in shards]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("ranks", "heads", "kv_heads"), [(2, 8, 4), (4, 8, 4), (8, 8, 4), (8, 16, 2), (4, 8, 1)])
def test_every_rank_has_the_key_value_heads_of_its_query_heads(ranks, heads, kv_heads):
    for rank in range(ranks):
        own = block.shard(rank, ranks, heads, kv_heads, 10)
        assert list(own.kv_heads) == sorted({head // (heads // kv_heads) for head in own.heads})


def test_span_is_the_channels_of_whole_heads():
    assert block.span(range(2, 4), 8) == slice(16, 32)
    assert block.span(range(3, 5)) == slice(3, 5)


def test_local_blocks_are_views_that_add_up_to_the_block():
    view = decoder(tiny("phi3"))  # gate and up fused in one module
    whole = view.blocks[0]
    locals_ = [local_block(whole, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([local.o for local in locals_], 1), whole.o.weight)
    assert torch.equal(torch.cat([local.gate for local in locals_]), whole.gate.weight)
    assert torch.equal(torch.cat([local.up for local in locals_]), whole.up.weight)
    assert torch.equal(torch.cat([local.down for local in locals_], 1), whole.down.weight)
    assert locals_[1].up.untyped_storage().data_ptr() == whole.up.base.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("family", ["llama", "granite", "opt"])
@pytest.mark.parametrize("dropped", [(), (0, 1, 2)])
def test_biases_count_once_and_a_share_that_holds_them_is_caught(family, dropped, monkeypatch):
    model, ids = tiny(family), token_ids()
    right = logits_in_threads(model, ids, 3, dropped)
    if not dropped:
        with torch.no_grad():
            torch.testing.assert_close(right, model(ids).logits, rtol=0, atol=1e-12)
    share, mlp = block.attention_share, block.mlp_share
    for name, wrong in (
        ("attention_share", lambda heads, local: F.linear(heads, local.o, local.o_bias)),
        ("mlp_share", lambda u, local: mlp(u, local) + local.down_bias),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(block, name, wrong)
            assert (logits_in_threads(model, ids, 3, dropped) - right).abs().max() > 1e-3
    assert (block.attention_share, block.mlp_share) == (share, mlp)


def test_without_a_bias_nothing_is_added():
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    y = torch.randn_like(x)
    b = torch.randn(4, dtype=torch.float64)
    assert torch.equal(block.add_residual(x, y, 1.0, None, None), x + y)
    torch.testing.assert_close(block.add_residual(x, y, 0.5, b, None, b), x + 0.5 * y + b, rtol=0, atol=1e-15)


def test_a_shape_that_does_not_fit_is_caught_by_its_annotation():
    local = local_block(decoder(tiny("llama")).blocks[0], 0, 3)
    with pytest.raises(Exception, match="heads"):
        block.spd_share(torch.zeros(2, 4, 24), torch.zeros(2, 5, 8), local)


def test_a_correction_acts_on_the_local_mlp_input_and_nowhere_else():
    whole = decoder(tiny("granite")).blocks[0]
    plain = [local_block(whole, rank, 3) for rank in range(3)]
    x, constant, gain = torch.randn(2, 4, 24), torch.randn(24), torch.randn(24)
    heads = [torch.randn(2, 4, 8) for _ in plain]
    x, constant, gain, *heads = (tensor.double() for tensor in (x, constant, gain, *heads))
    other_o = torch.randn(24, 8, dtype=torch.float64)
    for local, a in zip(plain, heads, strict=True):
        p, b, r = a @ local.o.T, local.o_bias, local.residual_multiplier
        for change, u in (
            ({}, x + r * (p + b)),
            ({"mlp_constant": constant}, x + r * (p + b + constant)),
            ({"mlp_constant": constant, "mlp_gain": gain}, x + r * (gain * p + b + constant)),
            ({"mlp_constant": constant, "mlp_o": other_o}, x + r * (a @ other_o.T + b + constant)),
        ):
            own = dataclasses.replace(local, **change)
            torch.testing.assert_close(block.mlp_input(x, a, p, own), u, rtol=0, atol=1e-12)
            share = block.spd_share(x, a, own)  # P_i itself goes into the sum uncorrected
            torch.testing.assert_close(share - p, block.mlp_share(u, local), rtol=0, atol=1e-12)


def test_the_constant_that_is_missing_makes_the_block_exact():
    """Where every other rank's share happens to be the same for all tokens, the correction is the whole of it."""
    whole = decoder(tiny("llama")).blocks[0]
    x, a = torch.randn(2, 4, 24).double(), [torch.randn(8).double() for _ in range(3)]
    shares = [vector @ local_block(whole, rank, 3).o.T for rank, vector in enumerate(a)]
    total = sum(shares)
    outputs = []
    for correct in (True, False):
        parts = []
        for rank, vector in enumerate(a):
            local = local_block(whole, rank, 3)
            if correct:
                local = dataclasses.replace(local, mlp_constant=total - shares[rank])
            parts.append(block.spd_share(x, vector.expand(2, 4, 8), local))
        outputs.append(block.spd_output(x, sum(parts), local_block(whole, 0, 3)))
    u = x + total + whole.o.bias
    dense = u + whole.mlp(whole.mlp_norm(u))
    torch.testing.assert_close(outputs[0], dense, rtol=0, atol=1e-12)
    assert (outputs[1] - dense).abs().max() > 1e-3
