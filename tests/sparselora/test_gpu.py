"""SparseLoRA on a GPU that is not there (tests/gpu.py): what CPUs compute, on one device, and nothing waited for."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elision import sparselora
from elision.sparselora import Elisions, Factors, SparsityPlan, sparsify
from elision.sparselora.stopwatch import measure
from tests import gpu
from tests.sparselora import tiny
from tests.sparselora.test_fast_apply import BATCHES, SETTINGS, turns, unequal

FETCH = "to the host: sparselora/tokens.py _fetched"  # labels, mask and positions, at once
Result = tuple[Tensor, dict[str, Tensor]]


def step(model: Any, inputs: dict[str, Any]) -> Result:
    """Loss and gradients, double precision as it is."""
    if model.dtype == torch.float64:
        return tiny.loss_and_gradients(model, **inputs)
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), tiny.gradients(model)


def on_both(
    model: Any,
    inputs: dict[str, Any],
    plan: SparsityPlan | None,
    *host: str,
    path: Any = "fast",
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> tuple[Result, Result, list[str]]:
    """A step on the CPU, the same on the GPU with the inputs `host` left behind, and what was waited for there.

    `dtype` is autocast's. The model stays on the GPU.
    """
    plan = SparsityPlan.uniform(model, 0.0, dense_steps=0.0) if plan is None else plan
    with sparsify(model, plan, path=path, **settings) as handle, autocast("cpu", dtype):
        torch.manual_seed(1)  # of dropout
        expected = step(model, inputs)
        kept, paths = handle.kept, handle.paths
    with gpu.Gpu() as device, sparsify(model, plan, path=path, **settings) as handle:
        model.to("cuda")  # as a Trainer does it: after sparsify
        if dtype is not None or model.dtype == torch.bfloat16:
            handle.hold(device.put(kept))  # rounding may choose others
        torch.manual_seed(1)
        device.waits.clear()
        with autocast("cuda", dtype):
            found = step(model, device.put(inputs, *host))
        assert handle.paths == paths
    assert {g.device for g in found[1].values()} == {gpu.DEVICE}
    return expected, (gpu.values(found[0]), {name: gpu.values(g) for name, g in found[1].items()}), device.waits


def autocast(device: str, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return nullcontext()
    return gpu.autocast(dtype) if device == "cuda" else torch.autocast(device, dtype)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_computes_what_cpus_do_and_fetches_once(family: str) -> None:
    model = tiny.lora(family)
    expected, found, waits = on_both(model, turns(), tiny.plan(model, 0.6))
    assert tiny.close(found, expected)
    assert waits == [FETCH]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_nothing_is_waited_for_where_what_tells_the_tokens_apart_stays_on_the_host(family: str) -> None:
    model = tiny.lora(family)
    expected, found, waits = on_both(model, turns(), tiny.plan(model, 0.6), "labels", "attention_mask")
    assert tiny.close(found, expected)
    assert waits == []
    with pytest.raises(RuntimeError, match=r"expected all tensors on one device, found cuda:0 and cpu"):
        on_both(model := tiny.lora(), turns(), tiny.plan(model, 0.6), "input_ids")


@pytest.mark.parametrize("batch", BATCHES)
def test_every_kind_of_batch(batch: str) -> None:
    model = tiny.lora("mistral", tiny.ATTENTION)  # with a sliding window
    expected, found, waits = on_both(model, BATCHES[batch](), tiny.plan(model, 0.6))
    assert tiny.close(found, expected)
    assert waits == [FETCH]


def test_several_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elision.sparselora.rows._SHORT", 1)
    model = tiny.lora("mistral")
    expected, found, waits = on_both(model, unequal(), tiny.plan(model, 0.6))
    assert tiny.close(found, expected)
    assert waits == [FETCH]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_kind_of_plan(setting: dict[str, Any]) -> None:
    model = tiny.lora()
    expected, found, waits = on_both(model, turns(), tiny.plan(model, 0.6, **setting))
    assert tiny.close(found, expected)
    late = ["to the GPU: sparselora/estimator.py _beside"] * 16  # factors made before the model moved: q, k, v twice
    assert sorted(waits) == sorted([*(late if setting.get("selection") == "svd" else []), FETCH])  # gate, up once


def test_factors_are_sent_once() -> None:
    model = tiny.lora()
    plan = tiny.plan(model, 0.6, selection="svd", rank=2)
    with gpu.Gpu() as device, sparsify(model, plan, path="fast") as handle:
        model.to("cuda")
        inputs = device.put(turns())
        step(model, inputs)
        device.waits.clear()
        step(model, inputs)
        assert device.waits == [FETCH] and handle.paths == {"fast": 2}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    model = tiny.lora(dtype=torch.float32)
    tiny.checkpoint(model, reentrant)
    expected, found, waits = on_both(model, turns(), tiny.plan(model, 0.6))
    assert tiny.close(found, expected, 1e-5)
    assert waits == [FETCH]


@pytest.mark.parametrize(
    ("family", "precision"),
    [*itertools.product(["llama", "gemma", "opt", "phi3"], ["bfloat16", "autocast"]), ("llama", "adapters in single")],
)
def test_low_precision(family: str, precision: str) -> None:
    low = torch.bfloat16
    model = tiny.lora(family, dtype=torch.float32 if precision == "autocast" else low)
    if precision == "adapters in single":
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    dtype = low if precision == "autocast" else None
    expected, found, waits = on_both(model, turns(), tiny.plan(model, 0.6), dtype=dtype)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=0.02)
    both = [torch.cat([g.double().flatten() for g in gradients.values()]) for _, gradients in (found, expected)]
    assert float((both[0] - both[1]).norm()) < 0.1 * float(both[1].norm())  # two ways of attention, rounded each
    assert {name: g.dtype for name, g in found[1].items()} == {name: g.dtype for name, g in expected[1].items()}
    assert waits == [FETCH]


@pytest.mark.parametrize("kind", ["dropout", "dora", "rslora"])
def test_kinds_of_adapters(kind: str) -> None:
    from peft import LoraConfig

    how: dict[str, Any] = {"dropout": {"lora_dropout": 0.3}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
    config = LoraConfig(r=3, target_modules=tiny.ALL, task_type="CAUSAL_LM", init_lora_weights=False, **how[kind])
    model = tiny.peft_model(tiny.base(), config).double().train()
    expected, found, waits = on_both(model, turns(), tiny.plan(model, 0.6))
    assert tiny.close(found, expected)
    assert waits == [FETCH]


def test_the_lossless_path_and_removal() -> None:
    model = tiny.lora()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected, found, waits = on_both(model, turns(), None)
    assert tiny.close(found, expected)
    assert waits == [FETCH]
    expected, found, waits = on_both(tiny.lora(), turns(), None, elisions=Elisions.none())
    assert tiny.close(found, expected)
    assert waits == [FETCH]
    parameters = {name: gpu.values(p) for name, p in model.named_parameters()}
    assert list(parameters) == list(before)
    assert all(torch.equal(parameters[name], p) and parameters[name].is_contiguous() for name, p in before.items())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_reference_path_waits_for_nothing_of_ours_but_the_tokens(checkpointed: bool) -> None:
    model = tiny.lora(dtype=torch.float32)
    if checkpointed:
        tiny.checkpoint(model, reentrant=False)
    expected, found, waits = on_both(model, turns(), tiny.plan(model, 0.6), path="reference")
    assert tiny.close(found, expected, 1e-5)
    assert [wait for wait in waits if not wait.endswith(": outside")] == [FETCH]


def test_labels_beside_the_call() -> None:
    model, inputs = tiny.lora(), turns()
    labels = inputs.pop("labels")
    with sparsify(model, tiny.plan(model, 0.6)):
        expected = model(**inputs, sparse_labels=labels).logits
    with gpu.Gpu() as device, sparsify(model.to("cuda"), tiny.plan(model, 0.6)) as handle:
        device.waits.clear()
        found = model(**device.put(inputs), sparse_labels=labels).logits
        assert handle.paths == {"fast, with all logits (no labels in the call)": 1}
        assert torch.allclose(gpu.values(found), expected, rtol=1e-12, atol=1e-12)
    assert device.waits == ["to the host: sparselora/tokens.py _fetched"]  # the mask alone


@pytest.mark.parametrize(("selection", "there"), [("svd", False), ("whitened", True)])
def test_calibration_and_factors(selection: str, there: bool) -> None:
    """Wherever the data lies; here there is no promise about waits."""
    settings: dict[str, Any] = {"selection": selection, "rank": 2, "max_loss": 0.05, "grid": (0.5,), "quiet": True}

    def planned(model: Any, data: list[dict[str, Tensor]]) -> SparsityPlan:
        factors = Factors.whitened(model, data, 2) if selection == "whitened" else None
        return sparselora.calibrate(model, data, factors=factors, rehearse=data if there else (), **settings)

    model = tiny.lora("phi3", tiny.ATTENTION)
    plan = planned(model, [tiny.batch()])
    with gpu.Gpu() as device:
        found = planned(model.to("cuda"), [device.put(tiny.batch()) if there else tiny.batch()])
    assert (found.ffn, found.qk, found.vo) == (plan.ffn, plan.qk, plan.vo)
    assert found.calibration is not None and plan.calibration is not None
    assert found.calibration.loss == pytest.approx(plan.calibration.loss, rel=1e-5)


def test_what_is_timed_is_waited_for() -> None:
    model = tiny.lora(dtype=torch.float32)
    with gpu.Gpu() as device:
        model.to("cuda")
        took = measure(model, [turns()], tiny.plan(model), turns=1)
        assert list(took) == ["LoRA", "dense + lossless", "sparse + lossless"]
    assert device.waits.count("synchronize: sparselora/stopwatch.py _step") == 6


def test_what_the_stand_in_notices() -> None:
    with gpu.Gpu() as device:
        x = torch.arange(6.0, device="cuda").view(2, 3)
        w = nn.Linear(3, 2).to("cuda")
        assert x.device == gpu.DEVICE and w(x).device == gpu.DEVICE
        device.waits.clear()
        for read in (lambda: x.sum().item(), lambda: bool(x.sum() > 0), x.tolist, lambda: x[x > 1], x.nonzero, x.cpu):
            read()
            assert len(device.waits) == 1
            device.waits.clear()
        torch.zeros(2, 3).to("cuda", non_blocking=True)
        x.copy_(torch.zeros(2, 3))
        x[torch.zeros(1, dtype=torch.long)]
        assert [wait.partition(":")[0] for wait in device.waits] == ["to the GPU"] * 2 + [
            "index by indices of the host"
        ]
        device.waits.clear()
        torch.zeros(2, 3).pin_memory().to("cuda", non_blocking=True)
        assert device.waits == []
        for wrong in (lambda: x + torch.zeros(2, 3), lambda: x.index_select(0, torch.zeros(1, dtype=torch.long))):
            with pytest.raises(RuntimeError, match=r"expected all tensors on one device"):
                wrong()
        with pytest.raises(TypeError, match=r"can't convert cuda:0"):
            x.numpy()
        (w(x).sum() * torch.tensor(2.0)).backward()  # a number on the host is one
        assert w.weight.grad is not None and w.weight.grad.device == gpu.DEVICE
