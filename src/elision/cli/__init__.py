"""The command line: parse, call, show.

Every command takes its options from a YAML file too (`--config`, see config.py). Exit codes: 0 done; 2 bad input, a
full disk or too small a GPU, one line on stderr saying what and where and what to do; 130 interrupted, after which the
same command resumes; 1 a rank that was lost, in one line too. Anything else that goes wrong is a bug of ours, shows its
traceback and ends with 1.
Rooms are imported inside the commands, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

import elision
from elision.cli import sparselora, spd
from elision.cli.common import Commands, Json, show
from elision.cli.evaluate import evaluate
from elision.cli.inspection import inspect
from elision.cli.report import report

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="""Fine-tune (SparseLoRA) and serve (Sync-Point Drop) LLMs without the work that does not matter.

    Both methods measure what each layer can spare on your data, write it down
    as a plan, leave the rest out, and say what it cost. MODEL is a directory, a
    Hugging Face id, or 'reference', a small model that comes with elision.

    \b
    Begin with:
      elision demo                 both methods, some ten minutes, nothing to prepare
      elision inspect MODEL        which of them covers a model
      elision sparselora --help    fine-tune with less computation
      elision spd --help           serve with less communication
    """,
)
app.command()(inspect)
app.command("eval")(evaluate)
app.command()(report)
app.add_typer(sparselora.app, name="sparselora")
app.add_typer(spd.app, name="spd")


def main() -> None:
    """Entry point of the `elision` command."""
    for name in (
        "torchao",
        "torch.utils._pytree",
    ):  # imported by transformers, torchao tells of other machines' kernels
        logging.getLogger(name).setLevel(logging.ERROR)
    app(prog_name="elision")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"elision {elision.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory of the results; a rerun resumes there.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of data order, adapters and controls.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Torch's threads; by default torch decides.")] = None,
    as_json: Json = False,
) -> None:
    """Run both methods on the embedded model and write a report page, in about ten minutes on two cores.

    LoRA, SparseLoRA and two controls learn word problems that the model has
    never seen; then syncs are dropped for 2, 4 and 8 ranks. Nothing is
    downloaded. Interrupt it as you like: the same command goes on.
    """
    from elision.demo import run

    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        page = run(out=out, seed=seed, threads=threads)
    if as_json:
        show({"report": str(page)}, as_json)
