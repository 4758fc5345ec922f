"""Heads that move between ranks: the plain model stays, the way back is exact, whole key/value groups."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from elision import InputError
from elision.blocks import decoder
from elision.spd import SyncPlan, correct, regroup, simulate, ungroup
from elision.spd.activations import sources
from elision.spd.block import mlp_share, spd_output
from elision.spd.regroup import _eager, _gram, inverse, permute
from elision.spd.simulate import carry, local_block
from tests.spd.tiny import bits, left_padded, tiny, token_ids

DATA = [{"input_ids": token_ids(3, 16)}, left_padded((7, 12))]
PLAN = SyncPlan(3, (0, 2))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(token_ids(2, 12, seed=5)).logits


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", "qwen3", "phi3", "granite"])
def test_the_plain_model_stays_what_it_was_and_the_weights_come_back_bit_for_bit(family):
    model = tiny(family)
    weights, dense = bits(model), logits(model)
    implementation = model.config._attn_implementation
    treated = regroup(model, PLAN, iter(DATA), quiet=True)
    assert treated.model is model and set(treated.plan.heads) <= {0, 2} and treated.plan.dropped == (0, 2)
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(logits(model), dense, rtol=0, atol=1e-12)
    assert any(order != tuple(range(6)) for order in treated.plan.heads.values()) and bits(model) != weights
    changed = {name for name, value in bits(model).items() if value != weights[name]}
    assert changed and not any(".layers.1." in name or "norm" in name or "mlp" in name for name in changed)
    with treated.simulate():
        torch.testing.assert_close(logits(model), logits(model))
    assert ungroup(model, treated.plan) == PLAN
    assert bits(model) == weights


@torch.no_grad()
@pytest.mark.parametrize(("family", "order"), [("opt", (4, 1, 0, 3, 5, 2)), ("qwen2", (4, 5, 0, 1, 2, 3))])
def test_a_regrouped_block_computes_what_its_ranks_would_with_those_heads(family, order):
    """Simulated on the permuted model, and from the original's heads, picked out by hand."""
    model, twin = tiny(family), tiny(family)
    batch = {"input_ids": token_ids(2, 8)}
    block, (source,) = decoder(twin).blocks[1], sources(decoder(twin), [batch])
    heads: list[torch.Tensor] = []
    hook = block.o.base.register_forward_pre_hook(lambda module, inputs: heads.append(inputs[0]))
    block.layer(source.embedded, **source.kwargs[1])
    hook.remove()

    def by_hand(order: tuple[int, ...]) -> torch.Tensor:
        total = torch.zeros(())
        for rank in range(3):
            columns = torch.cat([torch.arange(4 * head, 4 * head + 4) for head in order[2 * rank : 2 * rank + 2]])
            partial = heads[0][..., columns] @ block.o.weight[:, columns].T
            u = source.embedded + partial + (0 if block.o.bias is None else block.o.bias)
            total = total + partial + mlp_share(u, local_block(block, rank, 3))
        return spd_output(source.embedded, total, local_block(block, 0, 3))

    moved = decoder(model).blocks[1]
    permute(moved, order)
    with simulate(model, SyncPlan(3, (1,))):
        found = moved.layer(source.embedded, **source.kwargs[1])
    torch.testing.assert_close(found, by_hand(order), rtol=0, atol=1e-12)
    assert (found - by_hand((0, 1, 2, 3, 4, 5))).abs().max() > 1e-3  # else any order would do


def test_a_permutation_without_its_way_back_is_noticed():
    model = tiny("llama", num_key_value_heads=6)
    dense, block = logits(model), decoder(model).blocks[1]
    order = (3, 0, 5, 1, 4, 2)
    permute(block, order)
    torch.testing.assert_close(logits(model), dense, rtol=0, atol=1e-12)
    with torch.no_grad():
        block.o.weight.copy_(block.o.weight[:, torch.arange(24).roll(4)])
    assert (logits(model) - dense).abs().max() > 1e-3
    assert inverse(inverse(order)) == order and [order[i] for i in inverse(order)] == list(range(6))


def test_grouped_queries_move_with_the_keys_that_they_read():
    model = tiny("qwen2")
    weights = bits(model)
    block = decoder(model).blocks[0]
    with pytest.raises(InputError, match="keeps the 2 of a key/value head together"):
        permute(block, (0, 2, 1, 3, 4, 5))
    with pytest.raises(InputError, match="are no order of its 6 query heads"):
        permute(block, (0, 1, 2, 3, 4, 4))
    assert bits(model) == weights
    order = regroup(model, PLAN, DATA, quiet=True).plan.heads[0]
    assert all(order[p + 1] == order[p] + 1 and order[p] % 2 == 0 for p in range(0, 6, 2))


