"""Fine-tuning from prompts and answers to a plain PEFT adapter, with transformers' Trainer.

What `elision sparselora train` and the demo run. Anyone with a Trainer of their own needs `sparsify` alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elision import blocks, data, families, files
from elision.errors import InputError
from elision.evaluate import check_tokens
from elision.sparselora import sweep
from elision.sparselora.apply import sparsify
from elision.sparselora.factors import Factors
from elision.sparselora.plan import SparsityPlan

BOARDS = "TENSORBOARD_LOGGING_DIR"  # of transformers' integration


@dataclass(frozen=True)
class Settings:
    """Of one fine-tuning run; defaults are the paper's where it has one (maths: The paper's settings)."""

    steps: int
    batch: int = 8
    learning_rate: float = 3e-4
    rank: int = 32
    max_length: int = 512
    checkpoints: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rank", "max_length", "checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} is not at least 1: give a larger number")
        if not 0 < self.learning_rate < 1:
            raise InputError(f"learning_rate {self.learning_rate} is not between 0 and 1: 3e-4 is usual")


def add_adapter(model: Any, settings: Settings) -> Any:
    """A PEFT model around `model` with LoRA on Q, K, V and O, alpha twice the rank, seeded."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(settings.seed)
    block = blocks.decoder(model).blocks[0]
    targets = sorted({part.attribute for part in (block.q, block.k, block.v, block.o)})  # fused in some families
    return get_peft_model(
        model,
        LoraConfig(
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            target_modules=targets,
            task_type="CAUSAL_LM",
        ),
    )


def encode(
    model: Any, tokenizer: Any, examples: Sequence[data.Example | data.Problem], max_length: int
) -> list[dict[str, list[int]]]:
    """`data.encode`, in rows that `model` can read.

    Raises:
        InputError: as `data.encode` does, a token outside the model's vocabulary, or a row beyond its positions.
    """
    rows = data.encode(tokenizer, examples, max_length)
    ends = [end for row in rows for end in (min(row["input_ids"]), max(row["input_ids"]))]
    config = model.config.get_text_config()
    check_tokens(config.vocab_size, [*ends, tokenizer.pad_token_id or 0], "rows of the data")
    longest = max(len(row["input_ids"]) for row in rows)
    families.check_positions(config, longest, f"a row within max-length {max_length}")
    return rows


