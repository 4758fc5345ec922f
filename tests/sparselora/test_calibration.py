"""Calibration: curves against the method's reference, planted sensitivities, budgets, resumption, streaming."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elision import blocks, streaming
from elision.errors import InputError
from elision.evaluate import loss
from elision.layerwise import fingerprint
from elision.sparselora import Factors, SparsityPlan, allotment, calibrate, calibration, sparsify, stopwatch, sweep
from elision.sparselora.forecasts import forecast
from elision.sparselora.plan import PARTS
from tests.sparselora import tiny

GRID = (0.5, 0.9)


def data(number: int = 2) -> list[dict[str, Tensor]]:
    return [tiny.batch((9 + i, 7), (2, 3)) for i in range(number)]


def planted(model: Any, insensitive: dict[int, tuple[str, ...]]) -> Any:
    """Silence parts of layers: what they leave out changes next to nothing."""
    with torch.no_grad():
        for block in blocks.decoder(model).blocks:
            for part in insensitive.get(block.index, ()):
                {"ffn": block.down, "vo": block.o, "qk": block.q}[part].base.weight.mul_(1e-7)
    return model


def own_answers(model: Any) -> list[dict[str, Tensor]]:
    """Data whose labels are what the model itself, made sure of them, says: whatever changes it costs loss."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
        batches = data()
        for batch in batches:
            said = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
            batch["labels"][:, 1:] = torch.where(batch["labels"][:, 1:] == -100, -100, said[:, :-1])
    return batches


def with_choice(plan: SparsityPlan, choice: sweep.Choice) -> SparsityPlan:
    """`plan` with the sparsities of `choice`."""
    layers = plan.model.layers
    return replace(plan, **{part: choice[i * layers : (i + 1) * layers] for i, part in enumerate(PARTS)})


def quick(model: Any, batches: Any = None, **settings: Any) -> SparsityPlan:
    given = {"grid": GRID, "selection": "weights", "dense_steps": 0.0, "quiet": True, **settings}
    return calibrate(model, batches or data(), **given)


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_the_curves_are_the_losses_of_the_reference(family: str) -> None:
    model, batches = tiny.lora(family), data(1)
    before = tiny.bits(model)
    plan = tiny.plan(model, 0.0)
    choices = sweep.singles(plan, GRID)
    assert len(choices) == 1 + 2 * 3 * len(GRID)
    with tiny.InDouble():
        found = sweep.losses(model, batches, plan, choices, sweep.Journal(None), quiet=True)
    assert tiny.bits(model) == before and model.training
    for choice, value in zip(choices, found, strict=True):
        with sparsify(model, with_choice(plan, choice), path="reference"), torch.no_grad():
            assert value == pytest.approx(tiny.loss_of(model, **batches[0]).item(), rel=1e-12)
    by_item = torch.tensor(found[1:]).view(2, 3, len(GRID)) - found[0]
    assert bool((by_item[1, 0] == 0).all())  # nothing reads the last FFN at context tokens
    by_item[1, 0] = 1
    assert bool((by_item != 0).all())


def test_planted_sensitivities_are_found_and_spared() -> None:
    model = planted(tiny.lora("llama", r".*\.v_proj", num_hidden_layers=4), {1: ("ffn", "vo"), 2: ("qk",)})
    batches = own_answers(model)
    plan = quick(model, batches, max_loss=1e-3)
    assert plan.ffn[1] == plan.vo[1] == plan.qk[2] == 0.9
    sensitive = [plan.ffn[0], plan.ffn[2], plan.vo[0], plan.vo[2], plan.vo[3]]
    assert max(sensitive) < 0.1
    assert plan.calibration is not None and plan.calibration.measured_increase <= math.log1p(1e-3)
    # by operations: what the silent parts save comes first, and where they do not suffice the next cheapest follow
    within = 1 - (1 - forecast(model, batches, plan).flops["full"]) * 0.8
    fewer = quick(model, batches, flops=within)
    assert max(fewer.ffn[0], fewer.ffn[2], fewer.vo[0], fewer.vo[2], fewer.vo[3]) == 0.0
    assert fewer.ffn[1] > 0 and fewer.calibration is not None
    assert fewer.calibration.ffn == plan.calibration.ffn  # one measurement, two budgets
    # uniform sparsity at the same cost loses more
    uniform = min(
        (SparsityPlan.uniform(model, s / 100, selection="weights", dense_steps=0.0) for s in range(1, 90)),
        key=lambda p: abs(forecast(model, batches, p).flops["full"] - within),
    )
    lost = sweep.losses(
        model,
        batches,
        uniform,
        [(0.0,) * 12, (*uniform.ffn, *uniform.qk, *uniform.vo)],
        sweep.Journal(None),
        quiet=True,
    )
    assert lost[1] - lost[0] > 10 * fewer.calibration.measured_increase


