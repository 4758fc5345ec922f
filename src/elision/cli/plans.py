"""`elision sparselora calibrate`, `presets` and `bench`: plans made, listed and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elision.cli.common import DryRun, Dtype, Json, Model, RunDirectory, load, run_directory, show, tell, warn
from elision.errors import InputError
from elision.runs import factors_beside

if TYPE_CHECKING:
    from torch import Tensor

    from elision.sparselora import Factors, SparsityPlan

Data = Annotated[
    Path, typer.Option(help="Prompts and answers: .jsonl with one object a line, or .json with a list of them.")
]
REHEARSED = 32  # steps
Rows = Annotated[int, typer.Option(min=1, help="Rows of the data at most, evenly spaced.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows at a time.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens a row at most.")]
Plan = Annotated[
    str | None,
    typer.Option(metavar="PLAN", help="File of a plan, a preset's name, or the directory of a published predictor."),
]
Mode = Annotated[str | None, typer.Option(help="Of a published predictor's modes, o1 or o2.")]


def calibrate(
    ctx: typer.Context,
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Where the plan goes; what was measured is kept beside it.")],
    flops: Annotated[float | None, typer.Option(help="Share of dense LoRA's operations that a run may cost.")] = None,
    time: Annotated[float | None, typer.Option(help="Share of its time instead; steps are timed here.")] = None,
    max_loss: Annotated[float | None, typer.Option(help="Or allowed perplexity increase; 0.01 is one percent.")] = None,
    rehearse: Annotated[
        int | None,
        typer.Option(min=0, help=f"Dense steps of a throwaway adapter before measuring; {REHEARSED} where it can."),
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Of these steps: that of the training to come.")] = 3e-4,
    adapter: Annotated[
        Path | None, typer.Option(help="PEFT adapter that has learned a little already, instead of a rehearsal.")
    ] = None,
    selection: Annotated[str | None, typer.Option(help="How channels are chosen; by default as plans do.")] = None,
    dense_steps: Annotated[float, typer.Option(help="Share of the steps that will be dense.")] = 0.05,
    rows: Rows = 32,
    batch: Batch = 8,
    max_length: Length = 512,
    dtype: Dtype = "float32",
    stream: Annotated[
        bool, typer.Option("--stream", help="Leave the layers on disk: for models larger than memory.")
    ] = False,
    run: RunDirectory = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure on your data what each layer can spare, and plan within one budget; a rerun resumes.

    The plan says, layer by layer, which share of the channels context tokens
    skip. Give one budget: --flops, --time or --max-loss (one percent where none
    is given). --dry-run says how long measuring takes, and what the data leaves
    to gain at most.

    A model that has learned nothing of your data does not show what learning it
    will need, so a throwaway adapter is trained for a few steps first, on rows
    that are not measured.

    \b
    Examples:
      elision sparselora calibrate reference --data pairs.jsonl --flops 0.6 --out plan.json
      elision sparselora calibrate ./model --data pairs.jsonl --max-loss 0.01 --out plan.json
    """
    from elision import sparselora
    from elision.loading import with_adapter
    from elision.report import sources
    from elision.sparselora.factors import check_free

    if out.is_dir():
        raise InputError(f"--out {out} is a directory: name the plan's file")
    if selection == "whitened":
        check_free(factors_beside(out))
    if stream and (adapter is not None or time is not None or rehearse):
        raise InputError("--stream goes without --adapter, --rehearse and --time: a model on disk cannot be trained")
    if adapter is not None and rehearse:
        raise InputError(f"--adapter {adapter} and --rehearse {rehearse} are both given: one of them is enough")
    steps = rehearse if rehearse is not None else 0 if stream or adapter is not None else REHEARSED
    loaded, batches, lessons = _load(model, data, rows, batch, max_length, dtype, stream, steps)
    if adapter is not None:
        loaded = with_adapter(loaded, adapter, trainable=True)  # its branch stays dense while the base is sparse
    elif time is not None or steps:
        from elision.sparselora.train import Settings, add_adapter

        loaded = add_adapter(loaded, Settings(steps=1, learning_rate=learning_rate))
    settings: dict[str, Any] = {"dense_steps": dense_steps} | ({} if selection is None else {"selection": selection})
    if dry_run:
        from elision.cli import estimates
        from elision.sparselora.calibration import check_budget

        check_budget(loaded, batches, flops, time, max_loss, settings)
        _tell_alike(lessons, batches)
        return show(estimates.sparsity_calibration(loaded, batches, flops or time, settings, lessons), as_json)
    with run_directory(ctx, run) as kept:
        if selection == "whitened":
            settings["factors"] = sparselora.Factors.whitened(loaded, batches)
        journal = out.with_name(f"{out.name}.journal")
        plan = sparselora.calibrate(
            loaded,
            batches,
            flops=flops,
            time=time,
            max_loss=max_loss,
            rehearse=lessons,
            learning_rate=learning_rate,
            state=journal,
            **settings,
        )
        if "factors" in settings:
            tell(kept, f"factors: {settings['factors'].save(factors_beside(out))}", as_json)
        plan.save(out)
        found, told = plan.calibration, sparselora.forecast(loaded, batches, plan)
        assert found is not None
        for part in ("ffn", "qk", "vo"):
            for layer, curve in enumerate(getattr(found, part)):
                for sparsity, increase in zip(found.grid, curve, strict=True):
                    kept.metric(part=part, layer=layer, sparsity=sparsity, increase=increase)
        kept.metric(loss=found.loss, expected=found.expected_increase, measured=found.measured_increase)
        kept.finish(**sources.of_plan(plan.to_dict(), out.stem))
    values = {"plan": str(out), "loss": found.loss, "measured_increase": found.measured_increase}
    values |= {"expected_increase": found.expected_increase, "flops": dict(told.flops), "speedup": told.speedup}
    lines = [
        plan.describe(),
        f"loss {found.loss:.4f} per output token, {found.measured_increase:+.4f} under the plan "
        f"({found.expected_increase:+.4f} by the curves)",
        told.line(),
        f"plan: {out}",
    ]
    _tell_alike(lessons, batches)
    show(values, as_json, "\n".join(lines))


