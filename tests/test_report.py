"""A run's numbers become a page that says no more than they allow, loads nothing and hides nothing."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import matplotlib
import pytest
from rich.console import Console

from elision import report
from elision.errors import InputError
from elision.report import page, plots, tables, verdict
from elision.report.canvas import THEME
from elision.report.results import Pair, check

BASE = {  # increase of perplexity in %, as one might measure it
    2: [0, 0.0, 0.02, 0.04, 0.07, 0.11, 0.17, 0.26, 0.55, 0.75, 1.1, 2.2, 8.5],
    4: [0, -0.01, 0.02, 0.06, 0.12, 0.2, 0.31, 0.45, 0.97, 1.5, 1.9, 4.6, 19],
    8: [0, -0.02, 0.01, 0.06, 0.13, 0.22, 0.34, 0.48, 1.1, 1.6, 2.3, 6.2, 26],
}
ORDER = [3, 2, 5, 4, 1, 6, 7, 9, 8, 10, 11, 0]


def spd(model: str, dense: float, factor: float = 1.0) -> dict[str, Any]:
    ranks = []
    for count, curve in BASE.items():
        increases = [factor * value for value in curve]
        sensitivities = [0.0] * 12
        for place, block in enumerate(ORDER):
            sensitivities[block] = 1.1 * (increases[place + 1] - increases[place])
        chosen = max(k for k, value in enumerate(increases) if value <= 1)
        perplexities = [dense * (1 + value / 100) for value in increases]
        ranks.append(
            {"ranks": count, "sensitivities": sensitivities, "order": ORDER, "perplexities": perplexities}
            | {"chosen": chosen, "max_loss": 0.01}
        )
    return {"model": model, "text": "standard-library text", "tokens": 16384, "dense_perplexity": dense, "ranks": ranks}


def variant(name: str, accuracy: float, ratio: float, seconds: float, lift: float) -> dict[str, Any]:
    losses = [
        [step, 2.4 * math.exp(-step / 40) + 0.5 + lift * step / 300 + 0.08 * math.sin(12.9898 * step)]
        for step in range(1, 301)
    ]
    right = round(400 * accuracy)
    return {
        "name": name,
        "losses": losses,
        "test_loss": 0.512345 + lift,
        "accuracy": accuracy,
        "accuracy_low": accuracy - 0.046,
        "accuracy_high": accuracy + 0.044,
        "swapped_accuracy": 0.1475,
        "correct": [1] * right + [0] * (400 - right),
        "flops": 1.234e15 * ratio,
        "flops_ratio": ratio,
        "seconds": seconds,
    }


def measured() -> dict[str, Any]:
    """Every section, every key."""
    ffn = [0.0, 0.0, 0.0, *[0.75] * 8, 0.0]
    return {
        "title": "elision demo",
        "settings": {
            "model": "embedded reference model, 7.5 M parameters",
            "seed": 0,
            "threads": 2,
            "versions": "elision 0.1.0, torch 2.13.0, transformers 5.23.0, peft 0.21.0",
            "date": "2025-01-31 12:34",
            "command": "elision demo",
            "seconds": 512.3,
        },
        "finetune": {
            "family": "ages",
            "task": "Each problem tells the ages of many people and asks how old one of them will be.",
            "train_problems": 3000,
            "test_problems": 400,
            "majority_rate": 0.125,
            "base_accuracy": 0.03,
            "variants": [
                variant("LoRA", 0.72, 1.0, 71.0, 0.0),
                variant("SparseLoRA", 0.7125, 0.613, 84.2, 0.006),
                variant("random channels", 0.7025, 0.6128, 79.5, 0.011),
                variant("no context FFN", 0.6325, 0.571, 70.1, 0.05),
            ],
            "paired": [
                {"a": "SparseLoRA", "b": "LoRA", "difference": -0.0075, "low": -0.031, "high": 0.016},
                {"a": "SparseLoRA", "b": "random channels", "difference": 0.01, "low": -0.014, "high": 0.034},
                {"a": "SparseLoRA", "b": "no context FFN", "difference": 0.08, "low": 0.047, "high": 0.113},
            ],
            "plan": {"ffn": ffn, "qk": [s / 2 for s in ffn], "vo": [s / 3 for s in ffn]},
            "example": {
                "prompt": "Facts. Ann is 7. Bob is 4 years older than Ann. <b>Cyd</b> & Dan are twins; Dan is 9.\n"
                "Question: how old is Bob?\nAnswer:",
                "expected": "7 + 4 = 11",
                "answers": {"LoRA": "7 + 4 = 11", "SparseLoRA": "7 + 4 = 11", "no context FFN": "9 + 4 = 13"},
            },
        },
        "spd": [spd("embedded model", 11.87), spd("fine-tuned and merged", 12.31, 1.15)],
    }


class Document(HTMLParser):
    """What the tests ask of a page: its elements with their attributes and text, and the cells of its tables."""

    VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {[element['tag'] for element in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {"tag": tag, "text": "", "inside": [e["tag"] for e in self.open]} | {"attributes": dict(attrs)}
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1]["tag"] == tag, f"</{tag}> closes nothing"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [element for element in self.elements if element["tag"] == tag]

    def by_id(self, name: str) -> dict[str, Any]:
        (found,) = [element for element in self.elements if element["attributes"].get("id") == name]
        return found

    def loads(self) -> list[str]:
        """Everything that a browser would fetch to show the page."""
        found = []
        for element in self.elements:
            for key, value in element["attributes"].items():
                if key in ("src", "srcset", "poster", "data", "action", "background"):
                    found.append(value)
                if key.rpartition(":")[2] == "href" and element["tag"] != "a":
                    found.append(value)
                if key == "style":
                    found += re.findall(r"url\(([^)]*)\)", value)
            if element["tag"] == "style":
                found += re.findall(r"url\(([^)]*)\)|@import", element["text"])
        return [value for value in found if not value.strip("'\"").startswith(("#", "data:"))]


def put(run: Path, results: Any) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "results.json").write_text(results if isinstance(results, str) else json.dumps(results), encoding="utf-8")
    return run


def html(results: dict[str, Any]) -> str:
    checked = check(results)
    return page.render(checked, page.sections(checked))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with its report; read only."""
    run = put(tmp_path_factory.mktemp("run"), measured())
    assert report.write(run) == run / "report.html"
    return run


