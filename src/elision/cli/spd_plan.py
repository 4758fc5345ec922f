"""`elision spd calibrate` and `elision spd heal`: from a model and text to a plan, from a plan to a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from elision import files
from elision.cli.common import DryRun, Dtype, Json, Model, Rows, RunDirectory, Text, Tokens, load, run_directory, show
from elision.cli.config import command_line
from elision.errors import InputError

if TYPE_CHECKING:
    from elision.spd import SyncPlan, Workload

ROWS_A_BATCH = 8
Method = Literal[
    "sequential", "single", "fisher", "output_error", "integrated"
]  # proxies.Method, which typer must see at import

HeldOut = Annotated[
    list[Path] | None,
    typer.Option(help="Text to verify on; by default rows of --text that nothing is decided on, a quarter more."),
]

Stream = Annotated[bool, typer.Option("--stream", help="Read weights block by block: for models larger than memory.")]


def calibrate(
    ctx: typer.Context,
    model: Model,
    text: Text,
    ranks: Annotated[list[int], typer.Option(min=2, help="Tensor-parallel ranks that will serve; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Where the plan goes; what was measured is kept beside it.")],
    max_loss: Annotated[float | None, typer.Option(help="Allowed perplexity increase; 0.01 is one percent.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Allowed KL divergence from the dense model, nats.")] = None,
    drop: Annotated[float | None, typer.Option(help="Share of the blocks to drop instead.")] = None,
    tiers: Annotated[str | None, typer.Option(help="t1,t2, shares of perplexity: heal blocks above.")] = None,
    healing: Annotated[bool, typer.Option("--healing", help="Plan for `elision spd heal` to follow.")] = False,
    recovered: Annotated[
        list[str] | None,
        typer.Option(metavar="HOW=SHARE", help="What an earlier healing won back, b2b=0.73 say; may be repeated."),
    ] = None,
    method: Annotated[Method, typer.Option(help="How blocks are ordered: exactly, or faster.")] = "sequential",
    probe: Annotated[Path | None, typer.Option(help="What `spd probe --out` wrote: mix treatments for it.")] = None,
    treatments: Annotated[
        str, typer.Option(help="What may be mixed: dropped, int8, skipped, which vLLM does not serve.")
    ] = "dropped,int8",
    alpha: Annotated[float | None, typer.Option(help="Instead of --probe: seconds of an empty all-reduce.")] = None,
    beta: Annotated[float | None, typer.Option(help="And seconds a byte that leaves a rank.")] = None,
    step_ms: Annotated[float | None, typer.Option(help="Time of a step with all syncs in place.")] = None,
    step_tokens: Annotated[int, typer.Option(min=1, help="Tokens of such a step: rows decoded at once.")] = 1,
    held_out: HeldOut = None,
    stream: Stream = False,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights; in less than float32 small losses drown in rounding.")
    ] = "float32",
    rows: Rows = 32,
    tokens: Tokens = 512,
    run: RunDirectory = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure what each dropped sync costs on text, and write the plan that the limit allows; a rerun resumes.

    This one process computes what the ranks would, so nothing needs several
    devices yet. Give one limit (--max-loss, --max-kl, --drop or --tiers); one
    percent of perplexity where none is given. --dry-run says how long it takes.

    \b
    Examples:
      elision spd calibrate reference --text notes.txt --ranks 4 --out plan.json
      elision spd calibrate ./model --text notes.txt --ranks 8 --healing --out plan.json
      elision spd calibrate ./model --text notes.txt --ranks 8 --drop 0.7 --run runs/plan --out plan.json
    """
    from elision import spd
    from elision.report import sources
    from elision.spd.calibration import Limit, check_workload
    from elision.spd.sensitivity import covered_by_all

    ranks = list(dict.fromkeys(ranks))
    paths = _plan_paths(out, ranks)
    allowed = tuple(each.strip() for each in treatments.split(","))
    limit = Limit(max_loss, max_kl, drop, _thresholds(tiers), healing, _shares(recovered or []), allowed)
    if recovered and not healing and tiers is None:
        raise InputError("--recovered is given without --healing or --tiers, so nothing will be healed: leave it out")
    loaded, tokenizer = load(model, dtype, stream=stream)
    workload = _workload(loaded, ranks, probe, alpha, beta, step_ms, step_tokens)
    check_workload(workload, covered_by_all(loaded, ranks), ranks, limit)
    batches, apart = _texts(loaded, tokenizer, text, held_out, rows, tokens)
    if workload is not None and (reason := workload.refusal()):
        return show({"plans": [], "verdict": reason}, as_json, reason)
    if dry_run:
        from elision.cli import estimates

        return show(estimates.sync_calibration(loaded, batches, apart, ranks, method, workload), as_json)
    with run_directory(ctx, run) as kept:
        made = spd.calibrations(
            loaded,
            batches,
            ranks,
            limit,
            method=method,
            workload=workload,
            held_out=apart,
            state=out.with_name(f"{out.name}.journal"),
        )
        sections: dict[str, list[Any]] = {}
        for plan, path in zip(made, paths, strict=True):
            plan.save(path)
            assert plan.calibration is not None
            for block, sensitivity in enumerate(plan.calibration.sensitivities):
                kept.metric(ranks=plan.ranks, block=block, sensitivity=sensitivity)
            for count, perplexity in enumerate(plan.calibration.perplexities):
                kept.metric(ranks=plan.ranks, dropped=count, perplexity=perplexity)
            for name, parts in sources.of_plan(plan.to_dict(), path.stem).items():
                sections.setdefault(name, []).extend(parts)
        kept.finish({}, **sections)
    values = [{"plan": str(path), **_summary(plan)} for plan, path in zip(made, paths, strict=True)]
    lines = [f"{_said(plan)}: {path}" for plan, path in zip(made, paths, strict=True)]
    show({"plans": values}, as_json, "\n".join(lines))


