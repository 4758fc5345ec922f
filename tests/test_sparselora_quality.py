"""The JSON line of SparseLoRA's quality is a report: what is lost for what is left out, the controls beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import sparselora_quality as benchmark
from elision import files, report
from elision.report import sources, verdict

RECIPE = files.read_json(benchmark.RECIPE, "recipe")


def results() -> dict:
    """Two seeds of ten problems: LoRA solves eight, the plan seven, random channels five."""
    solved = {"LoRA": 8, "46%": 7, "46%, random channels": 5, "LoRA, 46% of the steps": 6}
    runs = {
        name: {seed: {"solved": [1] * count + [0] * (10 - count), "loss": 0.1, "flops": flops} for seed in (0, 1)}
        for name, count in solved.items()
        for flops in [dict.fromkeys(("frozen", "all"), 1.0 if name == "LoRA" else 0.46)]
    }
    return {"bus": {name: runs.get(name, {}) for name in RECIPE["variants"]}}


def test_what_is_lost_is_drawn_against_what_is_left_out(tmp_path: Path) -> None:
    line = {"benchmark": "sparselora_quality", "recipe": RECIPE, **benchmark.sections(results(), RECIPE, "python x")}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(line))
    found = sources.load(path)
    (tradeoff,) = found.tradeoffs
    points = {point.name: (point.kind, round(point.saving, 6), round(point.cost, 6)) for point in tradeoff.points}
    assert points == {
        "LoRA": ("plan", 0.0, 0.0),
        "46%": ("chosen", 0.54, 0.1),
        "46%, random channels": ("control", 0.54, 0.3),
        "LoRA, 46% of the steps": ("control", 0.54, 0.2),
    }
    chosen = next(point for point in tradeoff.points if point.kind == "chosen")
    assert chosen.low is not None and chosen.high is not None and chosen.low < 0.1 < chosen.high
    minus = next(row for row in found.evaluation if row.model == "46%")
    assert minus.change is not None and minus.change.value == pytest.approx(-0.1) and minus.count == 20
    assert "bus leaves out 54.0% of the operations of LoRA's frozen products" in verdict.headline(found)
    page = report.write(path, tmp_path / "page").read_text()
    assert '<figure id="plot-tradeoff-1"' in page and "(control)" in page


def test_where_lora_solves_nothing_no_bar_counts_as_held() -> None:
    (said, *_) = benchmark.verdict(results())
    assert said.startswith("- bus: 46% minus LoRA -10.0") and "not above -1 point" in said
    found = results()
    for seeds in found["bus"].values():
        for result in seeds.values():
            result["solved"] = [0] * 10
    (said, *_) = benchmark.verdict(found)
    assert "too few for points to say anything" in said and "above" not in said


def test_controls_are_known_by_what_they_take_away() -> None:
    kinds = {name: benchmark.kind_of(name, RECIPE) for name in RECIPE["variants"]}
    assert [name for name, kind in kinds.items() if kind == "chosen"] == ["46%"]
    assert {name for name, kind in kinds.items() if kind == "control"} == {
        "46%, random channels",
        "46%, no context FFN",
        "46%, sparse outputs",
        "46%, uniform, random channels",
        "46%, uniform, no context FFN",
        "LoRA, 46% of the steps",
    }
