"""The command line: parse, call, show.

Exit codes: 0 done; 2 bad input, one line on stderr saying what and where and what to do; 130 interrupted, after
which the same command resumes. Anything else that goes wrong is a bug of ours and shows its traceback. Rooms are
imported inside the commands, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import elision
from elision.errors import InputError

if TYPE_CHECKING:
    from elision.blocks import Description


class Commands(TyperGroup):
    """Turns the two failures that are no fault of ours into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("\ninterrupted: run the same command again to resume", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune (SparseLoRA) and serve (Sync-Point Drop) LLMs without the work that does not matter.",
)


def main() -> None:
    """Entry point of the `elision` command."""
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
) -> None:
    """Run both methods on the embedded model and write a report page, in about ten minutes."""
    from elision.demo import run

    run(out=out, seed=seed, threads=threads)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's directory, a Hugging Face id, or 'reference'.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Show what a model's blocks are made of and which method covers them; reads its config, never its weights."""
    from elision.blocks import describe
    from elision.families import load_config

    description = describe(load_config(model))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(description), indent=2))
    else:
        _show(model, description)


def _show(model: str, is_: Description) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(model), title_justify="left")
    for name in ("blocks", "window", "part", "module", "bias"):
        table.add_column(name)
    for name in ("out x in", "parameters"):
        table.add_column(name, justify="right")
    for run in is_.blocks:
        labels = [run.span, "" if run.sliding_window is None else f"{run.sliding_window:,}"]
        for name, p in run.projections.items():
            shape = f"{p.out_features:,} x {p.in_features:,}"
            table.add_row(*labels, name, p.module, "yes" if p.bias else "", shape, f"{p.parameters:,}")
            labels = ["", ""]
        table.add_row("", "", "block", "", "", "", f"{run.parameters:,}", style="bold", end_section=True)

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_row("family", f"{is_.family} ({is_.model_type})")
    facts.add_row("size", f"{is_.parameters:,} parameters, {is_.layers} blocks, vocabulary {is_.vocabulary:,}")
    facts.add_row("widths", f"hidden {is_.hidden_size:,}, intermediate {is_.intermediate_size:,} ({is_.activation})")
    heads = [f"{is_.heads} heads of {is_.head_dim}", f"{is_.kv_heads} for keys and values"]
    heads.append(f"{is_.rotary_dim} dimensions rotate" if is_.rotary_dim else "no rotation")
    facts.add_row("attention", ", ".join(heads))
    norms = f"{is_.norm}, {is_.norms}" + (", on Q and K too" if is_.qk_norms else "")
    multiplier = "" if is_.residual_multiplier == 1.0 else f"; residual multiplier {is_.residual_multiplier:g}"
    facts.add_row("norms", norms + multiplier)
    facts.add_row("output head", "shares the embeddings' weight" if is_.tied else "has a weight of its own")
    facts.add_row("SparseLoRA", is_.sparselora or "covered")
    facts.add_row("SPD", is_.spd or f"covered; ranks can be {', '.join(map(str, is_.ranks))}")

    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(facts)
