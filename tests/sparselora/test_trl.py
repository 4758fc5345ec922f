"""TRL's trainers, which put a forward of their own over the model's and read hidden states: sparse, and fast."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from elision.sparselora import keep_labels, sparsify
from tests.sparselora import tiny
from tests.sparselora.test_trainer import cross_entropy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what TRL says of itself while it is imported
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

pytestmark = [
    # What TRL 1.16, PEFT 0.21 and transformers 5.23 say of each other.
    pytest.mark.filterwarnings("ignore:`\\w*gradient_checkpointing\\w*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]
STEPS = 4
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token of the tiny models."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tiny.VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")


def words(count: int, generator: torch.Generator) -> str:
    return " ".join(f"w{i}" for i in torch.randint(3, tiny.VOCABULARY, (count,), generator=generator).tolist())


def rows(answers: tuple[str, ...]) -> Dataset:
    """Prompts of several lengths, each with these answers."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for row in range(2 * STEPS):
        asked = {"prompt": words(4 + row % 3, generator)}
        found.append({**asked, **{name: " " + words(2 + (row + i) % 4, generator) for i, name in enumerate(answers)}})
    return Dataset.from_list(found)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(folder: Path, path: Any, first: bool = True, **settings: Any) -> tuple[Any, Any]:
    """A run of SFTTrainer and its handle; `first`: sparsify comes before the trainer."""
    model = tiny.lora(dtype=torch.float32)
    arguments = SFTConfig(output_dir=str(folder), **{**COMMON, **settings})

    def made(**more: Any) -> Any:
        return SFTTrainer(model, arguments, train_dataset=rows(("completion",)), processing_class=tokenizer(), **more)

    trainer = None if first else made()
    with sparsify(model, tiny.plan(model, 0.6, dense_steps=0.25), path=path) as handle:
        trainer = trainer or made()
        trainer.add_callback(handle.schedule)
        trainer.train()
    assert handle.forwards == {"dense (first steps)": 1, "sparse": STEPS - 1}
    return trainer, handle


@pytest.mark.parametrize(
    "settings", [{}, {"packing": True, "max_length": 16, "gradient_checkpointing": False}], ids=str
)
def test_sft_is_fast_and_equal_to_the_reference(tmp_path: Path, settings: dict[str, Any]) -> None:
    expected, handle = sft(tmp_path, "reference", **settings)
    assert handle.paths == {}
    for first in (True, False):
        found, handle = sft(tmp_path, "auto", first, **settings)
        assert handle.paths == {"fast": STEPS}
        assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
        entropies = [[e["entropy"] for e in run.state.log_history if "entropy" in e] for run in (expected, found)]
        assert entropies[1] == pytest.approx(entropies[0], rel=1e-4) and len(entropies[0]) == STEPS


def test_sft_with_a_loss_from_logits(tmp_path: Path) -> None:
    """Label smoothing in TRL: a forward for the loss, without labels, then one for the metrics."""
    model = tiny.lora(dtype=torch.float32)
    arguments = SFTConfig(output_dir=str(tmp_path), **COMMON, label_smoothing_factor=0.1)
    with (
        sparsify(model, tiny.plan(model, 0.6)) as handle,
        pytest.warns(FutureWarning, match="`label_smoothing_factor` is deprecated"),
    ):
        trainer = SFTTrainer(
            model,
            arguments,
            train_dataset=rows(("completion",)),
            processing_class=tokenizer(),
            data_collator=keep_labels(DataCollatorForLanguageModeling(pad_token_id=0)),  # type: ignore[arg-type]
            callbacks=[handle.schedule],
        )
        trainer.train()
        assert handle.forwards == {"sparse": 2 * STEPS}
        assert handle.paths == {"reference (a replaced forward of the model)": STEPS, "fast": STEPS}


def with_own_loss(folder: Path, sparse: Any, keep: bool = False) -> tuple[Tensor, Any]:
    """Adapters and handle after a run whose loss is the test's own; `sparse` is the path, or None for no handle."""
    model = tiny.lora()
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    handle = None if sparse is None else sparsify(model, tiny.plan(model, 0.6), path=sparse)
    with pytest.warns(FutureWarning, match="`compute_loss_func` is deprecated"):
        trainer = SFTTrainer(
            model,
            SFTConfig(output_dir=str(folder), **COMMON),
            train_dataset=rows(("completion",)),
            processing_class=tokenizer(),
            data_collator=keep_labels(collate) if keep else collate,  # type: ignore[arg-type]
            callbacks=[] if handle is None else [handle.schedule],
            compute_loss_func=cross_entropy,
        )
    trainer.train()
    if handle is not None:
        handle.remove()
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_" in name]), handle


