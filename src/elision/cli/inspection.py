"""`elision inspect`: what a model is made of."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import typer

from elision.cli.common import Json, Model

if TYPE_CHECKING:
    from elision.blocks import Description


def inspect(
    model: Model,
    as_json: Json = False,
) -> None:
    """Show what a model's blocks are made of and which method covers them; reads its config, never its weights.

    Where a method does not cover the family, the last lines say why.

    \b
    Examples:
      elision inspect reference             the embedded model
      elision inspect ./my-model --json     a directory, for machines
    """
    from elision.blocks import describe
    from elision.families import load_config

    description = describe(load_config(model))
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(description), "served_by": _served_by(description)}, indent=2))
    else:
        _show(model, description)


def _served_by(is_: Description) -> dict[str, list[int]]:
    """Each runtime with the numbers of ranks on which it serves plans for the model, skipped attention aside."""
    from elision.facts import ModelFacts
    from elision.spd import SyncPlan
    from elision.spd.serving import RUNTIMES, served_by

    if is_.spd is not None:
        return {}
    sizes = (is_.layers, is_.heads, is_.kv_heads, is_.head_dim, is_.hidden_size, is_.intermediate_size)
    facts = ModelFacts(is_.model_type, *sizes)
    return {name: [n for n in is_.ranks if name in served_by(facts, SyncPlan(n))] for name in RUNTIMES}


def _show(model: str, is_: Description) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(model), title_justify="left")
    for name in ("blocks", "window", "part", "module", "bias"):
        table.add_column(name, overflow="fold")
    for name in ("out x in", "parameters"):
        table.add_column(name, justify="right", no_wrap=True)  # a number that is cut is another number
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
    served = [f"{name} on {', '.join(map(str, ranks))}" for name, ranks in _served_by(is_).items() if ranks]
    if served:
        facts.add_row("served by", f"{'; '.join(served)} ranks")

    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(facts)
