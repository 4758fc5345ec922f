"""The tables of a report: made once, shown in the terminal and on the page."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table as RichTable
from rich.text import Text

from elision.report import verdict
from elision.report.results import TIERS, FineTune, Results, SyncPointDrop


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

    def rich(self) -> RichTable:
        """For the terminal."""
        table = RichTable(title=Text(self.title), title_justify="left")
        for name, numeric in zip(self.columns, self.numeric, strict=True):
            table.add_column(Text(name), justify="right" if numeric else "left")
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
        chosen = each.increases[each.chosen]
        tiers = [model.tier(sensitivity) for sensitivity in each.sensitivities]
        rows.append(
            [
                Cell(str(each.ranks), each.ranks),
                Cell(f"{each.chosen} of {each.layers}", each.chosen),
                Cell(verdict.spans(each.dropped)),
                Cell(verdict.number(each.perplexities[each.chosen], 3), each.perplexities[each.chosen]),
                Cell(verdict.change(chosen), chosen),
                Cell(verdict.change(each.increases[-1]), each.increases[-1]),
                *(Cell(str(tiers.count(tier)), tiers.count(tier)) for tier in range(len(TIERS))),
            ]
        )
    budgets = verdict.listed([f"+{verdict.limit(loss)}" for loss in sorted({each.max_loss for each in model.ranks})])
    dense = verdict.number(model.dense_perplexity, 3)
    title = f"Sync-Point Drop, {model.model}: budget {budgets} of the dense perplexity, {dense}"
    return Table(title, columns, (False, True, False, *[True] * 6), rows)


def numbers(header: tuple[str, ...], rows: list[tuple], title: str) -> Table:
    """The numbers of a plot, to be read instead of it."""
    cells = [[Cell(value) if isinstance(value, str) else _optional(value, 4) for value in row] for row in rows]
    return Table(title, header, tuple(not isinstance(value, str) for value in rows[0]), cells)


def summary_tables(results: Results) -> list[Table]:
    """The tables that sum up a run: fine-tuning's, then one a model that syncs were dropped in."""
    found = [] if results.finetune is None else [variants(results.finetune)]
    return found + [ranks(model) for model in results.spd]


def _together(words: str) -> str:
    """`words` on one line, also where a phone is too narrow for the whole cell."""
    return words.replace(" ", "\N{NO-BREAK SPACE}")


def _optional(value: float | None, digits: int) -> Cell:
    if value is None:
        return Cell("–")
    return Cell(f"{value}" if isinstance(value, int) else verdict.number(value, digits), value)
