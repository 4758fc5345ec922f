"""The page that predicts what SPD saves shows what its program computes, and calls it a prediction."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("spd_costs", ROOT / "benchmarks" / "spd_costs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["spd_costs"] = module  # where its dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


def test_the_pages_numbers_are_the_programs(program):
    page = (ROOT / "docs" / "does-spd-pay.md").read_text(encoding="utf-8")
    begin, end = program.MARKS
    shown = page[page.index(begin) + len(begin) : page.index(end)].strip()
    assert shown == program.tables(), "run python benchmarks/spd_costs.py --write"
    assert "Everything below is a prediction" in page[: page.index(begin)]
    assert shown.count("### Prediction") == len(program.SYSTEMS)


def test_every_number_about_a_link_names_who_measured_it(program):
    for link in program.LINKS:
        assert link.source.count("https://github.com/") >= 1 and "alpha" in link.source and "bandwidth" in link.source


def test_predictions_keep_to_what_must_hold(program):
    rows = program.predictions()
    for row in rows:
        assert 0 <= row["int8_all"] < row["drop_all"] < 0.5
        assert row["drop_70"] == pytest.approx(0.7 * row["drop_all"], abs=2e-3)
        assert row["in_syncs"] == pytest.approx(2 * row["drop_all"], abs=2e-4)
    by_link = {row["link"]: row for row in rows if row["work"] == "decode, batch 1" and "8 x H100" in row["system"]}
    assert by_link["NVLink, one-shot kernel"]["drop_all"] < by_link["NVLink, NCCL"]["drop_all"]
    reported = {row["figure"]: row for row in program.held_against_the_paper()}
    assert reported["10 GB/s links"]["decode"][0] < 0.197 < reported["10 GB/s links"]["prefill"][1]
    assert reported["two nodes, 50 GB/s"]["prefill"][1] > 0.10
