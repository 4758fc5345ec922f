"""A plan by hand, on disk, and against a model."""

from __future__ import annotations

import dataclasses
import json

import pytest

from elision import InputError
from elision.blocks import decoder
from elision.spd import Calibration, ModelFacts, SyncPlan
from elision.spd.simulate import facts
from tests.spd.tiny import tiny

FACTS = ModelFacts("llama", layers=3, heads=6, kv_heads=3, head_dim=4, hidden=24, intermediate=40)
MEASURED = Calibration(
    data="0123456789abcdef",
    sensitivities=(0.1 + 0.2, -0.01, 2.5),
    order=(1, 0, 2),
    perplexities=(12.0, 11.99, 12.3, 15.0),
    versions={"elision": "0.1.0"},
)
WHOLE = SyncPlan(ranks=3, dropped=(1, 0), model=FACTS, calibration=MEASURED)


def refused(match: str, call, *arguments, **named) -> None:
    with pytest.raises(InputError, match=match) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)


def test_a_plan_by_hand_needs_ranks_and_blocks_only():
    plan = SyncPlan(ranks=8, dropped=(9, 4, 7))
    assert plan.dropped == (4, 7, 9)
    assert plan == SyncPlan(8, [4, 7, 9]) and hash(plan) == hash(SyncPlan(8, (4, 7, 9)))
    assert plan.to_dict() == {"version": 1, "ranks": 8, "dropped": [4, 7, 9]}


TREATED = SyncPlan(8, (4, 7, 11), corrections={11: "local_o", 4: "gain"}, healed=(7, 4), int8=(5, 3))


@pytest.mark.parametrize("plan", [SyncPlan(1), SyncPlan(8, (4, 7, 9)), WHOLE, TREATED])
def test_what_is_saved_is_loaded_and_saved_again_in_the_same_bytes(plan, tmp_path):
    first = plan.save(tmp_path / "new" / "plan.json")
    again = SyncPlan.load(first)
    assert again == plan
    assert again.save(tmp_path / "again.json").read_bytes() == first.read_bytes()
    assert SyncPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan  # as in a model's config.json


def test_treatments_are_part_of_the_plan():
    assert TREATED.to_dict() == {
        "version": 1,
        "ranks": 8,
        "dropped": [4, 7, 11],
        "corrections": {"4": "gain", "11": "local_o"},
        "healed": [4, 7],
        "int8": [3, 5],
    }
    assert TREATED.healed == (4, 7) and list(TREATED.corrections) == [4, 11]
    assert WHOLE.original_weights and not TREATED.original_weights
    assert not dataclasses.replace(TREATED, healed=()).original_weights
    assert dataclasses.replace(TREATED, corrections={}) != TREATED and hash(TREATED)


def test_facts_are_read_off_the_model():
    assert facts(decoder(tiny("llama"))) == FACTS
    opt = facts(decoder(tiny("opt")))
    assert opt == ModelFacts("opt", layers=3, heads=6, kv_heads=6, head_dim=4, hidden=24, intermediate=40)


def test_a_plan_fits_its_model_and_names_the_fact_that_differs_in_another():
    WHOLE.check(FACTS)
    for field in dataclasses.fields(ModelFacts):
        other = dataclasses.replace(FACTS, **{field.name: "opt" if field.name == "type" else 12})
        refused(f"with {field.name} .*, this model has {field.name} (opt|12): calibrate", WHOLE.check, other)


def test_a_plan_by_hand_fits_every_model_that_has_its_blocks():
    SyncPlan(2, (2,)).check(FACTS)
    refused("dropped block 3 does not exist: name blocks from 0 to 2", SyncPlan(2, (0, 3)).check, FACTS)


