"""`elision spd`: serve with fewer syncs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elision.cli import spd_plan
from elision.cli.common import Commands, Json, Model, show
from elision.errors import InputError

if TYPE_CHECKING:
    from elision.spd import SyncPlan

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Drop the syncs that tensor parallelism can spare.")
app.command()(spd_plan.calibrate)
app.command()(spd_plan.heal)

Plan = Annotated[Path | None, typer.Option(help="A plan's file, where the checkpoint carries none.")]
Ranks = Annotated[int | None, typer.Option(min=1, help="Ranks that keep all syncs, where there is no plan.")]
Weights = Annotated[str, typer.Option(help="Type of the weights: float32, bfloat16, float16; auto: as stored.")]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="Text to go on from; may be given several times.")],
    plan: Plan = None,
    ranks: Ranks = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    dtype: Weights = "auto",
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds that a rank waits for another in a sync.")] = 10.0,
    as_json: Json = False,
) -> None:
    """Generate text on tensor-parallel ranks under a plan; the ranks are started on this machine."""
    from elision.loading import load_tokenizer
    from elision.spd.runtimes import tasks

    chosen = _plan(model, plan, ranks, dtype)
    tokenizer = load_tokenizer(model)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    given = tokenizer(prompt, return_tensors="pt", padding=True)
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": temperature > 0, "seed": seed}
    options |= {"temperature": temperature} if temperature else {}
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    out = _launch(chosen.ranks, tasks.generate, model, chosen, inputs, options, dtype, timeout)
    if out is not None:
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        values = {"ranks": chosen.ranks, "dropped": list(chosen.dropped), "texts": texts}
        show(values, as_json, "\n---\n".join(p + t for p, t in zip(prompt, texts, strict=True)))


@app.command()
def bench(
    model: Model,
    plan: Plan = None,
    ranks: Ranks = None,
    batch: Annotated[list[int], typer.Option(min=1, help="Rows decoded at once; may be given several times.")] = [1],  # noqa: B006
    prompt_tokens: Annotated[list[int], typer.Option(min=2, help="Tokens of a prompt; may be repeated.")] = [128],  # noqa: B006
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after the first prompt.")] = 16,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each variant.")] = 5,
    dtype: Weights = "auto",
    as_json: Json = False,
) -> None:
    """Time all syncs, the plan and all syncs dropped, in turns, on ranks that are started on this machine."""
    from rich.table import Table

    from elision.spd.runtimes import tasks
    from elision.spd.runtimes.latency import Workload

    chosen = _plan(model, plan, ranks, dtype)
    work = [Workload(rows, prompt_tokens[0], new_tokens) for rows in batch] + [Workload(1, n) for n in prompt_tokens]
    rows = _launch(chosen.ranks, tasks.bench, model, chosen, work, turns, dtype)
    if rows is None:
        return
    table = Table(title=f"{model}, {chosen.ranks} ranks")
    for head in ("workload", "variant", "ms", "saved", "one all-reduce, ms", "ideal, ms", "model, ms"):
        table.add_column(head, justify="left" if head in ("workload", "variant") else "right")
    for row in rows:
        numbers = (row["all_reduce_ms"], row["ideal_ms"], row["model_ms"])
        cells = ("" if n is None else f"{n:.3g}" for n in numbers)
        table.add_row(row["workload"], row["variant"], f"{row['ms']:.3g}", f"{row['saved']:.1%}", *cells)
    show({"ranks": chosen.ranks, "dropped": list(chosen.dropped), "rows": rows}, as_json, table)


@app.command()
def probe(
    ranks: Annotated[int, typer.Option(min=2, help="Ranks on this machine; under torchrun its own number counts.")] = 2,
    turns: Annotated[int, typer.Option(min=3, help="All-reduces of each size.")] = 50,
    out: Annotated[Path | None, typer.Option(help="File for alpha and beta, as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Measure alpha and beta of the links between ranks: what an all-reduce costs here, at any size."""
    from rich.table import Table

    from elision import files
    from elision.spd.runtimes import tasks

    found = _launch(ranks, tasks.probe, turns)
    if found is None:
        return
    if out is not None:
        files.write_json(out, found)
    rate = 1e-9 / found["beta"] if found["beta"] else float("inf")
    table = Table(title=f"{found['ranks']} ranks")
    table.caption = f"alpha {1e6 * found['alpha']:.1f} us, 1 / beta {rate:.3g} GB/s"
    for head in ("bytes", "an all-reduce, us", "fitted, us"):
        table.add_column(head, justify="right")
    for row in found["all_reduces"]:
        table.add_row(str(row["bytes"]), f"{1e6 * row['seconds']:.1f}", f"{1e6 * row['fitted']:.1f}")
    show(found, as_json, table)


def _plan(model: str, path: Path | None, ranks: int | None, dtype: str) -> SyncPlan:
    """The plan to run, with everything refused that can be before ranks are started."""
    from elision.spd import SyncPlan
    from elision.spd.runtimes import transformers as runtime

    if dtype not in (kinds := ("auto", "float32", "bfloat16", "float16")):
        raise InputError(f"dtype {dtype!r} is not known: use {', '.join(kinds)}")
    if path is not None and ranks is not None:
        raise InputError(f"--ranks {ranks} is given beside --plan, which says the ranks itself: leave one out")
    given = SyncPlan.load(path) if path is not None else None if ranks is None else SyncPlan(ranks)
    return runtime.planned(model, given)[1]


def _launch(ranks: int, task: Any, *arguments: Any) -> Any:
    """What rank 0 returned; None in the other ranks, which have nothing to say. A lost rank ends the command."""
    from elision.spd.runtimes import launch
    from elision.spd.runtimes.ranks import RankLostError

    try:
        result = launch.launch(ranks, task, *arguments)
    except RankLostError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    return result if launch.is_first() else None
