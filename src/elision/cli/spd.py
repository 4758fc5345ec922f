"""`elision spd`: serve with fewer syncs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elision.cli import spd_plan
from elision.cli.common import Commands, Json, Model, RunDirectory, run_directory, show
from elision.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from elision.spd import SyncPlan

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="""Drop the syncs that tensor parallelism can spare (SPD, Sync-Point Drop).

    A tensor-parallel block synchronises its devices twice. Where the model can
    spare it, the first sync goes, and each step waits less for the links.

    \b
    In this order:
      probe      what a sync costs on your links
      calibrate  a plan: which blocks can go without, on your text
      heal       a checkpoint that has learned to do without them
      generate   text from it, on several ranks
      bench      what the plan saves there, timed
    """,
)
app.command()(spd_plan.calibrate)
app.command()(spd_plan.heal)

Plan = Annotated[Path | None, typer.Option(help="A plan's file, where the checkpoint carries none.")]
Ranks = Annotated[int | None, typer.Option(min=1, help="Ranks that keep all syncs, where there is no plan.")]
Weights = Annotated[str, typer.Option(help="Type of the weights: float32, bfloat16, float16; auto: as stored.")]
Timeout = Annotated[float, typer.Option(min=1.0, help="Seconds that a rank waits for another in a sync, on CPUs.")]


@app.command()
def generate(
    ctx: typer.Context,
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="Text to go on from; may be given several times.")],
    plan: Plan = None,
    ranks: Ranks = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    dtype: Weights = "auto",
    timeout: Timeout = 10.0,
    run: RunDirectory = None,
    as_json: Json = False,
) -> None:
    """Generate text on tensor-parallel ranks under a plan; the ranks are started on this machine.

    A checkpoint that `elision spd heal` wrote carries its plan. Under torchrun
    the ranks that it started are used, on several machines too.

    \b
    Examples:
      elision spd generate model-spd --prompt "def add(a, b):" --new-tokens 32
      elision spd generate reference --plan plan.json --prompt "def add(a, b):"
    """
    from elision.evaluate import check_tokens
    from elision.families import check_positions
    from elision.loading import load_tokenizer
    from elision.spd.runtimes import tasks

    for text in prompt:
        if re.search("[\ud800-\udfff]", text):  # how Python holds bytes that are no UTF-8
            raise InputError(f"--prompt {text!a} is not UTF-8: type it in that")
    config, chosen = _plan(model, plan, ranks, dtype)
    tokenizer = load_tokenizer(model)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:  # any will do, for it is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    given = tokenizer(prompt, return_tensors="pt", padding=True)
    for text, real in zip(prompt, given["attention_mask"], strict=True):
        if not real.any():
            raise InputError(f"--prompt {text!r} holds no token: give text to go on from")
    check_tokens(config.vocab_size, given["input_ids"][given["attention_mask"] > 0].tolist(), "the prompts")
    check_positions(config, int(given["attention_mask"].sum(1).max()) + new_tokens, "a --prompt with its --new-tokens")
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": temperature > 0, "seed": seed}
    options |= {"temperature": temperature} if temperature else {}
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    with run_directory(ctx, run) as kept:
        out = _launch(chosen.ranks, tasks.generate, model, chosen, inputs, options, dtype, timeout)
        if out is None:
            return
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for text in texts:
            kept.metric(text=text)
        kept.finish({"dropped": list(chosen.dropped)})
        values = {"ranks": chosen.ranks, "dropped": list(chosen.dropped), "texts": texts}
        show(values, as_json, "\n---\n".join(p + t for p, t in zip(prompt, texts, strict=True)))


@app.command()
def bench(
    ctx: typer.Context,
    model: Model,
    plan: Plan = None,
    ranks: Ranks = None,
    batch: Annotated[list[int], typer.Option(min=1, help="Rows decoded at once; may be given several times.")] = [1],  # noqa: B006
    prompt_tokens: Annotated[list[int], typer.Option(min=2, help="Tokens of a prompt; may be repeated.")] = [128],  # noqa: B006
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after the first prompt.")] = 16,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each variant.")] = 5,
    dtype: Weights = "auto",
    timeout: Timeout = 10.0,
    run: RunDirectory = None,
    as_json: Json = False,
) -> None:
    """Time all syncs, the plan and all syncs dropped, in turns, on ranks that are started on this machine.

    Beside each time stands the ideal: the time with all syncs less what the
    dropped ones cost alone. `elision report` draws what --json prints.

    \b
    Example:
      elision spd bench model-spd --batch 1 --batch 8 --prompt-tokens 512
    """
    from rich.table import Table

    from elision.families import check_positions
    from elision.report import sources
    from elision.spd.runtimes import tasks
    from elision.spd.runtimes.latency import Workload

    config, chosen = _plan(model, plan, ranks, dtype)
    check_positions(config, prompt_tokens[0] + new_tokens, "a prompt of --prompt-tokens with its --new-tokens")
    check_positions(config, max(prompt_tokens), "a prompt of --prompt-tokens")
    if chosen.ranks < 2:
        other = "--ranks 2 or more" if ranks else "a plan for two or more"
        raise InputError(f"1 rank has no syncs to time: give {other}")
    work = [Workload(rows, prompt_tokens[0], new_tokens) for rows in batch] + [Workload(1, n) for n in prompt_tokens]
    with run_directory(ctx, run) as kept:
        rows = _launch(chosen.ranks, tasks.bench, model, chosen, work, turns, dtype, timeout)
        if rows is None:
            return
        for row in rows:
            kept.metric(**row)
        values = {
            "benchmark": "elision spd bench",
            "ranks": chosen.ranks,
            "dropped": list(chosen.dropped),
            "rows": rows,
        }
        kept.finish(**sources.of_benchmark(values))
    table = Table(title=f"{model}, {chosen.ranks} ranks")
    for head in ("workload", "variant", "ms", "saved", "one all-reduce, ms", "ideal, ms", "model, ms"):
        table.add_column(head, justify="left" if head in ("workload", "variant") else "right")
    for row in rows:
        numbers = (row["all_reduce_ms"], row["ideal_ms"], row["model_ms"])
        cells = ("" if n is None else f"{n:.3g}" for n in numbers)
        table.add_row(row["workload"], row["variant"], f"{row['ms']:.3g}", f"{row['saved']:.1%}", *cells)
    show(values, as_json, table)


@app.command()
def probe(
    ctx: typer.Context,
    ranks: Annotated[int, typer.Option(min=2, help="Ranks on this machine; under torchrun its own number counts.")] = 2,
    turns: Annotated[int, typer.Option(min=3, help="All-reduces of each size.")] = 50,
    out: Annotated[Path | None, typer.Option(help="File for alpha and beta, as JSON.")] = None,
    run: RunDirectory = None,
    as_json: Json = False,
) -> None:
    """Measure alpha and beta of the links between ranks: what an all-reduce costs here, at any size.

    alpha is the time of an all-reduce of next to nothing, 1 / beta the rate at
    which bytes leave a rank. `elision spd calibrate --probe` plans with them.

    \b
    Examples:
      elision spd probe --ranks 2 --out probe.json
      torchrun --nnodes 2 --nproc-per-node 4 ... --no-python elision spd probe --out probe.json
    """
    from rich.table import Table

    from elision import files
    from elision.spd.runtimes import tasks

    if out is not None:
        files.check_file(out, "--out")
    with run_directory(ctx, run) as kept:
        found = _launch(ranks, tasks.probe, turns)
        if found is None:
            return
        for row in found["all_reduces"]:
            kept.metric(**row)
        kept.finish(links=[found])
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


def _plan(model: str, path: Path | None, ranks: int | None, dtype: str) -> tuple[PretrainedConfig, SyncPlan]:
    """The model's config and the plan to run, with everything refused that can be before ranks are started."""
    from elision.families import load_config, treatment
    from elision.loading import named_dtype
    from elision.spd import SyncPlan
    from elision.spd.runtimes import transformers as runtime

    named_dtype(dtype)
    if path is not None and ranks is not None:
        raise InputError(f"--ranks {ranks} is given beside --plan, which says the ranks itself: leave one out")
    config = load_config(model)
    if path is None and ranks is None and not hasattr(config, "spd_plan"):
        raise InputError(f"{model} carries no plan: give --plan FILE, or --ranks N to keep all syncs")
    if ranks is not None and (treated := treatment(config)):
        raise InputError(f"--ranks {ranks} is given, but {model} {treated}: leave it out")
    given = SyncPlan.load(path) if path is not None else None if ranks is None else SyncPlan(ranks)
    return runtime.planned(model, given)


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
