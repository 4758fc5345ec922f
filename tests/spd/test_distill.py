"""Healing brings blocks closer to their teachers, on the streams it says, to the same bytes after a kill."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elision import InputError, evaluate
from elision.blocks import decoder
from elision.spd import (
    Recipe,
    SyncPlan,
    Verified,
    calibrate,
    carry_out,
    correct,
    distill,
    heal,
    regroup,
    simulate,
    student,
    uncorrect,
    ungroup,
)
from elision.spd.activations import sources
from tests.spd.tiny import bits, left_padded, tiny, token_ids

RANKS, ALL = 3, (0, 1, 2)
DATA = [{"input_ids": token_ids(4, 16, seed)} for seed in range(9)] + [left_padded((7, 16))]
PLAN = SyncPlan(RANKS, ALL)
QUICK = Recipe(epochs=2)


def layers(model) -> list[dict[str, bytes]]:
    return [bits(layer) for layer in decoder(model).model.get_decoder().layers]


@torch.no_grad()
def last_error(model, teacher, plan: SyncPlan, data=DATA) -> float:
    """Squared distance of the last block's output from the original model's, over real tokens, relative."""
    error = norm = 0.0
    for batch in data:
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        target = teacher(**batch, output_hidden_states=True).hidden_states
        with simulate(model, plan):
            out = model(**batch, output_hidden_states=True).hidden_states
        error += (out[-1] - target[-1])[real].square().sum().item()
        norm += (target[-1] - target[0])[real].square().sum().item()
    return error / norm


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_healing_brings_the_model_back_towards_itself(family):
    model, teacher = tiny(family), tiny(family)
    before = last_error(model, teacher, PLAN)
    healed = heal(model, PLAN, iter(DATA), recipe=Recipe(epochs=4), quiet=True)
    assert healed.model is model and healed.plan == SyncPlan(RANKS, ALL, healed=ALL)
    assert last_error(model, teacher, healed.plan) < 0.8 * before
    rest = {name: value for name, value in bits(model).items() if "layers" not in name}
    assert rest.items() <= bits(teacher).items()


def test_blocks_learn_from_the_student_stream_what_the_teacher_stream_became():
    """Every block's inputs and targets, seen from outside, are those of the two models' own forwards."""
    model, teacher, seen = tiny("llama"), tiny("llama"), []
    original = distill.distil

    def spy(student, inputs, targets, data, recipe):
        seen.append((student.block.index, inputs[-1].clone(), targets[-1].clone()))
        original(student, inputs, targets, data, recipe)

    real = DATA[-1]["attention_mask"].bool()
    for teacher_inputs in (False, True):
        model, seen[:] = tiny("llama"), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distill, "distil", spy)
            recipe = Recipe(epochs=1, teacher_inputs=teacher_inputs)
            healed = heal(model, SyncPlan(RANKS, (0, 2)), DATA, recipe=recipe, quiet=True)
        with torch.no_grad():
            target = teacher(**DATA[-1], output_hidden_states=True).hidden_states
            with healed.simulate():
                student = model(**DATA[-1], output_hidden_states=True).hidden_states
            inputs = target if teacher_inputs else student
            last = teacher.get_decoder().layers[2]
            outputs = []
            last.register_forward_hook(lambda module, args, out, kept=outputs: kept.append(out))
            teacher(**DATA[-1])
        assert [index for index, _, _ in seen] == [0, 2]
        for (index, x, t), expected in zip(seen, (target[1], outputs[0]), strict=True):
            torch.testing.assert_close(x[real], inputs[index][real], rtol=0, atol=1e-12)
            torch.testing.assert_close(t[real], expected[real], rtol=0, atol=1e-12)
        assert (student[2] - target[2])[real].abs().max() > 1e-3  # the two streams do differ


def test_the_loss_is_relative_to_what_the_block_adds_and_ignores_padding():
    model = tiny("granite")
    view = decoder(model)
    block, data = view.blocks[1], sources(view, DATA)
    learner = student.Student(block, SyncPlan(RANKS, (1,)))
    x, t = (torch.randn_like(data[-1].embedded) for _ in range(2))
    with simulate(model, SyncPlan(RANKS, (1,))), torch.no_grad():
        y = block.layer(x, **data[-1].kwargs[1])
    real = DATA[-1]["attention_mask"].bool()
    expected = (y - t)[real].square().sum() / (t - x)[real].square().sum()
    with torch.no_grad():
        assert learner.loss(x, t, data[-1]).item() == pytest.approx(expected.item(), rel=1e-12)


def test_only_the_chosen_blocks_change_and_the_rest_of_the_model_is_left_as_it_was():
    model = tiny("llama").train()
    for parameter in model.model.layers[2].parameters():
        parameter.requires_grad_(False)
    before, flags = layers(model), [parameter.requires_grad for parameter in model.parameters()]
    attributes = [set(vars(module)) for module in model.modules()]
    healed = heal(model, PLAN, DATA, blocks=[2], recipe=QUICK, quiet=True)
    after = layers(model)
    assert healed.plan.healed == (2,) and healed.plan.dropped == ALL
    assert after[:2] == before[:2] and all(after[2][name] != before[2][name] for name in before[2])
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training
    assert model is healed.model and vars(model).pop("save_pretrained")  # its own would lose the plan
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_corrections_take_part_and_are_trained():
    model = tiny("llama")
    treated = correct(model, PLAN, DATA, "gain", quiet=True)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if "spd_correction" in name}
    before = last_error(model, tiny("llama"), treated.plan)
    healed = heal(model, treated.plan, DATA, recipe=QUICK, quiet=True)
    assert healed.plan.corrections == treated.plan.corrections and healed.plan.healed == ALL
    assert last_error(model, tiny("llama"), healed.plan) < before
    assert all(not torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_weights_that_learned_beside_a_correction_keep_it():
    model = tiny("llama")
    fitted = correct(model, PLAN, DATA, "gain", blocks=[1], quiet=True)
    healed = heal(*fitted, DATA, blocks=[1, 2], recipe=Recipe(epochs=1), quiet=True)
    before = bits(model)
    for use in (lambda: uncorrect(*healed), lambda: correct(*healed, DATA, blocks=[1], quiet=True)):
        with pytest.raises(InputError, match="block 1 was healed beside its correction, which its weights need: leave"):
            use()
    for corrections in ({}, {1: "constant"}, {2: "gain"}):
        with pytest.raises(InputError, match=r"carried out on blocks \[1, 2\] of another model than this"):
            simulate(model, replace(healed.plan, corrections=corrections))
    assert bits(model) == before
    further = correct(*healed, DATA, blocks=[2], quiet=True)  # which learned without one
    for plan in (healed.plan, further.plan):
        simulate(model, plan).remove()
    assert uncorrect(*correct(tiny("llama"), PLAN, DATA, quiet=True)) == PLAN


def test_what_a_plan_still_has_to_heal_is_done_as_it_says():
    model, base = tiny("llama"), tiny("llama")
    healed = heal(
        model, SyncPlan(RANKS, ALL, healing={0: "correct", 1: "b2b", 2: "hg+b2b"}), DATA, recipe=QUICK, quiet=True
    )
    assert healed.plan == SyncPlan(RANKS, ALL, {0: "gain"}, healed=(1, 2), heads=healed.plan.heads)
    assert healed.plan.corrections == {0: "gain"} and set(healed.plan.heads) == {2} and not healed.plan.healing
    before, after = layers(base), layers(model)
    assert {name: value for name, value in after[0].items() if "spd_" not in name} == before[0]
    assert all(after[i][name] != value for i in (1, 2) for name, value in before[i].items())
    assert last_error(model, base, healed.plan) < last_error(base, tiny("llama"), PLAN)


def test_the_recipe_says_how_blocks_are_corrected():
    plan = SyncPlan(RANKS, (0, 1), healing={0: "correct", 1: "b2b"})
    found = heal(tiny("llama"), plan, DATA, recipe=Recipe(epochs=1, correction="constant"), quiet=True).plan
    assert found.corrections == {0: "constant", 1: "constant"} and found.healed == (1,)


def test_a_correction_is_fitted_to_the_stream_that_the_student_gets():
    """Block 1's constant is the mean of what its ranks miss behind a healed block 0, not behind the original one."""
    recipe = Recipe(epochs=1, lr=1e-9, correction="constant")  # what was fitted is hardly trained
    seen = []
    for blocks in ((0, 1), (1,)):
        model = tiny("opt")
        heal(model, SyncPlan(RANKS, (0, 1)), DATA, blocks=blocks, recipe=recipe, quiet=True)
        seen.append(model.state_dict()["model.decoder.layers.1.spd_correction.constant"])
    twin = tiny("opt")
    both = correct(twin, SyncPlan(RANKS, (0, 1)), DATA, "constant", quiet=True)
    torch.testing.assert_close(
        seen[0], both.model.state_dict()["model.decoder.layers.1.spd_correction.constant"], rtol=1e-5, atol=1e-7
    )
    assert (seen[0] - seen[1]).abs().max() > 1e-4  # block 0 uncorrected gives another stream


