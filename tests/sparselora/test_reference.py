"""The masked-dense reference is the maths to the letter, with its exact gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from elision import blocks, sparselora
from elision.sparselora import SparsityPlan, reference
from elision.sparselora.reference import MaskedLinear
from tests.sparselora import tiny
from tests.sparselora.formula import FAULTS, Formula

sparsify = partial(sparselora.sparsify, path="reference")
QV = r".*\.(q_proj|v_proj)"
PARTS = {"ffn": 0.6, "qk": 0.5, "vo": 0.3}
GQA = {"attention_bias": True, "mlp_bias": True}
SMALL = {**GQA, "intermediate_size": 14, "hidden_size": 16}


def plan(model: nn.Module, sparsity: dict[str, float] = PARTS, **settings: Any) -> SparsityPlan:
    """Oracle selection with another sparsity for each part."""
    from dataclasses import replace

    base = tiny.plan(model, 0.0, **settings)
    return replace(base, **{part: (value,) * base.model.layers for part, value in sparsity.items()})


def sparse(model: Any, inputs: dict[str, Tensor], **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a sparse forward and backward."""
    with sparsify(model, plan(model, **settings)) as handle:
        result = tiny.loss_and_gradients(model, **inputs)
        assert handle.forwards == {"sparse": 1}
    return result


def several_turns() -> dict[str, Tensor]:
    """Padded rows of two turns; the first ends in context that nothing reads, the last has no target at all."""
    inputs = tiny.batch((5, 3, 4), (4, 3, 1))
    inputs["labels"][0, 6:8] = -100  # user's second turn: context between outputs
    inputs["labels"][1, 5:] = -100  # unread tail
    inputs["labels"][2] = -100
    return inputs


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sparsity_zero_and_keeping_all_are_peft_lora(family: str) -> None:
    model, inputs = tiny.lora(family), several_turns()
    dense = tiny.loss_and_gradients(model, **inputs)
    with sparsify(model, tiny.plan(model, 0.0)):
        assert not any(isinstance(module, MaskedLinear) for module in model.modules())
        assert tiny.close(tiny.loss_and_gradients(model, **inputs), dense)
    with sparsify(model, tiny.plan(model, 1e-6)) as handle:  # every channel kept, through the masks
        assert tiny.close(tiny.loss_and_gradients(model, **inputs), dense)
        assert handle.forwards == {"sparse": 1}
        assert {len(kept) for (_, name), kept in handle.kept.items() if name == "down"} == {40}
    assert not tiny.close(sparse(model, inputs), dense, 1e-3)


