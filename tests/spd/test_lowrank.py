"""Low-rank healing: a few numbers beside an untouched base, that give the healed model back bit for bit."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from elision import InputError
from elision.blocks import decoder
from elision.spd import Recipe, SyncPlan, correct, heal, load_adapter, read, save_adapter
from elision.spd.lowrank import LowRank, attach_lowrank, matrices, merged
from elision.spd.streams import step
from tests.spd.tiny import bits, tiny, token_ids

DATA = [{"input_ids": token_ids(4, 12, seed)} for seed in range(4)]
LORA = Recipe(epochs=2, lora=2, lr=1e-2)


def healed(family: str = "llama", dtype: torch.dtype = torch.float64, recipe: Recipe = LORA, **plan):
    model = tiny(family, dtype=dtype)
    return heal(model, SyncPlan(3, (0, 2), **plan), DATA, recipe=recipe, quiet=True)


def own(model) -> dict[str, bytes]:
    """The base's tensors, without what treatments put beside them."""
    return {name: value for name, value in bits(model).items() if "spd_" not in name}


def test_a_fresh_block_computes_what_it_did_and_gradients_reach_the_factors_alone():
    model = tiny("opt")
    block = decoder(model).blocks[0]
    x, kwargs = torch.randn(2, 5, 24, dtype=torch.float64), {"attention_mask": None}
    before, weights = step(block, 2, x, kwargs), bits(model)
    lowrank = attach_lowrank(block, 2, 0)
    block.layer.requires_grad_(False)
    lowrank.requires_grad_(True)
    with lowrank.applied(block.layer):
        after = step(block, 2, x, kwargs)
    assert torch.equal(after, before)
    after.square().sum().backward()
    assert set(lowrank.b) == set(matrices(block.layer)) and len(lowrank.b) == 6
    assert all(b.grad is not None and b.grad.abs().max() > 0 for b in lowrank.b.values())
    assert all("weight" not in vars(module) for module in matrices(block.layer).values())
    assert {name: value for name, value in bits(model).items() if "spd_" not in name} == weights


