"""A plan carried out: what held-out text says of it, and the same of a model of which one block is in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from elision import InputError, spd
from elision.blocks import decoder
from elision.spd import Recipe, SyncPlan, calibrate, carry_out, open_streamed
from elision.spd.calibration import Limit
from elision.streaming import resident
from tests.spd.test_calibration import APART
from tests.spd.test_sensitivity import DATA, brute_force
from tests.spd.tiny import tiny, token_ids

BATCHES = [*DATA, *({"input_ids": token_ids(2, 9, seed)} for seed in (11, 12))]
HOW = {0: "hg+b2b", 1: "correct", 2: "b2b"}


def test_held_out_text_says_what_came_back_and_how_far_off_the_prediction_was():
    model = tiny("llama", num_hidden_layers=4)
    plan = calibrate(model, BATCHES, 3, drop=0.75, healing=True, recovered={"b2b": 0.9}, quiet=True)
    assert plan.calibration is not None and set(plan.healing.values()) == {"b2b"} and len(plan.dropped) == 3
    bare = SyncPlan(3, plan.dropped)
    before = [brute_force(model, APART, *each) for each in ((1, ()), (3, plan.dropped))]
    healed = carry_out(model, plan, BATCHES, held_out=APART, recipe=Recipe(epochs=2), quiet=True)
    found = healed.plan.verified
    assert found is not None and healed.plan.healed == plan.dropped
    assert [found.dense, found.zero_shot] == pytest.approx(before, rel=1e-11)
    assert found.planned == pytest.approx(brute_force(model, APART, 3, bare.dropped), rel=1e-11)
    assert found.recovery == pytest.approx((before[1] - found.planned) / (before[1] - before[0]), rel=1e-9)
    zero_shot = plan.calibration.perplexities[3] / plan.calibration.perplexities[0] - 1
    assert found.predicted == pytest.approx(0.1 * zero_shot, rel=1e-9)  # the share that was said to come back
    assert found.loss == pytest.approx(found.planned / before[0] - 1, rel=1e-9) and found.loss != found.predicted


def test_blocks_named_by_hand_beside_a_measurement_are_predicted_by_the_shares():
    """The curve was measured along another order, so only held-out text says what these blocks cost."""
    model = tiny("llama")
    plan = calibrate(model, DATA, 3, drop=0.34, healing=True, recovered={"b2b": 0.9}, quiet=True)
    assert plan.calibration is not None and len(plan.dropped) == 1
    edited = replace(plan, dropped=plan.calibration.order[-1:], healing={})
    found = carry_out(model, edited, BATCHES, held_out=APART, recipe=Recipe(epochs=1), quiet=True).plan.verified
    assert found is not None and found.predicted == pytest.approx(0.1 * (found.zero_shot / found.dense - 1), rel=1e-9)


def test_tiers_plan_no_heads_to_move_between_ranks_that_hold_copies_of_them():
    model = tiny("llama", seed=1)
    plans = spd.calibrations(model, BATCHES, (3, 6), Limit(tiers=(0.0, 0.0)), quiet=True)
    assert [plan.healing for plan in plans] == [{0: "hg+b2b", 2: "hg+b2b"}, {0: "b2b", 2: "b2b"}]
    assert carry_out(model, plans[1], BATCHES, recipe=Recipe(epochs=1), quiet=True).plan.healed == (0, 2)


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("plan drops no sync", {"plan": SyncPlan(3)}),
        ("plan is carried out already", {"plan": SyncPlan(3, (0,), healed=(0,))}),
        ("so its healed blocks need a place on disk: give state", {}),
        # Before held-out text is as much as looked at, here what would be refused.
        ("data holds one batch: give at", {"state": "state", "batches": BATCHES[:1], "held_out": []}),
        (
            "6 ranks replicate the model's 3 key/value heads",
            {"state": "state", "plan": SyncPlan(6, (0,), healing={0: "hg+b2b"}), "held_out": []},
        ),
        ("polish 2 trains all healed blocks together", {"state": "state", "recipe": Recipe(polish=2)}),
    ],
)
def test_what_cannot_be_carried_out(match, arguments, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    model = open_streamed(tmp_path / "model")
    if "state" in arguments:
        arguments = {**arguments, "state": tmp_path / "state"}
    with pytest.raises(InputError, match=match) as caught:
        carry_out(model, **{"plan": SyncPlan(3, (0,)), "batches": BATCHES, "quiet": True, **arguments})
    assert "\n" not in str(caught.value) and not (tmp_path / "state").exists()


def blocks_of(model) -> list[dict[str, torch.Tensor]]:
    """Every block's parameters."""
    found = []
    for block in decoder(model).blocks:
        with resident(block.layer):
            found.append({name: tensor.detach() for name, tensor in block.layer.named_parameters()})
    return found


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's safetensors."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("family", "dtype", "recipe"),
    [
        ("llama", torch.float64, Recipe(epochs=2, correction="local_o")),
        ("opt", torch.bfloat16, Recipe(epochs=2)),
        ("llama", torch.bfloat16, Recipe(epochs=2, lora=2)),
    ],
    ids=["llama", "opt, bf16", "lora, bf16"],
)
def test_it_heals_to_the_same_bits(family, dtype, recipe, tmp_path):
    model = tiny(family, dtype=dtype)
    model.save_pretrained(tmp_path / "model")
    streamed = open_streamed(tmp_path / "model")
    plan = SyncPlan(3, (0, 1, 2), healing=HOW)
    own = carry_out(model, plan, BATCHES, held_out=APART, recipe=recipe, quiet=True)
    found = carry_out(streamed, plan, BATCHES, held_out=APART, recipe=recipe, state=tmp_path / "state", quiet=True)
    assert found.plan == own.plan and found.plan.verified is not None and set(found.plan.heads) == {0}
    pairs = list(zip(blocks_of(model), blocks_of(streamed), strict=True))
    assert all(same(*pair) for pair in pairs)
    assert all(parameter.is_meta for block in decoder(streamed).blocks for parameter in block.layer.parameters())
    assert not same(pairs[2][0], blocks_of(open_streamed(tmp_path / "model"))[2])  # something was healed

    own.save_pretrained(tmp_path / "own")
    found.save_pretrained(tmp_path / "found")
    assert len(list((tmp_path / "found").glob("*.safetensors"))) == 4  # a block a file
    assert same(stored(tmp_path / "own"), stored(tmp_path / "found"))
    for name in ("config.json", "README.md"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "found" / name).read_bytes()
    with torch.no_grad():
        ids = token_ids()
        assert torch.equal(spd.load(tmp_path / "own")(ids).logits, spd.load(tmp_path / "found")(ids).logits)
    if recipe.lora:
        one, two = (spd.save_adapter(*each, tmp_path / "adapter").read_bytes() for each in (own, found))
        assert one == two
