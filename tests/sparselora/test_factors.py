"""SVD factors on disk: what belongs to which weights, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from elision import blocks
from elision.errors import InputError
from elision.sparselora import Factors, SparsityPlan, calibrate, sparsify, tokens
from tests.sparselora import tiny


def test_factors_approximate_every_scored_projection() -> None:
    model = tiny.lora("phi3")  # fused: each projection has its own rows' factors
    factors = Factors.compute(model, rank=4)
    assert set(factors.pairs) == {f"layers.{i}.{name}" for i in range(2) for name in ("q", "k", "v", "gate", "up")}
    for block in blocks.decoder(model).blocks:
        for name in ("q", "k", "v", "gate", "up"):
            b, a = factors.pairs[f"layers.{block.index}.{name}"]
            weight = block.projections[name].weight.detach()
            assert b.shape == (weight.shape[0], 4) and a.shape == (4, weight.shape[1])
            rest = torch.linalg.svdvals(weight)[4:].norm()
            assert torch.isclose((weight - b @ a).norm(), rest)


def test_only_what_the_plan_prunes_is_decomposed() -> None:
    model = tiny.lora("llama")
    plan = SparsityPlan.uniform(model, 0.5, parts=("vo",), layers=[1], selection="svd")
    assert set(Factors.compute(model, 8, plan).pairs) == {"layers.1.v"}
    for selection in ("oracle", "sampled", "weights", "random", "no-ffn"):
        assert not Factors.compute(model, 8, SparsityPlan.uniform(model, 0.5, selection=selection)).pairs


def test_saved_factors_choose_the_same_channels(tmp_path: Path) -> None:
    model, inputs = tiny.lora(), tiny.batch()
    plan = tiny.plan(model, selection="svd", rank=3)
    with sparsify(model, plan) as handle:
        model(**inputs)
        computed = {key: kept.tolist() for key, kept in handle.kept.items()}
    path = Factors.compute(model, 3).save(tmp_path / "new" / "factors.safetensors")
    assert sorted(p.name for p in path.parent.iterdir()) == ["factors.json", "factors.safetensors"]
    for factors in (Factors.load(path), Factors.load(path.with_suffix(".json")), path, str(path)):
        with sparsify(model, plan, factors) as handle:
            model(**inputs)
            assert {key: kept.tolist() for key, kept in handle.kept.items()} == computed


def test_equal_factors_give_equal_bytes(tmp_path: Path) -> None:
    model = tiny.lora(dtype=torch.float32)
    one, two = (Factors.compute(model).save(tmp_path / name) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert one.with_suffix(".json").read_bytes() == two.with_suffix(".json").read_bytes()


def test_names_keep_their_dots_and_no_other_file_is_written_over(tmp_path: Path) -> None:
    factors = Factors.compute(tiny.lora(), 2, tiny.plan(tiny.lora(), selection="svd", layers=[1]))
    assert factors.save(tmp_path / "v1.5") == tmp_path / "v1.5.safetensors"
    assert factors.save(tmp_path / "v1.6") == factors.save(tmp_path / "v1.6.json")  # its own card it may write over
    assert Factors.load(tmp_path / "v1.5").pairs.keys() == factors.pairs.keys()
    names = ["v1.5.json", "v1.5.safetensors", "v1.6.json", "v1.6.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for text in (json.dumps(tiny.plan(tiny.lora()).to_dict()), "[]", "{"):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(InputError, match=r"plan.json, which is none of theirs: give another name"):
            factors.save(tmp_path / "plan")
        assert (tmp_path / "plan.json").read_text() == text and not (tmp_path / "plan.safetensors").exists()


def test_the_fingerprint_is_of_the_weights() -> None:
    from elision.sparselora.factors import fingerprint

    model = tiny.base()
    original = fingerprint(blocks.decoder(model))
    assert fingerprint(blocks.decoder(tiny.lora())) == original  # adapters are no part of it
    assert fingerprint(blocks.decoder(tiny.base(dtype=torch.bfloat16))) == original  # nor is the precision
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    assert fingerprint(blocks.decoder(model)) != original


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def exchange(path: Path) -> None:
    Factors.compute(tiny.lora("qwen3")).save(path.with_name("other"))
    path.with_name("other.safetensors").replace(path)


def edit(path: Path, **values: Any) -> None:
    card = json.loads(path.with_suffix(".json").read_text())
    kept = {name: value for name, value in {**card, **values}.items() if value is not None}
    path.with_suffix(".json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "do not match their JSON, truncated or exchanged: compute them again"),
        (exchange, "do not match their JSON"),
        (lambda path: path.unlink(), r"factors\.safetensors is not a file"),
        (lambda path: path.with_suffix(".json").unlink(), r"factors\.json is not a file"),
        (lambda path: truncate(path.with_suffix(".json")), "is not JSON"),
        (lambda path: edit(path, version=9), "are not of version 1"),
        (lambda path: edit(path, rank=None), "lacks rank"),
        (lambda path: edit(path, sha256=None), "lacks sha256"),
    ],
)
def test_a_damaged_file_is_refused_with_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    model = tiny.lora()
    path = Factors.compute(model).save(tmp_path / "factors.safetensors")
    damage(path)
    before = tiny.bits(model)
    with pytest.raises(InputError, match=message) as caught:
        sparsify(model, tiny.plan(model, selection="svd"), path)
    assert "\n" not in str(caught.value)
    assert tiny.bits(model) == before


def test_factors_of_another_model_rank_or_plan_are_refused() -> None:
    model = tiny.lora()
    plan = tiny.plan(model, selection="svd")
    with pytest.raises(InputError, match="made from other weights than this model's"):
        sparsify(model, plan, Factors.compute(tiny.lora(num_hidden_layers=3)))
    with pytest.raises(InputError, match="factors have rank 4, the plan rank 8: compute them with rank=8"):
        sparsify(model, plan, Factors.compute(model, 4))
    with pytest.raises(InputError, match=r"factors lack layers\.0\.q, which the plan prunes"):
        sparsify(model, plan, Factors.compute(model, 8, tiny.plan(model, selection="svd", layers=[1])))


def test_factors_that_the_plan_does_not_use_are_refused() -> None:
    model = tiny.lora()
    factors = Factors.compute(model)
    message = "factors are given, which selection 'sampled' does not use: leave them out"
    with pytest.raises(InputError, match=message):
        sparsify(model, tiny.plan(model, selection="sampled"), factors)
    with pytest.raises(InputError, match=message):
        calibrate(model, [tiny.batch()], flops=0.9, selection="sampled", factors=factors)
    sparsify(model, tiny.plan(model, 0.0), factors).remove()  # nothing to select


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_whitened_factors_fit_the_context_tokens_of_the_data(family: str) -> None:
    model, inputs = tiny.lora(family), tiny.batch((9, 7, 8), (3, 2, 2))
    plan = tiny.plan(model, selection="whitened", rank=3)
    before = tiny.bits(model)
    whitened = Factors.whitened(model, [inputs], 3, plan)
    assert tiny.bits(model) == before and model.training and not any(m._forward_pre_hooks for m in model.modules())
    plain = Factors.compute(model, 3)
    assert whitened.pairs.keys() == plain.pairs.keys()
    rows = tokens.classify(inputs["labels"], inputs["attention_mask"]).kept
    seen: dict[str, torch.Tensor] = {}
    block = blocks.decoder(model).blocks[1]
    hook = block.up.module.register_forward_pre_hook(
        lambda module, args: seen.update(x=args[0][rows.reshape(args[0].shape[:-1])])
    )
    with torch.no_grad():
        model.eval()(**{name: value for name, value in inputs.items() if name != "labels"})
    hook.remove()
    weight = block.up.weight.detach()
    errors = [(seen["x"] @ (weight - b @ a).T).norm() for b, a in (f.pairs["layers.1.up"] for f in (whitened, plain))]
    assert errors[0] < 0.9 * errors[1]


def test_whitened_factors_are_made_on_data_and_told_apart(tmp_path: Path) -> None:
    model, inputs = tiny.lora(), tiny.batch()
    plan = tiny.plan(model, selection="whitened", rank=3)
    factors = Factors.whitened(model, [inputs], 3)
    with sparsify(model, plan, factors.save(tmp_path / "factors")) as handle:
        model(**inputs)
        assert handle.forwards == {"sparse": 1}
    with pytest.raises(InputError, match=r"give Factors.whitened\(model, batches\)"):
        sparsify(model, plan)
    with pytest.raises(InputError, match="factors are of kind svd, selection whitened needs whitened"):
        sparsify(model, plan, Factors.compute(model, 3))
    with pytest.raises(InputError, match="factors are of kind whitened, selection svd needs svd"):
        sparsify(model, tiny.plan(model, selection="svd", rank=3), factors)
    with pytest.raises(InputError, match="a batch has no labels"):
        Factors.whitened(model, [{"input_ids": inputs["input_ids"]}])
    with pytest.raises(InputError, match="no context token"):
        Factors.whitened(model, [{**inputs, "labels": inputs["input_ids"]}])
