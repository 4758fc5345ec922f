"""Both methods on the embedded model, start to finish: `elision demo`.

    (a) fine-tune on a family of word problems that the model has never seen: LoRA, SparseLoRA, and SparseLoRA's two
        controls, "random channels" and "no context FFN", with the same seeds and data
    (b) calibrate SPD for 2, 4 and 8 ranks on the standard library's text, and score each plan on files held out of it
    (c) merge the SparseLoRA adapter into the model and calibrate that
    (d) write report.html

Every stage leaves its numbers in `stages/`, and training its checkpoints, so that an interrupted run goes on.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from elision import files, runs
from elision.errors import InputError
from elision.progress import progress

FAMILY = "bus"
TASK = (
    "Each problem tells, among the possessions of many people, how many people were in a bus, got on and got off, and "
    "asks how many are left. The model was never trained on this family; the test's numbers were held out as well."
)
TRAIN_PROBLEMS = 1040
TEST_PROBLEMS = 200
SWAPPED_PROBLEMS = 100  # of them, asked with another one's facts
BATCH = 16
LEARNING_RATE = 2e-3
CHECKPOINTS = 4  # per fine-tuning run
ANSWER_TOKENS = 36  # at most; a solution has about 25
RANKS = (2, 4, 8)
MAX_LOSS = 0.01
TEXT_ROWS, TEXT_TOKENS = 12, 384  # of calibration and of scoring, each
VARIANTS = {"LoRA": None, "SparseLoRA": "sampled", "random channels": "random", "no context FFN": "no-ffn"}

console = Console(highlight=False)


def run(out: Path, seed: int = 0, threads: int | None = None) -> Path:
    """Run or resume the demo in `out`; returns the path of its report.

    Raises:
        InputError: `out` holds the results of other settings.
    """
    import torch
    import transformers

    from elision import report
    from elision.reference_model import PATH

    if not (PATH / "model.safetensors").is_file():
        raise InputError(f"{PATH} holds no model.safetensors: install elision whole, or train it (its README says how)")
    if threads:
        torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings(
        "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
    )  # PEFT's, on transformers
    out = Path(out)
    options = {"seed": seed} | ({} if threads is None else {"threads": threads})
    with runs.opened(out, "demo", options) as kept:
        finetune = _finetune_all(kept, out, seed)
        merged = out / "adapters" / "sparselora"
        spd = [_spd(kept, out, "embedded model", None, seed), _spd(kept, out, "fine-tuned and merged", merged, seed)]
        seconds = sum(files.read_json(path, "stage")["seconds"] for path in (out / "stages").glob("*.json"))
        settings = {
            "model": "embedded reference model",
            "threads": torch.get_num_threads(),
            "date": time.strftime("%Y-%m-%d"),
            "command": f"elision demo --out {out} --seed {seed}",
            "seconds": round(seconds),
        }
        kept.finish(settings, finetune=finetune, spd=spd)
        page = report.write(out)
    for table in report.summary_tables(files.read_json(out / "results.json", "results")):
        console.print(table)
    console.print(f"\nThe whole story, with plots: [bold]{page.resolve()}[/bold]", soft_wrap=True)
    return page


def _stage(kept: runs.Run, out: Path, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `work`, from disk where it was done before; its numbers are metrics of the run."""
    path = out / "stages" / f"{name}.json"
    if path.exists():
        console.print(f"[dim]{name}: done before[/dim]")
        return files.read_json(path, "stage")["result"]
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    kept.metric(stage=name, **{key: value for key, value in result.items() if isinstance(value, int | float)})
    kept.log(f"{name}: {seconds:.0f} s")
    files.write_json(path, {"seconds": seconds, "result": result})
    return result