def test_applied_and_merged_are_the_same_bits():
    for dtype in (torch.float64, torch.bfloat16):
        model = tiny("qwen2", dtype=dtype)
        block = decoder(model).blocks[1]
        lowrank = attach_lowrank(block, 3, 0)
        with torch.no_grad():
            for b in lowrank.b.values():
                b.normal_(std=0.1)
        with lowrank.applied(block.layer):
            shown = {name: module.weight.clone() for name, module in matrices(block.layer).items()}
        wide = merged(block.q.weight.double(), *(x["self_attn-q_proj"].double() for x in (lowrank.a, lowrank.b)))
        torch.testing.assert_close(shown["self_attn-q_proj"].double(), wide, rtol=2**-8, atol=1e-6)
        lowrank.merge(block.layer)
        assert all(torch.equal(module.weight, shown[name]) for name, module in matrices(block.layer).items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", ["opt", "qwen2"])
def test_an_adapter_beside_the_base_is_the_healed_model_bit_for_bit(family, dtype, tmp_path):
    recipe = Recipe(epochs=2, lora=2, lr=1e-2, correction="gain", polish=1)
    treated = healed(family, dtype, recipe, healing={0: "b2b", 2: "hg+b2b"})
    assert treated.plan.healed == (0, 2) and treated.plan.corrections == {0: "gain", 2: "gain"}
    assert set(treated.plan.heads) == {2} and not treated.plan.healing
    assert own(treated.model) != own(tiny(family, dtype=dtype)) and treated.model.dtype == dtype
    path = save_adapter(*treated, tmp_path / "healing.safetensors")
    again = load_adapter(tiny(family, dtype=dtype), path)
    assert again.plan == treated.plan and again.plan.heads == treated.plan.heads
    assert bits(again.model) == bits(treated.model)
    assert save_adapter(*again, tmp_path / "again").read_bytes() == path.read_bytes()
    treated.save_pretrained(tmp_path / "whole")  # merged: nothing that a runtime would have to know
    whole = read(tmp_path / "whole").model
    assert own(whole) == own(treated.model) and not any("spd_lowrank" in name for name in whole.state_dict())


def test_an_adapter_is_small():
    lowrank = LowRank(decoder(tiny("llama", hidden_size=96, intermediate_size=256)).blocks[0].layer, 2)
    matrix = sum(m.weight.numel() for m in matrices(decoder(tiny("llama", hidden_size=96)).blocks[0].layer).values())
    assert sum(p.numel() for p in lowrank.parameters()) < 0.15 * matrix


def test_only_factors_and_vectors_are_trained_and_healing_helps():
    model, base = tiny("llama"), tiny("llama")
    treated = heal(model, SyncPlan(3, (1,)), DATA, recipe=Recipe(epochs=4, lora=2, lr=1e-2), quiet=True)
    changed = {name for name, value in own(model).items() if value != own(base)[name]}
    assert changed and all(".layers.1." in name for name in changed)
    for name, module in matrices(model.model.layers[1]).items():
        original = matrices(base.model.layers[1])[name].weight
        assert torch.linalg.matrix_rank(module.weight - original, rtol=1e-6).item() == 2
    x, kwargs = base.model.embed_tokens(DATA[-1]["input_ids"]), {}
    kwargs["position_embeddings"] = base.model.rotary_emb(x, torch.arange(12).unsqueeze(0))
    with torch.no_grad():
        target = step(decoder(base).blocks[1], None, x, kwargs)
        errors = [(step(decoder(m).blocks[1], 3, x, kwargs) - target).norm() for m in (base, model)]
    assert errors[1] < 0.99 * errors[0] and treated.plan.healed == (1,)


def test_what_is_no_adapter_or_for_another_base_is_refused_and_changes_nothing(tmp_path):
    treated = healed(healing={0: "hg+b2b", 2: "b2b"})
    path = save_adapter(*treated, tmp_path / "healing.safetensors")
    (tmp_path / "broken").write_bytes(b"no tensors")
    other = tiny("llama", seed=1)
    for model, file, match in (
        (other, path, "was made for other weights in block 0: give the base that was treated"),
        (tiny("llama", num_hidden_layers=2), path, "block 2 does not exist|layers"),
        (tiny("llama"), tmp_path / "none", "is not a file"),
        (tiny("llama"), tmp_path / "broken", "is not safetensors"),
    ):
        state = bits(model)
        with pytest.raises(InputError, match=match) as caught:
            load_adapter(model, file)
        assert "\n" not in str(caught.value) and bits(model) == state
    fitted = save_adapter(*correct(tiny("llama"), SyncPlan(3, (1,)), DATA, "gain", quiet=True), tmp_path / "fitted")
    assert load_adapter(tiny("llama"), fitted).plan.corrections == {1: "gain"}
    with pytest.raises(InputError, match="was made for other weights in block 1"):
        load_adapter(other, fitted)
    assert bits(other) == bits(tiny("llama", seed=1))
    unnamed = {name: tensor for name, tensor in load_file(fitted).items() if name != "1.base"}
    save_file(unnamed, fitted, {"spd_plan": json.dumps(SyncPlan(3, (1,), {1: "gain"}).to_dict())})
    with pytest.raises(InputError, match="does not say for which weights block 1 is: write it again"):
        load_adapter(tiny("llama"), fitted)
    full = healed(recipe=Recipe(epochs=1))
    with pytest.raises(InputError, match="block 0 has no low-rank factors, for it was healed in full or comes from"):
        save_adapter(*full, tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_a_copy_carries_its_factors():
    treated = healed()
    assert bits(copy.deepcopy(treated.model)) == bits(treated.model)
    assert any("spd_lowrank.base" in name for name in treated.model.state_dict())


def test_an_adapter_is_not_loaded_twice_nor_on_what_another_healing_left(tmp_path):
    path = save_adapter(*healed(), tmp_path / "healing.safetensors")
    twice = tiny("llama")
    load_adapter(twice, path)
    for model in (twice, healed(recipe=Recipe(epochs=1, lora=2, seed=5)).model, healed(recipe=Recipe(epochs=1)).model):
        state, config = bits(model), model.config.to_dict()
        with pytest.raises(InputError, match=r"model is healed or corrected already.*: load adapter .* on the base"):
            load_adapter(model, path)
        assert bits(model) == state and model.config.to_dict() == config
