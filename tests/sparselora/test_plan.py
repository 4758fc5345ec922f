"""SparsityPlan: what it holds, what it refuses, and how it stands on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elision.errors import InputError
from elision.sparselora import ModelFacts, SparsityPlan
from tests.sparselora import tiny

FACTS = ModelFacts(type="llama", layers=4, heads=4, kv_heads=2, head_dim=8, hidden=32, intermediate=40)
PLAN = SparsityPlan(FACTS, ffn=(0.0, 0.9, 0.9, 0.5), qk=(0.0, 0.0, 0.25, 0.0), vo=(0.0,) * 4, seed=3)


def test_round_trip_is_exact_and_readable(tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "deep" / "plan.json")
    assert SparsityPlan.load(path) == PLAN
    before = path.read_bytes()
    SparsityPlan.load(path).save(path)
    assert path.read_bytes() == before
    data = json.loads(before)
    assert data["version"] == 1 and data["ffn"] == [0.0, 0.9, 0.9, 0.5] and data["model"]["kv_heads"] == 2
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]  # no temporary left


def test_describe_names_runs_of_layers() -> None:
    assert PLAN.describe() == "ffn 90% in 1-2 + 50% in 3; qk 25% in 2; vo dense"
    assert replace(PLAN, ffn=(0.0, 0.783654321, 0.0, 0.5)).describe().startswith("ffn 78.37% in 1 + 50% in 3; ")
    assert PLAN.sparsity(2, "k") == 0.25 and PLAN.sparsity(3, "down") == 0.5 and PLAN.sparsity(0, "o") == 0.0


def test_numbers_become_floats_and_lists_tuples() -> None:
    plan = SparsityPlan(FACTS, ffn=[0, 0, 0, 0.5], qk=(0,) * 4, vo=(0,) * 4, dense_steps=0)  # type: ignore[arg-type]
    assert plan.ffn == (0.0, 0.0, 0.0, 0.5) and isinstance(plan.ffn[0], float) and isinstance(plan.dense_steps, float)
    assert hash(plan) == hash(replace(plan, dense_steps=0.0))


@pytest.mark.parametrize("layers", [2, 12, 32])
def test_the_default_is_the_papers_shape_at_any_depth(layers: int) -> None:
    plan = SparsityPlan.default(tiny.base(num_hidden_layers=layers), selection="svd")
    assert plan.selection == "svd" and plan.qk == plan.vo
    if layers == 32:
        paper = SparsityPlan.preset("llama3-8b/math10k")
        assert plan.ffn == paper.ffn
        assert [i for i in range(32) if plan.qk[i] != paper.qk[i]] == [20, 24]  # left out for that model alone
    else:
        assert plan.ffn == {2: (0.99, 0.0), 12: (0.0,) + (0.99,) * 10 + (0.0,)}[layers]
        assert plan.qk == {2: (0.0, 0.0), 12: (0.0,) * 5 + (0.75,) * 6 + (0.0,)}[layers]
    with pytest.raises(InputError, match="rank 0 is not a whole number"):
        SparsityPlan.default(tiny.base(), rank=0)


def test_uniform_knows_the_model() -> None:
    model = tiny.base("qwen3")
    plan = SparsityPlan.uniform(model, 0.75, parts=("ffn", "vo"), layers=[1], rank=4, rotary_pairs=True)
    assert plan.model == ModelFacts("qwen3", layers=2, heads=4, kv_heads=2, head_dim=12, hidden=32, intermediate=40)
    assert (plan.ffn, plan.qk, plan.vo) == ((0.0, 0.75), (0.0, 0.0), (0.0, 0.75))
    assert plan.rank == 4 and plan.rotary_pairs
    assert SparsityPlan.uniform(model, 0.75).qk == (0.75, 0.75)


def changed(**values: Any) -> dict[str, Any]:
    return {"model": FACTS, "ffn": (0.0,) * 4, "qk": (0.0,) * 4, "vo": (0.0,) * 4, **values}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ffn": (0.1, 0.2, 1.0, 0.0)}, r"ffn sparsity 1.0 of layer 2 is not in \[0, 1\)"),
        ({"qk": (-0.1, 0.0, 0.0, 0.0)}, r"qk sparsity -0.1 of layer 0"),
        ({"vo": (float("nan"), 0.0, 0.0, 0.0)}, r"vo sparsity nan of layer 0"),
        ({"vo": (0.0, float("inf"), 0.0, 0.0)}, r"vo sparsity inf of layer 1"),
        ({"vo": (True, 0.0, 0.0, 0.0)}, r"vo sparsity True of layer 0"),
        ({"vo": ("0.5", 0.0, 0.0, 0.0)}, r"vo sparsity '0.5' of layer 0"),
        ({"ffn": (0.5,) * 3}, "ffn has 3 sparsities for 4 layers"),
        ({"ffn": 0.5}, "ffn 0.5 is not a list of sparsities"),
        (
            {"selection": "magic"},
            "selection 'magic' is not known: use one of svd, whitened, sampled, oracle",
        ),
        ({"rank": 0}, "rank 0 is not a whole number of at least 1"),
        ({"rank": 8.0}, "rank 8.0 is not a whole number"),
        ({"dense_steps": 1.5}, r"dense_steps 1.5 is not in \[0, 1\]"),
        ({"dense_steps": float("nan")}, "dense_steps nan"),
        ({"rotary_pairs": 1}, "rotary_pairs 1 is not a switch"),
        ({"seed": -1}, "seed -1 is not a whole number"),
        ({"model": {"layers": 4}}, "is not ModelFacts"),
    ],
)
def test_refuses_what_is_out_of_range(values: dict[str, Any], message: str) -> None:
    assert SparsityPlan(**changed())
    with pytest.raises(InputError, match=message) as caught:
        SparsityPlan(**changed(**values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [2]}, "layer 2 does not exist: name layers from 0 to 1"),
        ({"layers": [-1]}, "layer -1 does not exist"),
        ({"parts": ("mlp",)}, "part 'mlp' is not known: use ffn, qk, vo"),
        ({"ranks": 8}, "setting 'ranks' is not known: use selection, rank, dense_steps"),
        ({"qk": (0.0, 0.0)}, "setting 'qk' is not known"),
    ],
)
def test_uniform_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SparsityPlan.uniform(tiny.base(), 0.5, **arguments)
    with pytest.raises(InputError, match=r"ffn sparsity 1.2 of layer 0 is not in \[0, 1\)"):
        SparsityPlan.uniform(tiny.base(), 1.2)


@pytest.mark.parametrize("name", ["ranks", "ffn"])
def test_the_default_refuses_what_is_no_setting(name: str) -> None:
    with pytest.raises(InputError, match=f"setting '{name}' is not known: use selection, rank, dense_steps"):
        SparsityPlan.default(tiny.base(), **{name: 8})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not JSON"),
        (lambda text: "[1, 2]", "holds list, not an object"),
        (lambda text: text.replace('"version": 1', '"version": 7'), "has version 7, this elision reads 1"),
        (lambda text: text.replace('"version": 1', '"version": true'), "has version True"),
        (lambda text: text.replace('"seed"', '"sed"'), "has an unknown field 'sed'"),
        (lambda text: text.replace("0.25", "1.25"), "qk sparsity 1.25 of layer 2"),
        (lambda text: text.replace("0.25", "NaN"), "qk sparsity nan of layer 2"),
        (lambda text: text.replace('"layers": 4', '"layers": 5'), "ffn has 4 sparsities for 5 layers"),
        (lambda text: text.replace('"layers": 4', '"layers": "four"'), "model: layers 'four' is not a whole number"),
        (lambda text: text.replace('    "heads": 4,\n', ""), "model lacks heads"),
    ],
)
def test_load_refuses_with_one_line_that_names_the_file(tmp_path: Path, edit: Any, message: str) -> None:
    path = PLAN.save(tmp_path / "plan.json")
    text = edit(path.read_text())
    assert text != path.read_text()
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        SparsityPlan.load(path)
    assert "\n" not in str(caught.value) and "plan.json" in str(caught.value)


def test_load_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json is not a file"):
        SparsityPlan.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize("fact", ["layers", "heads", "kv_heads", "head_dim", "hidden", "intermediate"])
def test_another_geometry_is_refused_by_name(fact: str) -> None:
    PLAN.check(FACTS)
    other = replace(FACTS, **{fact: getattr(FACTS, fact) * 2})
    with pytest.raises(InputError, match=f"with {fact} {getattr(FACTS, fact)}, this model has {fact}"):
        PLAN.check(other)


def test_another_family_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="type llama, this model has type opt"):
        PLAN.check(replace(FACTS, type="opt"))


def test_a_plan_is_read_without_torch(tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "plan.json")
    script = (
        "import sys; from elision.sparselora import SparsityPlan; "
        f"print(SparsityPlan.load({str(path)!r}).seed, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["3", "False", "False"]
