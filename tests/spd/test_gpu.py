"""SPD and the measures of quality on a GPU that is not there (tests/gpu.py): what CPUs compute, on one device."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from elision import evaluate, spd
from elision.spd import Recipe, SyncPlan
from tests import gpu
from tests.spd.tiny import tiny

PLAN = SyncPlan(ranks=3, dropped=(0, 1))


def batches() -> list[dict[str, Tensor]]:
    """Two, the first with padding."""
    generator = torch.Generator().manual_seed(0)
    found = [{"input_ids": torch.randint(3, 97, (2, 12), generator=generator)} for _ in range(2)]
    found = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in found]
    found[0]["attention_mask"][1, 9:] = 0
    return found


def logits(model: Any, batch: dict[str, Any], plan: SyncPlan) -> Tensor:
    real = gpu.values(batch["attention_mask"]) != 0
    with spd.simulate(model, plan), torch.no_grad():
        return gpu.values(model(**batch, use_cache=False).logits)[real]


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "granite"])
def test_simulations_compute_what_they_do_on_cpus(family: str) -> None:
    model, batch = tiny(family), batches()[0]
    for plan in (PLAN, SyncPlan(ranks=3, dropped=(1,), int8=(0, 2))):
        expected = logits(model, batch, plan)
        with gpu.Gpu() as device:
            found = logits(copy.deepcopy(model).to("cuda"), device.put(batch), plan)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("there", [False, True])
def test_calibration_and_quality(there: bool) -> None:
    """Wherever the data lies."""
    model, data = tiny("llama"), batches()
    plan = spd.calibrate(model, data, ranks=3, max_loss=0.1, quiet=True)
    rows, far = evaluate.row_losses(model, data), evaluate.divergence(model, tiny("llama", seed=1), data)
    with gpu.Gpu() as device:
        given = [device.put(batch) for batch in data] if there else data
        model, other = model.to("cuda"), tiny("llama", seed=1).to("cuda")
        assert spd.calibrate(model, given, ranks=3, max_loss=0.1, quiet=True).dropped == plan.dropped
        found = evaluate.row_losses(model, given)
        assert [row.tokens for row in found] == [row.tokens for row in rows]
        assert [row.nats for row in found] == pytest.approx([row.nats for row in rows], rel=1e-6)
        assert evaluate.divergence(model, other, given).kl == pytest.approx(far.kl, rel=1e-5)


@pytest.mark.parametrize("treatment", ["constant", "gain", "local_o", "regroup", "heal", "low rank"])
def test_treatments(treatment: str) -> None:
    def treated(model: Any) -> Any:
        if treatment == "regroup":
            return spd.regroup(model, PLAN, batches(), quiet=True)
        if treatment in ("constant", "gain", "local_o"):
            return spd.correct(model, PLAN, batches(), treatment, quiet=True)
        recipe = Recipe(epochs=1, polish=1, lora=2 if treatment == "low rank" else 0)
        return spd.heal(model, PLAN, batches(), recipe=recipe, quiet=True)

    expected = treated(tiny("llama"))
    with gpu.Gpu() as device:
        found = treated(tiny("llama").to("cuda"))
        assert {p.device for p in found.model.parameters()} == {gpu.DEVICE}
        batch = device.put(batches()[0])
        reached = logits(found.model, batch, found.plan)
    assert replace(found.plan, calibration=None) == replace(expected.plan, calibration=None)
    torch.testing.assert_close(reached, logits(expected.model, batches()[0], expected.plan), rtol=1e-4, atol=1e-4)
