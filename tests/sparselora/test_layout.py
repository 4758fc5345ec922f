"""Weights laid out by rows: to whoever looks at storages, each is still a weight of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig
from safetensors.torch import load_file, load_model, save_model

from elision import blocks
from elision.sparselora import sparsify
from elision.sparselora.layout import Matrix
from tests.sparselora import tiny
from tests.sparselora.test_fast_apply import run, turns


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def emptied(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "llama-mha", "phi3", "opt"])
def test_every_weight_has_a_storage_as_large_as_itself(family: str, dtype: torch.dtype) -> None:
    model = tiny.lora(family, dtype=dtype)
    before = tiny.bits(model)
    with sparsify(model, tiny.plan(model), path="fast") as handle:
        model(**turns())
        assert handle._fast is not None and handle._fast.layout.weights[0].qkv.storage is not None
        weights = list(model.parameters())
        storages = [weight.untyped_storage() for weight in weights]
        assert [storage.nbytes() for storage in storages] == [weight.nbytes for weight in weights]
        assert len({storage.data_ptr() for storage in storages}) == len(weights)
        assert tiny.bits(model) == before
    assert tiny.bits(model) == before


def test_what_is_written_to_a_weight_is_what_products_are_taken_of() -> None:
    model, inputs = tiny.lora(), turns()
    plan = tiny.plan(model)
    with sparsify(model, plan, path="fast") as handle:
        first = tiny.loss_and_gradients(model, **inputs)
        with torch.no_grad():
            for projection in blocks.decoder(model).blocks[0].projections.values():
                projection.base.weight.mul_(1.5)
        found = tiny.loss_and_gradients(model, **inputs)
        assert handle.paths == {"fast": 2} and not tiny.close(found, first, 1e-3)
    with sparsify(model, plan, path="reference"):
        assert tiny.close(tiny.loss_and_gradients(model, **inputs), found)


def test_weights_that_layers_share_are_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layer_replication=[[0, 2], [0, 2]])
    model, inputs = tiny.peft_model(tiny.base(), config).double().train(), turns()
    before, plan, laid = tiny.bits(model), tiny.plan(model), []
    expected = run(model, inputs, "reference", plan)
    lay_out = Matrix._lay_out
    monkeypatch.setattr(Matrix, "_lay_out", lambda matrix: laid.append(matrix) or lay_out(matrix))
    with sparsify(model, plan, path="fast"):
        for _ in range(2):
            assert tiny.close(tiny.loss_and_gradients(model, **inputs), expected)
    assert len(laid) == 8 and tiny.bits(model) == before  # four of each of two layers, in the first step


def test_a_checkpoint_of_accelerate_holds_every_weight_and_is_loaded(tmp_path: Path, accelerator: Accelerator) -> None:
    model, inputs = accelerator.prepare(tiny.lora(dtype=torch.float32)), turns()
    before, file = tiny.bits(model), tmp_path / "state" / "model.safetensors"
    with sparsify(model, tiny.plan(model), path="fast") as handle:
        loss = model(**inputs).loss
        accelerator.save_state(str(file.parent))
        assert load_file(file).keys() == model.state_dict().keys()
        emptied(model)
        accelerator.load_state(str(file.parent))
        assert torch.equal(model(**inputs).loss, loss) and handle.paths == {"fast": 2}
        save_model(model, str(tmp_path / "again.safetensors"))
        for name in (file, tmp_path / "again.safetensors"):
            fresh = emptied(tiny.lora(dtype=torch.float32))
            load_model(fresh, str(name))
            assert tiny.bits(fresh) == before
    assert tiny.bits(model) == before
