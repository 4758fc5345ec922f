"""The polish: towards the dense model's distribution, through everything that is served, resumable."""

from __future__ import annotations

import signal

import pytest
import torch
from torch.nn import functional as F

from elision.blocks import decoder
from elision.spd import Recipe, SyncPlan, heal, polish, simulate, student
from elision.spd.activations import sources
from tests.spd.tiny import bits, left_padded, tiny, token_ids

DATA = [{"input_ids": token_ids(4, 12, seed)} for seed in range(5)] + [left_padded((7, 12))]
RECIPE = Recipe(epochs=1, polish=3, held_out=0.3)


@torch.no_grad()
def divergence(model, plan, teacher, batch) -> float:
    """KL(dense || healed), mean over real tokens, from the models' own forwards."""
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    target = teacher(**batch).logits[real].log_softmax(-1)
    with simulate(model, plan):
        found = model(**batch).logits[real].log_softmax(-1)
    return F.kl_div(found, target, reduction="batchmean", log_target=True).item()


@pytest.mark.parametrize("family", ["granite", "opt"])
@pytest.mark.parametrize("rows", [5, 1024])
def test_the_loss_is_the_divergence_of_the_served_model(family, rows, monkeypatch):
    monkeypatch.setattr(polish, "HEAD_ROWS", rows)
    model, plan = tiny(family), SyncPlan(3, (0, 2), int8=(1,))
    view, data = decoder(model), sources(decoder(model), DATA)
    students = {i: student.Student(view.blocks[i], plan) for i in (0, 2)}
    for batch, source in zip(DATA, data, strict=True):
        real = source.real
        with torch.no_grad():
            hidden = source.embedded
            for block in view.blocks:
                hidden = block.layer(hidden, **source.kwargs[block.index])
            served = polish.forward(view, plan, students, {}, source)
            found = sum(part.item() for part in polish.divergences(view, served[real], hidden[real]))
        assert found == pytest.approx(divergence(model, plan, model, batch), rel=1e-9, abs=1e-14) and found > 0


def test_it_brings_the_model_closer_to_the_dense_one_than_distillation_alone():
    plan, held_out, found = SyncPlan(3, (0, 1, 2)), {"input_ids": token_ids(8, 12, 77)}, []
    for recipe in (Recipe(epochs=1), RECIPE):
        model = tiny("qwen2")
        found.append(divergence(*heal(model, plan, DATA, recipe=recipe, quiet=True), tiny("qwen2"), held_out))
    assert found[1] < 0.97 * found[0]


def test_it_trains_what_healing_trained_and_nothing_else():
    model = tiny("llama", num_hidden_layers=4)
    plan = SyncPlan(3, (0, 1, 3), int8=(2,))
    before = bits(model)
    heal(model, plan, DATA, blocks=[1, 3], recipe=RECIPE, quiet=True)
    changed = {name for name, value in bits(model).items() if value != before[name]}
    assert {name.split(".")[2] for name in changed} == {"1", "3"}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_sync_in_int8_lets_gradients_through():
    """As if it were exact: without that, the part of the gradient that goes through attention would be missing."""
    slopes = []
    for plan in (SyncPlan(3, (0,), int8=(1,)), SyncPlan(3, (0,))):
        model = tiny("llama")
        view, (source, *_) = decoder(model), sources(decoder(model), DATA)
        students = {0: student.Student(view.blocks[0], plan)}
        polish.forward(view, plan, students, {}, source)[source.real].square().sum().backward()
        slopes.append(view.blocks[0].q.weight.grad.flatten())
    assert torch.cosine_similarity(*slopes, dim=0) > 0.999 and not torch.equal(*slopes)


def test_students_see_what_they_will_be_served_with():
    """The stream into a healed block has gone through the int8 sync before it."""
    model, plan, seen = tiny("llama"), SyncPlan(3, (1,), int8=(0,)), []
    loss = student.Student.loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student.Student, "loss", lambda self, x, t, s: seen.append((x, s)) or loss(self, x, t, s))
        heal(model, plan, DATA, recipe=Recipe(epochs=1), quiet=True)
    x, source = seen[0]  # the last batch judges before training
    twin = tiny("llama")
    with torch.no_grad(), simulate(twin, plan):
        expected = twin(**DATA[-1], output_hidden_states=True).hidden_states[1]
    dense = twin(**DATA[-1], output_hidden_states=True).hidden_states[1]
    assert torch.equal(x[source.real], expected[source.real])
    assert not torch.equal(expected[source.real], dense[source.real])


@pytest.mark.parametrize("lora", [0, 2])
def test_stopped_after_any_epoch_it_goes_on_to_the_same_bytes(lora, tmp_path, monkeypatch):
    recipe = Recipe(epochs=1, polish=3, held_out=0.3, lora=lora)
    plan = SyncPlan(3, (0, 2))
    whole = tiny("llama")
    heal(whole, plan, DATA, recipe=recipe, state=tmp_path / "whole", quiet=True)
    keep = student.Kept.keep

    def killed(self, name, tensors):
        keep(self, name, tensors)
        raise KeyboardInterrupt(signal.SIGKILL)

    monkeypatch.setattr(student.Kept, "keep", killed)
    for _ in range(5):  # two blocks, three epochs
        with pytest.raises(KeyboardInterrupt):
            heal(tiny("llama"), plan, DATA, recipe=recipe, state=tmp_path / "state", quiet=True)
    model = tiny("llama")
    heal(model, plan, DATA, recipe=recipe, state=tmp_path / "state", quiet=True)  # nothing left to keep
    assert bits(model) == bits(whole)
    names = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "state" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_weights_of_16_bits_are_polished_as_float32():
    model = tiny("llama", dtype=torch.bfloat16)
    before = bits(model)
    treated = heal(model, SyncPlan(3, (0, 2), int8=(1,)), DATA, recipe=RECIPE, quiet=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and bits(model) != before
    assert treated.plan.healed == (0, 2)
