"""Several runs, plans and benchmarks become one page; a real browser shows it without a complaint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from elision import report, runs
from elision.cli import app
from elision.errors import InputError
from elision.report import measured, sources, tables, verdict
from elision.report.results import Bounds, Measure, check
from tests.browser import browser, executable
from tests.test_report import measured as measured_by_the_demo

MEASURES = [
    {
        "task": "text",
        "metric": "perplexity",
        "value": 3.31,
        "low": 3.1,
        "high": 3.5,
        "count": 4096,
        "better": "lower",
        "baseline": 3.3,
        "change": {"value": 0.0031, "low": 0.001, "high": 0.005},
        "relative": True,
    },
    {
        "task": "elision_addsub",
        "metric": "exact_match",
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "count": 100,
        "baseline": 0.52,
        "change": {"value": -0.02, "low": -0.06, "high": 0.02},
    },
    {"task": "text", "metric": "KL to the baseline, nats", "value": 0.0002, "count": 4096, "better": "lower"},
]
EVERYTHING: dict[str, Any] = {
    "training": [{"name": "SparseLoRA", "losses": [[step, 2.0 / step] for step in range(1, 80)]}],
    "evaluation": MEASURES,
    "tradeoffs": [
        {
            "name": "SparseLoRA",
            "saving": "FLOPs",
            "cost": "loss",
            "points": [
                {"name": "a", "saving": 0.2, "cost": 0.001},
                {"name": "b", "saving": 0.3, "cost": 0.02},
                {"name": "c", "saving": 0.4, "cost": 0.01, "low": 0.005, "high": 0.02, "kind": "chosen"},
                {"name": "random channels", "saving": 0.4, "cost": 0.05, "kind": "control"},
            ],
        }
    ],
    "layers": [{"name": "SparseLoRA", "parts": {"ffn": [3.0, 0.1, 0.3], "qk": [1.0, 0.0, -0.1]}, "bounds": [0.2, 2]}],
    "plans": {"chosen": {"ffn": [0, 0.9, 0.9], "qk": [0, 0.5, 0.5], "vo": [0, 0.5, 0.5]}},
    "steps": [
        {"variant": "hf-lora", "shape": "S1", "output_share": 0.25, "step_ms": 400.0, "speedup": 1.0, "ideal": 1.0},
        {
            "variant": "sparse + lossless",
            "shape": "S1",
            "output_share": 0.25,
            "step_ms": 160.0,
            "speedup": 2.5,
            "ideal": 2.9,
            "peak_mb": 900,
            "breakdown": {"attention": 60.0, "base products": 70.0, "adapters": 30.0},
        },
    ],
    "latency": [
        {"variant": "all syncs", "phase": "decode", "link": "loopback", "ranks": 2, "ms": 17.1},
        {"variant": "none", "phase": "decode", "link": "loopback", "ranks": 2, "ms": 13.6, "ideal_ms": 13.5},
        {"variant": "none", "phase": "decode", "link": "1 Gbit", "ranks": 2, "ms": 20.6, "ideal_ms": 19.5},
    ],
    "links": [
        {
            "ranks": 2,
            "alpha": 1e-4,
            "beta": 1e-9,
            "all_reduces": [
                {"bytes": 4**k, "seconds": 1.1e-4 + 4**k * 1e-9, "fitted": 1e-4 + 4**k * 1e-9} for k in (5, 8)
            ],
        }
    ],
}
PLOTS = {
    "training",
    "perplexity-change",
    "task-changes",
    "tradeoff-1",
    "layers-1",
    "plan-1",
    "steps-1",
    "breakdown-1",
    "latency-1",
    "links-1",
}
MODEL = {"type": "llama", "layers": 3, "heads": 2, "kv_heads": 2, "head_dim": 8, "hidden": 16, "intermediate": 32}
FOUND = {"data": "y", "tokens": 9, "kl": 0.1, "predicted": 0.02}
PLAN = {
    "version": 1,
    "ranks": 4,
    "dropped": [1, 2],
    "calibration": {
        "data": "x",
        "sensitivities": [0.9, 0.01, 0.02],
        "order": [1, 2, 0],
        "perplexities": [3.0, 3.003, 3.009, 3.9],
        "versions": {"torch": "2.13.0"},
    },
}


def put(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report")
    put(place / "run" / "results.json", {"title": "everything", "settings": {"seed": 3}, **EVERYTHING})
    put(place / "plan.json", PLAN)
    said = CliRunner().invoke(
        app, ["report", str(place / "run"), str(place / "plan.json"), "--out", str(place / "page")]
    )
    assert said.exit_code == 0, said.output
    return place / "page" / "report.html"


def test_every_measurement_is_drawn_in_three_forms(page: Path) -> None:
    drawn = {path.stem for path in (page.parent / "plots").glob("*.png")}
    assert drawn == PLOTS | {"sensitivity-1", "dropping-1"}
    assert {path.stem for path in (page.parent / "plots").glob("*.csv")} == drawn
    text = page.read_text()
    assert set(re.findall(r'<figure id="plot-([^"]+)"', text)) == drawn
    assert text.count("<svg") == len(drawn) == text.count("<desc id=")


def test_settings_say_whose_they_are(page: Path) -> None:
    text = page.read_text()
    assert "<dt>run: seed</dt><dd>3</dd>" in text and "<dt>plan: torch</dt><dd>2.13.0</dd>" in text


def test_the_verdict_names_what_was_compared() -> None:
    assert verdict.headline(check({"evaluation": MEASURES})) == (
        "Perplexity on text is 3.3100, +0.31% against the baseline (95% interval +0.10% to +0.50%: worse)."
    )
    best = verdict.headline(check({"steps": EVERYTHING["steps"]}))
    assert "A step of sparse + lossless at S1 is 2.50 times as fast, where the counted operations allow 2.90" in best
    tradeoff = verdict.headline(check({"tradeoffs": EVERYTHING["tradeoffs"]}))
    assert tradeoff == "SparseLoRA leaves out 40.0% of FLOPs for +1.00% loss."


@pytest.mark.parametrize(
    ("change", "better", "expected"),
    [
        ({"value": 0.1, "low": 0.05, "high": 0.2}, "lower", "worse"),
        ({"value": 0.1, "low": 0.05, "high": 0.2}, "higher", "better"),
        ({"value": -0.1, "low": -0.2, "high": -0.05}, "lower", "better"),
        ({"value": 0.1, "low": -0.05, "high": 0.2}, "higher", "cannot be told apart"),
        ({"value": 0.1}, "higher", "cannot be told apart"),
    ],
)
def test_a_difference_is_judged_by_its_interval(change: dict[str, float], better: Any, expected: str) -> None:
    is_ = Measure(task="t", metric="m", value=1.0, better=better, change=Bounds(**change))
    assert verdict.judged(is_) == expected


def test_the_table_holds_every_number() -> None:
    table = tables.evaluation([Measure.model_validate(row) for row in MEASURES])
    assert len(table.columns) == len(table.numeric) == len(table.rows[0]) == 9
    assert [row[2].value for row in table.rows] == [3.31, 0.5, 0.0002]
    assert [row[-1].text for row in table.rows] == ["worse", "cannot be told apart", "–"]


def test_many_comparisons_are_counted(tmp_path: Path) -> None:
    worse = {
        "task": "t",
        "metric": "solved",
        "value": 0.4,
        "baseline": 0.5,
        "change": {"value": -0.1, "low": -0.2, "high": -0.05},
    }
    same = worse | {"change": {"value": -0.1, "low": -0.2, "high": 0.05}}
    rows = [row | {"model": f"way {number}"} for number, row in enumerate([worse, *[same] * 14])]
    text = report.write(put(tmp_path / "results.json", {"evaluation": rows}), tmp_path / "page").read_text()
    assert "<li>Solved on t is 0.4000 for way 0, −10.0 points against the baseline" in text
    assert "<li>14 of 15 differences to the baseline cannot be told from none.</li>" in text
    assert text.count("<li>Solved on t") == 1 and '<figure id="plot-task-changes-t"' in text


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(0.2, 1.0), (0.3, 3.0), (0.4, 2.0), (0.5, 9.0), (0.5, 8.0), (0.1, 1.0)]
    assert measured.front(points) == [(0.2, 1.0), (0.4, 2.0), (0.5, 8.0)]


def test_a_run_that_goes_on_shows_its_loss(tmp_path: Path) -> None:
    place = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), runs.opened(place, "sparselora train", {"seed": 1}) as run:
        run.metric(step=1, loss=2.0)
        run.metric(step=5, loss=1.5)
        raise KeyboardInterrupt
    text = report.write(place).read_text()
    assert "went from 2.000 to 1.500 in 5 steps" in text and "not finished" in text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / name / "run" / "results.json", {"training": EVERYTHING["training"]})
    given = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    found = sources.together(
        [(label, sources.load(run)) for label, run in zip(sources.labels(given), given, strict=True)]
    )
    assert [run.name for run in found.training] == [f"{place}: SparseLoRA" for place in given]


def test_what_a_benchmark_printed(tmp_path: Path) -> None:
    path = tmp_path / "bench.txt"
    path.write_text("variant  ms\nlora  400\n" + json.dumps({"benchmark": "steps", "rows": EVERYTHING["steps"]}) + "\n")
    assert [row.variant for row in sources.load(path).steps] == ["hf-lora", "sparse + lossless"]


REFUSED: list[tuple[dict[str, Any], str]] = [  # what the commands refuse, the report does not draw
    ({"ranks": 4.0}, ": ranks 4.0 is not a whole number"),
    ({"corrections": ["a"]}, r": corrections \['a'\] is not a mapping"),
    ({"version": 2}, " has version 2, this elision reads 1"),
    ({"calibration": {"a": 1}}, ", calibration has an unknown field 'a'"),
    ({"model": {**MODEL, "layers": -1}}, ", model: layers -1 is not a whole number"),
    (
        {"calibration": {**PLAN["calibration"], "sensitivities": [1, 2, float("nan")]}},
        ", calibration: sens.* holds nan",
    ),
    ({"verified": {**FOUND, "dense": 0, "zero_shot": 1, "planned": 1}}, ", verified: dense 0 is not a perplexity"),
    ({"ffn": [0.0, 1.5]}, r": ffn .*1\.5"),
    ({"ffn": [0.0, 0.9], "calibration": {"a": 1}}, ", calibration has an unknown field 'a'"),
]


def test_sources_that_cannot_be_shown(tmp_path: Path) -> None:
    plan = put(tmp_path / "plan.json", {"version": 1, "ranks": 2, "dropped": [1]})
    with pytest.raises(InputError, match="made by hand"):
        report.write(plan, tmp_path / "page")
    with pytest.raises(InputError, match="is no run, plan or benchmark"):
        report.write(put(tmp_path / "x.json", {"a": 1}), tmp_path / "page")
    with pytest.raises(InputError, match="none does not exist: give a run directory, a plan or a benchmark's JSON"):
        report.write(tmp_path / "none", tmp_path / "page")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty is no run, for it holds neither results\.json nor run\.json: give"):
        report.write(tmp_path / "empty")
    (tmp_path / "log.txt").write_text("a Trainer's\n{'loss': '4.6'}\n")
    with pytest.raises(InputError, match=r"log\.txt is no run, plan or benchmark: give"):
        report.write(tmp_path / "log.txt", tmp_path / "page")
    for values in ({"rows": [1]}, {"rows": [{"workload": 3}]}):
        with pytest.raises(InputError, match=r"torn\.json is not a whole plan or benchmark \(.+\): write it again"):
            report.write(put(tmp_path / "torn.json", values), tmp_path / "page")
    for change, words in REFUSED:
        with pytest.raises(InputError, match=rf"plan .*torn\.json{words}"):
            report.write(put(tmp_path / "torn.json", {**(VERIFIED if "ffn" not in change else SPARSITY), **change}))
    with pytest.raises(InputError, match="has no place of its own"):
        report.write(put(tmp_path / "p.json", PLAN))
    assert not (tmp_path / "page").exists()


needs_browser = pytest.mark.skipif(
    executable() is None, reason="no Chromium here: the page is looked at in a browser only where one is installed"
)
FIGURES = """[...document.querySelectorAll("figure")].map(figure => {
  const [svg] = figure.querySelectorAll("svg"), box = svg.getBoundingClientRect();
  return {id: figure.id, left: box.left, right: box.right, height: box.height,
          marks: svg.querySelectorAll("path").length, words: svg.querySelector("desc").textContent.length};
})"""


@needs_browser
@pytest.mark.parametrize("kind", ["several sources", "the demo"])
def test_a_browser_shows_every_plot_without_a_complaint(kind: str, page: Path, tmp_path: Path) -> None:
    if kind == "the demo":
        page = report.write(put(tmp_path / "demo" / "results.json", measured_by_the_demo()).parent)
    drawn = {f"plot-{path.stem}" for path in (page.parent / "plots").glob("*.png")}
    with browser(tmp_path / "profile") as tab:
        for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
            tab.show(page, width, scheme=scheme)
            assert tab.complaints == []
            assert [url for url in tab.requests if not url.startswith("data:")] == [page.as_uri()]
            figures = tab.evaluate(FIGURES)
            assert {figure["id"] for figure in figures} == drawn
            for figure in figures:
                assert figure["left"] >= -8 and figure["right"] <= width, (figure, width)  # in sight, not cut off
                assert figure["height"] > 100 and figure["marks"] > 5 and figure["words"] > 20, figure
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            paper = tab.evaluate("getComputedStyle(document.documentElement).backgroundColor")
            bright = sum(map(int, re.findall(r"\d+", paper)[:3])) > 3 * 128
            assert bright == (scheme == "light"), (paper, scheme)
            assert tab.screenshot(tmp_path / f"{width}-{scheme}.png").stat().st_size > 20_000


@needs_browser
def test_the_browser_would_hear_a_complaint(tmp_path: Path) -> None:
    bodies = ["<script>console.error('oh')</script>", "<script>nothing()</script>", "<img src='file:///nowhere.png'>"]
    with browser(tmp_path / "profile") as tab:
        for body in bodies:
            (tmp_path / "page.html").write_text(f"<!doctype html><title>x</title>{body}")
            tab.show(tmp_path / "page.html", 800)
            assert tab.complaints, body


SPARSITY = {
    "version": 1,
    "model": {**MODEL, "layers": 2},
    "ffn": [0.0, 0.9],
    "qk": [0.0, 0.5],
    "vo": [0.0, 0.5],
    "calibration": {
        "data": "x",
        "output_tokens": 9,
        "output_share": 0.5,
        "loss": 2.0,
        "grid": [0.5, 0.9],
        "ffn": [[0.1, 0.4], [0.0, 0.01]],
        "qk": [[0.1, 0.2], [0.0, 0.01]],
        "vo": [[0.1, 0.2], [0.0, 0.01]],
        "expected_increase": 0.02,
        "measured_increase": 0.02,
        "rehearsed": 0,
        "speedup": 1.5,
        "speedup_from": "operations",
        "flops": {"full": 0.6},
        "budget": "flops",
        "limit": 0.6,
        "versions": {"torch": "2.13.0"},
    },
}


PLANS = (("Dear", "40.0"), ("cheap", "60.0"))


def test_calibrated_plans_are_one_picture(tmp_path: Path) -> None:
    cheap = {**SPARSITY, "calibration": {**SPARSITY["calibration"], "flops": {"full": 0.4}}}
    given = [put(tmp_path / "dear.json", SPARSITY), put(tmp_path / "cheap.json", cheap)]
    found = sources.together([(path.stem, sources.load(path)) for path in given])
    (tradeoff,) = found.tradeoffs
    assert [(point.name, round(point.saving, 3), point.cost) for point in tradeoff.points] == [
        ("dear", 0.4, 0.01),
        ("cheap", 0.6, 0.01),
    ]
    assert found.layers[0].parts["ffn"] == [20.0, 0.5]
    several = [("a", check({"tradeoffs": EVERYTHING["tradeoffs"] * 2})), ("plan", found), ("b", found)]
    assert [(each.name, len(each.points)) for each in sources.together(several).tradeoffs] == [
        ("a: SparseLoRA", 4),
        ("a: SparseLoRA", 4),
        ("plan: dear and cheap", 2),
        ("b: dear and cheap", 2),
    ]
    dear, cheap = (f"{name} leaves out {share}% of LoRA's FLOPs for +1.00% loss" for name, share in PLANS)
    assert verdict.headline(found) == f"{dear} and {cheap}."
    assert report.write(given, tmp_path / "page").is_file()


VERIFIED = {
    **PLAN,
    "model": MODEL,
    "verified": {**FOUND, "dense": 10.0, "zero_shot": 10.2, "planned": 10.2},
}


def test_verified_plans_of_syncs_are_named_and_judged_on_held_out_text(tmp_path: Path) -> None:
    alone = sources.load(put(tmp_path / "a.json", VERIFIED))
    assert verdict.headline(alone) == (
        "A leaves out 66.7% of the syncs after attention for +2.00% perplexity (held-out text)."
    )
    page = report.write(tmp_path / "a.json", tmp_path / "page").read_text()
    assert "+2.00% perplexity on held-out text" in page and "perplexity on the calibration text<" not in page
    other = {**VERIFIED, "verified": {**FOUND, "dense": 10.0, "zero_shot": 10.5, "planned": 10.5}}
    both = sources.together([("a", alone), ("b", sources.load(put(tmp_path / "b.json", other)))])
    said = (
        "A on held-out text leaves out 66.7% of the syncs after attention for +2.00% perplexity and b on held-out text "
    )
    assert verdict.headline(both) == f"{said}leaves out 66.7% of the syncs after attention for +5.00% perplexity."
    same = put(tmp_path / "other" / "a.json", other)
    twins = sources.together([("a.json", alone), ("other/a.json", sources.load(same))])
    assert [each.name for each in twins.tradeoffs] == ["a.json: a and other/a.json: a"]
    unverified = sources.load(put(tmp_path / "c.json", PLAN))
    assert "perplexity on the calibration text<" in report.write(tmp_path / "c.json", tmp_path / "page").read_text()
    mixed = sources.together([("s", sources.load(put(tmp_path / "s.json", SPARSITY))), ("c", unverified)])
    assert verdict.headline(mixed) == (
        "On 4 ranks, Sync-Point Drop leaves out 2 of the c's 3 syncs after attention for +0.30% perplexity on the "
        "calibration text itself; s leaves out 40.0% of LoRA's FLOPs for +1.00% loss."
    )
    mixed = sources.together([("s", sources.load(tmp_path / "s.json")), ("a", alone)])
    assert verdict.headline(mixed) == (
        "S leaves out 40.0% of LoRA's FLOPs for +1.00% loss; a leaves out 66.7% of the syncs after attention for "
        "+2.00% perplexity (held-out text)."
    )


def test_what_is_slower_is_not_called_a_gain() -> None:
    timed = {"shape": "S1", "step_ms": 400.0}
    steps = [
        {**timed, "variant": "LoRA", "speedup": 1.0, "ideal": 1.0},
        {**timed, "variant": "sparse + lossless", "speedup": 0.8, "ideal": 1.2},
    ]
    assert verdict.headline(check({"steps": steps})) == (
        "A step of sparse + lossless at S1 is 0.80 times as fast, where the counted operations allow 1.20."
    )
    whole = {"phase": "decode", "link": "this machine", "ranks": 2}
    latency = [
        {**whole, "variant": "all syncs", "ms": 100.0, "ideal_ms": 100.0},
        {**whole, "variant": "plan", "ms": 110.0, "ideal_ms": 95.0},
    ]
    assert verdict.headline(check({"latency": latency})) == (
        "The plan adds 10.0% to decode on this machine, where the dropped syncs alone would take off 5.0%."
    )


def test_latencies_are_shown_against_their_ideal(tmp_path: Path) -> None:
    rows = [
        {"workload": "decode", "variant": "all syncs", "ms": 17.0, "saved_ms": 0.0, "ideal_ms": 0.0},
        {"workload": "decode", "variant": "all dropped", "ms": 13.6, "saved_ms": 3.4, "ideal_ms": 3.5},
    ]
    links = {"benchmark": "tp_latency", "links": [{"link": "loopback", "rows": rows}, {"link": "1 Gbit", "rows": rows}]}
    found = sources.load(put(tmp_path / "bench.json", links)).latency
    assert [(row.link, row.ideal_ms) for row in found[:2]] == [("loopback", None), ("loopback", 13.5)] and len(
        found
    ) == 4
    rows = [{"workload": "decode", "variant": "plan", "ms": 15.0, "ideal_ms": 14.5}]  # as elision spd bench prints them
    (alone,) = sources.load(put(tmp_path / "alone.json", {"ranks": 2, "dropped": [1], "rows": rows})).latency
    assert (alone.ranks, alone.ideal_ms) == (2, 14.5)


@pytest.mark.parametrize(
    ("change", "headline"),
    [
        (
            {"dropped": [0, 2]},
            "On 4 ranks, the plan of p spares syncs after attention in 2 of 3 blocks (dropped in 0, 2) for a cost that "
            "was not measured.",
        ),
        (
            {**VERIFIED, "dropped": [2], "int8": [0], "skipped": [1]},
            "On 4 ranks, the plan of p spares syncs after attention in 3 of 3 blocks (dropped in 2, int8 in 0 and "
            "skipped in 1) for +2.00% perplexity on held-out text.",
        ),
        (
            {**VERIFIED, "dropped": [0, 2]},
            "P leaves out 66.7% of the syncs after attention for +2.00% perplexity (held-out text).",
        ),
    ],
)
def test_a_plan_that_is_no_point_of_its_curve_gets_no_cost_from_it(
    change: dict[str, Any], headline: str, tmp_path: Path
) -> None:
    plan = put(tmp_path / "p.json", {**PLAN, **change})
    assert verdict.headline(sources.load(plan)) == headline
    text = report.write(plan, tmp_path / "page").read_text()
    assert "no point of it is this plan" in text and "Ringed" not in text and "+0.30%" not in text
    spared = f"<td>{'2; int8 0; skipped 1' if 'int8' in change else '0, 2'}</td>"
    assert spared in re.sub(r"<td[^>]*>", "<td>", text)
    assert "Ringed" in report.write(put(tmp_path / "on.json", PLAN), tmp_path / "on").read_text()


@pytest.mark.parametrize("mixed", [False, True])
def test_what_is_to_be_healed_is_not_judged_by_what_it_costs_before(mixed: bool, tmp_path: Path) -> None:
    found = {**VERIFIED["verified"], "zero_shot": 16.0, "planned": 16.0, "predicted": 0.1}
    plan = {**VERIFIED, "healing": {"2": "b2b"}, "verified": found} | ({"int8": [0]} if mixed else {})
    first, second = (sources.load(put(tmp_path / name, plan)) for name in ("p.json", "q.json"))
    said = "held-out text before healing, +10.0% expected after it"
    assert verdict.headline(first).endswith(f"+60.0% perplexity {f'on {said}' if mixed else f'({said})'}.")
    assert mixed or f"P on {said} leaves out" in verdict.headline(sources.together([("p", first), ("q", second)]))


def test_benchmarks_on_one_page_are_each_held_against_their_own_baseline(tmp_path: Path) -> None:
    def bench(name: str, slower: float) -> Path:
        rows = [row | {"step_ms": slower * row["step_ms"]} for row in EVERYTHING["steps"]]
        return put(tmp_path / f"{name}.json", {"benchmark": "steps", "rows": rows})

    def served(name: str, all_syncs: float, plan: float) -> Path:
        rows = [
            {"workload": "decode", "variant": "all syncs", "ms": all_syncs, "ideal_ms": all_syncs},
            {"workload": "decode", "variant": "plan", "ms": plan, "ideal_ms": plan},
        ]
        return put(tmp_path / f"{name}.json", {"ranks": 2, "rows": rows})

    given = [bench("a", 1.0), bench("b", 10.0), served("c", 100.0, 90.0), served("d", 10.0, 9.5)]
    found = sources.together([(path.stem, sources.load(path)) for path in given])
    assert [row.shape for row in found.steps] == ["a: S1"] * 2 + ["b: S1"] * 2
    assert "the plan takes 10.0% off decode on c: this machine" in verdict.headline(found)
    page = report.write(given, tmp_path / "page").read_text()
    assert "Time of a step, a: S1" in page and "Time of a step, b: S1" in page
    one = sources.together([("a", sources.load(given[0])), ("c", sources.load(given[2]))])
    assert {row.shape for row in one.steps} == {"S1"} and {row.link for row in one.latency} == {"this machine"}
    whole = {"phase": "decode", "link": "here", "variant": "all syncs"}
    rows: list[dict[str, Any]] = [{**whole, "ranks": ranks, "ms": 50 * ranks} for ranks in (2, 4)]
    rows += [{**rows[0], "variant": "plan", "ms": 90, "ideal_ms": 90}]
    assert "The plan takes 10.0% off" in verdict.headline(check({"latency": rows}))
    timed = [row | {"step_ms": slower * row["step_ms"]} for row in EVERYTHING["steps"] for slower in (1, 10)]
    drawn = measured.step_times(check({"steps": timed}).steps, "steps", "Steps").figure.axes[0].lines[0].get_xdata()
    assert list(drawn) == pytest.approx([400, 4000, 400 / 2.9, 4000 / 2.9])


def test_a_source_is_called_by_its_whole_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lr.3e-4").mkdir()
    assert sources.labels([tmp_path / "lr.3e-4", tmp_path / "plan.json"]) == ["lr.3e-4", "plan"]
    monkeypatch.chdir(tmp_path / "lr.3e-4")
    assert sources.labels(["."]) == ["lr.3e-4"]

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    put(tmp_path / "plan.json", PLAN)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(InputError, match=r"plan\.json cannot be read \(Permission denied\): give a file that you may"):
        sources.load(tmp_path / "plan.json")
