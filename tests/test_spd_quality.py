"""The page of SPD's quality says what was measured, and calls a missed bar missed."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import spd_quality_report as report
from elision import files
from elision.report import sources, verdict

RECIPE = files.read_json(report.ROOT / "benchmarks/spd_quality.json", "recipe")


def journal(seed: int, ranks: int, model: str = "llama") -> dict:
    """A measurement of a model of three blocks whose dense perplexity is 10."""
    ways = {"dense": 10.0, "zero-shot": 20.0, "HG": 19.0, "B2B (paper)": 13.0 + seed, "HG + B2B (paper)": 13.5 + seed}
    ways |= {"ours": 11.0, "int8 syncs": 10.001}
    found = {
        "about": {
            "model": model, "seed": seed, "ranks": ranks, "layers": 3, "parameters": 5_000_000, "weights": "ab",
            "scored": {"library": "x"}, "recipe": RECIPE,
        },
        "exact": {"sensitivities": [0.5, 0.001, 0.2], "errors": [0.01, 0.01, 0.01]},
        "done": True,
    }  # fmt: skip
    found |= {f"{way} | library": {"perplexity": value, "accuracy": 0.5} for way, value in ways.items()}
    found |= {f"fast | {method}": [3.0, 9.0, 1.0] for method in report.FAST}
    curve = {str(k): {"perplexity": 10 + 0.05 * k**2, "accuracy": 0.5 + 0.01 * k} for k in range(4)}
    return found | {f"curve | {way}": curve for way in report.CURVES}


def test_the_numbers_are_those_of_the_journals():
    each = journal(1, 8)
    assert report.loss(each, "ours") == pytest.approx(0.1)
    assert report.won_back(each, "ours") == pytest.approx(0.9)
    assert report.won_back(each, "B2B (paper)") == pytest.approx(0.6)
    assert [report.droppable(each, "ours", limit) for limit in (0.01, 0.03)] == [1, 2]
    assert report.significant(each, 2.0) == [0, 2]  # block 1 is noise, so that its wrong place does not count
    assert report.pooled([each, journal(2, 8)], "integrated", 2.0)[1] == 4
    assert report.rank_correlation([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)


def test_bars_are_judged_by_the_worst_model_and_number_of_ranks():
    journals = [journal(seed, ranks) for ranks in (2, 8) for seed in (0, 1)]
    verdicts = {what: (value, met) for what, _, value, met in report.bars(journals, RECIPE)}
    assert verdicts["All syncs dropped, the paper's B2B wins back"] == ("65.0% (llama, 2 ranks)", True)
    assert verdicts["All syncs dropped, our best recipe wins back"] == ("90.0% (llama, 2 ranks)", True)
    assert verdicts["Cost of int8 syncs"] == ("+0.010% (llama, 2 ranks)", True)
    assert verdicts["Droppable at 8 ranks below +1%, our best recipe"] == ("1.0 (llama, 8 ranks)", False)
    assert not next(met for what, (_, met) in verdicts.items() if "Rank correlation" in what)  # 8 blocks are too few
    bad = copy.deepcopy(journals)
    bad[0]["ours | library"]["perplexity"] = 14.0
    assert not dict((what, met) for what, _, _, met in report.bars(bad, RECIPE))[
        "All syncs dropped, our best recipe wins back"
    ]


def test_the_page_has_every_model_and_says_not_met(tmp_path):
    journals = [journal(0, ranks, model) for model in ("llama", "opt") for ranks in (2, 8)]
    for number, each in enumerate(journals):
        files.write_json(tmp_path / f"{number}.json", each)
    files.write_json(tmp_path / "unfinished.json", {**journal(3, 4), "done": False})
    loaded = report.load(tmp_path, RECIPE)
    assert len(loaded) == 4
    page = report.page(loaded, RECIPE)
    for heading in ("## llama, 2 ranks", "## opt, 8 ranks", "## Bars", "**not met**", "| met |", report.COMMAND):
        assert heading in page
    assert "llama at 2 ranks: 0; llama at 8 ranks: 0; opt at 2 ranks: 0" in page
    assert "in 0 of 4 after it: it does not reliably help here" in page
    assert json.dumps(report.summary(loaded, RECIPE))


def test_the_json_line_is_a_report(tmp_path):
    journals = [journal(seed, ranks) for ranks in (2, 8) for seed in (0, 1)]
    (tmp_path / "bench.txt").write_text("told before\n" + json.dumps(report.summary(journals, RECIPE)) + "\n")
    found = sources.load(tmp_path / "bench.txt")
    assert [each.name for each in found.tradeoffs] == ["SPD, llama, 2 ranks", "SPD, llama, 8 ranks"]
    points = {point.name: point for point in found.tradeoffs[1].points}
    assert points["ours, within +1%"].kind == "chosen" and points["ours, within +1%"].saving == pytest.approx(1 / 3)
    assert points["zero-shot, all dropped"].kind == "control" and points["zero-shot, all dropped"].cost == 1.0
    b2b = points["B2B (paper), all dropped"]
    assert (b2b.low, b2b.cost, b2b.high) == pytest.approx((0.3, 0.35, 0.4))
    assert "leaves out 33.3% of the syncs after attention for +0.50% perplexity" in verdict.headline(found)