@pytest.fixture(scope="module")
def document(written: Path) -> Document:
    return Document((written / "report.html").read_text(encoding="utf-8"))


PLOTS = ["accuracy", "dropping-1", "dropping-2", "losses", "paired", "plan", "sensitivity-1", "sensitivity-2"]


def test_page_stands_alone(written: Path, document: Document) -> None:
    assert document.loads() == []
    assert document.all("script") == []
    assert "default-src 'none'" in str([meta["attributes"] for meta in document.all("meta")])
    for link in document.all("a"):
        target = urlsplit(link["attributes"]["href"])
        assert target.netloc == "proceedings.mlr.press" or (written / target.path).is_file()
    guilty = '<img src="https://a.b/c.png"><style>p { background: url(https://a.b) }</style><p style="x: url(y)"></p>'
    assert Document(guilty).loads() == ["https://a.b/c.png", "https://a.b", "y"]


def test_verdict_comes_first(document: Document) -> None:
    first = next(element for element in document.elements if element["tag"] == "p")
    assert first["text"] == (
        "With 61% of LoRA's FLOPs, SparseLoRA answers 71.2% of 400 held-out problems and LoRA 72.0%, which this test "
        "cannot tell apart (95% interval −3.1 to +1.6 points); on 2, 4 and 8 ranks, Sync-Point Drop leaves out 9, 8 "
        "and 7 of the embedded model's 12 syncs after attention for +0.97% perplexity at most."
    )


