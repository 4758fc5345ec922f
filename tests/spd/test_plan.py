"""A plan by hand, on disk, and against a model."""

from __future__ import annotations

import dataclasses
import json

import jsonschema
import pytest

from elision import InputError
from elision.blocks import decoder
from elision.spd import Calibration, ModelFacts, SyncPlan, Verified
from elision.spd.plan import PARTS, SCHEMA
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


TREATED = SyncPlan(
    8,
    (4, 7, 11),
    corrections={11: "local_o", 4: "gain"},
    healed=(7, 4),
    int8=(5, 3),
    skipped=(6,),
    heads={11: (2, 0, 3, 1)},
    healing={11: "hg+b2b"},
)
FULL = dataclasses.replace(
    WHOLE,
    calibration=dataclasses.replace(
        MEASURED,
        method="fisher",
        kls=(0.0, 0.1, 0.2, 0.3),
        thresholds=(0.01, 0.1),
        tiers=("SB", "ISB", "ESB"),
        recovered={"b2b": 0.6},
    ),
    verified=Verified("fedcba9876543210", 99, dense=12.0, zero_shot=14.0, planned=12.5, kl=0.01, predicted=0.03),
)


@pytest.mark.parametrize("plan", [SyncPlan(1), SyncPlan(8, (4, 7, 9)), WHOLE, TREATED, FULL])
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
        "skipped": [6],
        "heads": {"11": [2, 0, 3, 1]},
        "healing": {"11": "hg+b2b"},
    }
    assert [TREATED.treatment(block) for block in (2, 3, 4, 6)] == ["dense", "int8", "dropped", "skipped"]
    assert TREATED.healed == (4, 7) and list(TREATED.corrections) == [4, 11]
    assert WHOLE.original_weights and not TREATED.original_weights
    assert not dataclasses.replace(TREATED, healed=(), heads={}).original_weights
    assert not dataclasses.replace(TREATED, healed=(), corrections={}).original_weights
    assert dataclasses.replace(TREATED, healed=(), corrections={}, heads={}).original_weights
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
        ("skipped block 4 is dropped too", {"ranks": 2, "dropped": (4,), "skipped": (4,)}),
        ("skipped block 4 is int8 too", {"ranks": 2, "int8": (4,), "skipped": (4,)}),
        ("skipped block 3 does not exist", {"ranks": 2, "skipped": (3,), "model": FACTS}),
        ("healing 'sleep' is not known: use one of correct, b2b, hg", {"ranks": 2, "healing": {1: "sleep"}}),
        ("healing block 1 keeps its sync", {"ranks": 2, "dropped": (4,), "healing": {1: "b2b"}}),
        ("heads block 1 keeps its sync", {"ranks": 2, "heads": {1: (1, 0)}}),
        (r"heads of block 1 are \[1, 1\], no permutation", {"ranks": 2, "dropped": (1,), "heads": {1: (1, 1)}}),
        (
            "heads of block 1 are 2, the model has 6",
            {"ranks": 2, "dropped": (1,), "heads": {1: (1, 0)}, "model": FACTS},
        ),
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
        ("method 3 is not a name", {"method": 3}),
        ("kls has 2 values for 3 blocks", {"kls": (0.0, 1.0)}),
        ("are not two numbers and one of ISB, SB, ESB a block", {"thresholds": (0.1, 0.2)}),
        ("are not two numbers and one of", {"thresholds": (0.1, 0.2), "tiers": ("ISB", "SB", "XSB")}),
        ("is not a mapping of names", {"versions": ["torch"]}),
        ("is no mapping of correct, b2b, hg", {"recovered": {"sleep": 0.5}}),
        ("recovered holds 'much', not a finite number", {"recovered": {"b2b": "much"}}),
    ],
)
def test_measurements_that_do_not_fit_each_other(match, values):
    refused(match, dataclasses.replace, MEASURED, **values)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("has version 2, this elision reads 1", {"version": 2}),
        ("unknown field 'blocks': use calibration, corrections, dropped, heads, healed, healing", {"blocks": [1]}),
        ("ranks None is not a whole number", {"ranks": None}),
        ("corrections block 'x' is not", {"corrections": {"x": "gain"}}),
        ("dropped block 1.5 is not", {"dropped": [1.5]}),
        ("model is 7, not an object", {"model": 7}),
        ("model has an unknown field 'depth'", {"model": {"depth": 3}}),
        ("model lacks head_dim, heads, hidden, intermediate, kv_heads, layers", {"model": {"type": "llama"}}),
        ("model: layers 0 is not", {"model": {**WHOLE.to_dict()["model"], "layers": 0}}),
        (
            "calibration: tiers 5 is not a list of names",
            {"calibration": {**WHOLE.to_dict()["calibration"], "tiers": 5}},
        ),
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


class TestSchema:
    schema = json.loads(SCHEMA.read_text())

    @pytest.mark.parametrize("plan", [SyncPlan(1), SyncPlan(8, (4, 7, 9)), WHOLE, TREATED, FULL])
    def test_plans_fit_it(self, plan):
        jsonschema.Draft202012Validator.check_schema(self.schema)
        jsonschema.validate(plan.to_dict(), self.schema)

    @pytest.mark.parametrize(
        "change",
        [
            {"version": 2},
            {"ranks": 0},
            {"blocks": [1]},
            {"dropped": [-1]},
            {"healing": {"1": "sleep"}},
            {"heads": {"x": [0]}},
            {"model": {"type": "llama"}},
            {"calibration": {**FULL.to_dict()["calibration"], "tiers": ["XSB"]}},
            {"verified": {"dense": 1.0}},
        ],
    )
    def test_what_load_refuses_does_not(self, change):
        changed = {**FULL.to_dict(), **change}
        with pytest.raises(InputError):
            SyncPlan.from_dict(changed)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed, self.schema)

    def test_it_has_every_field(self):
        for kind, schema in ((SyncPlan, self.schema), *((kind, self.schema["$defs"][n]) for n, kind in PARTS.items())):
            assert set(schema["properties"]) - {"version"} == {field.name for field in dataclasses.fields(kind)}


def test_what_was_verified_is_told_in_shares():
    verified = FULL.verified
    assert verified is not None
    assert verified.loss == pytest.approx(0.5 / 12) and verified.recovery == pytest.approx(0.75)
    assert dataclasses.replace(verified, zero_shot=11.0).recovery is None
    refused("tokens 0 is not", dataclasses.replace, verified, tokens=0)
    refused("verified holds nan", dataclasses.replace, verified, kl=float("nan"))