def test_a_budget_of_operations_is_met_and_monotone() -> None:
    model = tiny.lora("llama")
    limits = [0.96, 0.93, 0.9]
    plans = [quick(model, flops=limit) for limit in limits]
    for limit, plan in zip(limits, plans, strict=True):
        share = forecast(model, data(), plan).flops["full"]
        assert share <= limit + 1e-9 and share > limit - 0.03  # whole channels: 1 of 40 is a lot here
        assert plan.calibration is not None and plan.calibration.flops["full"] == pytest.approx(share)
    for part in PARTS:
        for one, other in itertools.pairwise(plans):
            assert all(a <= b for a, b in zip(getattr(one, part), getattr(other, part), strict=True))
    with_dense_steps = quick(model, flops=0.95, dense_steps=0.1)
    assert forecast(model, data(), with_dense_steps).flops["full"] == pytest.approx(0.95, abs=0.03)


def test_what_is_left_is_measured_in_the_company_of_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = tiny.lora("llama", num_hidden_layers=3), data(1)
    legs: list[tuple[allotment.Allotment, Any]] = []

    class Seen(allotment.Walk):
        def __init__(self, curves: Any, again: Any, ends: Any) -> None:
            super().__init__(curves, lambda taken: legs.append((taken, again(taken))) or legs[-1][1], ends)

    monkeypatch.setattr(calibration, "Walk", Seen)
    monkeypatch.setattr(calibration, "LEGS", (0.2,))
    with tiny.InDouble():
        plan = quick(model, batches, flops=0.86)
    ((taken, curves),) = legs
    assert plan.calibration is not None and sum(map(len, curves)) > 4

    def loss_with(item: int, sparsity: float) -> float:
        values = [*taken.sparsities[:item], sparsity, *taken.sparsities[item + 1 :]]  # layer by layer
        parts = {part: tuple(values[number::3]) for number, part in enumerate(PARTS)}
        with sparsify(model, replace(plan, **parts), path="reference"), torch.no_grad(), tiny.InDouble():
            return tiny.loss_of(model, **batches[0]).item()

    assert max(taken.sparsities) > 0 and set(taken.sparsities) <= {0.0, *GRID}
    now = loss_with(0, taken.sparsities[0])
    for item, (before, curve) in enumerate(zip(taken.points, curves, strict=True)):
        assert all(point.saving > before.saving for point in curve)
        for point in curve:
            grown = loss_with(item, point.sparsity) - now
            assert point.increase - before.increase == pytest.approx(grown, rel=1e-9, abs=1e-12)


def test_a_loss_limit_holds_for_all_parts_together() -> None:
    model, limit = tiny.lora("llama"), 0.02
    plan = quick(model, max_loss=limit)
    assert max((*plan.ffn, *plan.qk, *plan.vo)) > 0
    with tiny.InDouble():
        dense = loss(model, data())
    assert plan.calibration is not None and plan.calibration.loss == pytest.approx(dense, rel=1e-6)
    total, count = 0.0, 0
    with sparsify(model, plan, path="reference"), torch.no_grad():
        for batch in data():
            n = int((batch["labels"][:, 1:] != -100).sum())
            total, count = total + n * tiny.loss_of(model, **batch).item(), count + n
    assert total / count - dense <= math.log1p(limit) + 1e-6


