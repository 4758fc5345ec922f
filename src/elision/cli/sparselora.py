"""`elision sparselora`: fine-tune with contextual sparsity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elision.cli import plans
from elision.cli.common import Commands, Model, load

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Fine-tune with contextual sparsity.")
app.command()(plans.calibrate)
app.command()(plans.presets)
app.command()(plans.bench)


@app.command()
def train(
    model: Model,
    data: Annotated[Path, typer.Option(help=".json or .jsonl of prompts and answers.")],
    out: Annotated[Path, typer.Option(help="Directory of the PEFT adapter; a rerun resumes.")],
    plan: Annotated[str | None, typer.Option(help="File of the SparsityPlan to train by, or a preset's name.")] = None,
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
    from elision.data import collate, encode, load_examples
    from elision.errors import InputError
    from elision.sparselora import SparsityPlan, forecast
    from elision.sparselora.train import Settings, add_adapter
    from elision.sparselora.train import train as run

    if (plan is None) == (sparsity is None):
        raise InputError("give either --plan or --sparsity: one of them says what to leave out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is not empty: give a new directory")
    examples = load_examples(data)
    loaded_plan = None if plan is None else plans.named_plan(plan)
    loaded, tokenizer = load(model, dtype)
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
    adapted = add_adapter(loaded, settings)
    if loaded_plan is not None:
        rows = encode(tokenizer, examples[:: max(1, len(examples) // 64)], max_length)
        sample = [collate(rows[i : i + batch], tokenizer.pad_token_id) for i in range(0, len(rows), batch)]
        typer.echo(forecast(adapted, sample, loaded_plan).line())
    run(adapted, tokenizer, examples, loaded_plan, out, settings)
    typer.echo(f"adapter: {out}")
