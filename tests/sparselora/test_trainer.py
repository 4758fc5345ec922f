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
from transformers import Trainer, TrainingArguments, default_data_collator

from elision.sparselora import SparsityPlan, keep_labels, sparsify
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


def trainer(model: Any, handle: Any, folder: Path, parts: dict[str, Any] | None = None, **settings: Any) -> Trainer:
    """`parts` are the Trainer's own arguments, `settings` those of TrainingArguments."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", "max_steps": 10, **settings},
    )
    callbacks = [handle.schedule] if handle is not None else []
    data = {"train_dataset": rows(16), "eval_dataset": rows(4)}
    return Trainer(model, arguments, callbacks=callbacks, **data, **(parts or {}))  # type: ignore[arg-type]


def test_a_run_says_once_what_is_sparse_what_is_dense_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.lora(dtype=torch.float32)
    expected = (
        "SparseLoRA, oracle selection: ffn 50% in 0-1; qk 50% in 0-1; vo 50% in 0-1; dense: output tokens, the first "
        "30% of steps, adapters, eval and generate; on the fast path"
    )

    def said() -> list[str]:
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("SparseLoRA")]

    with sparsify(model, tiny.plan(model, dense_steps=0.3)) as handle:
        run = trainer(model, handle, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2)
        run.train()
        assert said() == [expected]
        run.evaluate()
        assert said() == []
        run.train()
        assert len(said()) == 1
    with sparsify(model, tiny.plan(model, dense_steps=0.3)) as handle:  # a loop of one's own
        model.train()
        for step in range(2):
            handle.step(step / 2)
            model(**{name: t[None] for name, t in rows(1)[0].items()})
        assert said() == [expected]
    with sparsify(model, tiny.plan(model)) as handle:
        model(**{name: t[None] for name, t in rows(1)[0].items()})
        assert said() == []  # no run began
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
        handle.step(0.0)
        model(**{name: t[None] for name, t in rows(1)[0].items()})
        assert said() == []  # another process says it


def test_a_program_that_logs_gets_the_line_in_its_log(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.lora(dtype=torch.float32)
    with sparsify(model, tiny.plan(model)) as handle, caplog.at_level("INFO", "elision"):
        handle.step(0.0)
        model(**{name: t[None] for name, t in rows(1)[0].items()})
        assert [record.getMessage()[:10] for record in caplog.records] == ["SparseLoRA"]
    assert capsys.readouterr().err == ""


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


def trained(folder: Path, path: Any, parts: dict[str, Any] | None = None, **settings: Any) -> tuple[list[float], Any]:
    """Losses and handle of a short run, the first of its steps dense."""
    model = tiny.lora(dtype=torch.float32)
    with sparsify(model, tiny.plan(model, 0.6, dense_steps=0.25), path=path) as handle:
        run = trainer(model, handle, folder, parts, **{"max_steps": 4, **settings})
        run.train()
    return losses(run), handle


def test_the_fast_path_with_accumulation_trains_as_the_reference_does(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2}
    expected, _ = trained(tmp_path, "reference", **settings)
    found, handle = trained(tmp_path, "fast", **settings)
    assert found == pytest.approx(expected, rel=1e-5)
    assert handle.paths == {"fast": 8} and handle.forwards == {"dense (first steps)": 2, "sparse": 6}


def cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Of the model itself, as a loss function of a user's own."""
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


ALL_LOGITS = "fast, with all logits (no labels in the call)"


def test_a_loss_function_of_ones_own(tmp_path: Path) -> None:
    """The trainer keeps the labels, so the model gives logits; `keep_labels` tells tokens apart all the same."""
    expected, _ = trained(tmp_path, "fast", gradient_accumulation_steps=2)
    parts = {"compute_loss_func": cross_entropy, "data_collator": keep_labels(default_data_collator)}
    for path, paths in (("auto", {ALL_LOGITS: 8}), ("reference", {})):
        found, handle = trained(tmp_path, path, parts, gradient_accumulation_steps=2)
        assert found == pytest.approx(expected, rel=1e-5)
        assert handle.paths == paths and handle.forwards["sparse"] == 6


def test_label_smoothing(tmp_path: Path) -> None:
    parts = {"data_collator": keep_labels(default_data_collator)}
    expected, _ = trained(tmp_path, "reference", parts, label_smoothing_factor=0.2)
    found, handle = trained(tmp_path, "auto", parts, label_smoothing_factor=0.2)
    assert found == pytest.approx(expected, rel=1e-5)
    assert handle.paths == {ALL_LOGITS: 4} and handle.forwards == {"dense (first steps)": 1, "sparse": 3}
    plain, _ = trained(tmp_path, "reference")
    assert found != pytest.approx(plain, rel=1e-2)


def test_noise_on_the_embeddings_takes_the_reference(tmp_path: Path) -> None:
    """NEFTune scales its noise by the length that it sees: without padding it would be another one."""
    found, handle = trained(tmp_path, "auto", neftune_noise_alpha=5.0)
    expected, _ = trained(tmp_path, "reference", neftune_noise_alpha=5.0)
    assert found == expected
    assert handle.paths == {"reference (NEFTune noise, whose size goes by the padded length)": 4}


def test_a_loss_without_labels_in_the_call_is_dense_and_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="dense where a training call has no labels: give the Trainer data_collator="):
        _, handle = trained(tmp_path, "auto", label_smoothing_factor=0.2)
    assert handle.forwards == {"dense (no labels in the call)": 4}


def test_metrics_are_those_of_the_dense_model(tmp_path: Path) -> None:
    def accuracy(prediction: Any) -> dict[str, float]:
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": float(right.mean()), "mean": float(prediction.predictions.mean())}

    model, found = tiny.lora(dtype=torch.float32), []
    parts = {"compute_metrics": accuracy, "data_collator": keep_labels(default_data_collator)}
    found.append(trainer(model, None, tmp_path, parts).evaluate())
    with sparsify(model, tiny.plan(model), path="fast") as handle:
        found.append(trainer(model, handle, tmp_path, parts).evaluate())
        assert handle.forwards == {"dense (eval mode)": 1} and handle.paths == {}
    for name in ("eval_loss", "eval_accuracy", "eval_mean"):
        assert found[0][name] == found[1][name]


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


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("restore", [False, True], ids=["", "callbacks restored"])
def test_resuming_in_the_middle_of_the_schedule(tmp_path: Path, restore: bool, path: Any) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": restore}

    def run(folder: Path, resume: str | None = None, **more: Any) -> tuple[Trainer, Any]:
        model = tiny.lora(dtype=torch.float32)
        plan = tiny.plan(model, dense_steps=0.3, selection="random" if restore else "oracle")
        with sparsify(model, plan, path=path) as handle:
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
        assert tiny.bits(resumed.model) == tiny.bits(whole.model)  # type: ignore[arg-type]


PLAIN = """
import sys, warnings, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
torch.set_num_threads(int(sys.argv[2]))
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
    words = [str(tmp_path), str(torch.get_num_threads())]  # which share out the additions of a product
    done = subprocess.run([sys.executable, "-c", PLAIN, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model.eval()(torch.arange(3, 12)[None]).logits
        untrained = tiny.lora(dtype=torch.float32).eval()(torch.arange(3, 12)[None]).logits
    one, two = torch.load(tmp_path / "logits.pt")
    assert torch.equal(one, expected)
    assert torch.allclose(two, expected, atol=1e-4)
    assert not torch.allclose(one, untrained, atol=1e-2)  # it had learnt something
