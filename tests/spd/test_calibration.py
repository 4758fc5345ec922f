"""Plans from measurements: limits, tiers, predictions, mixtures, and what held-out text says of them."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from elision import InputError, spd
from elision.blocks import decoder
from elision.spd import SyncPlan, Workload, calibrate, calibrations, heal, proxies, simulate, streams
from elision.spd.calibration import Limit, _prefix, expected, predicted, tiers_of
from elision.spd.costs import Compute, Link
from elision.spd.plan import EXCLUSIVE
from elision.spd.streams import Quality, check_batches, last_hidden, measure, treat
from tests.spd.test_sensitivity import DATA, brute_force, one_by_one
from tests.spd.tiny import bits, corrected, tiny, token_ids

APART = [{"input_ids": token_ids(3, 8, seed=5)}]


@torch.no_grad()
def divergence(model, plan, batches, base=None) -> float:
    """Mean KL(dense || plan) over predicted tokens, by the models' own forward."""
    total, count = 0.0, 0
    for batch in batches:
        dense = (base or model)(**batch).logits.double().log_softmax(-1)[:, :-1]
        with simulate(model, plan):
            own = model(**batch).logits.double().log_softmax(-1)[:, :-1]
        total += (dense.exp() * (dense - own)).sum().item()
        count += dense.shape[0] * dense.shape[1]
    return total / count


class TestMeasure:
    plans = (
        SyncPlan(3, (0, 2)),
        SyncPlan(6, (0, 2)),
        SyncPlan(3, (2,), int8=(0,), skipped=(1,)),
        SyncPlan(3),
        SyncPlan(6, skipped=(2,)),
    )

    @pytest.mark.parametrize("family", ["llama", "opt"])
    def test_every_treatment_and_number_of_ranks_in_one_pass_is_brute_force(self, family):
        model = tiny(family)
        found = measure(decoder(model), DATA[1:], self.plans, quiet=True)
        for plan, quality in zip(self.plans, found, strict=True):
            with simulate(model, plan):
                expected = one_by_one(model, DATA[1:])
            assert quality.perplexity == pytest.approx(expected, rel=1e-11)
            assert quality.kl == pytest.approx(divergence(model, plan, DATA[1:]), abs=1e-11)
        assert len({quality.perplexity for quality in found}) == 5 and found[3].kl == 0.0
        assert all(quality.kl > 1e-4 for i, quality in enumerate(found) if i != 3)

    def test_corrections_of_a_plan_take_part(self):
        model = corrected("llama", 3, {1: "gain"})
        plan = SyncPlan(3, (1,), corrections={1: "gain"})
        with_it, without = measure(decoder(model), APART, [plan, SyncPlan(3, (1,))], quiet=True)
        assert with_it.kl == pytest.approx(divergence(model, plan, APART), abs=1e-11)
        assert with_it != without

    def test_divergence_is_taken_from_the_model_that_is_named(self):
        original, healed = tiny("llama"), tiny("llama")
        torch.nn.init.normal_(healed.model.layers[1].mlp.down_proj.weight, generator=torch.Generator().manual_seed(3))
        reference = last_hidden(decoder(original), APART)
        plan = SyncPlan(3, (1,))
        (quality,) = measure(decoder(healed), APART, [plan], reference=reference, quiet=True)
        assert quality.kl == pytest.approx(divergence(healed, plan, APART, original), abs=1e-11)
        assert quality.kl != pytest.approx(divergence(healed, plan, APART), rel=1e-3)

    def test_blocks_that_plans_share_are_computed_once(self):
        model = tiny("llama", num_hidden_layers=5)
        calls = []
        handles = [
            layer.register_forward_hook(lambda module, *_: calls.append(module.self_attn.layer_idx))
            for layer in model.model.layers
        ]
        spd.sensitivities(model, APART, (3, 6), quiet=True)
        for handle in handles:
            handle.remove()
        noted, dense, dropped = 5, 5, 2 * sum(range(1, 6))
        assert len(calls) == noted + dense + dropped