def presets(as_json: Json = False) -> None:
    """List the paper's plans; `--plan NAME` of the other commands takes them.

    \b
    Example:
      elision sparselora train ./llama --data pairs.jsonl --plan llama3-8b/math10k --out adapter
    """
    from elision.sparselora import SparsityPlan, presets

    plans = {name: SparsityPlan.preset(name) for name in presets.names()}
    show({name: plan.to_dict() if as_json else plan.describe() for name, plan in plans.items()}, as_json)


def bench(
    ctx: typer.Context,
    model: Model,
    data: Data,
    plan: Plan = None,
    mode: Mode = None,
    sparsity: Annotated[float | None, typer.Option(help="One sparsity for all layers instead.")] = None,
    turns: Annotated[int, typer.Option(min=1, help="Timed steps of each variant, in turns.")] = 5,
    rows: Rows = 8,
    batch: Batch = 8,
    max_length: Length = 512,
    dtype: Dtype = "float32",
    run: RunDirectory = None,
    as_json: Json = False,
) -> None:
    """Time real fine-tuning steps on your data: LoRA, LoRA without what is lossless to leave out, and the plan.

    Without --plan it is the paper's, scaled to the model. Beside each speedup
    stands what the counted operations alone would allow. `elision report` draws
    what --json prints.

    \b
    Example:
      elision sparselora bench reference --data pairs.jsonl
    """
    from rich.table import Table

    from elision.sparselora import SparsityPlan, forecast
    from elision.sparselora.forecasts import ideals
    from elision.sparselora.stopwatch import measure
    from elision.sparselora.train import Settings, add_adapter

    if plan is not None and sparsity is not None:
        raise InputError("--plan and --sparsity are both given: one of them says what to leave out")
    known = plan_of(plan, mode)
    loaded, batches, _ = _load(model, data, rows, batch, max_length, dtype)
    wanted, factors = known(loaded)
    if wanted is None:
        wanted = SparsityPlan.default(loaded) if sparsity is None else SparsityPlan.uniform(loaded, sparsity)
    loaded = add_adapter(loaded, Settings(steps=1))
    told = forecast(loaded, batches, wanted)
    with run_directory(ctx, run) as kept:
        took, allowed = measure(loaded, batches, wanted, turns, factors), ideals(loaded, batches, wanted)
        shape, base = f"{model}, batch {len(batches[0]['input_ids'])}", took["LoRA"]
        steps = [
            {
                "variant": name,
                "shape": shape,
                "output_share": told.output_share,
                "device": loaded.device.type,
                "step_ms": 1e3 * seconds,
                "speedup": base / seconds,
                "ideal": allowed[name],
            }
            for name, seconds in took.items()
        ]
        for row in steps:
            kept.metric(**row)
        kept.finish({"forecast": told.line()}, steps=steps)
    table = Table(title=shape, title_justify="left", caption=told.line(), caption_justify="left")
    for head in ("variant", "a step, ms", "over LoRA", "ideal"):
        table.add_column(head, justify="left" if head == "variant" else "right")
    for row in steps:
        table.add_row(row["variant"], f"{row['step_ms']:.4g}", f"{row['speedup']:.2f}x", f"{row['ideal']:.2f}x")
    show({"benchmark": "elision sparselora bench", "forecast": told.line(), "rows": steps}, as_json, table)


