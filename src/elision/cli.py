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


sparselora = typer.Typer(cls=Commands, no_args_is_help=True, help="Fine-tune with contextual sparsity.")
spd = typer.Typer(cls=Commands, no_args_is_help=True, help="Drop the syncs that tensor parallelism can spare.")
app.add_typer(sparselora, name="sparselora")
app.add_typer(spd, name="spd")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's directory, a Hugging Face id, or 'reference'.")]
Text = Annotated[list[Path], typer.Option(help="Plain text; may be given several times.")]
Rows = Annotated[int, typer.Option(min=1, help="Rows of text at most.")]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens a row.")]


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
    """Run both methods on the embedded model and write a report page, in about a quarter of an hour."""
    from elision.demo import run

    run(out=out, seed=seed, threads=threads)


@app.command()
def inspect(
    model: Model,
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


@app.command("eval")
def evaluate(
    model: Model,
    text: Text,
    plan: Annotated[Path | None, typer.Option(help="SPD plan: score what its ranks would compute.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="PEFT adapter to merge into the model first.")] = None,
    rows: Rows = 32,
    tokens: Tokens = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Perplexity of a model on text, with an SPD plan or a PEFT adapter if given."""
    from contextlib import nullcontext

    from elision import evaluate, spd
    from elision.data import text_batches
    from elision.loading import load_adapter, load_texts

    texts = load_texts(text)
    planned = None if plan is None else spd.SyncPlan.load(plan)
    loaded, tokenizer = _load(model)
    if adapter is not None:
        loaded = load_adapter(loaded, adapter)
    batches = text_batches(tokenizer, texts, tokens, limit=rows)
    with nullcontext() if planned is None else spd.simulate(loaded, planned):
        found = evaluate.perplexity(loaded, batches)
    scored = sum(batch["input_ids"][:, 1:].numel() for batch in batches)
    line = f"perplexity {found:.4f} over {scored:,} tokens"
    typer.echo(json.dumps({"perplexity": found, "tokens": scored}) if as_json else line)


@sparselora.command()
def train(
    model: Model,
    data: Annotated[Path, typer.Option(help=".json or .jsonl of prompts and answers.")],
    out: Annotated[Path, typer.Option(help="Directory of the PEFT adapter; a rerun resumes.")],
    plan: Annotated[Path | None, typer.Option(help="SparsityPlan to train by.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="One sparsity for all layers instead; 0 is LoRA.")] = None,
    epochs: Annotated[float, typer.Option(min=0, help="Passes over the data.")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak; cosine schedule with 4% warmup.")] = 3e-4,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank; alpha is twice that.")] = 32,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a row at most.")] = 512,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Of adapter and data order.")] = 0,
) -> None:
    """Fine-tune with SparseLoRA; what comes out is an ordinary PEFT adapter."""
    from elision.data import load_examples
    from elision.errors import InputError
    from elision.sparselora import SparsityPlan
    from elision.sparselora.train import Settings, add_adapter
    from elision.sparselora.train import train as run

    if (plan is None) == (sparsity is None):
        raise InputError("give either --plan or --sparsity: one of them says what to leave out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is not empty: give a new directory")
    examples = load_examples(data)
    loaded_plan = None if plan is None else SparsityPlan.load(plan)
    loaded, tokenizer = _load(model, dtype)
    settings = Settings(
        steps=max(1, round(epochs * len(examples) / batch)),
        batch=batch,
        learning_rate=learning_rate,
        rank=rank,
        max_length=max_length,
        seed=seed,
    )
    if loaded_plan is None and sparsity:
        loaded_plan = SparsityPlan.uniform(loaded, sparsity)
    run(add_adapter(loaded, settings), tokenizer, examples, loaded_plan, out, settings)
    typer.echo(f"adapter: {out}")


@spd.command()
def calibrate(
    model: Model,
    text: Text,
    ranks: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks that will serve.")],
    out: Annotated[Path, typer.Option(help="Where the plan goes; what was measured is kept beside it.")],
    max_loss: Annotated[float | None, typer.Option(help="Allowed perplexity increase; 0.01 is one percent.")] = None,
    drop: Annotated[float | None, typer.Option(help="Share of the blocks to drop instead.")] = None,
    rows: Rows = 32,
    tokens: Tokens = 512,
) -> None:
    """Measure what each dropped sync costs on text, and write the plan that the limit allows; a rerun resumes."""
    from elision import spd
    from elision.data import text_batches
    from elision.loading import load_texts

    texts = load_texts(text)
    loaded, tokenizer = _load(model)
    batches = text_batches(tokenizer, texts, tokens, limit=rows)
    journal = out.with_name(f"{out.name}.journal")
    made = spd.calibrate(loaded, batches, ranks, max_loss=max_loss, drop=drop, state=journal)
    made.save(out)
    found = made.calibration
    assert found is not None
    count = len(made.dropped)
    cost = 100 * (found.perplexities[count] / found.perplexities[0] - 1)
    typer.echo(f"{count} of {len(found.order)} blocks drop their first sync, perplexity {cost:+.2f}%: {out}")


def _load(model: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Model and tokenizer, without the libraries' own bars and warnings."""
    import warnings

    from transformers.utils import logging

    from elision.loading import load_model

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    return load_model(model, dtype)


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
