"""The tables of a report: made once, shown in the terminal and on the page."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from elision.report import verdict
from elision.report.results import TIERS, FineTune, Latency, Measure, Ranks, Results, StepTime, SyncPointDrop


@dataclass(frozen=True)
class Cell:
    """What is shown, and the exact number behind it."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first column names the row, `numeric` columns are aligned to the right."""

    title: str
    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: list[list[Cell]]

    def rich(self, width: int | None = None) -> RichTable:
        """For a terminal of `width` columns, by default this one: the widest wrap, and as long as it can be no word is
        cut.
        """
        width = shutil.get_terminal_size().columns if width is None else width
        heads = [name.replace("-", "-\n") for name in self.columns]
        columns = [[head, *(row[i].text for row in self.rows)] for i, head in enumerate(heads)]
        least = [max((len(word) for text in texts for word in text.split()), default=0) for texts in columns]
        widths = [max(len(line) for text in texts for line in text.split("\n")) for texts in columns]
        while sum(widths) + len(widths) - 1 > width and widths != least:
            widest = max((i for i in range(len(widths)) if widths[i] > least[i]), key=lambda i: widths[i])
            widths[widest] -= 1
        table = RichTable(title=Text(self.title), title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        for head, numeric, wide in zip(heads, self.numeric, widths, strict=True):
            table.add_column(Text(head), justify="right" if numeric else "left", width=wide)
        for row in self.rows:
            table.add_row(*(Text(cell.text) for cell in row))
        return table


def variants(is_: FineTune) -> Table:
    """One row a variant: loss, accuracy with its interval, FLOPs, time."""
    swapped = any(variant.swapped_accuracy is not None for variant in is_.variants)
    names = ["variant", "test loss", "accuracy", "95% interval", "FLOPs", "of LoRA's", "time"]
    rows = []
    for variant in is_.variants:
        rows.append(
            [
                Cell(variant.name),
                _optional(variant.test_loss, 3),
                Cell(verdict.percent(variant.accuracy), variant.accuracy),
                Cell(f"{verdict.percent(variant.accuracy_low)} to {verdict.percent(variant.accuracy_high)}"),
                Cell(verdict.operations(variant.flops), variant.flops),
                Cell(verdict.percent(variant.flops_ratio), variant.flops_ratio),
                Cell(verdict.duration(variant.seconds), variant.seconds),
            ]
        )
        if swapped:
            share = variant.swapped_accuracy
            rows[-1].insert(4, Cell("–") if share is None else Cell(verdict.percent(share), share))
    if swapped:
        names.insert(4, "facts swapped")
    title = (
        f"Fine-tuning on {is_.family}: {is_.train_problems:,} problems to learn from, {is_.test_problems:,} held out"
    )
    return Table(title, tuple(names), (False, *[True] * (len(names) - 1)), rows)


def pairs(is_: FineTune) -> Table | None:
    """One row a paired test."""
    if not is_.paired:
        return None
    rows = [
        [
            Cell(f"{pair.a} {_together(f'− {pair.b}')}"),
            Cell(f"{verdict.signed(100 * pair.difference)} points", pair.difference),
            Cell(f"{verdict.signed(100 * pair.low)} to {verdict.signed(100 * pair.high)}"),
            Cell(verdict.reading(pair)),
        ]
        for pair in is_.paired
    ]
    columns = ("difference", "accuracy", "95% interval", "reading")
    return Table("Paired tests on the same held-out problems", columns, (False, True, True, False), rows)


def ranks(model: SyncPointDrop) -> Table:
    """One row a number of ranks: what the budget allows, what everything would cost, how many blocks of each tier."""
    columns = ("ranks", "dropped", "blocks", "perplexity", "increase", "all dropped", *TIERS)
    rows = []
    for each in model.ranks:
        tiers = [model.tier(sensitivity) for sensitivity in each.sensitivities]
        rows.append(
            [
                Cell(str(each.ranks), each.ranks),
                Cell(f"{len(each.dropped)} of {each.layers}", len(each.dropped)),
                Cell(_blocks(each)),
                _optional(None if each.chosen is None else each.perplexities[each.chosen], 3),
                Cell("–") if each.cost is None else Cell(verdict.change(each.cost), each.cost),
                Cell(verdict.change(each.increases[-1]), each.increases[-1]),
                *(Cell(str(tiers.count(tier)), tiers.count(tier)) for tier in range(len(TIERS))),
            ]
        )
    limits = sorted({each.max_loss for each in model.ranks if each.max_loss is not None})
    budgets = f"budget {verdict.listed([f'+{verdict.limit(loss)}' for loss in limits])} of the " if limits else ""
    title = f"Sync-Point Drop, {model.model}: {budgets}dense perplexity, {verdict.number(model.dense_perplexity, 3)}"
    return Table(title, columns, (False, True, False, *[True] * 6), rows)


def _blocks(is_: Ranks) -> str:
    """The dropped blocks, and those whose sync is spared in another way."""
    others = [f"{how} {verdict.spans(blocks)}" for how, blocks in is_.other.items() if blocks and how != "dropped"]
    return "; ".join([verdict.spans(is_.dropped), *others])


def evaluation(measures: Sequence[Measure]) -> Table:
    """One row a metric: its value with its interval and, where there is a baseline, the paired difference."""
    several, compared = any(m.model for m in measures), any(m.baseline is not None for m in measures)
    rows = []
    for is_ in measures:
        row = [Cell(is_.metric), _precise(is_.value), Cell(_span(is_.low, is_.high)), Cell(f"{is_.count:,}", is_.count)]
        if several:
            row.insert(0, Cell(is_.model))
        row.insert(int(several), Cell(is_.task))
        if compared:
            found = is_.change
            row.append(Cell("–") if is_.baseline is None else _precise(is_.baseline))
            row.append(Cell("–") if found is None else Cell(verdict.difference(found.value, is_.relative), found.value))
            row.append(Cell("–") if found is None else Cell(verdict.bounds(found, is_.relative)))
            row.append(Cell(verdict.judged(is_)))
        rows.append(row)
    names = [*(["model"] if several else []), "task", "metric", "value", "95% interval", "of"]
    words = [True] * int(several) + [True, True]
    if compared:
        names += ["baseline", "change", "95% interval of the change", "reading"]
    numeric = tuple(
        not word for word in [*words, *[False] * (len(names) - len(words) - int(compared)), *[True] * compared]
    )
    return Table("Evaluation", tuple(names), numeric, rows)


def step_times(rows: Sequence[StepTime]) -> Table:
    """One row a timed step."""
    columns = ("variant", "shape", "output tokens", "step", "speedup", "ideal", "of ideal", "peak memory")
    return Table(
        "Fine-tuning steps, timed",
        columns,
        (False, False, *[True] * 6),
        [
            [
                Cell(row.variant),
                Cell(row.shape),
                Cell("–" if row.output_share is None else verdict.percent(row.output_share, 0), row.output_share),
                Cell(f"{verdict.number(row.step_ms, 1)} ms", row.step_ms),
                _times(row.speedup),
                _times(row.ideal),
                Cell("–")
                if row.speedup is None or row.ideal is None
                else Cell(verdict.percent(row.speedup / row.ideal, 0), row.speedup / row.ideal),
                Cell("–") if row.peak_mb is None else Cell(f"{row.peak_mb:,.0f} MB", row.peak_mb),
            ]
            for row in rows
        ],
    )


def latencies(rows: Sequence[Latency]) -> Table:
    """One row a serving measurement."""
    columns = ("phase", "link", "ranks", "variant", "time", "ideal")
    cells = [
        [
            Cell(row.phase),
            Cell(row.link),
            Cell(str(row.ranks), row.ranks) if row.ranks else Cell("–"),
            Cell(row.variant),
            Cell(f"{verdict.number(row.ms, 2)} ms", row.ms),
            Cell("–") if row.ideal_ms is None else Cell(f"{verdict.number(row.ideal_ms, 2)} ms", row.ideal_ms),
        ]
        for row in rows
    ]
    return Table("Latency", columns, (False, False, True, False, True, True), cells)


def numbers(header: tuple[str, ...], rows: list[tuple], title: str) -> Table:
    """The numbers of a plot, to be read instead of it."""
    cells = [[Cell(value) if isinstance(value, str) else _optional(value, 4) for value in row] for row in rows]
    return Table(title, header, tuple(not isinstance(value, str) for value in rows[0]), cells)


def summary_tables(results: Results) -> list[Table]:
    """The tables that sum up a run, of what it measured."""
    found = [] if results.finetune is None else [variants(results.finetune)]
    found += [ranks(model) for model in results.spd]
    found += [evaluation(results.evaluation)] if results.evaluation else []
    found += [step_times(results.steps)] if results.steps else []
    return found + ([latencies(results.latency)] if results.latency else [])


def _precise(value: float) -> Cell:
    return Cell(verdict.number(value, 4 if abs(value) < 10 else 2), value)


def _times(value: float | None) -> Cell:
    return Cell("–") if value is None else Cell(f"{verdict.number(value, 2)}×", value)


def _span(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{_precise(low).text} to {_precise(high).text}"


def _together(words: str) -> str:
    """`words` on one line, also where a phone is too narrow for the whole cell."""
    return words.replace(" ", "\N{NO-BREAK SPACE}")


def _optional(value: float | None, digits: int) -> Cell:
    if value is None:
        return Cell("–")
    return Cell(f"{value}" if isinstance(value, int) else verdict.number(value, digits), value)
