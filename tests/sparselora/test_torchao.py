"""Bases with torchao's int8 weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from elision import blocks
from elision.errors import InputError
from elision.sparselora import sparsify
from tests.sparselora import tiny
from tests.sparselora.test_fast_apply import turns

quantization = pytest.importorskip("torchao.quantization", reason="pip install elision[torchao]")
pytestmark = pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")  # merging is not tried


def quantised(family: str, kind: Any) -> Any:
    base = tiny.base(family, torch.float32)
    quantization.quantize_(base, kind, filter_fn=lambda module, name: type(module) is nn.Linear and name != "lm_head")
    config = LoraConfig(r=3, lora_alpha=6, target_modules=tiny.ALL, task_type="CAUSAL_LM")
    model = tiny.peft_model(base, config).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_int8_weights(family: str) -> None:
    model = quantised(family, quantization.Int8WeightOnlyConfig())
    weights = [id(p.base.weight) for block in blocks.decoder(model).blocks for p in block.projections.values()]
    results = []
    for path in ("reference", "fast"):
        with sparsify(model, tiny.plan(model), path=path) as handle:
            loss = model(**turns(), use_cache=False).loss
            loss.backward()
            results.append((loss.detach(), tiny.gradients(model)))
            assert handle.forwards == {"sparse": 1} and handle.paths == ({"fast": 1} if path == "fast" else {})
    assert tiny.close(*results, 1e-5)
    assert weights == [id(p.base.weight) for block in blocks.decoder(model).blocks for p in block.projections.values()]


def test_other_kinds_are_refused() -> None:
    model = quantised("llama", quantization.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(InputError, match=r"q_proj of layer 0 is torchao's Int8Tensor, not a plain nn.Linear"):
        sparsify(model, tiny.plan(model))