def test_a_block_that_gets_no_better_keeps_its_weights():
    model = tiny("llama")
    state = bits(model)
    heal(model, PLAN, DATA, recipe=Recipe(epochs=8, lr=1e6), quiet=True)  # diverges at once
    assert bits(model) == state


def test_training_stops_early(monkeypatch):
    calls = []
    loss = student.Student.loss
    monkeypatch.setattr(student.Student, "loss", lambda *a: calls.append(torch.is_grad_enabled()) or loss(*a))
    heal(tiny("llama"), SyncPlan(RANKS, (1,)), DATA, recipe=Recipe(epochs=50, lr=1e3), quiet=True)
    assert calls.count(True) == 9 * (student.PATIENCE + 1)
    assert calls.count(False) == 1 + student.PATIENCE + 1  # one batch held out: before, and after each epoch


def test_any_number_is_better_than_none():
    weight, losses = torch.nn.Parameter(torch.zeros(1)), iter([math.nan, math.nan, 2.0, math.nan])
    seen = []

    def judge() -> float:
        seen.append(weight.item())
        return next(losses)

    def backward(index: int) -> None:
        weight.grad = torch.ones(1)

    student.train({"weight": weight}, backward, judge, count=1, epochs=3, peak=0.1, seed=0)
    assert weight.item() == seen[2] and len(set(seen)) == 4


