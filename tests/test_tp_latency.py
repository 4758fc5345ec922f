"""How the latency program judges pairs; the program itself needs two quiet cores and runs for half an hour."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_the_interval_of_a_median_ratio_holds_the_truth_as_often_as_it_says(program: Any) -> None:
    over = program("tp_latency").over
    draw = random.Random(0)
    held = 0
    for _ in range(400):
        fast = [draw.lognormvariate(0, 0.3) for _ in range(25)]
        slow = [1.1 * each * draw.lognormvariate(0, 0.1) for each in fast]  # what is shared falls out of the ratio
        value, low, high = over(slow, fast)
        assert low <= value <= high
        held += low <= 0.1 <= high
    assert 0.93 <= held / 400 <= 0.99  # of 25 pairs, the 8th from either end: 95.7%
    assert over([1.2, 1.3], [1.0, 1.0]) == pytest.approx([0.25, 0.2, 0.3])  # too few for an interval: all of them


@pytest.mark.parametrize(
    ("pair", "word"),
    [([0.01, -0.01, 0.03], "met"), ([0.03, 0.01, 0.05], "not decided"), ([0.05, 0.03, 0.07], "**missed**")],
)
def test_a_bar_is_missed_only_where_the_interval_says_so(program: Any, pair: list[float], word: str) -> None:
    report = program("tp_latency_report")
    rows = [{"workload": "decode", "empty plan": pair}]
    (bar,) = report.verdicts([{"link": "loopback", "rows": [], "empty_plan": rows}])
    assert report.said(bar).startswith(
        f"{word}: empty plan over transformers, decode, loopback: {100 * pair[0]:.1f}% (2%)"
    )
    assert bar["met"] is (word == "met")


def test_a_bar_without_an_interval_is_met_or_missed(program: Any) -> None:
    report = program("tp_latency_report")
    for saved, word in ((0.2, "met"), (0.1, "**missed**")):
        row = {"workload": "decode, batch 1", "variant": "all dropped", "saved": saved, "quartiles_ms": [1, 2]}
        row |= {"ideal_ms": 0.5}
        (bar,) = report.verdicts([{"link": "loopback", "rows": [row], "empty_plan": []}])
        assert report.said(bar).startswith(word)
