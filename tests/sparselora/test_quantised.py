"""QLoRA: 4-bit bases of bitsandbytes, masked on the reference and dequantised on the fast path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from elision import blocks
from elision.errors import InputError
from elision.sparselora import forecast, load_predictor, lossless, sparsify, stopwatch
from tests.sparselora import tiny
from tests.sparselora.test_fast_apply import turns
from tests.sparselora.test_presets import publish

Result = tuple[Tensor, dict[str, Tensor]]


def quantise(model: Any, nested: bool, kind: str = "nf4") -> Any:
    """Every linear map of the blocks in nf4 or fp4, as transformers loads it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            four = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, torch.float32, quant_type=kind
            )
            four.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type=kind, compress_statistics=nested, module=four
            )
            four.bias = module.bias
            holder, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(holder), attribute, four.to("cpu"))
    return model


def qlora(family: str, nested: bool = False, kind: str = "nf4", **settings: Any) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 64, **({"word_embed_proj_dim": 64} if family == "opt" else {})}
    base = quantise(tiny.base(family, torch.float32, **sizes), nested, kind)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=tiny.ALL, task_type="CAUSAL_LM", **settings)
    model = tiny.peft_model(base, config).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def step(model: Any) -> Result:
    loss = model(**turns(), use_cache=False).loss
    loss.backward()
    return loss.detach(), tiny.gradients(model)


@pytest.mark.parametrize("selection", ["oracle", "svd"])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_the_fast_path_is_the_reference(family: str, dora: bool, selection: Any) -> None:
    model = qlora(family, nested=dora, use_dora=dora)
    dense = step(model)
    results = []
    for path in ("reference", "fast"):
        with sparsify(model, tiny.plan(model, selection=selection), path=path) as handle:
            results.append(step(model))
            assert handle.forwards == {"sparse": 1} and handle.paths == ({"fast": 1} if path == "fast" else {})
    assert tiny.close(*results, 1e-5)
    assert not tiny.close(results[0], dense, 1e-3)


@pytest.mark.parametrize("nested", [False, True])
def test_fp4_is_another_model_and_the_fast_path_is_its_reference(nested: bool) -> None:
    model, results = qlora("llama", nested, "fp4"), []
    assert all(blocks.quantised(p.base) == "fp4" for b in blocks.decoder(model).blocks for p in b.projections.values())
    for path in ("reference", "fast"):
        with sparsify(model, tiny.plan(model), path=path) as handle:
            results.append(step(model))
            assert handle.forwards == {"sparse": 1} and handle.paths == ({"fast": 1} if path == "fast" else {})
    assert tiny.close(*results, 1e-5)
    nf4 = qlora("llama", nested)
    with sparsify(nf4, tiny.plan(nf4), path="reference"):
        assert not tiny.close(step(nf4), results[0], 1e-3)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_it_is_the_model_of_the_dequantised_weights(kind: str) -> None:
    model = qlora("llama", kind=kind)
    with sparsify(model, tiny.plan(model), path="reference"):
        expected = step(model)
    for block in blocks.decoder(model).blocks:
        for projection in block.projections.values():
            plain = nn.Linear(projection.in_features, projection.out_features, bias=False)
            plain.weight = nn.Parameter(projection.matrix, requires_grad=False)
            holder, attribute = projection.slot
            setattr(holder, attribute, plain)
    with sparsify(model, tiny.plan(model), path="reference"):
        assert tiny.close(step(model), expected, 1e-5)


def test_nothing_dequantised_is_kept_and_removal_restores() -> None:
    model = qlora("llama")
    before, kinds = tiny.bits(model), [type(module) for module in model.modules()]
    dense = step(model)
    with lossless(model, path="fast") as handle:
        assert tiny.close(step(model), dense, 1e-5)
        assert handle._fast is not None
        assert all(m.storage is None for weights in handle._fast.layout.weights for m in vars(weights).values())
    with sparsify(model, tiny.plan(model), path="reference"):
        step(model)
    assert tiny.bits(model) == before and [type(module) for module in model.modules()] == kinds
    assert tiny.close(step(model), dense, 0.0)