def test_bf16_weights_are_trained_as_float32_and_rounded_once():
    healed = []
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny("qwen2", dtype=torch.bfloat16).to(dtype)
        heal(model, SyncPlan(RANKS, (0,)), DATA, recipe=QUICK, quiet=True)
        assert model.dtype == dtype
        healed.append(model.model.layers[0].self_attn.o_proj.weight)
    start = tiny("qwen2", dtype=torch.bfloat16).model.layers[0].self_attn.o_proj.weight
    moved = (healed[1] - start.float()).norm()
    assert (healed[0].float() - healed[1]).norm() < 0.5 * moved  # inputs and targets are of bf16 precision


def test_the_learning_rate_follows_the_width():
    assert [Recipe().learning_rate(hidden) for hidden in (24, 256, 4096)] == [1e-3, 1e-3, 0.256 / 4096]
    assert Recipe(lr=0.02).learning_rate(4096) == 0.02
    factors = [student.schedule(done, 100) for done in range(100)]
    assert factors[0] == 0.2 and max(factors) == 1.0 and 0 < factors[-1] < 1e-2


class TestStateDirectory:
    def test_what_is_healed_is_not_healed_again(self, tmp_path, monkeypatch):
        model = tiny("llama")
        heal(model, PLAN, DATA, recipe=QUICK, state=tmp_path / "state", quiet=True)
        again, other = tiny("llama"), tiny("llama")
        with monkeypatch.context() as patch:
            patch.setattr(distill, "distil", None)
            heal(again, PLAN, DATA, recipe=QUICK, state=tmp_path / "state", quiet=True)
        assert bits(again) == bits(model)
        heal(other, PLAN, DATA, recipe=Recipe(epochs=2, seed=1), state=tmp_path / "state", quiet=True)
        assert bits(other) != bits(model)

    @pytest.mark.parametrize("what", ["weights", "config", "data", "plan"])
    def test_another_healing_does_not_find_it(self, what, tmp_path):
        heal(tiny("llama"), PLAN, DATA, recipe=QUICK, state=tmp_path, quiet=True)
        changed = {"rms_norm_eps": 0.1} if what == "config" else {}
        model, data = tiny("llama", seed=int(what == "weights"), **changed), DATA[what == "data" :]
        plan = SyncPlan(RANKS, (0, 1)) if what == "plan" else PLAN
        twin = copy.deepcopy(model)
        heal(model, plan, data, recipe=QUICK, state=tmp_path, quiet=True)
        heal(twin, plan, data, recipe=QUICK, quiet=True)
        assert bits(model) == bits(twin)

    def test_killed_and_run_again_it_writes_the_same_bytes(self, tmp_path):
        def start(folder: Path) -> subprocess.Popen:
            folder.mkdir(exist_ok=True)
            return subprocess.Popen([sys.executable, "-m", "tests.spd.heal_slowly", str(folder)], env=environment)

        root = Path(__file__).parents[2]
        paths = [str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        whole, killed = start(tmp_path / "whole"), start(tmp_path / "killed")
        try:
            deadline = time.monotonic() + 120
            while not list((tmp_path / "killed" / "state").glob("*-0.safetensors")):
                assert time.monotonic() < deadline and killed.poll() is None
                time.sleep(0.02)
            killed.send_signal(signal.SIGKILL)
            assert killed.wait(60) == -signal.SIGKILL
            assert not (tmp_path / "killed" / "model").exists()
            assert start(tmp_path / "killed").wait(120) == 0
            assert whole.wait(120) == 0
        finally:
            whole.kill()
            killed.kill()
        for folder in ("state", "model"):
            files = sorted(path.name for path in (tmp_path / "whole" / folder).iterdir())
            assert len(files) >= 3
            for name in files:
                assert (tmp_path / "killed" / folder / name).read_bytes() == (
                    tmp_path / "whole" / folder / name
                ).read_bytes(), name


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("plan has healed blocks \\[0\\] already", {"plan": SyncPlan(RANKS, (0, 1), healed=(0,))}),
        ("healed block 1 keeps its sync", {"plan": SyncPlan(RANKS, (0,)), "blocks": [1]}),
        ("data holds one batch: give at least two", {"batches": DATA[:1]}),
        (
            "held_out 0.6 of 2 batches leaves none to train on: give more",
            {"batches": DATA[:2], "recipe": Recipe(held_out=0.6)},
        ),
        ("this model has no correction there", {"plan": SyncPlan(RANKS, (0,), {0: "gain"})}),
        ("state .* is a file", {"state": Path(__file__)}),
    ],
)
def test_bad_input_changes_nothing(match, arguments):
    model = tiny("llama")
    state = bits(model)
    with pytest.raises(InputError, match=match) as caught:
        heal(model, **{"plan": PLAN, "batches": DATA, "quiet": True, **arguments})
    assert "\n" not in str(caught.value) and bits(model) == state


