"""`elision sparselora calibrate`, `presets` and `bench`: plans made, listed and timed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elision.cli.common import Model, load, show

if TYPE_CHECKING:
    from torch import Tensor

    from elision.sparselora import SparsityPlan

Data = Annotated[Path, typer.Option(help=".json or .jsonl of prompts and answers.")]
Rows = Annotated[int, typer.Option(min=1, help="Rows of the data at most, evenly spaced.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows at a time.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens a row at most.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


def calibrate(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Where the plan goes; what was measured is kept beside it.")],
    flops: Annotated[float | None, typer.Option(help="Share of dense LoRA's operations that a run may cost.")] = None,
    time: Annotated[float | None, typer.Option(help="Share of its time instead; steps are timed here.")] = None,
    max_loss: Annotated[float | None, typer.Option(help="Or allowed perplexity increase; 0.01 is one percent.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="PEFT adapter that had the dense first steps; by default the bare model.")
    ] = None,
    selection: Annotated[str | None, typer.Option(help="How channels are chosen; by default as plans do.")] = None,
    dense_steps: Annotated[float, typer.Option(help="Share of the steps that will be dense.")] = 0.05,
    rows: Rows = 32,
    batch: Batch = 8,
    max_length: Length = 512,
    dtype: Dtype = "float32",
    stream: Annotated[bool, typer.Option(help="Leave the layers on disk: for models larger than memory.")] = False,
) -> None:
    """Measure on your data what each layer can spare, and plan within one budget; a rerun resumes."""
    from elision import sparselora
    from elision.errors import InputError

    if stream and (adapter is not None or time is not None):
        raise InputError("--stream goes without --adapter and --time: a model on disk cannot be trained")
    loaded, batches = _load(model, data, rows, batch, max_length, dtype, stream)
    if adapter is not None:
        loaded = _with_adapter(loaded, adapter)
    elif time is not None:
        from elision.sparselora.train import Settings, add_adapter

        loaded = add_adapter(loaded, Settings(steps=1))
    settings: dict[str, Any] = {"dense_steps": dense_steps} | ({} if selection is None else {"selection": selection})
    if selection == "whitened":
        factors = sparselora.Factors.whitened(loaded, batches)
        typer.echo(f"factors: {factors.save(out.with_suffix('.factors'))}")
        settings["factors"] = factors
    journal = out.with_name(f"{out.name}.journal")
    plan = sparselora.calibrate(loaded, batches, flops=flops, time=time, max_loss=max_loss, state=journal, **settings)
    plan.save(out)
    found = plan.calibration
    assert found is not None
    typer.echo(plan.describe())
    typer.echo(
        f"loss {found.loss:.4f} per output token, {found.measured_increase:+.4f} under the plan "
        f"({found.expected_increase:+.4f} by the curves)"
    )
    typer.echo(sparselora.forecast(loaded, batches, plan).line())
    typer.echo(f"plan: {out}")


def presets(as_json: Json = False) -> None:
    """List the paper's plans; `--plan NAME` of the other commands takes them."""
    from elision.sparselora import SparsityPlan, presets

    plans = {name: SparsityPlan.preset(name) for name in presets.names()}
    show({name: plan.to_dict() if as_json else plan.describe() for name, plan in plans.items()}, as_json)


def bench(
    model: Model,
    data: Data,
    plan: Annotated[str | None, typer.Option(help="File of a plan, or a preset's name.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="One sparsity for all layers instead.")] = None,
    turns: Annotated[int, typer.Option(min=1, help="Timed steps of each variant, in turns.")] = 5,
    rows: Rows = 8,
    batch: Batch = 8,
    max_length: Length = 512,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Time real fine-tuning steps on your data: LoRA, LoRA without what is lossless to leave out, and the plan."""
    from elision.errors import InputError
    from elision.sparselora import SparsityPlan, forecast
    from elision.sparselora.stopwatch import measure
    from elision.sparselora.train import Settings, add_adapter

    if (plan is None) == (sparsity is None):
        raise InputError("give either --plan or --sparsity: one of them says what to leave out")
    known = None if plan is None else named_plan(plan)
    loaded, batches = _load(model, data, rows, batch, max_length, dtype)
    wanted = known or SparsityPlan.uniform(loaded, sparsity or 0.0)
    loaded = add_adapter(loaded, Settings(steps=1))
    told = forecast(loaded, batches, wanted)
    found = measure(loaded, batches, wanted, turns)
    values = {"forecast": told.line(), **{f"{name}, seconds a step": round(s, 4) for name, s in found.items()}}
    over = {f"{name}, over LoRA": round(found["LoRA"] / s, 3) for name, s in found.items() if name != "LoRA"}
    show(values | over, as_json)


def named_plan(name: str) -> SparsityPlan:
    """The plan of a file, or the preset of that name where there is no such file."""
    from elision.sparselora import SparsityPlan, presets

    return SparsityPlan.preset(name) if not Path(name).exists() and name in presets.names() else SparsityPlan.load(name)


def _load(
    model: str, data: Path, rows: int, batch: int, max_length: int, dtype: str, stream: bool = False
) -> tuple[Any, list[dict[str, Tensor]]]:
    """A model, and batches of rows spread over a file of prompts and answers."""
    from elision.data import collate, encode, load_examples

    examples = load_examples(data)
    if stream:
        from elision.streaming import load_streamed

        loaded, tokenizer = load_streamed(model, dtype)
    else:
        loaded, tokenizer = load(model, dtype)
    encoded = encode(tokenizer, examples[:: max(1, len(examples) // rows)][:rows], max_length)
    return loaded, [collate(encoded[i : i + batch], tokenizer.pad_token_id) for i in range(0, len(encoded), batch)]


def _with_adapter(model: Any, path: Path) -> Any:
    """`model` with the adapter of `path` beside it, unmerged: its branch stays dense while the base is sparse."""
    from peft import PeftModel

    from elision.errors import InputError

    if not (path / "adapter_config.json").is_file():
        raise InputError(f"adapter {path} holds no adapter_config.json: give the directory of a PEFT adapter")
    try:
        return PeftModel.from_pretrained(model, str(path), is_trainable=True)
    except Exception as error:  # peft raises what its config, safetensors and torch raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"adapter {path} does not fit the model ({reason}): give the one made for it") from error
