"""`elision eval`: what a model, a plan or an adapter is worth, and whether the difference is real."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elision.cli.common import (
    DryRun,
    Dtype,
    Json,
    Model,
    Rows,
    RunDirectory,
    Tokens,
    device,
    load,
    run_directory,
    show,
    warn,
)
from elision.errors import InputError

if TYPE_CHECKING:
    from elision.evaluate import Interval

ADAPTER = "adapter_config.json"  # PEFT's
SAMPLE = 100_000  # characters of a text on which two tokenizers are compared


def evaluate(
    ctx: typer.Context,
    model: Model,
    text: Annotated[
        list[Path] | None, typer.Option(help="Plain text for perplexity; rows of several files are taken in turn.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help=".json or .jsonl of prompts and answers, for exact match.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Task of lm-evaluation-harness or elision_*; several times if need be.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="SPD plan: score what its ranks would compute.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="PEFT adapter to merge into the model first.")] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Baseline, or another adapter of MODEL; by default MODEL, if changed."),
    ] = None,
    rows: Rows = 32,
    tokens: Tokens = 512,
    limit: Annotated[int | None, typer.Option(min=2, help="Documents a task, and problems of --data, at most.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Solved examples before a task's documents.")] = None,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer to --data at most.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Rows, problems or documents at once.")] = 8,
    include: Annotated[Path | None, typer.Option(help="Directory with .yaml task files of yours.")] = None,
    dtype: Dtype = "float32",
    run: RunDirectory = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Score a model on text, answers or tasks, with an SPD plan or a PEFT adapter if given.

    Every number has a 95% interval. With --plan, --adapter or --against the
    same is measured on a baseline, and every difference is paired on the same
    rows or documents: an interval that holds 0 cannot tell the two apart. On
    text, KL and top-1 agreement with the baseline are given too.

    \b
    Examples:
      elision eval reference --text notes.txt
      elision eval reference --text notes.txt --plan plan.json
      elision eval reference --adapter adapter --data test.jsonl --answer-tokens 64
      elision eval reference --adapter sparse --against lora --data test.jsonl
      elision eval reference --plan plan.json --tasks elision_word_problems --limit 200
    """
    from elision import evaluate
    from elision.data import load_examples, text_batches
    from elision.families import check_positions
    from elision.loading import load_texts

    if text is None and data is None and not tasks:
        raise InputError("nothing to score: give --text, --data or --tasks")
    for name, value in (("include", include), ("shots", shots)):
        if value is not None and not tasks:
            raise InputError(f"--{name} is given without --tasks, which alone uses it: name some, or leave it out")
    if limit is not None and data is None and not tasks:
        raise InputError("--limit is given without --data or --tasks, which alone use it: of --text, give --rows")
    if include is not None and not include.is_dir():
        raise InputError(f"--include {include} is no directory: give one with lm-evaluation-harness's .yaml files")
    texts = None if text is None else load_texts(text)
    examples = None if data is None else load_examples(data, warn)[:limit]
    with (
        _changed(model, plan, adapter, dtype) as (changed, tokenizer),
        _baseline(model, plan, adapter, against, dtype) as (base, other),
    ):
        if other is not None and against is not None:
            _check_pair(model, tokenizer, against, other, _sample(texts, examples))
        for scored in (changed, base) if texts is not None else ():
            check_positions(getattr(scored, "config", None), tokens, "a row of --tokens")
        batches = None if texts is None else text_batches(tokenizer, texts, tokens, batch, limit=rows, in_turn=True)
        if batches is not None and base is not None:
            evaluate.check_vocabularies(changed, base)
        if dry_run:
            show(_estimate(changed, base, batches, examples, tasks), as_json)
            return
        for scored, name in ((changed, adapter or model), (base, against or model)):
            if scored is not None:
                _check_finite(scored, str(name))
        with run_directory(ctx, run) as kept:
            found = []
            if batches is not None:
                found += _text(changed, base, batches)
            if examples is not None:
                found += _answers(changed, base, tokenizer, examples, answer_tokens, batch)
            if tasks:
                found += _tasks(changed, base, tokenizer, tasks, limit, batch, shots, include)
            for row in found:
                kept.metric(**row)
            kept.finish(evaluation=found)
    first = next((row for row in found if row["metric"] == "perplexity"), None)
    summary = {} if first is None else {"perplexity": first["value"], "tokens": first["count"]}
    show({**summary, "scores": found}, as_json, _lines(found))


