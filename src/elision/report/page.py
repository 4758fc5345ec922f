"""Results of runs -> one self-contained HTML page, with PNG and CSV of every plot beside it.

The page states its verdict first, loads nothing (its own content policy forbids it), needs no script and follows the
reader's light or dark setting. A `Section` holds what was found in words, tables and plots; the template knows no more
than that, so another measurement is another function that returns a section.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from rich.table import Table as RichTable

import elision
from elision import files
from elision.errors import InputError
from elision.report import measured, plots, sources, tables, verdict
from elision.report.canvas import THEME, Plot
from elision.report.results import (
    LORA,
    SPARSE,
    Example,
    FineTune,
    Latency,
    Links,
    Measure,
    Results,
    StepTime,
    SyncPointDrop,
    Tradeoff,
    Training,
    check,
)

Source = str | Path
READABLE = 60  # rows: a longer table behind a plot is in its CSV only
READABLE_CHANGES = 12  # rows: more are a plot a task


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


def write(runs: Source | Sequence[Source], out: str | Path | None = None) -> Path:
    """Write report.html, whose path is returned, with plots/*.png and plots/*.csv beside it.

    Args:
        runs: run directories, plans or benchmark files (see `sources`), one or several.
        out: directory of the page; by default the only run's own.

    Raises:
        InputError: a run's results are missing or broken, or `out` is not given where it is needed; nothing is written.
    """
    given = [runs] if isinstance(runs, str | Path) else list(runs)
    if not given:
        raise InputError("no runs to report: give at least one run directory, plan or benchmark file")
    found = [sources.load(run) for run in given]
    if out is None and (len(given) > 1 or not Path(given[0]).is_dir()):
        raise InputError("the page has no place of its own: name a directory for it with --out")
    place = Path(given[0] if out is None else out)
    results = sources.together(list(zip(sources.labels(given), found, strict=True)))
    parts = sections(results)
    page = render(results, parts)
    drawn = [(plot.name, plot.png(), plot.csv()) for section in parts for plot in section.plots]
    for name, png, csv in drawn:
        files.write(place / "plots" / f"{name}.png", lambda path, png=png: path.write_bytes(png))
        files.write_text(place / "plots" / f"{name}.csv", csv)
    return files.write_text(place / "report.html", page)


def summary_tables(results: Results | Mapping[str, Any]) -> list[RichTable]:
    """Tables for the terminal: one of fine-tuning, one a model that syncs were dropped in.

    Raises:
        InputError: `results` is not what results.json may hold.
    """
    return [table.rich() for table in tables.summary_tables(check(results))]


def sections(results: Results) -> list[Section]:
    """What the page shows of these results, in its order."""
    found = [] if results.finetune is None else [_finetune(results.finetune)]
    if results.spd:
        found.append(_spd(results.spd))
    if results.evaluation:
        found.append(_evaluation(results.evaluation))
    if results.tradeoffs:
        found.append(_tradeoffs(results.tradeoffs))
    if results.layers or results.plans:
        found.append(_sparsity(results))
    if results.training:
        found.append(_training(results.training))
    if results.steps:
        found.append(_steps(results.steps))
    if results.latency:
        found.append(_latency(results.latency))
    if results.links:
        found.append(_links(results.links))
    return found


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
    drawn = [plots.losses(is_), plots.accuracy(is_), plots.paired(is_), plots.layer_plan(is_.plan)]
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
    texts = verdict.listed(list(dict.fromkeys(_text(model) for model in models)))
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


def _text(model: SyncPointDrop) -> str:
    return f"{model.text}, {model.tokens:,} tokens" if model.tokens else model.text


def _evaluation(measures: list[Measure]) -> Section:
    relative = measured.changes([m for m in measures if m.relative], "perplexity-change", "Change of perplexity")
    scores = [measure for measure in measures if not measure.relative]
    by_task = {"": scores}
    if len(scores) > READABLE_CHANGES:
        by_task = {task: [m for m in scores if m.task == task] for task in dict.fromkeys(m.task for m in scores)}
    absolute = [
        measured.changes(own, "-".join(["task-changes", *filter(None, [task])]), f"Change on {task or 'the tasks'}")
        for task, own in by_task.items()
    ]
    compared = [measure for measure in measures if measure.change is not None]
    named = [measure for measure in compared if verdict.judged(measure) != "cannot be told apart"]
    counted = f"{len(compared) - len(named)} of {len(compared)} differences to the baseline cannot be told from none"
    many = len(compared) > READABLE_CHANGES
    told = [f"{verdict.capital(str(verdict.evaluated([each])))}." for each in (named if many else compared)]
    told += [f"{counted}."] if many else []
    return Section(
        anchor="evaluation",
        title="Quality, evaluated",
        question="How good is the model, and which differences to its baseline are more than chance? Both are scored "
        "on the same rows and documents.",
        findings=told,
        tables=[tables.evaluation(measures)],
        plots=[plot for plot in (relative, *absolute) if plot is not None],
    )


def _tradeoffs(found: list[Tradeoff]) -> Section:
    return Section(
        anchor="tradeoffs",
        title="Quality against saving",
        question="What does each way of leaving work out save, and what does it cost? A control that does as well as "
        "the method means that the method's choice is not what matters here.",
        findings=[f"{verdict.capital(verdict.chosen(each))}." for each in found],
        tables=[],
        plots=[measured.tradeoff(each, f"tradeoff-{index}") for index, each in enumerate(found, 1)],
    )


def _sparsity(results: Results) -> Section:
    drawn = [measured.layer_sensitivity(each, f"layers-{index}") for index, each in enumerate(results.layers, 1)]
    for index, (name, plan) in enumerate(results.plans.items(), 1):
        plot = plots.layer_plan(plan, f"plan-{index}", f"What SparseLoRA leaves out, {name}")
        drawn += [] if plot is None else [plot]
    return Section(
        anchor="sparsity",
        title="What can be left out of fine-tuning",
        question="Which layers can spare computation, and what does the plan leave out of each?",
        findings=[],
        tables=[],
        plots=drawn,
    )


def _training(runs: list[Training]) -> Section:
    return Section(
        anchor="training",
        title="Fine-tuning runs",
        question="Does the loss fall as it should?",
        findings=[f"{verdict.capital(verdict.descended(run))}." for run in runs],
        tables=[],
        plots=[measured.losses(runs)],
    )


def _steps(rows: list[StepTime]) -> Section:
    drawn = []
    for index, (shape, share) in enumerate(dict.fromkeys((row.shape, row.output_share) for row in rows), 1):
        own = [row for row in rows if (row.shape, row.output_share) == (shape, share)]
        outputs = "" if share is None else f", {verdict.percent(share, 0)} output tokens"
        drawn.append(measured.step_times(own, f"steps-{index}", f"Time of a step, {shape}{outputs}"))
        parts = measured.breakdown(own, f"breakdown-{index}")
        drawn += [] if parts is None else [parts]
    best = verdict.fastest(rows)
    return Section(
        anchor="steps",
        title="Speed of fine-tuning",
        question="How long does a step take, and how much of what the arithmetic allows is reached?",
        findings=[] if best is None else [f"{verdict.capital(best)}."],
        tables=[tables.step_times(rows)],
        plots=drawn,
    )


def _latency(rows: list[Latency]) -> Section:
    drawn = []
    for index, phase in enumerate(dict.fromkeys(row.phase for row in rows), 1):
        own = [row for row in rows if row.phase == phase]
        drawn.append(measured.latencies(own, f"latency-{index}", f"Latency, {phase}"))
    return Section(
        anchor="latency",
        title="Speed of serving",
        question="How long does a forward pass take on real ranks and links, and how near is that to the ideal?",
        findings=[] if (best := verdict.served(rows)) is None else [f"{verdict.capital(best)}."],
        tables=[tables.latencies(rows)],
        plots=drawn,
    )


def _links(found: list[Links]) -> Section:
    return Section(
        anchor="links",
        title="The links between ranks",
        question="How long does one sync take, at any size?",
        findings=[f"{verdict.capital(verdict.linked(each))}." for each in found],
        tables=[],
        plots=[measured.all_reduces(each, f"links-{index}") for index, each in enumerate(found, 1)],
    )


def _figures(results: Results) -> list[Figure]:
    """The numbers that the verdict rests on."""
    found = []
    if (tuned := results.finetune) is not None and (sparse := tuned.variant(SPARSE)) is not None:
        found.append(Figure(verdict.percent(sparse.flops_ratio, 0), "of LoRA's FLOPs", "SparseLoRA, counted"))
        if (pair := tuned.pair(SPARSE, LORA)) is not None:
            value = f"{verdict.signed(100 * pair.difference)} points"
            found.append(Figure(value, "accuracy against LoRA", verdict.interval(pair.low, pair.high)))
    for measure in results.evaluation[:3]:
        if measure.change is not None:
            value = verdict.difference(measure.change.value, measure.relative)
            interval = f"95% interval {verdict.bounds(measure.change, measure.relative)}"
            found.append(Figure(value, f"{measure.metric} on {measure.task}", interval))
    timed = [row for row in results.steps if row.speedup is not None]
    if timed and (best := verdict.best_step(timed)).speedup:
        found.append(
            Figure(f"{best.speedup:.2f}×", f"as fast: {best.variant}", f"{best.shape}, {best.device}".strip(", "))
        )
    if results.spd:
        model, most = results.spd[0], results.spd[0].ranks[-1]
        cost, text = most.cost, f" on {model.text}" if model.text == verdict.CALIBRATION else ""
        text = f" on {verdict.HELD_OUT}" if most.chosen is None else text
        for each in results.tradeoffs:
            if (each.name, each.saving) == (model.model, verdict.SYNCS):  # verified on other text than was planned on
                cost, text = next((p.cost for p in each.points if p.kind == "chosen"), cost), f" on {verdict.HELD_OUT}"
        others = [f"{len(blocks)} {how}" for how, blocks in most.other.items() if blocks and how != "dropped"]
        found.append(
            Figure(
                f"{len(most.dropped)} of {most.layers}",
                f"syncs after attention dropped on {most.ranks} ranks"
                + (f", {verdict.listed(others)}" if others else ""),
                ("cost not measured" if cost is None else f"{verdict.change(cost)} perplexity{text}")
                + ("" if most.max_loss is None else f", budget +{verdict.limit(most.max_loss)}"),
            )
        )
    return found