@pytest.mark.parametrize("targets", [tiny.ALL, tiny.ATTENTION, QV], ids=["all", "attention", "q and v"])
@pytest.mark.parametrize("kv_heads", [2, 4], ids=["GQA", "MHA"])
def test_against_an_independent_formula(kv_heads: int, targets: str) -> None:
    model, inputs = tiny.lora("llama", targets, num_key_value_heads=kv_heads, **SMALL), several_turns()
    found = sparse(model, inputs)
    loss = Formula(model, PARTS).loss(**inputs)
    loss.backward()
    assert tiny.close((loss.detach(), tiny.gradients(model)), found)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_formula_would_show(fault: str) -> None:
    model, inputs = tiny.lora("llama", **SMALL), several_turns()
    found = sparse(model, inputs)
    with torch.no_grad():
        wrong = Formula(model, PARTS, fault).loss(**inputs)
        assert (wrong - found[0]).abs() > 1e-5 * found[0]
        assert (Formula(model, PARTS).loss(**inputs) - found[0]).abs() < 1e-12 * found[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_against_finite_differences(family: str) -> None:
    assert gradient_error(tiny.lora(family)) < 1e-6


def test_finite_differences_would_show_a_gradient_that_stops_at_context(monkeypatch: pytest.MonkeyPatch) -> None:
    def prune(y: Tensor, sparse: Tensor, keep: Tensor, bias: Tensor | None) -> Tensor:
        return prune_outputs(torch.where(sparse[..., None], y.detach(), y), sparse, keep, bias)

    prune_outputs = reference.prune_outputs
    monkeypatch.setattr(reference, "prune_outputs", prune)
    assert gradient_error(tiny.lora()) > 1e-3


def gradient_error(model: Any) -> float:
    """Largest relative error of the gradient along random directions, one for each adapter tensor; choice held."""
    inputs = several_turns()
    error = 0.0
    with sparsify(model, plan(model)) as handle:
        tiny.loss_and_gradients(model, **inputs)
        handle.hold(handle.kept)
        _, gradients = tiny.loss_and_gradients(model, **inputs)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        largest = max(float(g.norm()) for g in gradients.values())
        for name, parameter in parameters.items():
            direction = torch.randn_like(parameter)
            direction /= direction.norm()
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.add_(sign * 1e-5 * direction)
                    ends.append(tiny.loss_of(model, **inputs))
                    parameter.sub_(sign * 1e-5 * direction)
            slope = (ends[0] - ends[1]) / 2e-5
            error = max(error, float((slope - (gradients[name] * direction).sum()).abs()) / largest)
        assert handle.forwards == {"sparse": 2 + 2 * len(parameters)}  # no_grad forwards too: not keyed on grad mode
    return error


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_svd_of_full_rank_chooses_as_the_oracle_does(family: str) -> None:
    model, inputs = tiny.lora(family), several_turns()
    oracle = sparse(model, inputs)
    assert tiny.close(sparse(model, inputs, selection="svd", rank=64), oracle)
    assert not tiny.close(sparse(model, inputs, selection="svd", rank=1), oracle, 1e-6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padding_side_and_batch_order_do_not_matter(family: str) -> None:
    model = tiny.lora(family)
    right, left = tiny.batch((6, 3, 4), (3, 2, 4)), tiny.batch((6, 3, 4), (3, 2, 4), left=True)
    assert not torch.equal(right["input_ids"], left["input_ids"])
    expected = sparse(model, right)
    assert tiny.close(sparse(model, left), expected, 1e-11)
    assert tiny.close(sparse(model, {name: tensor[[2, 0, 1]] for name, tensor in right.items()}), expected, 1e-11)


@pytest.mark.parametrize(
    "family", [family for family in tiny.FAMILIES if family != "opt"]
)  # OPT's masks know no packing
def test_packing_does_not_matter(family: str) -> None:
    model, rows = tiny.lora(family), tiny.batch((6, 3, 4), (3, 2, 4))
    rows["labels"][0, 7:] = -100  # a tail that would vote if segments were not seen
    lengths = rows["attention_mask"].sum(1).tolist()
    packed = {
        name: torch.cat([rows[name][row, :length] for row, length in enumerate(lengths)])[None]
        for name in ("input_ids", "labels")
    }
    packed["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    assert tiny.close(sparse(model, packed), sparse(model, rows), 1e-11)


def test_a_row_without_targets_changes_nothing() -> None:
    model, inputs = tiny.lora(), tiny.batch((5, 3, 7), (3, 2, 1))
    inputs["labels"][2] = -100
    assert tiny.close(sparse(model, inputs), sparse(model, {name: t[:2] for name, t in inputs.items()}), 1e-11)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "opt"])
def test_what_every_projection_computes(family: str) -> None:
    """Row by row: dense tokens in full, context tokens at the kept channels, bias or nothing elsewhere."""
    model, inputs = tiny.lora(family, **(GQA if family == "llama" else {})), tiny.batch((5, 3), (3, 2))
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with sparsify(model, plan(model)) as handle:
        block = blocks.decoder(model).blocks[1]
        for name, projection in block.projections.items():

            def keep(_: nn.Module, args: tuple, output: Tensor, name: str = name) -> None:
                seen[name] = (args[0].detach(), output.detach())

            projection.base.register_forward_hook(keep)
        model(**inputs)
        kept = {name: set(channels.tolist()) for (layer, name), channels in handle.kept.items() if layer == 1}
        context = torch.zeros(2, 8, dtype=torch.bool)
        context[0, :4] = context[1, :2] = True  # the fifth and third tokens predict the first output tokens
        for name, projection in block.projections.items():
            x, y = seen[name]
            y = y if projection.rows is None else y[..., projection.rows]
            full = linear(x, projection.weight, projection.bias)
            sparse_rows = context.reshape(x.shape[:-1])
            assert torch.allclose(y[~sparse_rows], full[~sparse_rows], rtol=1e-12)
            bias = torch.zeros(projection.out_features) if projection.bias is None else projection.bias.detach()
            if name in ("o", "down"):
                outside = [c for c in range(projection.in_features) if c not in kept[name]]
                x = x.clone()
                x[..., outside] = 0
                expected = linear(x, projection.weight, projection.bias)[sparse_rows]
            else:
                outside = [c for c in range(projection.out_features) if c not in kept[name]]
                expected = full[sparse_rows].clone()
                expected[:, outside] = 0.0 if name in ("gate", "up") else bias.to(full.dtype)[outside]
            assert outside and torch.allclose(y[sparse_rows], expected, rtol=1e-12)
            assert not torch.allclose(y[sparse_rows], full[sparse_rows], rtol=1e-3)


def test_grouped_queries_keep_the_channels_of_their_kv_head() -> None:
    model = tiny.lora("llama")  # 4 heads of dimension 8 on 2 kv heads
    with sparsify(model, plan(model)) as handle:
        model(**tiny.batch())
        for narrow, wide in (("k", "q"), ("v", "o")):
            kv, query = (handle.kept[0, name].tolist() for name in (narrow, wide))
            assert query == sorted(h * 8 + c % 8 for c in kv for h in range(4) if h // 2 == c // 8)
        assert len(handle.kept[0, "k"]) == 8 and len(handle.kept[0, "v"]) == 11 and len(handle.kept[0, "down"]) == 16


def test_rotary_pairs() -> None:
    model = tiny.lora("llama")
    with sparsify(model, plan(model, {"qk": 0.55}, rotary_pairs=True)) as handle:
        model(**tiny.batch())
        for name in ("q", "k"):
            channels = set(handle.kept[1, name].tolist())
            assert channels == {c // 8 * 8 + (c % 8 + 4) % 8 for c in channels}
        assert len(handle.kept[1, "k"]) == 8  # 7 by its sparsity, made even


def test_output_tokens_sparse_as_an_ablation() -> None:
    model, inputs = tiny.lora("llama", **SMALL), tiny.batch()
    loss, _ = sparse(model, inputs, dense_outputs=False)
    with torch.no_grad():
        expected = Formula(model, PARTS, "output tokens are sparse").loss(**inputs)
    assert (loss - expected).abs() < 1e-12 * loss


def test_the_control_without_context_ffn() -> None:
    model, inputs = tiny.lora("llama", tiny.ATTENTION, **SMALL), tiny.batch()
    with sparsify(model, plan(model, {"ffn": 0.5}, selection="no-ffn")):
        loss = model(**inputs).loss
    for block in blocks.decoder(model).blocks:  # with no adapter there, context tokens get down's bias only

        def bias_only(module: Any, args: tuple, output: Tensor) -> Tensor:
            context = torch.zeros(2, 8, dtype=torch.bool)
            context[0, :4] = context[1, :2] = True
            return torch.where(context[..., None], module.bias, output)

        block.down.base.register_forward_hook(bias_only)
    assert (model(**inputs).loss - loss).abs() < 1e-12 * loss


def test_the_control_with_random_channels() -> None:
    model, inputs = tiny.lora(), tiny.batch()
    draws = []
    for seed in (0, 0, 1):
        with sparsify(model, plan(model, selection="random", seed=seed)) as handle:
            for _ in range(2):
                model(**inputs)
                draws.append({key: kept.tolist() for key, kept in handle.kept.items()})
                assert [len(draws[-1][0, name]) for name in ("q", "k", "v", "o", "down")] == [16, 8, 11, 22, 16]
    assert draws[0] == draws[2] and draws[1] == draws[3]  # by the plan's seed
    assert draws[0] != draws[1] and draws[0] != draws[4]  # anew for every batch
    assert draws[0][0, "down"] != draws[0][1, "down"]  # and every layer


def test_low_precision_errs_no_more_than_plain_pytorch() -> None:
    double, low, inputs = tiny.lora(), tiny.lora(dtype=torch.bfloat16), tiny.batch((11, 9, 14), (6, 7, 3))

    def logits(model: Any) -> Tensor:
        return model(**inputs).logits.double()

    with torch.no_grad():
        plain = (logits(low) - logits(double)).norm()
        with sparsify(double, plan(double)) as handle:
            exact, kept = logits(double), handle.kept
        with sparsify(low, plan(low)) as handle:
            handle.hold(kept)
            assert (logits(low) - exact).norm() < 2 * plain
    with sparsify(low, plan(low)):
        low(**inputs).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in low.parameters() if p.requires_grad)


def test_autocast() -> None:
    model, inputs = tiny.lora(dtype=torch.float32, attention_bias=True), tiny.batch()
    with sparsify(model, plan(model)) as handle:
        exact = model(**inputs).loss
        kept = {key: set(channels.tolist()) for key, channels in handle.kept.items() if key[0] == 0}
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        agree = [len(kept[key] & set(handle.kept[key].tolist())) / len(kept[key]) for key in kept]
    assert (loss - exact).abs() < 0.05 * exact
    assert min(agree) > 0.7
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