def test_several_numbers_of_ranks_are_measured_as_one_by_one():
    model = tiny("llama", num_hidden_layers=4)
    for method in ("sequential", "fisher"):
        together = calibrations(model, DATA, (3, 6), Limit(drop=0.5), method=method, held_out=APART, quiet=True)
        apart = [calibrate(model, DATA, n, drop=0.5, method=method, held_out=APART, quiet=True) for n in (3, 6)]
        assert list(together) == apart
        assert together[0].calibration.method == method and together[0].calibration != together[1].calibration


def test_a_model_that_a_device_map_put_on_one_device_is_calibrated_there(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    plain, placed = (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, **how)
        for how in ({}, {"device_map": {"": "cpu"}})
    )
    assert calibrate(placed, DATA, 3, quiet=True) == calibrate(plain, DATA, 3, quiet=True)


@pytest.mark.parametrize("method", ["sequential", "fisher"])
def test_a_model_that_a_device_map_offloads_to_disk_is_calibrated_to_the_same_numbers(method, tmp_path):
    tiny("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.1": "cpu"}
    places |= dict.fromkeys(("model.layers.0", "model.layers.2", "model.norm", "lm_head"), "disk")
    options = {"device_map": places, "offload_folder": tmp_path / "offloaded"}
    plain, placed = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64, **how) for how in ({}, options)
    )
    assert {parameter.is_meta for parameter in placed.parameters()} == {True, False}
    state, sizes = tmp_path / "state", []
    plans = []
    for model in (plain, placed, placed):
        where = None if len(plans) == 1 else state
        plans.append(calibrate(model, DATA, 3, drop=0.5, method=method, held_out=APART, state=where, quiet=True))
        sizes.append(len(json.loads(state.read_text())["losses"]))
    assert plans[0] == plans[1] == plans[2] and len(set(sizes)) == 1  # nor is it another model to the state
    assert torch.equal(placed(**DATA[0]).logits, plain(**DATA[0]).logits)  # accelerate's hooks are where they were
    for use in (
        lambda: heal(placed, plans[0], [*DATA, *DATA], state=tmp_path / "healing", quiet=True),
        lambda: simulate(placed, plans[0]),
    ):
        with pytest.raises(InputError, match=r"dispatched by accelerate, .* with elision\.spd\.open_streamed"):
            use()
    placed.model.layers[1]._hf_hook.execution_device = "cuda:1"
    with pytest.raises(InputError, match=r"is dispatched by accelerate over cpu, cuda:1: load it onto one device"):
        calibrate(placed, DATA, 3, quiet=True)


def test_held_out_text_says_how_far_the_prediction_is_off():
    model = tiny("llama", num_hidden_layers=4)
    plan = calibrate(model, DATA, 3, drop=0.5, held_out=APART, quiet=True)
    found, measured = plan.verified, plan.calibration
    assert found is not None and measured is not None
    assert found.dense == pytest.approx(brute_force(model, APART, 1, ()), rel=1e-11)
    assert found.planned == found.zero_shot == pytest.approx(brute_force(model, APART, 3, plan.dropped), rel=1e-11)
    assert found.predicted == pytest.approx(measured.perplexities[2] / measured.perplexities[0] - 1, rel=1e-12)
    assert found.predicted == pytest.approx(expected(plan), rel=1e-12)
    assert found.tokens == 21 and found.data != measured.data
    assert found.kl == pytest.approx(divergence(model, plan, APART), abs=1e-11)


CURVE = [Quality(10.0, 0.0), Quality(10.0, 0.1), Quality(10.5, 0.2), Quality(12.5, 0.6)]


