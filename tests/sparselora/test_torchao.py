"""Bases with torchao's int8 and int4 weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torchao import quantization

from elision import blocks
from elision.errors import InputError
from elision.sparselora import sparsify
from tests.sparselora import tiny
from tests.sparselora.test_fast_apply import turns

pytestmark = pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")  # merging is not tried
INT4: Any = torch.int4  # type: ignore[attr-defined]


def quantised(family: str, kind: Any) -> Any:
    base = tiny.base(family, torch.float32)
    quantization.quantize_(base, kind, filter_fn=lambda module, name: type(module) is nn.Linear and name != "lm_head")
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=tiny.ALL, task_type="CAUSAL_LM")
    model = tiny.peft_model(base, config).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def weights(bits: int) -> Any:
    if bits == 8:
        return quantization.Int8WeightOnlyConfig()
    return quantization.IntxWeightOnlyConfig(weight_dtype=INT4, granularity=quantization.PerAxis(0))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_weight_only(family: str, bits: int) -> None:
    model = quantised(family, weights(bits))
    view = blocks.decoder(model)
    assert {blocks.quantised(p.base) for block in view.blocks for p in block.projections.values()} == {f"int{bits}"}
    identities = [id(p.base.weight) for block in view.blocks for p in block.projections.values()]
    results = []
    for path in ("reference", "fast"):
        with sparsify(model, tiny.plan(model), path=path) as handle:
            loss = model(**turns(), use_cache=False).loss
            loss.backward()
            results.append((loss.detach(), tiny.gradients(model)))
            assert handle.forwards == {"sparse": 1} and handle.paths == ({"fast": 1} if path == "fast" else {})
    assert tiny.close(*results, 1e-5)
    assert identities == [id(p.base.weight) for block in view.blocks for p in block.projections.values()]


def test_under_autocast() -> None:
    """Both paths against single precision; torchao's own products under autocast are not those of bfloat16 alone."""
    model, kept, found = quantised("llama", weights(8)), None, []
    for path, enabled in (("reference", False), ("reference", True), ("fast", True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), sparsify(model, tiny.plan(model), path=path) as h:  # type: ignore[arg-type]
            h.hold(kept)
            loss = model(**turns(), use_cache=False).loss
            loss.backward()
            found.append(tiny.gradients(model))
            kept = h.kept
    exact, reference, fast = found
    errors = [sum(float((e[n] - exact[n]).square().sum()) for n in exact) ** 0.5 for e in (reference, fast)]
    assert 0 < errors[1] <= 2 * errors[0]


def test_other_kinds_are_refused() -> None:
    model = quantised("llama", quantization.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(InputError, match=r"q_proj of layer 0 is torchao's Int8Tensor, not a plain nn.Linear"):
        sparsify(model, tiny.plan(model))
    model = quantised(
        "llama",
        quantization.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=INT4, weight_granularity=quantization.PerAxis(0)
        ),
    )
    with pytest.raises(InputError, match=r"q_proj of layer 0 is torchao's IntxUnpackedToInt8Tensor"):
        sparsify(model, tiny.plan(model))