@contextmanager
def _changed(source: str, plan: Path | None, adapter: Path | None, dtype: str) -> Iterator[tuple[Any, Any]]:
    """The model to be scored with its tokenizer: merged, simulated, or a checkpoint with the plan that it carries."""
    from contextlib import nullcontext

    from huggingface_hub import snapshot_download

    from elision import spd
    from elision.families import load_config, model_path
    from elision.files import read_json
    from elision.loading import load_adapter, load_tokenizer, named_dtype

    planned = None if plan is None else spd.SyncPlan.load(plan)
    if planned is not None and not planned.original_weights:
        raise InputError(
            f"plan {plan} is of a healed checkpoint, whose weights belong to it: give that, without --plan"
        )
    directory = Path(model_path(source))
    if not directory.is_dir() and hasattr(load_config(source), "spd_plan"):
        directory = Path(snapshot_download(source))
    config = directory / "config.json"
    if config.is_file() and isinstance(values := read_json(config, "model config"), dict) and "spd_plan" in values:
        if planned is not None or adapter is not None:
            raise InputError(f"{source} carries its plan: leave --plan and --adapter out, or give the original")
        treated = spd.read(directory, dtype=named_dtype(dtype))
        placed: Any = treated.model
        with treated.simulate():
            yield placed.to(device()).eval(), load_tokenizer(str(directory))
        return
    loaded, tokenizer = load(source, dtype)
    if adapter is not None:
        loaded = load_adapter(loaded, adapter)
    with nullcontext() if planned is None else spd.simulate(loaded, planned):
        yield loaded, tokenizer


@contextmanager
def _baseline(
    source: str, plan: Path | None, adapter: Path | None, against: str | None, dtype: str
) -> Iterator[tuple[Any, Any]]:
    """The model that differences are taken to, under the plan that it may carry, and its tokenizer; else two None."""
    if against is None and plan is None and adapter is None:
        yield None, None
        return
    other = None if against is None else Path(against).expanduser()
    adapted = other is not None and (other / ADAPTER).is_file() and not (other / "config.json").is_file()
    with _changed(source, None, other, dtype) if adapted else _changed(against or source, None, None, dtype) as found:
        yield found


def _sample(texts: list[str] | None, examples: list[Any] | None) -> list[str]:
    """Some of what is scored, and a line that most tokenizers read each in their own way, for the tasks."""
    own = [*(text[:SAMPLE] for text in texts or ()), *(example.prompt for example in examples or ())]
    return ["Don't  pay 1,234.50 for\n\tcaf\u00e9s_inCamelCase!", *own]


def _check_pair(source: str, tokenizer: Any, against: str, other: Any, sample: list[str]) -> None:
    """Both models are given the tokens of the first one's tokenizer, which to another are other words."""
    same = tokenizer.get_vocab() == other.get_vocab()
    if not same or any(tokenizer.encode(text) != other.encode(text) for text in sample):
        raise InputError(
            f"{source} and --against {against} have different tokenizers, so the same text is other tokens to each: "
            "score each alone, or give a baseline of the same tokenizer"
        )


def _check_finite(model: Any, name: str) -> None:
    """Refuse, on the vocabulary's first tokens, a model whose predictions are no numbers."""
    import torch

    from elision import evaluate

    tokens = torch.arange(min(8, model.config.get_text_config().vocab_size))
    _finite(evaluate.loss(model, [{"input_ids": tokens[None]}]), f"the loss of {name}")


def _finite(value: float, what: str) -> float:
    """`value`, which nothing can be compared with where it is no number."""
    if not math.isfinite(value):
        raise InputError(f"{what} is {value}: weights or an adapter diverged, or need another --dtype (float32)")
    return value