def test_every_plot_is_there_in_three_forms(written: Path, document: Document) -> None:
    assert sorted(path.name for path in (written / "plots").iterdir()) == sorted(
        f"{name}.{kind}" for name in PLOTS for kind in ("csv", "png")
    )
    images = document.all("svg")
    assert len(images) == len(PLOTS)
    for image in images:
        title, description = (document.by_id(name) for name in image["attributes"]["aria-labelledby"].split())
        assert image["attributes"]["role"] == "img"
        assert (
            title["tag"] == "title" and title["text"] and description["tag"] == "desc" and len(description["text"]) > 40
        )
    for name in PLOTS:
        picture = (written / "plots" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG\r\n") and int.from_bytes(picture[16:20]) > 900  # pixels wide
        assert document.by_id(f"plot-{name}")["tag"] == "figure"


def test_ids_are_unique_and_references_resolve(document: Document) -> None:
    ids = [element["attributes"]["id"] for element in document.elements if "id" in element["attributes"]]
    assert len(ids) == len(set(ids)) > 50
    for element in document.elements:
        for key, value in element["attributes"].items():
            names = re.findall(r"url\(#([^)]+)\)", value or "") + re.findall(r"^#(.+)", value or "")
            names += value.split() if key == "aria-labelledby" else []
            assert set(names) <= set(ids), names


def test_colours_follow_the_page(document: Document) -> None:
    css = document.all("style")[0]["text"]
    assert len(document.all("style")) == 1  # matplotlib's own would style the whole page
    light, dark = css.split("prefers-color-scheme: dark", 1)
    for image in [element for element in document.elements if "svg" in element["inside"]]:
        style = image["attributes"].get("style", "")
        assert not re.search(r"#[0-9a-f]{3,8}\b|rgb", style), style
        for name in re.findall(r"var\(--([\w-]+)\)", style):
            assert f"--{name}: " in light
            assert name == "sans" or f"--{name}: " in dark
    for name, pair in THEME.items():
        assert f"--{name}: {pair[0]}" in light and f"--{name}: {pair[1]}" in dark


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_text_has_contrast(mode: int) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name in ("ink", "muted", "blue"):  # text, quiet text, links
        bright, dim = sorted((luminance(THEME[key][mode]) for key in (name, "paper")), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, name


def test_csv_holds_the_numbers_unrounded(written: Path) -> None:
    results = measured()

    def table(name: str) -> list[list[str]]:
        with (written / "plots" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.reader(file))

    header, *rows = table("losses")
    variants = results["finetune"]["variants"]
    assert header == ["step", *(v["name"] for v in variants)]
    assert [[float(x) for x in row] for row in rows] == [
        [v["losses"][i][1] if v else i + 1 for v in (None, *variants)] for i in range(300)
    ]
    header, *rows = table("dropping-2")
    assert header == ["dropped", "2 ranks, perplexity", "4 ranks, perplexity", "8 ranks, perplexity"]
    curves = [ranks["perplexities"] for ranks in results["spd"][1]["ranks"]]
    assert [[float(x) for x in row[1:]] for row in rows] == [list(row) for row in zip(*curves, strict=True)]
    assert [float(row[2]) for row in table("sensitivity-1")[1:]] == results["spd"][0]["ranks"][1]["sensitivities"]
    assert [[float(x) for x in row[1:]] for row in table("plan")[1:]] == [
        list(row) for row in zip(*results["finetune"]["plan"].values(), strict=True)
    ]


def test_tables_hold_the_results(document: Document) -> None:
    values = [float(element["attributes"]["value"]) for element in document.all("data")]
    results = measured()
    for each in results["finetune"]["variants"]:
        for key in ("test_loss", "accuracy", "swapped_accuracy", "flops", "flops_ratio", "seconds"):
            assert each[key] in values, key
    for each in results["finetune"]["paired"]:
        assert each["difference"] in values
    for model in results["spd"]:
        for ranks in model["ranks"]:
            assert {ranks["ranks"], ranks["chosen"], *ranks["perplexities"], *ranks["sensitivities"]} <= set(values)
    headers = [element for element in document.all("th") if element["attributes"]["scope"] == "row"]
    assert len(headers) == len(document.all("tr")) - len(document.all("thead"))


def test_settings_and_example_are_shown_as_they_are(document: Document) -> None:
    shown = [element["text"] for element in document.all("dd")]
    results = measured()
    assert {str(value) for value in results["settings"].values()} <= set(shown)
    assert results["finetune"]["example"]["prompt"] in [element["text"] for element in document.all("pre")]
    assert set(results["finetune"]["example"]["answers"].values()) <= set(shown)


def test_terminal_shows_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = report.summary_tables(measured())
    console = Console(width=200, file=io.StringIO())
    for table in shown:
        console.print(table)
    text = console.file.getvalue()
    assert len(shown) == 3
    row = next(line for line in text.splitlines() if "SparseLoRA" in line)
    assert row.split() == "SparseLoRA 0.518 71.2% 66.6% to 75.7% 14.8% 756 TFLOP 61.3% 1 min 24 s".split()
    assert re.search(r"4 +8 of 12 +1-7, 9 +11.985 +\+0.97% +\+19.0% +7 +4 +1", text)
    with pytest.raises(InputError, match="accuracy"):
        report.summary_tables({"finetune": measured()["finetune"] | {"variants": [{"name": "LoRA"}]}})


@pytest.mark.parametrize("width", [80, 200])
def test_no_word_is_cut_in_a_terminal(width: int) -> None:
    for table in tables.summary_tables(check(measured())):
        console = Console(width=width, file=io.StringIO())
        console.print(table.rich(width))
        shown = console.file.getvalue().split()  # type: ignore[attr-defined]
        for cell in (*table.columns, *(cell.text for row in table.rows for cell in row)):
            assert set(cell.replace("-s", "- s").split()) <= set(shown)


def test_text_is_escaped() -> None:
    results = measured()
    del results["spd"]
    attack = "</pre></svg><script>alert('x')</script> & $\\frac$ <b>"
    results["title"] = results["settings"]["model"] = attack
    results["finetune"] |= {"task": attack, "family": attack}
    results["finetune"]["variants"][2]["name"] = attack
    results["finetune"]["example"] |= {"prompt": attack, "answers": {attack: attack}}
    document = Document(html(results))
    assert document.all("script") == document.all("b")[2:] == []  # two figures of the header
    assert document.all("pre")[0]["text"] == attack
    assert document.all("title")[0]["text"] == document.all("h1")[0]["text"] == attack
    assert attack in [element["text"] for element in document.all("th")]
    assert attack in [element["text"] for element in document.all("text")]  # a plot's legend


@pytest.mark.parametrize("missing", ["finetune", "spd", "settings", "title"])
def test_missing_sections_are_left_out(missing: str) -> None:
    results = measured()
    del results[missing]
    if missing != "finetune":
        del results["finetune"]["variants"][1:]  # draws less
        results["finetune"] |= {"plan": None, "paired": []}
        del results["finetune"]["example"], results["finetune"]["base_accuracy"]
        del results["finetune"]["variants"][0]["losses"], results["finetune"]["variants"][0]["swapped_accuracy"]
    results["spd"] = results.get("spd", [])[:1]
    document = Document(html(results))
    ids = [element["attributes"].get("id") for element in document.elements]
    assert ("fine-tuning" in ids) == (missing != "finetune")
    assert ("sync-point-drop" in ids) == (missing != "spd")
    assert ("settings" in ids) == (missing != "settings")
    drawn = [name.removeprefix("plot-") for name in ids if name and name.startswith("plot-")]
    expected = ["accuracy"] if missing != "finetune" else []
    assert drawn == expected + (["sensitivity-1", "dropping-1"] if missing != "spd" else [])
    assert "None" not in "".join(element["text"] for element in document.all("body"))


def test_nothing_measured_says_so() -> None:
    assert "nothing that could be judged" in Document(html({})).all("p")[0]["text"]


def test_unknown_keys_are_ignored() -> None:
    results = {"spd": measured()["spd"][:1]}
    more = copy.deepcopy(results) | {"later": {"x": 1}}
    more["spd"][0]["later"] = more["spd"][0]["ranks"][0]["later"] = 3
    assert html(more) == html(results)  # also: equal results make equal pages


def broken(path: str, value: Any) -> dict[str, Any]:
    results = measured()
    place: Any = results
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in way:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return results


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ([], "the whole"),
        (broken("finetune.variants.1.accuracy", None), r"finetune\.variants\.1\.accuracy: Field required"),
        (broken("finetune.variants.1.accuracy", 71.2), r"finetune\.variants\.1\.accuracy: .*less than or equal to 1"),
        (broken("finetune.variants.1.accuracy", 0.5), r"accuracy 0\.5 is not between accuracy_low 0\.66"),
        (broken("finetune.variants.0.flops", float("nan")), r"finetune\.variants\.0\.flops: .*finite"),
        (broken("finetune.variants", []), r"finetune\.variants: .*at least 1"),
        (broken("finetune.plan.qk", [0.5]), r"finetune\.plan: ffn, qk and vo list 12, 1 and 12"),
        (broken("spd.0.ranks.1.order", [0, 0]), r"spd\.0\.ranks\.1: order \[0, 0\] does not name each of 12"),
        (broken("spd.0.ranks.1.perplexities", [1.0]), r"spd\.0\.ranks\.1: perplexities has 1 values"),
        (broken("spd.1.ranks.2.chosen", 13), r"spd\.1\.ranks\.2: chosen 13 is more than 12 blocks"),
        (broken("spd.1.ranks", "two"), r"spd\.1\.ranks: .*list"),
        (broken("settings", "seed=0"), r"settings: .*dictionary"),
    ],
)
def test_broken_results_are_refused(tmp_path: Path, results: Any, words: str) -> None:
    run = put(tmp_path / "run", results)
    with pytest.raises(InputError, match=words) as refusal:
        report.write(run)
    assert str(run / "results.json") in str(refusal.value) and "\n" not in str(refusal.value)
    assert [path.name for path in run.iterdir()] == ["results.json"]


