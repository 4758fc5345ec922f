"""The paper's plans as data, and its authors' predictors, loaded as they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from elision import blocks
from elision.errors import InputError
from elision.sparselora import Factors, SparsityPlan, flops, load_predictor, presets, sparsify
from tests.sparselora import tiny
from tests.sparselora.test_flops import LLAMA3_8B, MATH10K, QKVO, ROWS


def test_every_row_of_the_paper_s_table_is_there() -> None:
    assert len(presets.names()) == 10
    plans = {name: SparsityPlan.preset(name) for name in presets.names()}
    assert plans["llama3-8b/math10k"] == MATH10K
    assert flops.relative(LLAMA3_8B, ROWS, QKVO, MATH10K, count=("base",)) == pytest.approx(0.457, abs=0.003)
    assert plans["llama2-13b/csr170k"].describe() == "ffn 97% in 13-36; qk 20% in 17-36; vo 20% in 17-36"
    assert plans["llama2-13b/csr170k"].dense_steps == 0.1 and plans["llama2-13b/csr170k"].model.layers == 40
    assert plans["llama3-8b/glue"].describe().startswith("ffn 95% in 17-30 + 50% in 31; qk 75% in 17-29")
    assert "qk 60% in 17-19, 21-23, 25-29" in plans["llama2-7b/math10k"].describe()
    with pytest.raises(InputError, match="preset 'llama3' is not known: use one of llama2-7b/csr170k"):
        SparsityPlan.preset("llama3")


# Model, data | FFN layers: percent | QKVO layers, but for these: percent | dense steps: percent; as the paper prints it
TABLE = """
llama2-7b/csr170k        | 13-29: 90         | 17-29 without 20, 24: 50 |  5
llama2-7b/math10k        | 13-29: 90         | 17-29 without 20, 24: 60 |  5
llama2-7b/codefeedback   | 3-30: 99          | 14-29 without 20, 24: 25 |  5
llama2-13b/csr170k       | 13-36: 97         | 17-36: 20                | 10
llama2-13b/math10k       | 13-36: 97         | 17-36: 25                |  5
llama3-8b/csr170k        | 17-30: 97         | 17-29 without 20, 24: 20 |  5
llama3-8b/math10k        | 3-30: 99          | 14-29 without 20, 24: 75 |  5
llama3-8b/glue           | 17-30: 95, 31: 50 | 17-29: 75                |  5
llama3.1-8b/codefeedback | 3-30: 99          | 14-29 without 20, 24: 40 |  5
llama3.1-8b/wizardlm     | 3-30: 99          | 14-29 without 20, 24: 40 |  5
"""
PRINTED = [[cell.strip() for cell in line.split("|")] for line in TABLE.strip().splitlines()]
MODELS = {  # as the models' own config.json say: layers, heads, key/value heads, hidden and intermediate size
    "llama2-7b": (32, 32, 32, 4096, 11008),
    "llama2-13b": (40, 40, 40, 5120, 13824),
    "llama3-8b": (32, 32, 8, 4096, 14336),
    "llama3.1-8b": (32, 32, 8, 4096, 14336),
}


def sparsities(cell: str, layers: int) -> tuple[float, ...]:
    """By layer, of a cell of the table."""
    found = [0.0] * layers
    for first, last, but, percent in re.findall(r"(\d+)(?:-(\d+))?(?: without ([\d, ]+))?: (\d+)", cell):
        for layer in range(int(first), int(last or first) + 1):
            if str(layer) not in but.split(", "):
                found[layer] = int(percent) / 100
    return tuple(found)


@pytest.mark.parametrize(("name", "ffn", "qkvo", "steps"), PRINTED, ids=[row[0] for row in PRINTED])
def test_a_preset_is_the_row_that_the_paper_prints(name: str, ffn: str, qkvo: str, steps: str) -> None:
    plan, of = SparsityPlan.preset(name), MODELS[name.partition("/")[0]]
    assert (plan.model.layers, plan.model.heads, plan.model.kv_heads, plan.model.hidden, plan.model.intermediate) == of
    assert plan.ffn == sparsities(ffn, of[0])
    assert plan.qk == plan.vo == sparsities(qkvo, of[0])
    assert (plan.dense_steps, plan.selection, plan.rank) == (int(steps) / 100, "svd", 8)


def test_the_table_has_every_preset() -> None:
    assert {row[0] for row in PRINTED} == set(presets.names())


def publish(model: Any, path: Path) -> Path:
    """A predictor for `model` in the published layout."""
    path.mkdir(exist_ok=True)
    factors = Factors.compute(model, 3)
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
    names |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj"}
    tensors = {}
    for key, (b, a) in factors.pairs.items():
        _, layer, name = key.split(".")
        tensors[f"model.layers.{layer}.{names[name]}.w1"] = a.T.contiguous()
        tensors[f"model.layers.{layer}.{names[name]}.w2"] = b.T.contiguous()
    save_file(tensors, path / "model.safetensors")
    sparsity = {f"model.layers.{i}.{place}": 0 for i in range(2) for place in ("mlp", "self_attn")}
    modes = {
        "o1": {"layer_sparsity": {**sparsity, "model.layers.1.mlp": 0.9}},
        "o2": {"layer_sparsity": {**sparsity, "model.layers.1.mlp": 0.99, "model.layers.1.self_attn": 0.75}},
    }
    config = {"base_model": "tiny", "predictor_rank": 3, "modes": modes}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Any]:
    """A predictor in the published layout, and the model that it is for."""
    model = tiny.lora("llama", dtype=torch.float32)
    return publish(model, tmp_path), model


def test_a_published_predictor_is_the_plan_and_factors_that_it_was(published: tuple[Path, Any]) -> None:
    path, model = published
    plan, factors = load_predictor(path, model, "o2")
    assert plan.describe() == "ffn 99% in 1; qk 75% in 1; vo 75% in 1" and plan.rank == 3 and plan.selection == "svd"
    own = Factors.compute(model, 3, plan)
    assert factors.pairs.keys() == own.pairs.keys() and factors.fingerprint == own.fingerprint
    assert all(torch.equal(x, y) for key in own.pairs for x, y in zip(factors.pairs[key], own.pairs[key], strict=True))
    with sparsify(model, plan, factors) as handle:
        handle.step(0.5)
        model(**tiny.batch())
        assert handle.forwards == {"sparse": 1}
    assert load_predictor(path, model, "o1")[0].describe() == "ffn 90% in 1; qk dense; vo dense"


def test_predictors_that_do_not_belong_are_refused(published: tuple[Path, Any]) -> None:
    path, model = published
    with pytest.raises(InputError, match=r"mode 'o3' is not in predictor .*: use one of o1, o2"):
        load_predictor(path, model, "o3")
    with torch.no_grad():
        up = blocks.decoder(model).blocks[1].up.base.weight
        up.copy_(torch.randn_like(up))
    with pytest.raises(InputError, match=r"made from other weights than this model's \(model.layers.1.mlp.up_proj\)"):
        load_predictor(path, model, "o1")
    with pytest.raises(InputError, match="which do not fit"):
        load_predictor(path, tiny.lora("llama", dtype=torch.float32, intermediate_size=48), "o1")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.gate_proj.w2"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks model.layers.1.mlp.gate_proj.w2, which mode o1 prunes"):
        load_predictor(path, model, "o1")
    (path / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(InputError, match=r"model.safetensors cannot be read"):
        load_predictor(path, model, "o1")
    (path / "config.json").write_text('{"modes": {}}')
    with pytest.raises(InputError, match="it is of another layout"):
        load_predictor(path, model, "o1")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mode", [0.5], "no modes.o1.layer_sparsity in its config.json: it is of another layout"),
        ("mode", {}, "no modes.o1.layer_sparsity in its config.json"),
        ("layer_sparsity", 0.5, "no modes.o1.layer_sparsity in its config.json"),
        ("sparsity", "half", r"has modes.o1.layer_sparsity.model.layers.1.mlp 'half' in its config.json, not a number"),
        ("sparsity", True, r"layers.1.mlp True in its config.json, not a number in \[0, 1\): download it again"),
        ("sparsity", 1.5, "layers.1.mlp 1.5 in"),
        ("sparsity", -0.1, "layers.1.mlp -0.1 in"),
        ("sparsity", float("nan"), "layers.1.mlp nan in"),
        ("rank", True, "has predictor_rank True in its config.json, not a whole number from 1"),
        ("rank", 0, "predictor_rank 0"),
        ("rank", -3, "predictor_rank -3"),
        ("rank", 3.0, "predictor_rank 3.0"),
    ],
)
def test_a_malformed_config_is_named(published: tuple[Path, Any], field: str, value: Any, message: str) -> None:
    path, model = published
    config = json.loads((path / "config.json").read_text())
    if field == "rank":
        config["predictor_rank"] = value
    elif field == "mode":
        config["modes"]["o1"] = value
    elif field == "layer_sparsity":
        config["modes"]["o1"]["layer_sparsity"] = value
    else:
        config["modes"]["o1"]["layer_sparsity"]["model.layers.1.mlp"] = value
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load_predictor(path, model, "o1")


def test_the_only_mode_need_not_be_named(published: tuple[Path, Any]) -> None:
    path, model = published
    with pytest.raises(InputError, match=r"predictor .* has modes o1, o2: say which one"):
        load_predictor(path, model)
    config = json.loads((path / "config.json").read_text())
    del config["modes"]["o1"]
    (path / "config.json").write_text(json.dumps(config))
    assert load_predictor(path, model)[0] == load_predictor(path, model, "o2")[0]
