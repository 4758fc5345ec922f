"""Every kind of adapter, in the reference by its definition and on the fast path by the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import linear

from elision import blocks
from elision.errors import InputError
from elision.sparselora import narrow, sparsify
from elision.sparselora.narrow import weight_norm
from elision.sparselora.train import Settings, add_adapter
from tests.sparselora import tiny
from tests.sparselora.test_fast_apply import turns

KINDS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "dropout": {"lora_dropout": 0.3},
}
SOME = r".*\.(q_proj|v_proj|qkv_proj|up_proj|gate_up_proj|fc1)"
Result = tuple[Tensor, dict[str, Tensor]]


def randomize(model: Any) -> Any:
    """Every adapter away from its initial state; magnitudes away from the norms that they begin with."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.train()


def adapted(family: str = "llama", targets: str = tiny.ALL, **settings: Any) -> Any:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **settings)
    model = tiny.peft_model(tiny.base(family), config).to(torch.float64)
    torch.manual_seed(1)
    return randomize(model)


def run(model: Any, path: Any, sparsity: float = 0.6, **inputs: Tensor) -> Result:
    with sparsify(model, tiny.plan(model, sparsity), path=path) as handle:
        torch.manual_seed(7)  # of dropout
        result = tiny.loss_and_gradients(model, **(inputs or turns()))
        assert handle.forwards == {"sparse": 1} and handle.paths == ({"fast": 1} if path == "fast" else {})
    return result


@pytest.mark.parametrize("targets", [tiny.ALL, SOME], ids=["all", "some"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama-mha", "phi3", "opt", "gemma2", "olmo2"])
def test_the_fast_path_is_the_reference_for_every_kind(family: str, kind: str, targets: str) -> None:
    model = adapted(family, targets, **KINDS[kind])
    expected = run(model, "reference")
    assert tiny.close(run(model, "fast"), expected)
    other = run(adapted(family, targets), "fast")  # factors of the same seed, but not the kind
    assert (other[0] - expected[0]).abs() > 1e-6 * expected[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama-mha", "opt"])
def test_keeping_every_channel_is_peft(family: str, kind: str) -> None:
    model = adapted(family, **KINDS[kind])
    torch.manual_seed(7)
    dense = tiny.loss_and_gradients(model, **turns())
    assert tiny.close(run(model, "reference", 1e-6), dense)
    assert tiny.close(run(model, "fast", 1e-6), dense)


def test_dora_masks_the_base_product_and_takes_the_norm_of_the_full_weight() -> None:
    """Token by token and channel by channel, on every projection of a model with biases."""
    model, inputs = adapted("llama-mha", use_dora=True), tiny.batch()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    block = blocks.decoder(model).blocks[1]
    with sparsify(model, tiny.plan(model), path="reference") as handle:
        for name, projection in block.projections.items():

            def keep(_: Any, args: tuple, output: Tensor, name: str = name) -> None:
                seen[name] = (args[0].detach().flatten(0, 1), output.detach().flatten(0, 1))

            projection.module.register_forward_hook(keep)
        tiny.loss_of(model, **inputs)
        kept = {name: channels for (layer, name), channels in handle.kept.items() if layer == 1}
    context = torch.tensor([0, 1, 2, 3, 8, 9])
    dense = torch.tensor([4, 5, 6, 7, 10, 11, 12])
    for name, projection in block.projections.items():
        layer: Any = projection.module
        x, y = seen[name]
        a, b = (getattr(layer, f"lora_{side}")["default"].weight.detach() for side in "AB")
        weight, delta = projection.weight, layer.scaling["default"] * b @ a
        factor = layer.lora_magnitude_vector["default"].weight / (weight + delta).norm(dim=1)
        assert projection.bias is not None
        inputs_pruned = name in ("o", "down")
        mask = x.new_zeros(len(weight.T) if inputs_pruned else len(weight)).index_fill(0, kept[name], 1.0)
        base = linear(x * mask, weight) if inputs_pruned else linear(x, weight) * mask
        bias = projection.bias * mask if name in ("gate", "up") else projection.bias
        expected = factor * (base + linear(x, delta)) + bias
        full = factor * linear(x, weight + delta) + projection.bias
        assert torch.allclose(y[context], expected[context], rtol=1e-12, atol=1e-13)
        assert torch.allclose(y[dense], full[dense], rtol=1e-12, atol=1e-13)
        assert not torch.allclose(y[context], full[context], rtol=1e-3)


def test_the_norm_of_a_sum_without_the_sum() -> None:
    weight, a, b = (torch.randn(size, dtype=torch.float64) for size in ((7, 5), (2, 5), (7, 2)))
    assert torch.allclose(weight_norm(weight, a, b), (weight + b @ a).norm(dim=1), rtol=1e-13)
    low = [tensor.bfloat16() for tensor in (weight, a, b)]
    exact = (low[0].double() + low[2].double() @ low[1].double()).norm(dim=1)
    assert weight_norm(*low).dtype == torch.float32
    assert torch.allclose(weight_norm(*low).double(), exact, rtol=1e-2)


def test_merged_dora_is_the_model_that_was_trained() -> None:
    model = adapted(use_dora=True)
    with sparsify(model, tiny.plan(model), path="fast"):
        tiny.loss_and_gradients(model, **turns())
    with torch.no_grad(), tiny.InDouble():
        expected = model.eval()(**turns()).logits
        assert torch.allclose(model.merge_and_unload()(**turns()).logits, expected, rtol=1e-9, atol=1e-10)


def test_dropped_inputs_are_dropped_in_backward_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(lora_dropout=0.3)
    expected = run(model, "reference")
    monkeypatch.setattr(
        narrow, "add_input_gradient", lambda grad, u, a, adapters: None if u is None else grad.addmm_(u, a)
    )
    assert not tiny.close(run(model, "fast"), expected, 1e-6)


def test_several_adapters_at_once_and_one_of_several() -> None:
    model = adapted()
    alone = run(model, "reference")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj", "o_proj"]))
    for name, parameter in model.to(torch.float64).named_parameters():
        if ".other." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        expected = run(model, "reference")
        assert tiny.close(run(model, "fast"), expected)
        assert bool((alone[0] - expected[0]).abs() < 1e-12) == (names == ["default"])
        assert {name.rsplit(".", 2)[1] for name in expected[1]} == set(names)


def test_a_kind_that_is_not_covered_is_refused_when_it_comes() -> None:
    model = adapted()
    with sparsify(model, tiny.plan(model)) as handle:
        tiny.loss_and_gradients(model, **turns())
        model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], use_dora=True, lora_dropout=0.1))
        model.set_adapter("other")
        with pytest.raises(InputError, match="v_proj of layer 0 has adapter 'other' with DoRA and lora_dropout"):
            model(**turns())
        assert handle.forwards == {"sparse": 1}


@pytest.mark.parametrize(
    ("family", "names"),
    [("llama", "k_proj o_proj q_proj v_proj"), ("phi3", "o_proj qkv_proj"), ("opt", "k_proj out_proj q_proj v_proj")],
)
def test_the_adapter_of_the_command_line_is_on_all_of_attention(family: str, names: str) -> None:
    model = add_adapter(tiny.base(family), Settings(steps=1))
    found = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert found == set(names.split())