class _Doubles(TorchDispatchMode):
    """Notes the most numbers that a tensor in float64 holds."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            self.most = max(self.most, out.numel())
        return out


@torch.no_grad()
def test_score_maps_are_compared_row_by_row_in_float64():
    view = decoder(tiny("llama", dtype=torch.float32))
    block = view.blocks[0]
    with _eager(view):
        (source,) = sources(view, [left_padded((7, 12, 4))])
        with _Doubles() as doubles:
            found = _gram(block, source.embedded, source)
        maps = block.attention(hidden_states=block.attention_norm(source.embedded), **source.kwargs[0])[1]
    assert doubles.most == 6 * 12 * 12  # one row's, where the batch has 23 queries
    flat = maps.transpose(0, 1)[:, source.real].flatten(1).double()
    torch.testing.assert_close(found, flat @ flat.T, rtol=1e-12, atol=0)


def test_padding_does_not_matter():
    rows = token_ids(2, 10)
    padded = {
        "input_ids": torch.cat([torch.zeros(2, 4, dtype=torch.long), rows], 1),
        "attention_mask": torch.tensor([[0] * 4 + [1] * 10] * 2),
        "position_ids": torch.cat([torch.zeros(4, dtype=torch.long), torch.arange(10)]).expand(2, -1),
    }
    plans = [
        regroup(tiny("llama"), SyncPlan(3, (0, 1, 2)), [batch], quiet=True).plan
        for batch in ({"input_ids": rows}, padded)
    ]
    assert plans[0] == plans[1] and plans[0].heads == plans[1].heads


@pytest.mark.parametrize(
    ("match", "plan", "blocks"),
    [
        ("6 ranks replicate the model's 3 key/value heads", SyncPlan(6, (0,)), None),
        ("block 1 keeps its sync", PLAN, [1]),
        ("block 0 is treated already", SyncPlan(3, (0,), healed=(0,)), None),
        ("block 2 is treated already", SyncPlan(3, (0, 2), heads={2: (0, 1, 2, 3, 4, 5)}), None),
    ],
)
def test_bad_input_changes_nothing(match, plan, blocks):
    model = tiny("llama")
    carry(decoder(model), plan)
    state = bits(model)
    with pytest.raises(InputError, match=match) as caught:
        regroup(model, plan, DATA, blocks=blocks, quiet=True)
    assert "\n" not in str(caught.value) and bits(model) == state


def test_a_treated_block_keeps_its_order():
    model = tiny("llama")
    treated = correct(*regroup(model, SyncPlan(3, (1,)), DATA, quiet=True), DATA, quiet=True)
    assert treated.plan.heads and treated.plan.corrections == {1: "constant"}
    with pytest.raises(InputError, match="block 1 was treated with its heads regrouped"):
        ungroup(model, treated.plan)


def test_heads_do_not_move_twice_unnoticed():
    """The second order would hide the first, and with it the way back."""
    model = tiny("llama")
    weights = bits(model)
    first = regroup(model, PLAN, DATA, blocks=[0], quiet=True)
    moved = bits(model)
    with pytest.raises(InputError, match=r"model has blocks \[0\] healed or regrouped already: load the original"):
        regroup(model, PLAN, DATA, quiet=True)
    assert bits(model) == moved
    both = regroup(*first, DATA, blocks=[2], quiet=True)  # with its own plan it goes on
    assert set(both.plan.heads) == {0, 2} and ungroup(*both) == PLAN and bits(model) == weights
    assert regroup(model, PLAN, DATA, quiet=True).plan.heads == both.plan.heads  # what was ungrouped is the original


def test_an_interruption_leaves_no_regrouped_model_that_passes_for_the_original(monkeypatch):
    model, calls = tiny("llama"), []

    def interrupted(*arguments):
        calls.append(permute(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["elision.spd.regroup"], "permute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            regroup(model, PLAN, DATA, quiet=True)
    assert calls and bits(model) != bits(tiny("llama"))
    with pytest.raises(InputError, match="healed or regrouped already"):
        regroup(model, PLAN, DATA, quiet=True)
