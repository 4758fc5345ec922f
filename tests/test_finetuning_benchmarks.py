"""The programs that measure SparseLoRA run to their last line, on models of a few layers."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from elision import files, reference_model
from tests.sparselora import tiny

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A program by its name, imported as Python does that runs it; what it tells the libraries is taken back."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads, words = torch.get_num_threads(), transformers.utils.logging.get_verbosity()
    yield importlib.import_module
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity(words)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a small model and the embedded one's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(reference_model.PATH)
    small = tiny.base("llama", torch.float32, vocab_size=len(tokenizer), max_position_embeddings=512)
    small.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def last_line(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_finetune_step(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = program("finetune_step")
    monkeypatch.setattr(torch, "compile", lambda model: model)  # takes longer than all the rest
    quick = ("--quick", "--device", "cpu", "--threads", 1, "--resume", tmp_path / "runs.jsonl")
    quick += ("--out", tmp_path / "step.json")
    found = last_line(benchmark, monkeypatch, capsys, *quick)
    rows = {row["variant"]: row for row in found["rows"]}
    assert found["benchmark"] == "finetune_step" and tuple(rows) == benchmark.available("cpu")
    asked = {"variant", "shape", "output_share", "device", "step_ms", "speedup", "ideal", "efficiency", "peak_mb"}
    for row in rows.values():
        asked |= {"gflops", "attention_gflops", "attention_ms", "tokens_per_s", "speedup_bf16", "quartiles_ms"}
        assert asked == row.keys()
        assert row["quartiles_ms"][0] <= row["step_ms"] <= row["quartiles_ms"][1]
        assert all(value > 0 for value in row.values() if isinstance(value, float | int) and not math.isnan(value))
    assert json.loads((tmp_path / "step.json").read_text()) == found
    assert f"| tiny | 25% | sparse + lossless | {rows['sparse + lossless']['step_ms']:.0f} |" in (
        (tmp_path / "step.md").read_text()
    )
    for name in ("dense + lossless", "sparse + lossless"):
        assert 0 < rows[name]["attention_ms"] < rows[name]["step_ms"]
        assert rows[name]["attention_gflops"] == rows["dense + lossless"]["attention_gflops"] < rows[name]["gflops"]
    assert rows["PEFT"]["attention_ms"] is None
    assert rows["PEFT"]["speedup"] == rows[benchmark.BASE]["ideal"] == 1.0
    ideals = [rows[name]["ideal"] for name in (benchmark.BASE, "dense + lossless", "sparse + lossless")]
    assert ideals == sorted(ideals) and len(set(ideals)) == 3 and rows["sparse"]["ideal"] > 1
    monkeypatch.setattr(benchmark, "timed", lambda *_: pytest.fail("timed again what was kept"))
    monkeypatch.setattr(benchmark, "attention_share", lambda *_: 0.5)
    again = last_line(benchmark, monkeypatch, capsys, *quick)["rows"]
    assert [row["step_ms"] for row in again] == [row["step_ms"] for row in found["rows"]]


def test_where_a_step_s_time_goes(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = program("finetune_step")
    arguments = ("--quick", "--breakdown", "--padded", "--device", "cpu", "--threads", 1)
    rows = last_line(benchmark, monkeypatch, capsys, *arguments)["rows"]
    assert [row["variant"] for row in rows] == [benchmark.BASE, "dense + lossless", "sparse + lossless"]
    for row in rows:
        assert tuple(row["breakdown"]) == benchmark.KINDS and row["output_share"] is None
        assert sum(row["breakdown"].values()) == pytest.approx(row["step_ms"], rel=0.01)
        assert all(row["breakdown"][kind] > 0 for kind in ("attention", "base products", "head and loss"))


def test_estimators(
    program: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = program("estimators")
    data = [{"prompt": f"Anna has {n} apples and buys 3 more. How many?", "completion": f"{n + 3}"} for n in range(9)]
    (tmp_path / "data.json").write_text(json.dumps(data))
    arguments = ("--data", tmp_path / "data.json", "--rows", 3, "--sparsities", "0.75", "--rank", 2, "--turns", 1)
    rows = last_line(benchmark, monkeypatch, capsys, model, *arguments)["rows"]
    by_name = {row["selection"]: row for row in rows}
    assert tuple(by_name) == benchmark.SELECTIONS
    for row in rows:
        shares = [row[f"{part} {what}"] for part in benchmark.PARTS for what in ("overlap", "energy")]
        assert all(0 < share <= 1 + 1e-6 for share in shares) and row["time"] > 0
        if row["selection"] == "oracle":
            assert shares == pytest.approx([1.0] * 6)
    assert by_name["oracle"]["flops"] >= by_name["sampled"]["flops"] > by_name["svd"]["flops"] > 0
    assert by_name["random"]["flops"] == 0 and by_name["random"]["ffn energy"] < by_name["sampled"]["ffn energy"]


class Serial:
    """multiprocessing's pool, in this process."""

    imap_unordered = staticmethod(map)

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_sparselora_quality(
    program: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe that is run for real, on few problems, and one variant of each kind."""
    benchmark = program("sparselora_quality")
    serial = SimpleNamespace(Pool=lambda processes: Serial())
    monkeypatch.setattr(benchmark.multiprocessing, "get_context", lambda method: serial)
    recipe = files.read_json(benchmark.RECIPE, "recipe")
    recipe |= {"model": str(model), "seeds": [0, 1], "batch": 4, "rank": 2, "grid": [0.99], "calibration_rows": 4}
    recipe["tasks"] = {"bus": {"family": "bus", "train": 8, "test": 4}}
    for name, how in recipe["variants"].items():
        how |= {key: 0.9 for key in ("flops", "uniform") if key in how}
        kinds = ("46%, uniform", "46%, sparse outputs", "46%, whitened", "LoRA, 46% of the steps")
        how["tier"] = how["tier"] if how["tier"] == 1 or name in kinds else 9
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    page, out = tmp_path / "page.md", tmp_path / "out"
    arguments = ("--recipe", tmp_path / "recipe.json", "--out", out, "--page", page, "--tiers", "1,2,3")
    found = last_line(benchmark, monkeypatch, capsys, *arguments)
    done = {name for name, how in recipe["variants"].items() if how["tier"] < 9}
    assert found["results"]["bus"].keys() == done and len(done) == 8
    assert all(result["seeds"] == 2 for result in found["results"]["bus"].values())
    text = page.read_text()
    assert "| 46% minus LoRA |" in text and "## Held against the bars" in text and "Plan at 90%: " in text
    losses = {name: result["loss"] for name, result in found["results"]["bus"].items()}
    assert losses["46%"] != losses["LoRA"] != losses["LoRA, 46% of the steps"]
    monkeypatch.setattr(benchmark, "run", lambda job: pytest.fail("run again what was done"))
    again = last_line(benchmark, monkeypatch, capsys, *arguments)
    assert again["results"] == found["results"]
    recipe["batch"] = 2
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit, match="2"):
        last_line(benchmark, monkeypatch, capsys, *arguments)


@pytest.mark.parametrize("name", ["long", "seeds"])
def test_recipes_of_three_passes_differ_from_one_pass_in_what_they_say(program: Any, name: str) -> None:
    """The plans of one recipe serve the other: all that a plan depends on is the same in both."""
    benchmark = program("sparselora_quality")
    one = files.read_json(benchmark.RECIPE, "recipe")
    other = files.read_json(benchmark.RECIPE.with_stem(f"sparselora_quality_{name}"), "recipe")
    said = {"about", "seeds", "test_seed", "epochs", "tasks", "variants", "comparisons"}
    assert {key: value for key, value in one.items() if key not in said} == {
        key: value for key, value in other.items() if key not in said
    }
    assert not set(one["seeds"]) & set(other["seeds"]) and one["test_seed"] != other["test_seed"]
    assert all(one["tasks"][name] == {**task, "test": 640} for name, task in other["tasks"].items())
    for name, how in other["variants"].items():
        assert {**one["variants"][name], "tier": how["tier"]} == how