def _text(model: Any, base: Any, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from elision import evaluate
    from elision.progress import progress

    def advancing() -> Iterator[dict[str, Any]]:
        for batch in batches:
            yield batch
            advance(1)

    with progress("reading", len(batches) * (1 if base is None else 4)) as advance:
        own = evaluate.row_losses(model, advancing())
        count = sum(row.tokens for row in own)
        rows = [_row("text", "perplexity", evaluate.perplexity_interval(own), count, better="lower")]
        if base is not None:
            other = evaluate.row_losses(base, advancing())
            rows[0] |= {"baseline": _finite(evaluate.perplexity_interval(other).value, "the baseline's perplexity")}
            rows[0] |= {"change": _bounds(evaluate.perplexity_change(own, other)), "relative": True}
            apart = evaluate.divergence(model, base, advancing())
            advance(len(batches))
            rows.append(_row("text", "KL to the baseline, nats", apart.kl, count, better="lower"))
            rows.append(_row("text", "top-1 agreement with the baseline", apart.agreement, count))
    return rows


def _answers(
    model: Any, base: Any, tokenizer: Any, examples: list[Any], answer_tokens: int, batch: int
) -> list[dict[str, Any]]:
    from elision import evaluate
    from elision.progress import progress

    def correct(scored: Any) -> list[int]:
        prompts = [example.prompt for example in examples]
        given = evaluate.answers(scored, tokenizer, prompts, answer_tokens, rows=batch, advance=advance)
        pairs = zip(given, examples, strict=True)
        return [int(evaluate.exact_match(text, example.answer)) for text, example in pairs]

    with progress("answering", len(examples) * (1 if base is None else 2)) as advance:
        own = correct(model)
        row = _row("data", "exact match", evaluate.accuracy(own), len(own))
        if base is not None:
            other = correct(base)
            row |= {"baseline": sum(other) / len(other)}
            row |= {"change": _bounds(evaluate.paired_difference(own, other)) if len(own) > 1 else None}
    return [row]


def _tasks(model: Any, base: Any, tokenizer: Any, tasks: list[str], *settings: Any) -> list[dict[str, Any]]:
    from elision import harness

    limit, batch, shots, include = settings
    options = {"limit": limit, "batch": batch, "shots": shots, "include": include}
    own = harness.run(model, tokenizer, tasks, **options)
    other = [None] * len(own) if base is None else harness.run(base, tokenizer, tasks, **options)
    rows = []
    for score, before in zip(own, other, strict=True):
        better = "higher" if score.higher_is_better else "lower"
        rows.append(_row(score.task, score.metric, score.value, score.count, better=better))
        if before is not None:
            change = harness.difference(score, before)
            baseline = _finite(before.value.value, f"the baseline's {score.metric} on {score.task}")
            rows[-1] |= {"baseline": baseline, "change": None if change is None else _bounds(change)}
    return rows


def _estimate(model: Any, base: Any, batches: Any, examples: Any, tasks: Any) -> dict[str, Any]:
    """What a dry run says: how much would be read and answered, the memory of the weights, the time of the text."""
    import time

    from elision import evaluate
    from elision.cli.estimates import weights_mb

    models = [model] if base is None else [model, base]
    found: dict[str, Any] = {"models": len(models)}
    found["weights_mb"] = weights_mb(models)
    if batches is not None:
        started = time.perf_counter()
        evaluate.loss(model, [{name: value[:1] for name, value in batches[0].items()}])
        row = time.perf_counter() - started
        count = sum(len(batch["input_ids"]) for batch in batches)
        found |= {"text_rows": count, "text_seconds": round(row * count * (1 if base is None else 4), 1)}
    if examples is not None:
        found["answers"] = len(examples) * len(models)
    if tasks:
        found["tasks"] = list(tasks)
    return found


def _row(task: str, metric: str, value: Interval, count: int, better: str = "higher") -> dict[str, Any]:
    _finite(value.value, f"{metric} on {task}")
    return {"task": task, "metric": metric, **_bounds(value), "count": count, "better": better}


def _bounds(found: Interval) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in found._asdict().items()}


def _lines(found: list[dict[str, Any]]) -> str:
    """One line a metric; the wide table is the report's."""
    from elision.report import verdict
    from elision.report.results import Measure

    lines = []
    for is_ in map(Measure.model_validate, found):
        said = f"{is_.metric} on {is_.task}: {is_.value:.4f}"
        if is_.low is not None and is_.high is not None:
            said += f" (95% interval {is_.low:.4f} to {is_.high:.4f}, of {is_.count:,})"
        if is_.baseline is not None:
            said += f"; baseline {is_.baseline:.4f}"
        if (change := is_.change) is not None:
            interval = f"95% interval {verdict.bounds(change, is_.relative)}"
            said += f", change {verdict.difference(change.value, is_.relative)} ({interval}): {verdict.judged(is_)}"
        lines.append(said)
    return "\n".join(lines)
