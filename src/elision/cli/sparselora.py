"""`elision sparselora`: fine-tune with contextual sparsity."""

from __future__ import annotations

import math
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from elision.cli import plans
from elision.cli.common import Commands, DryRun, Dtype, Json, Model, RunDirectory, load, run_directory, show, tell, warn
from elision.errors import InputError

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="""Fine-tune with contextual sparsity (SparseLoRA).

    LoRA spends its time in frozen weights. SparseLoRA computes only those of
    their channels that a batch's prompts need; answers and the adapter stay
    dense. What comes out is an ordinary PEFT adapter.

    \b
    In this order:
      bench      what it would gain on your data, timed
      presets    the paper's plans, if your model is one of its models; else
      calibrate  a plan: what each layer can spare on your data
      train      the adapter, by that plan
    """,
)
app.command()(plans.bench)
app.command()(plans.presets)
app.command()(plans.calibrate)


@app.command()
def train(
    ctx: typer.Context,
    model: Model,
    data: plans.Data,
    out: Annotated[Path, typer.Option(help="Directory of the PEFT adapter; a rerun resumes.")],
    plan: plans.Plan = None,
    mode: plans.Mode = None,
    sparsity: Annotated[float | None, typer.Option(help="One sparsity for all layers instead; 0 is LoRA.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data, in whole steps.")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak; cosine schedule with 4% warmup.")] = 3e-4,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank; alpha is twice that.")] = 32,
    max_length: plans.Length = 512,
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Of adapter and data order.")] = 0,
    report_to: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb or trackio, where installed; may be repeated.")
    ] = None,
    run: RunDirectory = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Fine-tune with SparseLoRA; what comes out is an ordinary PEFT adapter.

    LoRA goes on Q, K, V and O. The fields of --data are those of docs/cli.md;
    no chat template is applied. Tells the expected speedup before the first step.
    --dry-run times one step and says how long all of them would take, in how much
    memory. A killed run goes on when the same command is run again. Without
    --plan it follows the paper's, scaled to the model; `calibrate` makes one for
    your model and data.

    \b
    Examples:
      elision sparselora train reference --data pairs.jsonl --out adapter
      elision sparselora train ./model --data pairs.jsonl --plan plan.json --out adapter
      elision sparselora train ./model --data pairs.jsonl --plan ./predictor --mode o2 --out adapter
      elision sparselora train ./model --data pairs.jsonl --sparsity 0 --out lora
    """
    from elision.data import collate, load_examples
    from elision.report import sources
    from elision.sparselora import SparsityPlan, forecast
    from elision.sparselora import train as training

    if plan is not None and sparsity is not None:
        raise InputError("--plan and --sparsity are both given: one of them says what to leave out")
    if not 0 < epochs < math.inf:
        raise InputError(f"--epochs {epochs:g} trains nothing: give a number above 0")
    training.check_alone()
    training.check_free(out, "--out", run)
    training.reporters(report_to or ())
    examples = load_examples(data, warn)
    known = plans.plan_of(plan, mode)
    loaded, tokenizer = load(model, dtype)
    rows = training.encode(loaded, tokenizer, examples, max_length)
    settings = training.Settings(
        steps=max(1, round(epochs * len(rows) / batch)),
        batch=batch,
        learning_rate=learning_rate,
        rank=rank,
        max_length=max_length,
        seed=seed,
    )
    wanted, factors = known(loaded)
    if wanted is None and sparsity != 0:
        wanted = SparsityPlan.default(loaded) if sparsity is None else SparsityPlan.uniform(loaded, sparsity)
    adapted = training.add_adapter(loaded, settings)
    spread = rows[:: max(1, len(rows) // 64)]
    sample = [collate(spread[i : i + batch], tokenizer.pad_token_id) for i in range(0, len(spread), batch)]
    if lost := _lost(rows, len(examples), tokenizer.eos_token_id, max_length):
        warn(lost)
    if dry_run:
        from elision.cli import estimates

        return show(estimates.fine_tuning(adapted, sample, wanted, settings.steps, factors), as_json)
    told = None if wanted is None else forecast(adapted, sample, wanted)
    with run_directory(ctx, run) as kept:
        if wanted is not None and told is not None:
            tell(kept, f"{wanted.describe()}\n{told.line()}", as_json)
        with redirect_stdout(sys.stderr):  # the Trainer's own lines
            log = training.train(
                adapted,
                tokenizer,
                examples,
                wanted,
                out,
                settings,
                callbacks=[kept.callback()],
                report_to=report_to or (),
                boards=None if kept.path is None else kept.path / "tensorboard",
                factors=factors,
            )
        losses = [[row["step"], row["loss"]] for row in log]
        found = {"name": "LoRA" if told is None else "SparseLoRA", "losses": losses}
        found |= {} if told is None else {"flops_ratio": told.flops["full"]}
        name = Path(plan).stem if plan is not None else "default" if sparsity is None else "one sparsity"
        shown = {} if wanted is None else sources.of_plan(wanted.to_dict(), name)
        kept.finish({} if told is None else {"forecast": told.line()}, training=[found], **shown)
    values = {"adapter": str(out), "steps": settings.steps, "loss": log[-1]["loss"] if log else None}
    show(values, as_json, f"adapter: {out}")


def _lost(rows: list[dict[str, list[int]]], examples: int, end: int | None, max_length: int) -> str | None:
    """What --max-length takes from the data, in a line; None: nothing."""
    cut = sum(row["input_ids"][-1] != end for row in rows)
    if len(rows) == examples and not cut:
        return None
    return (
        f"--max-length {max_length}: {examples - len(rows)} of {examples} rows are left out, because their prompts "
        f"alone are that long, and {cut} lose the end of their answers"
    )