def test_time_is_measured_and_budgeted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.lora("llama")
    monkeypatch.setattr(
        "elision.sparselora.stopwatch.step_seconds", lambda *_, **__: {"dense": 1.0, "ffn": 0.5, "attention": 0.9}
    )
    plan = quick(model, time=0.7)
    found = plan.calibration
    assert found is not None and found.speedup_from == "timed steps"
    assert 1 / 0.7 - 1e-6 <= found.speedup < 1.5
    with pytest.raises(InputError, match=r"time=0.2 cannot be met: 90% everywhere, .* give at least 0.4"):
        quick(model, time=0.2)
    outputs = tiny.batch((0, 0), (9, 9))
    for budget in ("time", "flops"):
        with pytest.raises(InputError, match=f"{budget}=0.7 cannot be met: .* still costs 1.000 of dense LoRA"):
            quick(model, [outputs], **{budget: 0.7})


@pytest.mark.parametrize("selection", ["svd", "whitened"])
def test_steps_are_timed_with_the_factors_that_losses_are_measured_with(
    selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = tiny.lora("llama"), []
    compute, whitened = Factors.compute, Factors.whitened(model, data())
    monkeypatch.setattr(Factors, "compute", lambda *given: made.append(given) or compute(*given))
    seconds = iter([1.0, 1.0, 1.0, 0.5, 1.0, 0.9] * 3)  # of the dense step, the FFN sparse, and attention
    monkeypatch.setattr(stopwatch, "_step", lambda *_: next(seconds))
    given = {} if selection == "svd" else {"factors": whitened}
    plan = quick(model, selection=selection, time=0.7, **given)
    assert plan.calibration is not None and plan.calibration.speedup_from == "timed steps"
    assert len(made) == (1 if selection == "svd" else 0)


def test_steps_are_timed_on_the_model_itself() -> None:
    model = tiny.lora("llama", dtype=torch.float32)
    before = tiny.bits(model)
    trained = next(p for p in model.parameters() if p.requires_grad)
    trained.grad = torch.ones_like(trained)
    found = stopwatch.measure(model, data(), tiny.plan(model, 0.9), turns=2)
    assert list(found) == ["LoRA", "dense + lossless", "sparse + lossless"]
    assert all(seconds > 0 for seconds in found.values())
    assert tiny.bits(model) == before
    assert [p.grad is None or bool((p.grad == 1).all()) for p in model.parameters()] == [True] * len(before)
    assert trained.grad is not None


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.lora("llama")
    state = tmp_path / "state.json"
    states: list[str] = []
    save = sweep.Journal.save

    def keep(journal: sweep.Journal) -> None:
        save(journal)
        states.append(state.read_text())

    monkeypatch.setattr(sweep.Journal, "save", keep)
    monkeypatch.setattr(calibration, "LEGS", (0.1,))
    whole = quick(model, flops=0.9, state=state).save(tmp_path / "whole.json").read_bytes()
    assert len(states) == 6  # two batches of the curves, two in company, two of the plan
    measured: list[int] = []
    forward = sweep._batch_losses
    monkeypatch.setattr(sweep, "_batch_losses", lambda *a: (measured.append(1), forward(*a))[1])
    for done, text in enumerate(tuple(states), 1):  # each is what a kill leaves behind
        state.write_text(text)
        measured.clear()
        assert quick(model, flops=0.9, state=state).save(tmp_path / "again.json").read_bytes() == whole
        assert len(measured) == 6 - done
    state.write_text('{"version": 1}')
    with pytest.raises(InputError, match=r"state.json was not written by a calibration"):
        quick(model, flops=0.9, state=state)
    for other in ([[1.0]], None):
        journal = json.loads(states[-1])
        journal["losses"][next(iter(journal["losses"]))] = other
        state.write_text(json.dumps(journal))
        with pytest.raises(InputError, match=r"state.json has other losses than were measured: delete it"):
            quick(model, flops=0.9, state=state)


def test_the_plan_carries_what_was_measured(tmp_path: Path) -> None:
    model = tiny.lora("llama")
    plan = quick(model, flops=0.9)
    found = plan.calibration
    assert found is not None
    assert found.grid == GRID and len(found.ffn) == len(found.qk) == len(found.vo) == 2
    assert found.budget == "flops" and found.limit == 0.9 and found.speedup > 1
    assert SparsityPlan.load(plan.save(tmp_path / "plan.json")) == plan
    values = plan.to_dict()
    values["calibration"]["ffn"] = [[0.1, 0.2], [0.1, 0.2, 0.3]]
    with pytest.raises(InputError, match="ffn has a curve of other length than the grid's 2"):
        SparsityPlan.from_dict(values)
    assert quick(planted(model, {0: ("ffn",)}), flops=0.9).calibration != found


def test_the_plan_names_its_data_by_their_fingerprint() -> None:
    def named(batches: list[dict[str, Tensor]]) -> str:
        found = quick(tiny.lora("llama"), batches, max_loss=0.1).calibration
        assert found is not None
        return found.data

    batches = data()
    other = [{**batches[0], "labels": batches[0]["labels"].clone()}, batches[1]]
    other[0]["labels"][0, 9] = -100
    assert named(batches) == fingerprint(batches)
    assert len({named(given) for given in (batches, batches[:1], batches[::-1], other)}) == 4


def test_a_model_on_disk_is_measured_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.base("llama", torch.float32, num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    streamed = streaming.open_streamed(tmp_path, dtype=torch.float32)
    held: list[int] = []
    enter = streaming.Stream.enter

    def count(stream: streaming.Stream, layer: torch.nn.Module) -> None:
        enter(stream, layer)
        held.append(sum(not p.is_meta for block in blocks.decoder(streamed).blocks for p in block.layer.parameters()))

    with monkeypatch.context() as patch:
        patch.setattr(streaming.Stream, "enter", count)
        settings = {"flops": 0.95, "grid": GRID, "selection": "sampled", "dense_steps": 0.0, "quiet": True}
        found = calibrate(streamed, data(), **settings)
    assert found == calibrate(model.eval(), data(), **settings)
    one_layer = len(list(blocks.decoder(model).blocks[0].layer.parameters()))
    assert set(held) == {one_layer}
    with torch.no_grad():
        inputs = data(1)[0]["input_ids"]
        assert torch.equal(streamed(inputs).logits, model(inputs).logits)


def test_bad_input_is_named() -> None:
    model = tiny.lora("llama")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"flops": 0.5, "time": 0.5}, "flops and time are both given"),
        ({"flops": 1.5}, r"flops=1.5 is not a share of dense LoRA's"),
        ({"max_loss": -1}, "max_loss=-1 is not an increase"),
        ({"flops": 0.1}, r"flops=0.1 cannot be met: 90% everywhere"),
        ({"flops": "0.5"}, "flops='0.5' is a str: give a number"),
        ({"flops": 0.5, "grid": ("a",)}, r"grid \('a',\) does not ascend"),
        ({"flops": 0.5, "grid": (0.9, 0.5)}, r"grid \(0.9, 0.5\) does not ascend"),
        ({"flops": 0.5, "ranks": 3}, "setting 'ranks' is not known"),
        ({"flops": 0.5, "selection": "whitened"}, "needs factors made on data"),
        ({"flops": 0.5, "count": ("base", "tea")}, r"count .* is not of base, adapters"),
    ]
    for settings, message in cases:
        with pytest.raises(InputError, match=message):
            quick(model, **settings)
    for batches, message in (
        ([], "data holds no batches"),
        ([{"input_ids": torch.ones(1, 4, dtype=torch.long)}], "batch 0 has no labels"),
        ([{**data(1)[0], "labels": torch.full((2, 11), -100)}], "every label of the data is -100"),
        ([{**data(1)[0], "input_ids": torch.full((2, 11), 999)}], "a token outside the vocabulary of 61"),
        ([{**data(1)[0], "labels": data(1)[0]["labels"].tolist()}], "batch 0: labels is a list: give a tensor"),
        ([{**data(1)[0], "labels": torch.full((2, 11), 61)}], "a label outside the vocabulary of 61"),
    ):
        with pytest.raises(InputError, match=message):
            calibrate(model, batches, flops=0.5)