def check_alone() -> None:
    """Refuse, before any work, to be one of several processes: they would write one adapter and its checkpoints.

    Raises:
        InputError: torchrun or accelerate has started this process beside others.
    """
    if (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise InputError(
            f"training runs in {count} processes (WORLD_SIZE), and is made for one: start it without torchrun, or "
            "write a script with sparsify and Trainer (docs: Several GPUs)"
        )


def check_free(out: Path, name: str = "out", run: Path | None = None) -> None:
    """Refuse, before any work, a place that the adapter, once whole, cannot be moved to; `name` is the option's.

    Raises:
        InputError: `out` is not empty or cannot be replaced, or `run`, a run's directory, would be replaced with it.
    """
    if (out / "adapter_config.json").is_file():
        raise InputError(f"{name} {out} holds a finished adapter: delete it to train anew, or give another directory")
    if out.is_dir() and (out.samefile(".") or out.is_mount()):
        raise InputError(f"{name} {out} cannot be replaced by the adapter's directory: name a new one in it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{name} {out} is not empty: give a new directory")
    for place in (out.resolve(), _checkpoints(out)):
        if run is not None and run.resolve().is_relative_to(place):
            raise InputError(f"run {run} is inside of {place}, which goes when the adapter is whole: put it beside it")


def _checkpoints(out: Path) -> Path:
    """Where those of a training go until it is done."""
    out = out.resolve()
    return out.with_name(f"{out.name}.training")


def train(
    model: Any,
    tokenizer: Any,
    examples: Sequence[data.Example | data.Problem],
    plan: SparsityPlan | None,
    out: Path,
    settings: Settings,
    *,
    callbacks: Sequence[Any] = (),
    report_to: Sequence[str] = (),
    boards: Path | None = None,
    factors: Factors | None = None,
) -> list[dict[str, float]]:
    """Train the adapter of `model` and save it to `out`; resumes from the checkpoints of an interrupted run.

    Args:
        model: a PEFT model with a LoRA adapter.
        tokenizer: the model's.
        examples: what to learn; loss on the answers alone.
        plan: what to leave out; None trains plain LoRA.
        out: directory of the adapter. Checkpoints go beside it, into `<out>.training`, until training is done.
        settings: how long and how fast.
        callbacks: further TrainerCallbacks.
        report_to: of the Trainer's integrations, "tensorboard", "wandb" and "trackio", those that get its log.
        boards: directory of tensorboard's files; by default `<out>.tensorboard`.
        factors: of the plan's estimator; None: as `sparsify` has it.

    Returns:
        The log of the Trainer: dicts with "step" and "loss".

    Raises:
        InputError: one of several processes, `out` is not empty, nothing to train on, rows that the model cannot read,
            checkpoints of another run beside `out`, a `report_to` that is not installed, or what `sparsify` refuses.
    """
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    check_alone()
    check_free(out)
    rows = encode(model, tokenizer, examples, settings.max_length)
    out = out.resolve()
    work = _checkpoints(out)
    _check_identity(work, _identity(model, rows, plan, settings, factors))
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=settings.batch,
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(max(1, settings.steps // 25), settings.steps - 1),  # whose first step has the rate 0
        weight_decay=0.0,
        logging_steps=max(1, settings.steps // 15),
        save_steps=max(1, settings.steps // settings.checkpoints),
        save_total_limit=1,
        report_to=reporters(report_to),
        run_name=out.name,
        seed=settings.seed,
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=False,
    )
    _ = arguments.device  # which counts the GPUs
    arguments._n_gpu = min(1, arguments.n_gpu)  # of several, Trainer would make nn.DataParallel, which shares a handle
    handle = None if plan is None else sparsify(model, plan, factors)

    def batch(chosen: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        return data.collate(chosen, tokenizer.pad_token_id)

    try:
        with _tensorboard_in(boards or out.with_name(f"{out.name}.tensorboard")):
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_list(rows),
                data_collator=batch,
                callbacks=[*callbacks, *([] if handle is None else [handle.schedule])],
            )
        with files.disk_errors(work):
            trainer.train(resume_from_checkpoint=_last_checkpoint(work))
    finally:
        if handle is not None:
            handle.remove()
    whole = work / "adapter"  # a kill while it is written leaves no half adapter at `out`
    with files.disk_errors(whole):
        model.save_pretrained(str(whole))
    if out.is_dir():
        out.rmdir()
    whole.rename(out)
    shutil.rmtree(work, ignore_errors=True)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def reporters(names: Sequence[str]) -> list[str]:
    """`names` of integrations, after making sure that they are installed.

    Raises:
        InputError: one that is not, or is not known.
    """
    packages = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
    for name in names:
        if name not in packages:
            raise InputError(f"report-to {name!r} is not known: use {', '.join(packages)}")
        if not any(importlib.util.find_spec(package) for package in packages[name]):
            raise InputError(f"report-to {name} is not installed: pip install {packages[name][0]}")
    return list(names)


@contextmanager
def _tensorboard_in(place: Path) -> Iterator[None]:
    """Trainer's integration reads its directory from the environment when the Trainer is made; else checkpoints'."""
    before = os.environ.get(BOARDS)
    os.environ[BOARDS] = before or str(place)
    try:
        yield
    finally:
        if before is None:
            del os.environ[BOARDS]


def _identity(
    model: Any,
    rows: Sequence[dict[str, list[int]]],
    plan: SparsityPlan | None,
    settings: Settings,
    factors: Factors | None,
) -> dict[str, Any]:
    """What a run is made of: its checkpoints are of use to no other."""
    trained = [[name, list(p.shape), str(p.dtype)] for name, p in model.named_parameters() if p.requires_grad]
    told = {"data": rows, "plan": None if plan is None else plan.to_dict(), "adapter": trained}
    told["base"] = sweep.weights_of(blocks.decoder(model), model)
    hashed = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in told.items()}
    return {**asdict(settings), **hashed, "factors": None if factors is None else factors.digest}


def _check_identity(work: Path, identity: dict[str, Any]) -> None:
    """Raise InputError where `work` has checkpoints of another run; else note whose they will be."""
    if _last_checkpoint(work) is not None:
        found = files.read_json(work / "run.json", "run")
        if other := [name for name, value in identity.items() if found.get(name) != value]:
            raise InputError(
                f"{work} has checkpoints of a run with other {', '.join(other)}: run that again to finish it, or "
                "delete the directory"
            )
    files.write_json(work / "run.json", identity)


def _last_checkpoint(work: Path) -> str | None:
    """The newest whole checkpoint of an interrupted run; trainer_state.json, whole, is the last file of one."""
    found = sorted(work.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    return next((str(path.parent) for path in reversed(found) if _is_json(path)), None)


def _is_json(path: Path) -> bool:
    try:
        files.read_json(path, "state")
    except InputError:
        return False
    return True
