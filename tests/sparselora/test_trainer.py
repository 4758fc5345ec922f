"""transformers' Trainer on a sparse PEFT model: the schedule, resuming, and what it leaves behind."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from elision.sparselora import SparsityPlan, sparsify
from tests.sparselora import tiny

# What PEFT 0.21 and transformers 5.23 say about each other.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def rows(count: int) -> list[dict[str, Tensor]]:
    """Rows of one length with prompts of several."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for row in range(count):
        ids = torch.randint(3, tiny.VOCABULARY, (10,), generator=generator)
        labels = ids.clone()
        labels[: 4 + row % 4] = -100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def trainer(model: Any, handle: Any, folder: Path, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        max_steps=10,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", **settings},
    )
    callbacks = [handle.schedule] if handle is not None else []
    return Trainer(model, arguments, train_dataset=rows(16), eval_dataset=rows(4), callbacks=callbacks)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_the_schedule_evaluation_and_accumulation(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 5, "gradient_accumulation_steps": 2}
    dense = trainer(tiny.lora(dtype=torch.float32), None, tmp_path, **settings)
    dense.train()
    model = tiny.lora(dtype=torch.float32)
    with sparsify(model, tiny.plan(model, 0.75, dense_steps=0.3), path="reference") as handle:  # to the last bit
        run = trainer(model, handle, tmp_path, **settings)
        run.train()
        # 10 steps of 2 micro-batches, the first 3 dense; 2 evaluations of 4 rows at 8 a batch
        assert handle.forwards == {"dense (first steps)": 6, "sparse": 14, "dense (eval mode)": 2}
        while_sparse = run.evaluate()["eval_loss"]
    assert run.evaluate()["eval_loss"] == while_sparse  # evaluation was dense
    assert losses(run)[:3] == losses(dense)[:3] and losses(run)[3] != losses(dense)[3]
    assert losses(run)[-1] < losses(run)[0]


def test_gradient_checkpointing_in_the_trainer(tmp_path: Path) -> None:
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    expected = None
    for settings in ({}, {name: True, f"{name}_kwargs": {"use_reentrant": False}}):
        model = tiny.lora(dtype=torch.float32)
        with sparsify(model, tiny.plan(model)) as handle:
            run = trainer(model, handle, tmp_path, **settings)
            run.train()
            assert handle.forwards == {"sparse": 10}
        expected = expected or losses(run)
        assert losses(run) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("restore", [False, True], ids=["", "callbacks restored"])
def test_resuming_in_the_middle_of_the_schedule(tmp_path: Path, restore: bool) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": restore}

    def run(folder: Path, resume: str | None = None, **more: Any) -> tuple[Trainer, Any]:
        model = tiny.lora(dtype=torch.float32)
        plan = tiny.plan(model, dense_steps=0.3, selection="random" if restore else "oracle")
        with sparsify(model, plan) as handle:
            found = trainer(model, handle, folder, **{**settings, **more})
            found.train(resume_from_checkpoint=resume)
        return found, handle

    whole, handle = run(tmp_path / "whole")
    assert handle.forwards == {"dense (first steps)": 3, "sparse": 7}
    for start, dense in ((2, 1), (6, 0)):
        resumed, handle = run(tmp_path / "resumed", str(tmp_path / "whole" / f"checkpoint-{start}"))
        assert (
            handle.forwards.get("dense (first steps)", 0) == dense and handle.forwards["sparse"] == 10 - start - dense
        )
        # the control draws by number of the forward, which travels with the schedule's state
        assert losses(resumed)[start:] == losses(whole)[start:]


PLAIN = """
import sys, warnings, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder + "/base"), folder + "/adapter").eval()
ids = torch.arange(3, 12)[None]
with torch.no_grad():
    one = model(ids).logits
    two = model.merge_and_unload()(ids).logits
assert "elision" not in sys.modules
torch.save((one, two), folder + "/logits.pt")
"""


def test_the_adapter_is_plain_peft_and_merges_without_us(tmp_path: Path) -> None:
    model = tiny.lora(dtype=torch.float32)
    model.get_base_model().config.use_cache = False
    base = tiny.base(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    with sparsify(model, SparsityPlan.uniform(model, 0.75)) as handle:
        trainer(model, handle, tmp_path).train()
        assert handle.forwards["sparse"] == 9  # 5% of 10 steps: the first is dense
        model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} <= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    done = subprocess.run([sys.executable, "-c", PLAIN, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model.eval()(torch.arange(3, 12)[None]).logits
        untrained = tiny.lora(dtype=torch.float32).eval()(torch.arange(3, 12)[None]).logits
    one, two = torch.load(tmp_path / "logits.pt")
    assert torch.equal(one, expected)
    assert torch.allclose(two, expected, atol=1e-4)
    assert not torch.allclose(one, untrained, atol=1e-2)  # it had learnt something