def test_a_budget_that_nothing_meets_names_none_that_does_not_either() -> None:
    model, short = tiny.lora("llama"), tiny.batch((1, 1), (9, 9))
    with pytest.raises(
        InputError, match=r"still costs 1\.\d+ .* on this data: nothing is to be saved there, give data"
    ):
        quick(model, [short], flops=0.8, dense_steps=0.05, selection="oracle")


def test_other_fields_of_a_batch_are_not_read() -> None:
    model = tiny.lora("llama")
    more = {"text": ["one", "two"], "idx": torch.arange(2), "token_type_ids": torch.zeros(2, 11, dtype=torch.long)}
    plans = []
    for batches in (data(2), [{**batch, **more} for batch in data(2)]):
        factors: Any = Factors.whitened(model, batches)
        given: Any = {"selection": "whitened", "rehearse": batches, "quiet": True, "factors": factors}
        plans.append(calibrate(model, batches, flops=0.9, grid=(0.5, 0.9), **given))
    assert plans[0] == plans[1]
    quick(model, batches, time=1.0)
    with pytest.raises(InputError, match="batch 0: labels is a list: give a tensor"):
        Factors.whitened(model, [{**data(1)[0], "labels": data(1)[0]["labels"].tolist()}])


@pytest.mark.parametrize("selection", ["oracle", "whitened"])
def test_what_is_none_in_a_batch_is_not_there(selection: str) -> None:
    model = tiny.lora("llama")
    bare = [{name: batch[name] for name in ("input_ids", "labels")} for batch in data(2)]
    plans = []
    for batches in (bare, [{**batch, "attention_mask": None, "position_ids": None} for batch in bare]):
        factors = Factors.whitened(model, batches) if selection == "whitened" else None
        more: Any = {"selection": selection, "rehearse": batches, "quiet": True}
        plans.append(calibrate(model, batches, flops=0.9, grid=(0.5, 0.9), factors=factors, **more))
    assert plans[0] == plans[1]