def test_a_run_without_results_is_refused(tmp_path: Path) -> None:
    for run in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"holds neither results\.json nor run\.json|nowhere does not exist"):
            report.write(run)
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_left_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    run = put(tmp_path, {"finetune": measured()["finetune"] | {"paired": [], "plan": None}})
    report.write(run)
    first = {path.name: path.read_bytes() for path in run.rglob("*.*")}
    assert dict(matplotlib.rcParams) == before
    report.write(run)  # again, over the first: equal bytes, nothing left beside them
    assert {path.name: path.read_bytes() for path in run.rglob("*.*")} == first


@pytest.mark.parametrize(
    ("layers", "perplexities", "chosen"),
    [
        (1, [12.0, 11.9], 1),
        (48, [12.0 + 0.2 * k for k in range(49)], 0),
        (3, [12.0, 13.0, math.inf, math.nan], 0),
    ],
    ids=["one block that gains", "deep", "breaks down"],
)
def test_odd_runs_are_drawn(layers: int, perplexities: list[float], chosen: int) -> None:
    sensitivities = [100 * (b / a - 1) for a, b in itertools.pairwise(perplexities)]
    ranks = {"ranks": 2, "sensitivities": sensitivities, "order": list(range(layers)), "perplexities": perplexities}
    model = {"model": "m", "text": "t", "tokens": 1, "dense_perplexity": 12.0}
    document = Document(html({"spd": [model | {"ranks": [ranks | {"chosen": chosen, "max_loss": 0.0}]}]}))
    assert len(document.all("svg")) == 2
    assert f"leaves out {chosen} of the m's {layers}" in document.all("p")[0]["text"]