def test_without_gradients_it_learns_all_the_same():
    model, other, recipe = tiny("llama"), tiny("llama"), Recipe(epochs=1, polish=1)
    with torch.no_grad():
        heal(model, PLAN, DATA[:3], recipe=recipe, quiet=True)
        assert not torch.is_grad_enabled()
    heal(other, PLAN, DATA[:3], recipe=recipe, quiet=True)
    assert bits(model) == bits(other) != bits(tiny("llama"))


def test_what_was_measured_before_a_treatment_is_not_said_of_it():
    measured = replace(PLAN, verified=Verified("0", 9, 2.0, 4.0, 3.0, 0.1, 0.5))
    corrected = correct(tiny("llama"), measured, DATA[:2], quiet=True)
    regrouped = regroup(tiny("llama"), measured, DATA[:2], quiet=True)
    assert heal(tiny("llama"), measured, DATA[:2], recipe=Recipe(epochs=1), quiet=True).plan.verified is None
    for (model, plan), undo in ((corrected, uncorrect), (regrouped, ungroup)):
        assert plan.verified is None
        assert undo(model, replace(plan, verified=measured.verified)) == PLAN


class TestAHealedModelIsNoOriginal:
    """Its weights would be taken for the teacher's, and what is measured for the original's."""

    @pytest.mark.parametrize(
        "use",
        [
            lambda model: heal(model, PLAN, DATA, recipe=QUICK, quiet=True),
            lambda model: carry_out(model, PLAN, DATA, recipe=QUICK, quiet=True),
            lambda model: calibrate(model, DATA, RANKS, drop=0.5, quiet=True),
            lambda model: correct(model, PLAN, DATA, quiet=True),
            lambda model: regroup(model, PLAN, DATA, quiet=True),
        ],
        ids=["heal", "carry_out", "calibrate", "correct", "regroup"],
    )
    def test_it_is_refused(self, use):
        model = tiny("llama")
        healed = heal(model, PLAN, DATA, blocks=[1], recipe=Recipe(epochs=1, lr=1e-2), quiet=True)
        before = bits(model)
        with pytest.raises(InputError, match=r"model has blocks \[1\] healed or regrouped already: load") as caught:
            use(model)
        assert "\n" not in str(caught.value) and bits(model) == before
        assert set(correct(*healed, DATA, quiet=True).plan.corrections) == set(ALL)  # with its own plan it goes on

    def test_an_interruption_does_not_leave_one_unnoticed(self, tmp_path, monkeypatch):
        def interrupted(student, *arguments):
            if student.block.index == 2:
                raise KeyboardInterrupt
            original(student, *arguments)

        original, model = distill.distil, tiny("llama")
        with monkeypatch.context() as patch:
            patch.setattr(distill, "distil", interrupted)
            with pytest.raises(KeyboardInterrupt):
                heal(model, PLAN, DATA, recipe=QUICK, state=tmp_path / "state", quiet=True)
        assert bits(model) != bits(tiny("llama"))
        with pytest.raises(InputError, match="healed or regrouped already"):
            heal(model, PLAN, DATA, recipe=QUICK, state=tmp_path / "state", quiet=True)
        again, whole = tiny("llama"), tiny("llama")
        heal(again, PLAN, DATA, recipe=QUICK, state=tmp_path / "state", quiet=True)
        heal(whole, PLAN, DATA, recipe=QUICK, quiet=True)
        assert bits(again) == bits(whole)

    def test_a_regrouped_model_is_healed_with_its_own_plan(self):
        regrouped = regroup(tiny("llama"), PLAN, DATA, blocks=[0], quiet=True)
        with pytest.raises(InputError, match=r"model has blocks \[0\] healed or regrouped already"):
            heal(regrouped.model, PLAN, DATA, recipe=QUICK, quiet=True)
        healed = heal(*regrouped, DATA, recipe=QUICK, quiet=True).plan
        assert healed.healed == ALL and healed.heads == regrouped.plan.heads


@pytest.mark.parametrize("values", [{"epochs": 0}, {"epochs": 1.5}, {"lr": -1.0}, {"held_out": 1.0}, {"seed": -1}])
def test_a_recipe_out_of_range(values):
    with pytest.raises(InputError, match=f"{next(iter(values))} .* is not"):
        Recipe(**values)


def test_perplexity_is_won_back_on_text_not_trained_on():
    model = tiny("llama", num_hidden_layers=3)
    held_out = [{"input_ids": token_ids(8, 16, seed=99)}]
    labels = torch.stack([model(**batch).logits.argmax(-1) for batch in held_out])[0]
    batch = {**held_out[0], "labels": torch.cat([labels[:, :1], labels[:, :-1]], 1)}  # what the dense model says

    def loss(plan: SyncPlan) -> float:
        with simulate(model, plan):
            return evaluate.loss(model, [batch])

    dense, dropped = loss(SyncPlan(RANKS)), loss(PLAN)
    healed = heal(model, PLAN, DATA, recipe=Recipe(epochs=3), quiet=True)
    assert dense < loss(healed.plan) < dropped