@pytest.mark.parametrize("nested", [False, True])
def test_under_autocast_as_qlora_is_trained(nested: bool) -> None:
    """4-bit maps that compute in bfloat16, all else in single precision, Trainer(bf16=True)."""
    model, inputs = qlora("llama", nested), tiny.batch((11, 9, 14), (6, 7, 3))
    kept, found = None, []
    for path, dtype in (("reference", torch.float32), ("reference", torch.bfloat16), ("fast", torch.bfloat16)):
        for block in blocks.decoder(model).blocks:
            for projection in block.projections.values():
                projection.base.compute_dtype = dtype  # type: ignore[assignment]
        autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with autocast, sparsify(model, tiny.plan(model), path=path) as handle:  # type: ignore[arg-type]
            handle.hold(kept)
            model(**inputs, use_cache=False).loss.backward()
            found.append(tiny.gradients(model))
            assert handle.paths == ({"fast": 1} if path == "fast" else {})
            kept = handle.kept
    exact, reference, fast = found
    errors = [sum(float((e[n] - exact[n]).square().sum()) for n in exact) ** 0.5 for e in (reference, fast)]
    assert 0 < errors[1] <= 2 * errors[0]


def test_products_in_another_precision_take_the_reference_by_name() -> None:
    model = qlora("llama")
    blocks.decoder(model).blocks[1].up.base.compute_dtype = torch.bfloat16  # type: ignore[assignment]
    with sparsify(model, tiny.plan(model)) as handle:
        step(model)
        assert handle.paths == {"reference (4-bit products in bfloat16 at up in layer 1)": 1}


def computing_in(model: Any, dtype: torch.dtype) -> Any:
    for block in blocks.decoder(model).blocks:
        for projection in block.projections.values():
            projection.base.compute_dtype = dtype  # type: ignore[assignment]
    return model


def test_autocast_that_comes_with_training_is_waited_for() -> None:
    """4-bit maps in bfloat16, all else in single precision: before a Trainer's autocast is on, and under it."""
    model, inputs, low = computing_in(qlora("llama"), torch.bfloat16), turns(), torch.autocast("cpu", torch.bfloat16)
    plan = tiny.plan(model)
    told = forecast(model, [inputs], plan)
    assert told.obstacle is None and told.line().startswith("under autocast to bfloat16, expect at most ")
    with low:
        assert forecast(model, [inputs], plan).line().startswith("expect at most ")
    with sparsify(model, plan, path="fast") as handle:
        assert handle.summary().endswith("; on the fast path under autocast to bfloat16, else on the reference path")
        with low:
            assert handle.summary().endswith("; on the fast path")
            model(**inputs).loss.backward()
            assert handle.paths == {"fast": 1}
        with pytest.raises(InputError, match="does not cover 4-bit products in bfloat16 at q in layer 0"):
            model(**inputs)
    with low, sparsify(computing_in(model, torch.float32), plan) as handle:
        assert handle.summary().endswith("; on the fast path without autocast, else on the reference path")
        model(**inputs)
        assert handle.paths == {"reference (4-bit products in float32 at q in layer 0)": 1}


def test_steps_are_timed_under_the_autocast_that_training_has(caplog: pytest.LogCaptureFixture) -> None:
    model, seen = computing_in(qlora("llama"), torch.bfloat16), []
    norm = blocks.decoder(model).final_norm
    assert norm is not None
    norm.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    stopwatch.measure(model, [turns()], tiny.plan(model), turns=1)
    assert seen == [True] * 6
    assert not any(record.name.startswith("elision") for record in caplog.records)  # it would name the reference


def test_a_published_predictor_is_held_against_the_dequantised_weights(tmp_path: Path) -> None:
    model = qlora("llama")
    plan, factors = load_predictor(publish(model, tmp_path), model, "o1")
    with sparsify(model, plan, factors) as handle:
        handle.step(0.5)
        step(model)
        assert handle.forwards == {"sparse": 1}