class TestLimits:
    def test_healing_is_predicted_to_win_back_a_share(self):
        assert predicted(CURVE, (2, 0, 1), 2, {}) == CURVE[2]
        left = predicted(CURVE, (2, 0, 1), 3, {1: "b2b"})
        assert left == (pytest.approx(10.5 + 0.25 * 2.0), pytest.approx(0.2 + 0.25 * 0.4))

    def test_what_an_earlier_healing_won_back_is_what_is_counted_on(self):
        measured = Limit(max_loss=0.05, healing=True, recovered={"b2b": 0.9})
        assert measured.count(CURVE, dict.fromkeys(range(3), "b2b"), (2, 0, 1)) == 3
        assert Limit(max_loss=0.05, healing=True).count(CURVE, dict.fromkeys(range(3), "b2b"), (2, 0, 1)) == 2
        assert measured.recovered == {"correct": 0.35, "b2b": 0.9, "hg+b2b": 0.75}
        model = tiny("llama")
        plan = calibrate(model, APART, 3, drop=1.0, healing=True, recovered={"b2b": 0.9}, quiet=True)
        assert plan.calibration is not None and plan.calibration.recovered == measured.recovered
        bare = calibrate(model, APART, 3, drop=1.0, quiet=True)
        assert bare.calibration is not None and bare.calibration.recovered is None
        assert expected(plan) == pytest.approx(0.1 * expected(bare), rel=1e-9)

    @pytest.mark.parametrize(
        ("limit", "healing", "count"),
        [
            (Limit(), {}, 1),
            (Limit(max_loss=0.05), {}, 2),
            (Limit(max_loss=0.14), {}, 2),
            (Limit(max_loss=0.14), {1: "b2b"}, 3),
            (Limit(max_kl=0.15), {}, 1),
            (Limit(max_kl=0.6), {}, 3),
            (Limit(max_kl=0.4), {1: "b2b"}, 3),
            (Limit(drop=0.4), {}, 1),
            (Limit(tiers=(0.1, 0.2)), {}, 3),
            (Limit(tiers=(0.1, 0.2), drop=0.7), {}, 2),
        ],
    )
    def test_the_longest_prefix_within_them(self, limit, healing, count):
        assert limit.count(CURVE, healing, (2, 0, 1)) == count

    def test_tiers_are_those_of_the_paper(self):
        assert tiers_of((0.05, 0.5, 3.0, -1.0, 0.1), 10.0, (0.01, 0.1)) == ("ISB", "SB", "ESB", "ISB", "ISB")

    def test_tiers_say_how_blocks_are_to_be_healed(self):
        model = tiny("llama", num_hidden_layers=5)
        bare = calibrate(model, DATA, 3, drop=1.0, quiet=True).calibration
        assert bare is not None
        shares = sorted(score / bare.perplexities[0] for score in bare.sensitivities)
        t1, t2 = max((shares[0] + shares[1]) / 2, 0.0), (shares[3] + shares[4]) / 2
        plan = calibrate(model, DATA, 3, tiers=(t1, t2), quiet=True)
        assert plan.dropped == (0, 1, 2, 3, 4) and plan.calibration is not None
        assert plan.healing[bare.order[-1]] == "hg+b2b" and plan.calibration.tiers[bare.order[-1]] == "ESB"
        wanted = {"SB": "b2b", "ESB": "hg+b2b"}
        assert dict(plan.healing) == {i: wanted[t] for i, t in enumerate(plan.calibration.tiers) if t in wanted}
        assert plan.calibration.thresholds == (t1, t2)
        fewer = calibrate(model, DATA, 3, tiers=(t1, t2), drop=0.4, quiet=True)
        assert set(fewer.healing) <= set(fewer.dropped) == set(bare.order[:2])

    @pytest.mark.parametrize(
        ("limit", "count", "healing"),
        [
            (0.05, 2, {}),  # nothing need be healed
            (0.04, 2, {0: "b2b"}),  # the one that costs
            (0.131, 3, {1: "b2b"}),
            (0.07, 3, {0: "b2b", 1: "b2b"}),
            (0.01, 1, {}),
        ],
    )
    def test_healing_lets_more_be_dropped_and_no_more_than_needed_is_healed(self, limit, count, healing):
        plan, loss = _prefix(3, Limit(max_loss=limit, healing=True), (2, 0, 1), CURVE, (), 3)
        assert plan == SyncPlan(3, (2, 0, 1)[:count], healing=healing) and plan.healing == healing
        assert loss <= limit + 1e-12

    @pytest.mark.parametrize(
        ("match", "values"),
        [
            ("max_loss=0.1 and max_kl=0.1 are both given", {"max_loss": 0.1, "max_kl": 0.1}),
            ("max_kl=-1 is not a divergence", {"max_kl": -1}),
            ("tiers=0.2,0.1 are not two ascending", {"tiers": (0.2, 0.1)}),
            ("tiers=nan,nan are not", {"tiers": (float("nan"),) * 2}),
            ("recovered names 'sleep', which is no treatment", {"recovered": {"sleep": 0.5}}),
            ("recovered 1.5 of b2b is not a share", {"recovered": {"b2b": 1.5}}),
        ],
    )
    def test_values_out_of_range(self, match, values):
        with pytest.raises(InputError, match=match):
            Limit(**values)


