"""Sensitivities and curves against brute force, their cost, and what a killed run leaves."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from elision import InputError, evaluate
from elision.spd import Recipe, SyncPlan, calibrate, curve, heal, scores, sensitivity, simulate, streams
from tests.spd.tiny import VOCABULARY, bits, left_padded, tiny, token_ids

DATA = [left_padded(), {"input_ids": token_ids(3, 7, seed=2)}]


@torch.no_grad()
def brute_force(model, batches, ranks: int, dropped) -> float:
    """Perplexity of the simulated model, by its own forward and one probability at a time."""
    with simulate(model, SyncPlan(ranks, tuple(dropped))):
        return one_by_one(model, batches)


def one_by_one(model, batches) -> float:
    """Perplexity of the model as it stands."""
    total, count = 0.0, 0
    for batch in batches:
        labels = batch.get("labels", batch["input_ids"])
        mask = batch.get("attention_mask", torch.ones_like(labels))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        log_probabilities = model(**inputs).logits.double().log_softmax(-1)
        for row, t in itertools.product(range(labels.shape[0]), range(1, labels.shape[1])):
            if labels[row, t] != -100 and mask[row, t] and mask[row, t - 1]:
                total -= log_probabilities[row, t - 1, labels[row, t]].item()
                count += 1
    return torch.tensor(total / count, dtype=torch.float64).exp().item()


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite", "opt"])  # masks differ by layer in qwen2
def test_sensitivities_are_those_of_brute_force(family):
    model = tiny(family)
    measured = sensitivity(model, DATA, 3, quiet=True)
    expected = [brute_force(model, DATA, 3, range(first, 3)) for first in range(4)]
    assert measured.perplexities == pytest.approx(expected, rel=1e-11)
    assert measured.dense == pytest.approx(brute_force(model, DATA, 1, ()), rel=1e-11)
    assert measured.blocks == pytest.approx([expected[i] - expected[i + 1] for i in range(3)], abs=1e-8)
    assert sorted(measured.order, key=lambda block: measured.blocks[block]) == list(measured.order)
    assert len(set(expected)) == 4


@pytest.mark.parametrize("order", [(2, 0, 1), (1,), ()])
def test_the_curve_is_that_of_brute_force(order):
    model = tiny("llama")
    expected = [brute_force(model, DATA, 6, order[:k]) for k in range(len(order) + 1)]
    assert curve(model, DATA, 6, order, quiet=True) == pytest.approx(expected, rel=1e-11)


def test_labels_say_what_is_scored_and_padding_side_does_not_matter():
    model = tiny("llama")
    ids = token_ids(2, 8)
    labels = ids.clone()
    labels[:, :5] = -100
    labels[1] = -100
    batches = [{"input_ids": ids, "labels": labels}]
    assert sensitivity(model, batches, 3, quiet=True).dense == pytest.approx(brute_force(model, batches, 1, ()))
    pad = torch.zeros(2, 3, dtype=torch.long)
    sides = []
    for parts in ((pad, ids), (ids, pad)):
        mask = torch.cat([torch.zeros_like(p) if p is pad else torch.ones_like(p) for p in parts], 1)
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        batch = {"input_ids": torch.cat(parts, 1), "attention_mask": mask, "position_ids": position_ids}
        sides.append(sensitivity(model, [batch], 3, quiet=True).perplexities)
    assert sides[0] == pytest.approx(sides[1], rel=1e-11)
    assert sides[0] == pytest.approx(sensitivity(model, [{"input_ids": ids}], 3, quiet=True).perplexities, rel=1e-11)


def test_what_is_none_in_a_batch_is_not_there():
    ids = token_ids(2, 9)
    whole = [{"input_ids": ids}] * 2
    nothing = dict.fromkeys(("attention_mask", "labels", "position_ids"))
    model = tiny("llama")
    assert sensitivity(model, [{"input_ids": ids, **nothing}] * 2, 3, quiet=True) == sensitivity(
        model, whole, 3, quiet=True
    )
    assert evaluate.row_losses(model, [{"input_ids": ids, **nothing}]) == evaluate.row_losses(model, whole[:1])


def test_the_dense_prefix_is_computed_once():
    layers = 6
    model = tiny("llama", num_hidden_layers=layers)
    calls = {"dense": [], "noted": [], "dropped": []}

    def count(module, args, output):
        forward = vars(module).get("forward")
        kind = "dense" if forward is None else "dropped" if isinstance(forward, partial) else "noted"
        calls[kind].append(module.self_attn.layer_idx)

    handles = [layer.register_forward_hook(count) for layer in model.model.layers]
    sensitivity(model, DATA[1:], 3, quiet=True)
    for handle in handles:
        handle.remove()
    assert calls["dropped"] == [j for j in range(layers) for _ in range(j + 1)]
    assert calls["dense"] == calls["noted"] == list(range(layers))  # noting arguments costs nothing
    assert (len(calls["dropped"]) + layers) / layers == layers / 2 + 1.5


def test_calibrate_plans_the_longest_prefix_within_the_limit():
    model = tiny("llama", num_hidden_layers=5)
    measured = sensitivity(model, DATA, 3, quiet=True)
    losses = curve(model, DATA, 3, measured.order, quiet=True)
    increases = [loss / losses[0] - 1 for loss in losses]
    for limit in (0.0, 0.01, 0.3, *(increase * 1.0001 for increase in increases if increase > 0), 1e9):
        plan = calibrate(model, iter(DATA), 3, max_loss=limit, quiet=True)
        count = len(plan.dropped)
        assert plan.dropped == tuple(sorted(measured.order[:count]))
        assert increases[count] <= limit and all(increase > limit for increase in increases[count + 1 :])
    assert plan.calibration is not None and count == 5
    assert plan.calibration.sensitivities == measured.blocks and plan.calibration.perplexities == losses
    assert calibrate(model, DATA, 3, quiet=True) == calibrate(model, DATA, 3, max_loss=0.01, quiet=True)
    with simulate(model, plan):
        pass


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.3, 2), (0.7, 4), (1.0, 5)])
def test_calibrate_drops_the_share_asked_for(share, count):
    plan = calibrate(tiny("llama", num_hidden_layers=5), DATA, 3, drop=share, quiet=True)
    assert plan.calibration is not None
    assert plan.dropped == tuple(sorted(plan.calibration.order[:count]))


def test_the_model_is_left_as_it_was():
    model = tiny("llama").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state, attributes = bits(model), [set(vars(module)) for module in model.modules()]
    calibrate(model, DATA, 3, quiet=True)
    assert [module.training for module in model.modules()] == modes
    assert bits(model) == state and [set(vars(module)) for module in model.modules()] == attributes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off_while_measuring():
    model = tiny("opt", dropout=0.5, attention_dropout=0.5).train()
    first = sensitivity(model, DATA, 3, quiet=True)
    assert first == sensitivity(model.eval(), DATA, 3, quiet=True)


class TestStateFile:
    def test_what_is_measured_is_not_measured_again(self, tmp_path, monkeypatch):
        model, state = tiny("llama"), tmp_path / "state.json"
        first = sensitivity(model, DATA, 3, state=state, quiet=True)
        before = state.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(streams, "_sums", None)
            assert sensitivity(model, DATA, 3, state=state, quiet=True) == first
        assert state.read_bytes() == before
        assert sensitivity(model, DATA, 6, state=state, quiet=True) != first

    @pytest.mark.parametrize("what", ["weights", "data", "labels", "config"])
    def test_another_measurement_does_not_find_it(self, what, tmp_path):
        model, state = tiny("llama"), tmp_path / "state.json"
        first = sensitivity(model, DATA[1:], 3, state=state, quiet=True)
        ids = DATA[1]["input_ids"]
        batch = {"weights": {}, "data": {"input_ids": ids.flip(1)}, "labels": {"labels": ids.roll(1, 0)}}.get(what, {})
        if what == "weights":
            with torch.no_grad():
                model.model.layers[2].mlp.down_proj.weight[0, 0] += 1.0
        if what == "config":
            model = tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 10.0})
            assert bits(model) == bits(tiny("llama"))
        second = sensitivity(model, [{**DATA[1], **batch}], 3, state=state, quiet=True)
        assert second != first
        assert second == sensitivity(model, [{**DATA[1], **batch}], 3, quiet=True)
        assert len(json.loads(state.read_text())["losses"]) == 2

    def test_a_file_that_is_not_a_state_is_refused_and_kept(self, tmp_path):
        path = tmp_path / "state.json"
        for text, match in (('{"version": 1', "is not JSON"), ('{"ranks": 8}', "was not written by a calibration")):
            path.write_text(text)
            with pytest.raises(InputError, match=f"state file .*state.json {match}"):
                sensitivity(tiny("llama"), DATA, 3, state=path, quiet=True)
            assert path.read_text() == text

    def test_killed_and_run_again_it_writes_the_same_bytes(self, tmp_path):
        def start(folder: Path) -> subprocess.Popen:
            folder.mkdir(exist_ok=True)
            return subprocess.Popen([sys.executable, "-m", "tests.spd.calibrate_slowly", str(folder)], env=environment)

        root = Path(__file__).parents[2]
        paths = [str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        whole, killed = start(tmp_path / "whole"), start(tmp_path / "killed")
        state = tmp_path / "killed" / "state.json"
        try:
            deadline = time.monotonic() + 120
            while not (state.exists() and "], [" in " ".join(state.read_text().split())):  # two batches are in
                assert time.monotonic() < deadline and killed.poll() is None
                time.sleep(0.02)
            killed.send_signal(signal.SIGKILL)
            assert killed.wait(60) == -signal.SIGKILL
            assert not (tmp_path / "killed" / "plan.json").exists()
            assert start(tmp_path / "killed").wait(120) == 0
            assert whole.wait(120) == 0
        finally:
            whole.kill()
            killed.kill()
        for name in ("plan.json", "state.json"):
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert SyncPlan.load(tmp_path / "killed" / "plan.json").ranks == 3


class TestRefusals:
    @pytest.mark.parametrize(
        ("match", "batches"),
        [
            ("data holds no batches", []),
            ("batch 0 has no input_ids", [{"labels": token_ids()}]),
            ("batch 0 has no input_ids", ["text"]),
            ("batch 1 has no input_ids", [{"input_ids": token_ids()}, {"input_ids": token_ids().float()}]),
            ("batch 0: position_ids has shape", [{"input_ids": token_ids(), "position_ids": torch.arange(8)[None]}]),
            ("batch 0: labels has shape", [{"input_ids": token_ids(), "labels": token_ids()[:, 1:]}]),
            (f"input_ids has token {VOCABULARY}", [{"input_ids": token_ids() * 0 + VOCABULARY}]),
            ("labels has token -1", [{"input_ids": token_ids(), "labels": token_ids() * 0 - 1}]),
            ("every label is -100", [{"input_ids": token_ids(), "labels": token_ids() * 0 - 100}]),
            ("every label is -100 or padding", [{"input_ids": token_ids(2, 1)}]),
        ],
    )
    def test_data_without_a_use(self, match, batches, tmp_path):
        for measure in (sensitivity, calibrate):
            with pytest.raises(InputError, match=match) as caught:
                measure(tiny("llama"), batches, 3, state=tmp_path / "state.json", quiet=True)
            assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())

    def test_rows_beyond_a_table_of_positions(self):
        long = [{"input_ids": token_ids(2, 65)}]
        uses = (
            lambda model: calibrate(model, long, 3, quiet=True),
            lambda model: heal(model, SyncPlan(3, (1,)), long * 2, quiet=True),
            lambda model: evaluate.loss(model, long),
        )
        for use in uses:
            with pytest.raises(InputError, match=r"^(a batch|batch 0) has 65 tokens, this OPT model has 64 positions"):
                use(tiny("opt"))
        use(tiny("llama"))  # rotations know no end
        mask = torch.ones(2, 65, dtype=torch.long)
        mask[:, 0] = 0  # nor does padding take a position
        calibrate(tiny("opt"), [{**long[0], "attention_mask": mask}], 3, quiet=True)

    @pytest.mark.parametrize(
        ("match", "limits"),
        [
            ("both given", {"max_loss": 0.1, "drop": 0.5}),
            ("drop=1.5 is not a share", {"drop": 1.5}),
            ("max_loss=-0.1 is not", {"max_loss": -0.1}),
            ("max_loss=nan is not", {"max_loss": float("nan")}),
        ],
    )
    def test_limits_out_of_range(self, match, limits):
        with pytest.raises(InputError, match=match):
            calibrate(tiny("llama"), DATA, 3, quiet=True, **limits)

    @pytest.mark.parametrize("ranks", [0, 4, -1])
    def test_ranks_that_are_not_allowed(self, ranks):
        with pytest.raises(InputError, match=f"ranks={ranks}"):
            calibrate(tiny("llama"), DATA, ranks, quiet=True)

    def test_an_order_that_is_not_of_this_model(self):
        with pytest.raises(InputError, match="dropped block 3 does not exist"):
            curve(tiny("llama"), DATA, 3, (0, 3), quiet=True)

    @pytest.mark.parametrize("measured", [sensitivity, scores, partial(curve, order=(0,)), calibrate])
    def test_a_healed_model_without_its_plan(self, measured):
        healed = heal(tiny("llama"), SyncPlan(3, (1,)), DATA, recipe=Recipe(epochs=1), quiet=True)
        with pytest.raises(InputError, match=r"model has blocks \[1\] healed or regrouped already: load the original"):
            measured(healed.model, DATA, ranks=3, quiet=True)

    def test_a_model_that_is_under_simulation(self):
        model = tiny("llama")
        with (
            simulate(model, SyncPlan(3, (1,))),
            pytest.raises(InputError, match="block 1's forward is replaced already"),
        ):
            sensitivity(model, DATA, 3, quiet=True)

    def test_a_loss_that_is_not_a_number(self):
        model = tiny("llama")
        nn.init.constant_(model.lm_head.weight, float("nan"))
        with pytest.raises(InputError, match="loss of nan per token is out of range"):
            sensitivity(model, DATA, 3, quiet=True)


def test_the_bar_goes_to_the_error_stream(capsys):
    calibrate(tiny("llama"), DATA, 3)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Sync sensitivity, 3 ranks" in shown.err and "Zero-shot curve, 3 ranks" in shown.err