def test_a_loss_function_of_ones_own_is_sparse_behind_keep_labels(tmp_path: Path) -> None:
    """TRL's forward for the loss has no labels; its forward for the metrics, without gradient, has them."""
    dense, _ = with_own_loss(tmp_path, None)
    with pytest.warns(UserWarning, match="SparseLoRA is dense where a training call has no labels: .*keep_labels"):
        found, handle = with_own_loss(tmp_path, "auto")
    assert handle.forwards == {"dense (no labels in the call)": STEPS, "sparse": STEPS}
    assert handle.paths == {"fast": STEPS} and torch.allclose(found, dense, rtol=0, atol=1e-13)
    expected, _ = with_own_loss(tmp_path, "reference", keep=True)
    found, handle = with_own_loss(tmp_path, "auto", keep=True)
    assert handle.forwards == {"sparse": 2 * STEPS}
    assert handle.paths == {"reference (a replaced forward of the model)": STEPS, "fast": STEPS}
    assert torch.allclose(found, expected, rtol=0, atol=1e-13) and not torch.allclose(found, dense, rtol=0, atol=1e-3)


def test_metrics_of_ones_own_are_those_of_the_dense_model(tmp_path: Path) -> None:
    found = []
    for sparse in (False, True):
        model, data = tiny.lora(dtype=torch.float32), rows(("completion",))
        trainer = SFTTrainer(
            model,
            SFTConfig(output_dir=str(tmp_path), **COMMON),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer(),
            compute_metrics=lambda given: {"sum": float(abs(given.predictions).sum())},
        )
        handle = sparsify(model, tiny.plan(model, 0.6)) if sparse else None
        with handle or nullcontext(), pytest.warns(FutureWarning, match="`return_outputs=True`"):
            found.append(trainer.evaluate()["eval_sum"])
        assert handle is None or set(handle.forwards) == {"dense (eval mode)"}
    assert found[0] == found[1] > 0


def test_trl_evaluates_the_dense_model(tmp_path: Path) -> None:
    found = {}
    for sparse in (True, False):
        model = tiny.lora(dtype=torch.float32)
        arguments = SFTConfig(output_dir=str(tmp_path), **COMMON)
        data = rows(("completion",))
        trainer = SFTTrainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer())
        if sparse:
            with sparsify(model, tiny.plan(model, 0.6)) as handle:
                found[sparse] = trainer.evaluate()["eval_loss"]
                assert list(handle.forwards) == ["dense (eval mode)"]
        else:
            found[sparse] = trainer.evaluate()["eval_loss"]
    assert found[True] == found[False]


@pytest.mark.parametrize("own", [True, False], ids=["adapter given", "adapter made by TRL"])
def test_dpo_has_a_sparse_policy_and_a_dense_reference(tmp_path: Path, own: bool) -> None:
    """With an adapter given, TRL compares with a frozen copy of it; else with the base, in train mode either way."""
    found = {}
    for path in ("reference", "auto"):
        if own:
            model, config = tiny.lora(dtype=torch.float32), None
        else:
            model, config = tiny.base(dtype=torch.float32), LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
        trainer = DPOTrainer(
            model,
            args=DPOConfig(output_dir=str(tmp_path), **COMMON),
            train_dataset=rows(("chosen", "rejected")),
            processing_class=tokenizer(),
            peft_config=config,
        )
        policy: Any = trainer.model
        with sparsify(policy, tiny.plan(policy, 0.6), path=path) as handle:  # type: ignore[arg-type]
            trainer.add_callback(handle.schedule)
            trainer.train()
        dense = "dense (an adapter that is not trained)" if own else "dense (adapters disabled)"
        assert handle.forwards == {"sparse": STEPS, dense: STEPS}
        assert handle.paths == ({} if path == "reference" else {"fast": STEPS})
        found[path] = losses(trainer)
    assert found["auto"] == pytest.approx(found["reference"], rel=1e-5)
    assert len(set(found["auto"])) > 1