def _finetune_all(kept: runs.Run, out: Path, seed: int) -> dict[str, Any]:
    from elision import data, evaluate

    console.rule(f"Fine-tuning on {FAMILY!r}: LoRA, SparseLoRA and its controls")
    test = data.problems((FAMILY,), "test", TEST_PROBLEMS, seed)
    others = [*test[1:], test[0]]
    swapped = [problem.with_facts_of(other) for problem, other in zip(test, others, strict=True)][:SWAPPED_PROBLEMS]
    base = _stage(kept, out, "base", lambda: _score(None, test, swapped))
    variants = []
    for name in VARIANTS:
        slug = name.replace(" ", "-").lower()
        trained = _stage(kept, out, f"train-{slug}", lambda name=name, slug=slug: _finetune(out, name, slug, seed))
        scored = _stage(kept, out, f"score-{slug}", lambda slug=slug: _score(out / "adapters" / slug, test, swapped))
        variants.append({"name": name, **trained, **scored})
        console.print(f"{name}: {100 * scored['accuracy']:.1f}% of {len(test)} held-out problems")
    for variant in variants:
        variant["flops_ratio"] = variant["flops"] / variants[0]["flops"]
    correct = {variant["name"]: variant["correct"] for variant in variants}
    pairs = [("SparseLoRA", other) for other in VARIANTS if other != "SparseLoRA"]
    return {
        "family": FAMILY,
        "task": TASK,
        "train_problems": TRAIN_PROBLEMS,
        "test_problems": TEST_PROBLEMS,
        "majority_rate": data.majority_rate(test),
        "base_accuracy": base["accuracy"],
        "variants": variants,
        "paired": [
            {"a": a, "b": b, "difference": found.value, "low": found.low, "high": found.high}
            for a, b in pairs
            for found in [evaluate.paired_difference(correct[a], correct[b])]
        ],
        "plan": next(variant["plan"] for variant in variants if variant["name"] == "SparseLoRA"),
        "example": {
            "prompt": test[0].prompt,
            "expected": test[0].solution,
            "answers": {"before": base["first"], **{v["name"]: v["first"] for v in variants}},
        },
    }


def _finetune(out: Path, name: str, slug: str, seed: int) -> dict[str, Any]:
    """Train one variant, saving an ordinary PEFT adapter; returns losses, cost and time."""
    from elision import data, evaluate, reference_model
    from elision.sparselora import SparsityPlan
    from elision.sparselora.train import Settings, add_adapter, train

    console.print(f"\n[bold]{name}[/bold]")
    base, tokenizer = reference_model.load()
    steps = TRAIN_PROBLEMS // BATCH
    settings = Settings(steps, BATCH, LEARNING_RATE, checkpoints=CHECKPOINTS, seed=seed)
    model = add_adapter(base, settings)
    selection: Any = VARIANTS[name]
    plan = None if selection is None else SparsityPlan.default(model, selection=selection, seed=seed)
    journal = _Journal(model, plan, out / "journals" / f"train-{slug}.jsonl")
    examples = data.problems((FAMILY,), "train", TRAIN_PROBLEMS, seed)
    adapter = out / "adapters" / slug
    if adapter.exists():  # a kill came between it and its stage's file, and took the losses: train it anew
        for left in (adapter.with_name(f"{slug}.training"), adapter):
            shutil.rmtree(left, ignore_errors=True)
    log = train(model, tokenizer, examples, plan, adapter, settings, callbacks=[journal.callback()])
    held_out = data.encode(tokenizer, data.problems((FAMILY,), "test", TEST_PROBLEMS, seed))
    test = [data.collate(held_out[i : i + BATCH], None) for i in range(0, len(held_out), BATCH)]
    rows = journal.read()
    return {
        "losses": [[entry["step"], entry["loss"]] for entry in log],
        "test_loss": evaluate.loss(model, test),
        "flops": sum(row["flops"] for row in rows),
        "seconds": statistics.median(row["seconds"] for row in rows) * steps,
        "plan": None if plan is None else {"ffn": plan.ffn, "qk": plan.qk, "vo": plan.vo},
    }