def compared(difference: float, low: float, high: float, other: str = "random channels") -> list[str]:
    results = measured()["finetune"]
    results["paired"] = [{"a": "SparseLoRA", "b": other, "difference": difference, "low": low, "high": high}]
    checked = check({"finetune": results}).finetune
    assert checked is not None
    return verdict.learned(checked)


def test_controls_are_read_honestly() -> None:
    (unclear,) = [s for s in compared(0.01, -0.014, 0.034) if "random" in s]
    assert unclear == (
        "SparseLoRA against random channels: this task at this scale cannot tell them apart (+1.0 points, 95% interval "
        "−1.4 to +3.4 points), so it does not show that choosing channels by their estimated norm matters."
    )
    (gain,) = [s for s in compared(0.05, 0.02, 0.08) if "random" in s]
    assert "5.0 points more" in gain and gain.endswith("choosing channels by their estimated norm matters here.")
    (harm,) = [s for s in compared(-0.05, -0.08, -0.02, "no context FFN") if "FFN" in s]
    assert "5.0 points fewer" in harm and harm.endswith("does harm here.")
    (loss,) = [s for s in compared(-0.05, -0.08, -0.02, "LoRA") if "against LoRA" in s]
    assert loss == "SparseLoRA against LoRA: 5.0 points fewer (95% interval −8.0 to −2.0 points)."