def plan_of(name: str | None, mode: str | None) -> Callable[[Any], tuple[SparsityPlan | None, Factors | None]]:
    """What `--plan` and `--mode` name, checked as far as that goes without the model: called with it, the plan and,
    where they come with it, the factors of its estimator.
    """
    from elision.sparselora import Factors, SparsityPlan, load_predictor, presets

    if name is not None and Path(name).is_dir():
        chosen = presets.predictor_mode(name, mode)
        return lambda model: load_predictor(name, model, chosen)
    if mode is not None:
        raise InputError(f"--mode {mode} goes with --plan DIRECTORY of a published predictor: leave it out")
    if name is None:
        return lambda model: (None, None)
    preset = not Path(name).exists() and name in presets.names()
    if not preset and not Path(name).is_file():
        raise InputError(
            f"plan {name} is neither a file nor a preset: give a plan's path or {', '.join(presets.names())}"
        )
    plan = SparsityPlan.preset(name) if preset else SparsityPlan.load(name)
    factors = Factors.load(factors_beside(Path(name))) if plan.selection == "whitened" else None
    return lambda model: (plan, factors)


def _load(
    model: str, data: Path, rows: int, batch: int, max_length: int, dtype: str, stream: bool = False, lessons: int = 0
) -> tuple[Any, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """A model, batches of rows spread over a file of prompts and answers, and `lessons` batches of its other rows.

    Where there are no other rows, lessons are of the same.
    """
    from elision.data import collate, load_examples
    from elision.sparselora.train import encode

    examples = load_examples(data, warn)
    loaded, tokenizer = load(model, dtype, stream=stream)
    encoded = encode(loaded, tokenizer, examples, max_length)  # all, because rows that are too long are left out

    def batches(taken: Sequence[Any]) -> list[dict[str, Tensor]]:
        return [collate(taken[i : i + batch], tokenizer.pad_token_id) for i in range(0, len(taken), batch)]

    chosen = spread(len(encoded), rows)
    measured = batches([encoded[i] for i in chosen])
    if not lessons:
        return loaded, measured, []
    others = [encoded[i] for i in sorted({*range(len(encoded))} - {*chosen})]
    learned = batches([others[i] for i in spread(len(others), lessons * batch)]) or measured
    return loaded, measured, [learned[i % len(learned)] for i in range(lessons)]


def spread(count: int, most: int) -> list[int]:
    """At most `most` places among `count`, evenly spaced from the first to near the last."""
    return [i * count // most for i in range(most)] if count > most else list(range(count))


def _tell_alike(lessons: Sequence[dict[str, Tensor]], measured: Sequence[dict[str, Tensor]]) -> None:
    """Say where a rehearsal is of the rows that are measured, as `_load` has it where there are no others."""
    if lessons and lessons[0] is measured[0]:
        warn("all rows of the data are measured, so the rehearsal is of the same ones: give fewer --rows, or more data")
