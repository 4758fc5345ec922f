"""results.json -> one self-contained HTML page, with PNG and CSV of every plot beside it.

The page states its verdict first, loads nothing (its own content policy forbids it), needs no script and follows the
reader's light or dark setting. A `Section` holds what was found in words, tables and plots; the template knows no more
than that, so another measurement is another function that returns a section.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from rich.table import Table as RichTable

import elision
from elision import files
from elision.report import plots, tables, verdict
from elision.report.canvas import THEME, Plot
from elision.report.results import LORA, SPARSE, Example, FineTune, Results, SyncPointDrop, check, load

READABLE = 60  # rows: a longer table behind a plot is in its CSV only


@dataclass(frozen=True)
class Section:
    """One measurement: its heading, what was asked, what was found, the evidence."""

    anchor: str
    title: str
    question: str
    findings: list[str]
    tables: list[tables.Table]
    plots: list[Plot]
    example: Example | None = None


@dataclass(frozen=True)
class Figure:
    """One number to be seen first."""

    value: str
    meaning: str
    detail: str = field(default="")


def write(run: str | Path) -> Path:
    """Read `run`/results.json; write plots/*.png, plots/*.csv and, last, report.html, whose path is returned.

    Raises:
        InputError: results.json is missing or broken; nothing has been written.
    """
    run = Path(run)
    results = load(run)
    parts = sections(results)
    page = render(results, parts)
    drawn = [(plot.name, plot.png(), plot.csv()) for section in parts for plot in section.plots]
    for name, png, csv in drawn:
        files.write(run / "plots" / f"{name}.png", lambda path, png=png: path.write_bytes(png))
        files.write_text(run / "plots" / f"{name}.csv", csv)
    return files.write_text(run / "report.html", page)


def summary_tables(results: Results | Mapping[str, Any]) -> list[RichTable]:
    """Tables for the terminal: one of fine-tuning, one a model that syncs were dropped in.

    Raises:
        InputError: `results` is not what results.json may hold.
    """
    return [table.rich() for table in tables.summary_tables(check(results))]


def sections(results: Results) -> list[Section]:
    """What the page shows of these results, in its order."""
    found = [] if results.finetune is None else [_finetune(results.finetune)]
    return found + ([_spd(results.spd)] if results.spd else [])


def render(results: Results, parts: list[Section]) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    source = resources.files("elision.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=results.title,
        verdict=verdict.headline(results),
        figures=_figures(results),
        sections=parts,
        settings={name: "–" if value is None else str(value) for name, value in results.settings.items()},
        numbers=lambda plot: tables.numbers(plot.header, plot.rows, plot.title) if len(plot.rows) <= READABLE else None,
        theme=THEME,
        version=elision.__version__,
    )


def _finetune(is_: FineTune) -> Section:
    drawn = [plots.losses(is_), plots.accuracy(is_), plots.paired(is_), plots.layer_plan(is_)]
    shown = [tables.variants(is_), tables.pairs(is_)]
    return Section(
        anchor="fine-tuning",
        title="Fine-tuning with contextual sparsity",
        question="SparseLoRA trains an ordinary LoRA adapter, but computes only some channels of the frozen layers "
        f"for context tokens. What does that cost in quality? {is_.task}",
        findings=verdict.learned(is_),
        tables=[table for table in shown if table is not None],
        plots=[plot for plot in drawn if plot is not None],
        example=is_.example,
    )


def _spd(models: list[SyncPointDrop]) -> Section:
    texts = verdict.listed(list(dict.fromkeys(f"{model.text}, {model.tokens:,} tokens" for model in models)))
    drawn = []
    for kind, draw in (("sensitivity", plots.sensitivity), ("dropping", plots.dropping)):
        drawn += [draw(model, models, f"{kind}-{index}") for index, model in enumerate(models, 1)]
    return Section(
        anchor="sync-point-drop",
        title="Serving with fewer sync points",
        question="Tensor parallelism synchronises its ranks twice in every block. Sync-Point Drop leaves out the first "
        f"of the two where it matters least. How many can go? Perplexity is measured on {texts}, with exact simulated "
        "ranks.",
        findings=verdict.dropped(models),
        tables=[tables.ranks(model) for model in models],
        plots=drawn,
    )


def _figures(results: Results) -> list[Figure]:
    """The numbers that the verdict rests on."""
    found = []
    if (tuned := results.finetune) is not None and (sparse := tuned.variant(SPARSE)) is not None:
        found.append(Figure(verdict.percent(sparse.flops_ratio, 0), "of LoRA's FLOPs", "SparseLoRA, counted"))
        if (pair := tuned.pair(SPARSE, LORA)) is not None:
            value = f"{verdict.signed(100 * pair.difference)} points"
            found.append(Figure(value, "accuracy against LoRA", verdict.interval(pair.low, pair.high)))
    if results.spd:
        most = results.spd[0].ranks[-1]
        found.append(
            Figure(
                f"{most.chosen} of {most.layers}",
                f"syncs after attention dropped on {most.ranks} ranks",
                f"{verdict.change(most.increases[most.chosen])} perplexity, budget +{verdict.limit(most.max_loss)}",
            )
        )
    return found