@pytest.mark.parametrize(
    ("match", "values"),
    [
        ("ranks 0 is not a whole number of at least 1", {"ranks": 0}),
        ("ranks True is not", {"ranks": True}),
        ("ranks 2.0 is not", {"ranks": 2.0}),
        ("dropped block -1 is not", {"ranks": 2, "dropped": (-1,)}),
        ("dropped block '3' is not", {"ranks": 2, "dropped": ("3",)}),
        ("dropped 3 is not a list", {"ranks": 2, "dropped": 3}),
        ("dropped block 4 is given twice", {"ranks": 2, "dropped": (4, 1, 4)}),
        ("healed block 4 is given twice", {"ranks": 2, "dropped": (4,), "healed": (4, 4)}),
        ("healed block 1 keeps its sync", {"ranks": 2, "dropped": (4,), "healed": (1, 4)}),
        ("corrections block 1 keeps its sync", {"ranks": 2, "dropped": (4,), "corrections": {1: "gain"}}),
        ("correction 'bias' is not known: use one of constant, gain", {"ranks": 2, "corrections": {1: "bias"}}),
        ("int8 block 4 is dropped too", {"ranks": 2, "dropped": (4,), "int8": (1, 4)}),
        ("int8 block 3 does not exist", {"ranks": 2, "int8": (3,), "model": FACTS}),
        ("corrections block '1' is not", {"ranks": 2, "corrections": {"1": "gain"}}),
        (r"corrections \['gain'\] is not a mapping", {"ranks": 2, "corrections": ["gain"]}),
        ("dropped block 7 does not exist", {"ranks": 3, "dropped": (7,), "model": FACTS}),
        (
            "calibration is of 3 blocks, layers is 4",
            {"ranks": 3, "model": dataclasses.replace(FACTS, layers=4), "calibration": MEASURED},
        ),
    ],
)
def test_values_that_make_no_plan(match, values):
    refused(match, SyncPlan, **values)


@pytest.mark.parametrize(
    ("match", "values"),
    [
        ("does not name each of 3 blocks once", {"order": (0, 1, 1)}),
        ("does not name each of 3 blocks once", {"order": (0, 1)}),
        ("perplexities has 3 values for 3 blocks", {"perplexities": (1.0, 2.0, 3.0)}),
        ("sensitivities holds nan", {"sensitivities": (1.0, float("nan"), 2.0)}),
        ("sensitivities 'abc' is not a list", {"sensitivities": "abc"}),
        ("data 3 is not a fingerprint", {"data": 3}),
        ("is not a mapping of names", {"versions": ["torch"]}),
    ],
)
def test_measurements_that_do_not_fit_each_other(match, values):
    refused(match, dataclasses.replace, MEASURED, **values)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("has version 2, this elision reads 1", {"version": 2}),
        ("unknown field 'blocks': use calibration, corrections, dropped, healed, int8, model, ranks", {"blocks": [1]}),
        ("ranks None is not a whole number", {"ranks": None}),
        ("corrections block 'x' is not", {"corrections": {"x": "gain"}}),
        ("dropped block 1.5 is not", {"dropped": [1.5]}),
        ("model is 7, not an object", {"model": 7}),
        ("model has an unknown field 'depth'", {"model": {"depth": 3}}),
        ("model lacks head_dim, heads, hidden, intermediate, kv_heads, layers", {"model": {"type": "llama"}}),
        ("model: layers 0 is not", {"model": {**WHOLE.to_dict()["model"], "layers": 0}}),
        ("calibration: order .* does not name", {"calibration": {**WHOLE.to_dict()["calibration"], "order": []}}),
    ],
)
def test_a_file_that_was_tampered_with(match, change, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**WHOLE.to_dict(), **change}))
    refused(f"plan .*plan.json.*{match}", SyncPlan.load, path)


def test_files_that_are_no_plan(tmp_path):
    refused("plan .*none.json is not a file", SyncPlan.load, tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(WHOLE.to_dict())[:-20])
    refused("broken.json is not JSON", SyncPlan.load, broken)
    broken.write_text("[1, 2]")
    refused("broken.json holds list, not an object", SyncPlan.load, broken)
    broken.write_text('{"version": 1, "dropped": []}')
    refused("broken.json lacks ranks", SyncPlan.load, broken)