@pytest.mark.parametrize("method", ["sequential", "fisher"])
def test_weights_are_hashed_once_however_much_is_measured(method, tmp_path, monkeypatch):
    hashed = []
    whole = streams.hash_weights
    monkeypatch.setattr(streams, "hash_weights", lambda *given: hashed.append(given) or whole(*given))
    work = Workload(Link(3, alpha=0.0, beta=1e-3), layers=3, hidden=24, tokens=9)
    settings = {"method": method, "workload": work, "held_out": APART, "quiet": True}
    first = calibrate(tiny("llama"), DATA, 3, state=tmp_path / "state.json", **settings)
    assert len(hashed) == 1
    assert calibrate(tiny("llama"), DATA, 3, state=tmp_path / "state.json", **settings) == first
    assert calibrate(tiny("llama"), DATA, 3, **settings) == first and len(hashed) == 2


class TestMixtures:
    slow = Link(3, alpha=0.0, beta=1e-3)  # every byte counts, so int8 saves

    def test_treatments_compete_and_the_whole_is_measured(self):
        model = tiny("llama", num_hidden_layers=4)
        before = bits(model)
        work = Workload(self.slow, layers=4, hidden=24, tokens=9)
        plan = calibrate(model, DATA, 3, max_loss=0.05, workload=work, held_out=APART, quiet=True)
        assert plan.verified is not None
        (quality, dense) = measure(decoder(model), check_batches(DATA, model.config), [plan, SyncPlan(3)], quiet=True)
        assert quality.perplexity / dense.perplexity - 1 == pytest.approx(plan.verified.predicted, rel=1e-9)
        assert plan.verified.predicted <= 0.05 and bits(model) == before
        more = calibrate(model, DATA, 3, max_loss=10.0, workload=work, treatments=EXCLUSIVE, quiet=True)
        how = [plan.treatment(block) for block in range(4)], [more.treatment(block) for block in range(4)]
        assert work.saving(how[1]).seconds > work.saving(how[0]).seconds >= 0
        assert set(how[1]) <= {"dropped", "skipped"}  # all that can be saved

    @pytest.mark.parametrize("method", ["single", "fisher"])
    def test_attention_is_neither_measured_nor_skipped_unasked(self, method, monkeypatch):
        model, seen = tiny("llama"), []
        monkeypatch.setattr(streams, "treat", lambda block, way, *rest: seen.append(way) or treat(block, way, *rest))
        monkeypatch.setattr(proxies, "treat", streams.treat)
        work = Workload(self.slow, layers=3, hidden=24, tokens=9, compute=Compute(1.0, 1.0))
        for treatments in ((), EXCLUSIVE):
            given = {"treatments": treatments} if treatments else {}
            plan = calibrate(model, DATA, 3, max_loss=10.0, workload=work, method=method, quiet=True, **given)
            used = {way[0] for way in seen if way is not None}
            assert used == set(treatments or ("dropped", "int8")) and bool(plan.skipped) == bool(treatments)
            seen.clear()

    @pytest.mark.parametrize(
        ("match", "work", "limits"),
        [
            ("do not bother", Workload(Link(3, 0.0, 0.0), 3, 24, 1), {}),
            ("are not the 6 of the link", Workload(Link(6, 1e-5, 0.0), 3, 24, 1), {}),
            ("workload is of 4 blocks", Workload(Link(3, 1e-5, 0.0), 4, 24, 1), {}),
            ("mixed within max_loss alone", Workload(Link(3, 1e-5, 0.0), 3, 24, 1), {"drop": 0.5}),
            ("treatments dropped are given without a workload", None, {"treatments": ["dropped"]}),
            ("treatments name 'sleep': give some of dropped, int8, skipped", None, {"treatments": ["sleep"]}),
            ("treatments name none", None, {"treatments": []}),
        ],
    )
    def test_what_does_not_fit_is_refused(self, match, work, limits):
        with pytest.raises(InputError, match=match):
            calibrate(tiny("llama"), DATA, 3, workload=work, quiet=True, **limits)