def test_what_was_measured_of_another_model_is_not_taken_for_this_one(tmp_path: Path) -> None:
    def dense(model: Any, state: Path | None) -> float:
        found = quick(model, flops=0.95, state=state).calibration
        assert found is not None
        return found.loss

    def scaled(model: Any) -> None:
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] *= 5

    changes = [
        lambda model: [block.down.base.weight.data.mul_(3.0) for block in blocks.decoder(model).blocks],
        lambda model: model.get_output_embeddings().weight.data.mul_(4.0),
        lambda model: blocks.decoder(model).blocks[0].layer.input_layernorm.weight.data.mul_(2.0),
        scaled,
    ]
    for number, change in enumerate(changes):
        model, state = tiny.lora("llama"), tmp_path / f"{number}.json"
        before = dense(model, state)
        change(model)
        assert dense(model, state) == dense(model, None) != before


def test_sparsities_that_keep_as_many_channels_are_one_point() -> None:
    plan = quick(tiny.lora("llama"), flops=0.9, grid=(0.5, 0.9, 0.99, 0.995))
    assert plan.calibration is not None and plan.calibration.flops["full"] <= 0.9 + 1e-9


def test_a_forward_that_stood_before_a_layer_stands_there_again() -> None:
    """As accelerate's hooks do, on a model that a device_map has dispatched."""
    model = tiny.lora("llama")
    layers = [block.layer for block in blocks.decoder(model).blocks]
    own = layers[0].forward
    layers[0].forward = own
    quick(model, max_loss=0.1)
    assert [vars(layer).get("forward") for layer in layers] == [own, None]