def heal(
    ctx: typer.Context,
    model: Model,
    plan: Annotated[Path, typer.Option(help="What `spd calibrate` wrote.")],
    text: Text,
    out: Annotated[Path, typer.Option(help="Directory of the healed checkpoint; a killed run goes on beside it.")],
    held_out: HeldOut = None,
    correction: Annotated[str | None, typer.Option(help="Fit before training: constant, gain or local_o.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the text for each block.")] = 10,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; by default set by the model's width.")] = None,
    judging: Annotated[float, typer.Option(help="Share of the text that judges each epoch, and is not learned.")] = 0.1,
    teacher_inputs: Annotated[
        bool, typer.Option("--teacher-inputs", help="Feed blocks what they got with all syncs, as the paper does.")
    ] = False,
    lora: Annotated[int, typer.Option(help="Train matrices in this rank only; 0: in full.")] = 0,
    polish: Annotated[int, typer.Option(help="Epochs of all healed blocks together at the end.")] = 0,
    polish_lr: Annotated[float | None, typer.Option(help="Their peak learning rate; by default a third of lr.")] = None,
    seed: Annotated[int, typer.Option(help="Of the batches' order.")] = 0,
    adapter: Annotated[
        Path | None, typer.Option(help="With --lora: also write what was learned as a file beside the untouched base.")
    ] = None,
    stream: Stream = False,
    dtype: Dtype = "auto",
    rows: Rows = 128,
    tokens: Tokens = 512,
    run: RunDirectory = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Distil what the plan's blocks lost with their syncs, and write a checkpoint that carries the plan.

    Each block learns, one after another, to put out what it did with its sync
    in place; a killed run goes on after its last whole block. The last line says
    which of vLLM and transformers (`elision spd generate`) serve the checkpoint,
    on the plan's number of ranks.

    \b
    Example:
      elision spd heal ./model --plan plan.json --text notes.txt --out model-spd
    """
    from elision import spd
    from elision.report import sources
    from elision.spd.artifact import check_replaceable

    planned = spd.SyncPlan.load(plan)
    recipe = spd.Recipe(epochs, lr, judging, teacher_inputs, seed, correction, lora, polish, polish_lr)
    if adapter is not None and not lora:
        raise InputError(f"adapter {adapter} holds low-rank healing: give --lora 8, say, or leave it out")
    if adapter is not None:
        files.check_file(adapter, "adapter")
        files.check_place(adapter, "adapter")
    for name, path in (("adapter", adapter), ("run", run)):
        if path is not None and path.resolve().is_relative_to(out.resolve()):  # the checkpoint replaces all in there
            raise InputError(f"{name} {path} is inside of --out {out}, which is written as a whole: put it beside it")
    check_replaceable(out)
    loaded, tokenizer = load(model, dtype, stream=stream)
    batches, apart = _texts(loaded, tokenizer, text, held_out, rows, tokens)
    place = out.resolve()  # links and ".." have other neighbours, or none
    state = place.with_name(f".{place.name}.healing")
    if dry_run:
        from elision.cli import estimates

        return show(estimates.healing(loaded, planned, batches, apart, recipe, state), as_json)
    count = sum(len(batch["input_ids"]) for batch in batches)
    about = {"Healed on": f"{count} rows of {tokens} tokens of {', '.join(path.name for path in text)}"}
    with run_directory(ctx, run) as kept:
        healed = spd.carry_out(loaded, planned, batches, held_out=apart, recipe=recipe, state=state)
        if adapter is not None:
            spd.save_adapter(healed.model, healed.plan, adapter)
        spd.save(healed.model, healed.plan, out, tokenizer, command=command_line(ctx), results=about)
        if (found := healed.plan.verified) is not None:
            kept.metric(dense=found.dense, zero_shot=found.zero_shot, planned=found.planned, recovery=found.recovery)
        kept.finish(**sources.of_plan(healed.plan.to_dict(), out.name))
    shutil.rmtree(state, ignore_errors=True)
    show({"checkpoint": str(out), **_summary(healed.plan)}, as_json, f"{_said(healed.plan, planned)}: {out}")


def _plan_paths(out: Path, ranks: list[int]) -> list[Path]:
    """Where the plan for each of `ranks` goes: beside `out` where they are several."""
    if out.is_dir():
        raise InputError(f"out {out} is a directory: give a file, {out / 'plan.json'} say")
    paths = [out if len(ranks) == 1 else out.with_name(f"{out.stem}-{n}{out.suffix}") for n in ranks]
    for path in paths:
        if path.is_dir():
            raise InputError(f"out {path} is a directory: remove it, or give --out another name")
    return paths


def _texts(
    model: Any, tokenizer: Any, text: list[Path], held_out: list[Path] | None, rows: int, tokens: int
) -> tuple[Any, Any]:
    """Batches to decide on and batches to verify on; None where the text has no row to spare for that."""
    from elision.data import text_batches
    from elision.families import check_positions
    from elision.loading import load_texts

    check_positions(model.config, tokens, "a row of --tokens")
    texts = load_texts(text)
    if held_out:
        other = load_texts(held_out)
        first, second = (
            text_batches(tokenizer, each, tokens, ROWS_A_BATCH, limit=rows, in_turn=True) for each in (texts, other)
        )
        return first, second
    found = text_batches(tokenizer, texts, tokens, rows=1, limit=rows + -(-rows // 4), in_turn=True)
    apart = max(len(found) - rows, len(found) // 5)
    cut = len(found) - apart
    return _joined(found[:cut]), _joined(found[cut:]) or None


def _joined(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Batches of single rows as batches of ROWS_A_BATCH."""
    import torch

    parts = [rows[first : first + ROWS_A_BATCH] for first in range(0, len(rows), ROWS_A_BATCH)]
    return [{name: torch.cat([row[name] for row in part]) for name in part[0]} for part in parts]


def _thresholds(tiers: str | None) -> tuple[float, float] | None:
    if tiers is None:
        return None
    try:
        first, second = map(float, tiers.split(","))
    except ValueError:
        raise InputError(f"tiers {tiers!r} are not two numbers: give t1,t2 such as 0.001,0.01") from None
    return first, second


def _shares(recovered: list[str]) -> dict[str, float]:
    """Treatments with the share that each won back."""
    found = {}
    for each in recovered:
        how, _, share = each.partition("=")
        try:
            found[how] = float(share)
        except ValueError:
            raise InputError(f"recovered {each!r} is no treatment with a share: give b2b=0.73, say") from None
    return found


def _workload(
    model: Any,
    ranks: list[int],
    probe: Path | None,
    alpha: float | None,
    beta: float | None,
    step_ms: float | None,
    step_tokens: int,
) -> Workload | None:
    """What a step costs by the link that was probed or typed; None where neither was."""
    from elision import spd
    from elision.blocks import decoder
    from elision.spd.costs import Link

    if probe is None and alpha is None and beta is None:
        if step_ms is not None:
            raise InputError("step-ms is given without a link: give --probe, or --alpha and --beta")
        if step_tokens != 1:
            raise InputError("step-tokens is given without a link: give --probe, or --alpha and --beta")
        return None
    if probe is not None:
        for name, value in (("alpha", alpha), ("beta", beta)):
            if value is not None:
                raise InputError(f"--{name} is given beside --probe, which says it itself: leave one out")
        found = files.read_json(probe, "probe")
        if not isinstance(found, dict) or not {"ranks", "alpha", "beta"} <= set(found):
            raise InputError(f"probe {probe} has no ranks, alpha and beta: write it with elision spd probe --out")
        link = Link(found["ranks"], found["alpha"], found["beta"])
    elif alpha is None or beta is None:
        raise InputError("one of alpha and beta is given: give both, or --probe")
    elif len(ranks) != 1:
        raise InputError(f"ranks {ranks} are several: a link has one number of ranks, give that")
    else:
        link = Link(ranks[0], alpha, beta)
    if step_ms is None:
        raise InputError("step-ms is not given: time a step with all syncs, with elision spd bench, and give it")
    view = decoder(model)
    return spd.Workload.of_model(view, link, tokens=step_tokens, step=step_ms / 1e3)


def _summary(plan: SyncPlan) -> dict[str, Any]:
    """The plan's outcome as JSON values."""
    from elision.spd.serving import served_by

    found: dict[str, Any] = {"ranks": plan.ranks}
    found |= {name: list(getattr(plan, name)) for name in ("dropped", "int8", "skipped", "healed")}
    found["healing"] = {str(block): how for block, how in plan.healing.items()}
    if plan.model is not None:
        found["served_by"] = list(served_by(plan.model, plan))
    if plan.verified is not None:
        found |= {name: getattr(plan.verified, name) for name in ("tokens", "predicted", "loss", "kl", "recovery")}
    return found


def _said(plan: SyncPlan, before: SyncPlan | None = None) -> str:
    """The plan's outcome in a sentence; `before` is what it was before it was carried out."""
    from elision.spd.serving import in_words, served_by

    layers = "" if plan.model is None else f" of {plan.model.layers}"
    blocks = "block drops its" if len(plan.dropped) == 1 and not layers else "blocks drop their"
    parts = [f"{len(plan.dropped)}{layers} {blocks} first sync on {plan.ranks} ranks"]
    for treated, one, many in (
        (plan.int8, "sends it in int8", "send it in int8"),
        (plan.skipped, "skips attention", "skip attention"),
        (plan.healing, "is to be healed", "are to be healed"),
    ):
        parts += [f"{len(treated)} {one if len(treated) == 1 else many}"] if treated else []
    if plan.model is not None:
        parts.append(f"served by {in_words(served_by(plan.model, plan))}")
    found = plan.verified
    if found is None:
        return ", ".join([*parts, "not verified, for no row of text was left over: give more text, or shorter rows"])
    cost = f"perplexity {100 * found.loss:+.2f}% on {found.tokens:,} held-out token{'' if found.tokens == 1 else 's'}"
    if plan.healing:  # what was predicted is of other weights than what was measured
        parts.append(f"{cost} before healing, {100 * found.predicted:+.2f}% expected after it")
    else:
        off = round(100 * (found.loss - found.predicted), 2)
        apart = f" ({abs(off):.2f} points {'more' if off > 0 else 'less'})" if off else ""
        parts.append(f"{cost} where {100 * found.predicted:+.2f}% was predicted{apart}")
    if (plan.healed or plan.corrections) and found.recovery is not None:
        parts.append(f"{100 * found.recovery:.0f}% of the loss recovered{_assumed(before)}")
    return ", ".join(parts)


def _assumed(plan: SyncPlan | None) -> str:
    """What was expected to be recovered by what `plan` says is to be done."""
    if plan is None or plan.calibration is None or plan.calibration.recovered is None or not plan.healing:
        return ""
    from elision.spd.planner import recoveries

    shares = recoveries(plan.calibration.recovered)
    assumed = [f"{100 * shares[how]:.0f}% by {how}" for how in sorted(set(plan.healing.values()))]
    return f" where {', '.join(assumed)} was assumed"