def test_a_pair_is_found_either_way_round() -> None:
    results = measured()["finetune"]
    results["paired"] = [{"a": "LoRA", "b": "SparseLoRA", "difference": 0.05, "low": 0.02, "high": 0.09}]
    checked = check({"finetune": results})
    assert checked.finetune is not None
    assert checked.finetune.pair("SparseLoRA", "LoRA") == Pair(
        a="SparseLoRA", b="LoRA", difference=-0.05, low=-0.09, high=-0.02
    )
    assert "a real difference (95% interval −9.0 to −2.0 points)" in verdict.headline(checked)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "the task was learned"),
        ({"accuracy": 0.14, "accuracy_low": 0.11, "accuracy_high": 0.18}, "was not clearly learned"),
        ({}, "The answers depend on the context: with another problem's facts in the context LoRA answers 14.8%."),
        ({"swapped_accuracy": 0.71}, "The answers are not shown to depend on the context"),
        ({"seconds": 84.2 / 0.8}, "needs 61% of LoRA's FLOPs and 80% of its time."),
        ({}, "119% of its time: here it saves arithmetic, not time."),
    ],
)
def test_findings_follow_the_numbers(changes: dict[str, float], words: str) -> None:
    results = measured()
    results["finetune"]["variants"][0] |= changes
    checked = check(results).finetune
    assert checked is not None
    assert words in " ".join(verdict.learned(checked))
    assert ("not clearly above the 12.5%" in verdict.headline(check(results))) == ("not clearly" in words)


def test_models_are_compared_by_ranks() -> None:
    checked = check(measured()).spd
    assert verdict.dropped(checked)[-1] == (
        "Fine-tuned and merged, against the embedded model: "
        "as many on 2 and 8 ranks and 7 instead of 8 on 4 ranks can go."
    )
    assert len(verdict.dropped(checked[:1])) == 1


def test_a_budget_that_did_not_hold_is_named() -> None:
    results = measured()["spd"][:1]
    assert "does not hold" not in " ".join(verdict.dropped(check({"spd": results}).spd))
    results[0]["ranks"][1]["chosen"] = 9
    assert verdict.dropped(check({"spd": results}).spd)[1] == (
        "Embedded model: the budget of +1% does not hold on this text (+1.50% on 4 ranks)."
    )


def test_points_of_like_cost_are_told_apart() -> None:
    places = plots.side_by_side([100.0, 61.3, 61.28, 57.1], gap=2.0)
    assert places[0] == 100 and places[3] == 57.1
    assert places[2] - places[1] == pytest.approx(2.0) and places[1] + places[2] == pytest.approx(61.3 + 61.28)


def test_smoothing_keeps_the_mean() -> None:
    assert plots.smooth({1: 1.0, 2: 2.0, 3: 6.0}, 3) == ([3], [3.0])
    assert plots.smooth({1: 1.0, 2: 2.0}, 3) == ([1, 2], [1.0, 2.0])  # shorter than the window


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (verdict.percent(0.7153), "71.5%"),
        (verdict.percent(-0.00001), "0.0%"),
        (verdict.number(-1234.5678, 2), "−1,234.57"),
        (verdict.number(math.inf), "not finite"),
        (verdict.signed(0.04), "0.0"),
        (verdict.signed(-0.06), "−0.1"),
        (verdict.change(0.0097), "+0.97%"),
        (verdict.change(0.26), "+26.0%"),
        (verdict.change(-0.00001), "0.00%"),
        (verdict.limit(0.005), "0.5%"),
        (verdict.duration(9.94), "9.9 s"),
        (verdict.duration(59.7), "1 min 0 s"),
        (verdict.duration(3900), "1 h 5 min"),
        (verdict.operations(1.2345e15), "1.23 PFLOP"),
        (verdict.operations(999.7e12), "1000 TFLOP"),
        (verdict.operations(12), "12 FLOP"),
        (verdict.listed([2, 4, 8]), "2, 4 and 8"),
        (verdict.listed([2]), "2"),
        (verdict.spans([9, 1, 2, 3, 4, 11, 12]), "1-4, 9, 11, 12"),
        (verdict.spans([]), "none"),
    ],
)
def test_numbers_are_said_as_people_write_them(said: str, expected: str) -> None:
    assert said == expected
