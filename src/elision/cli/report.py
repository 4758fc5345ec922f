"""`elision report`: runs become a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elision.cli.common import Json, show
from elision.errors import InputError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, plans, benchmarks' JSON.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the page goes; a single run directory may hold its own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make one self-contained HTML page of one or several runs, with PNG and CSV of every plot beside it.

    A run is a directory that a command was given as --run (or the demo's), a
    SyncPlan or SparsityPlan, or what a benchmark printed. The page states its
    verdict first, loads nothing from the network, and follows the reader's
    light or dark setting. Of a run that still goes on it shows the loss so far.

    \b
    Examples:
      elision report runs/demo
      elision report plan.json --out report
      elision report runs/lora runs/sparse bench.json --out runs/both
    """
    from elision import report

    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a directory for the page and its plots")
    page = report.write(runs, out)
    show({"report": str(page)}, as_json, f"report: {page}")