class _Journal:
    """Seconds and operations of every optimizer step, on disk, so that they survive an interruption."""

    def __init__(self, model: Any, plan: Any, path: Path) -> None:
        from elision.sparselora import flops

        self.path = path
        self.plan = plan
        self.shape, self.adapters = flops.Shape.of(model), flops.adapters_of(model)
        self.batch: dict[str, Any] = {}
        self.padded = True
        model.register_forward_hook(self._see, with_kwargs=True)

    def _see(self, model: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self.batch = kwargs
        self.padded = output.logits is not None  # the fast step makes none, and computes no padding

    def _flops(self, done: float) -> float:
        """Of the batch at hand as it was computed; sparse after the dense first steps."""
        from elision.sparselora import flops, tokens

        kinds = tokens.classify(self.batch["labels"], self.batch["attention_mask"])
        plan = self.plan if self.plan is not None and done >= self.plan.dense_steps else None
        return flops.step(self.shape, flops.Workload.of(kinds, padded=self.padded), self.adapters, plan).total()

    def callback(self) -> Any:
        from transformers import TrainerCallback

        journal = self

        class Journal(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.started = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                seconds = time.perf_counter() - self.started
                row = {"step": state.global_step, "seconds": seconds}
                row["flops"] = journal._flops((state.global_step - 1) / state.max_steps)
                journal.path.parent.mkdir(parents=True, exist_ok=True)
                files.append_line(journal.path, json.dumps(row))

        return Journal()

    def read(self) -> list[dict[str, float]]:
        """One row per step; of a step that was run again after an interruption, the last. Torn lines are skipped."""
        rows = {}
        for line in files.whole_lines(self.path):
            row = json.loads(line)
            rows[row["step"]] = row
        return list(rows.values())


def _score(adapter: Path | None, test: list[Any], swapped: list[Any]) -> dict[str, Any]:
    """Accuracy on the test problems, and with every problem's facts exchanged for another's."""
    from peft import PeftModel

    from elision import evaluate, reference_model

    model, tokenizer = reference_model.load()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with progress("answering", len(test) + len(swapped)) as advance:
        given = evaluate.answers(model, tokenizer, [p.prompt for p in test], ANSWER_TOKENS, advance=advance)
        misled = evaluate.answers(model, tokenizer, [p.prompt for p in swapped], ANSWER_TOKENS, advance=advance)
    correct = [int(evaluate.final_answer(text) == p.answer) for text, p in zip(given, test, strict=True)]
    interval = evaluate.accuracy(correct)
    return {
        "accuracy": interval.value,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "swapped_accuracy": statistics.fmean(
            evaluate.final_answer(text) == p.answer for text, p in zip(misled, swapped, strict=True)
        ),
        "correct": correct,
        "first": given[0],
    }


def _text(tokenizer: Any, split: Literal["train", "test"], seed: int) -> list[dict[str, Any]]:
    """Rows of the running Python's standard library, files drawn by seed."""
    from elision import data
    from elision.reference_model.corpus import library_texts

    texts = library_texts(split)
    random.Random(seed).shuffle(texts)
    return data.text_batches(tokenizer, texts, TEXT_TOKENS, limit=TEXT_ROWS)


def _spd(kept: runs.Run, out: Path, name: str, adapter: Path | None, seed: int) -> dict[str, Any]:
    """Calibrate SPD for each number of ranks and score its drops on text that it was not calibrated on."""
    from peft import PeftModel

    from elision import reference_model, spd

    console.rule(f"Sync-point drop: {name}")
    model: Any
    model, tokenizer = reference_model.load()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    calibration, held_out = _text(tokenizer, "train", seed), _text(tokenizer, "test", seed)
    slug = name.replace(" ", "-")

    def measure(ranks: int) -> dict[str, Any]:
        plan = spd.calibrate(
            model, calibration, ranks, max_loss=MAX_LOSS, state=out / "journals" / f"{slug}-{ranks}.json"
        )
        plan.save(out / "plans" / f"{slug}-{ranks}-ranks.json")
        found = plan.calibration
        assert found is not None and found.perplexities is not None
        scored = spd.curve(model, held_out, ranks, found.order, state=out / "journals" / f"{slug}-{ranks}.json")
        return {
            "ranks": ranks,
            "sensitivities": [100 * value / found.perplexities[0] for value in found.sensitivities],
            "order": list(found.order),
            "perplexities": list(scored),
            "chosen": len(plan.dropped),
            "max_loss": MAX_LOSS,
        }

    ranks = [_stage(kept, out, f"spd-{slug}-{n}", lambda n=n: measure(n)) for n in RANKS]
    return {
        "model": name,
        "text": "the Python standard library, files held out of training and calibration",
        "tokens": TEXT_ROWS * TEXT_TOKENS,
        "dense_perplexity": ranks[0]["perplexities"][0],
        "ranks": ranks,
    }
