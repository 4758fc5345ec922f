"""SparseLoRA with transformers' Trainer: two lines more than plain LoRA.

    python examples/finetune_trainer.py --steps 60 --out runs/trainer

The embedded model learns a kind of word problem that it has never seen. What is left is an ordinary PEFT adapter.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from elision import data, reference_model
from elision.sparselora import SparsityPlan, sparsify


def main(out: Path, steps: int = 60, batch: int = 8) -> None:
    """Train an adapter and save it to `out`."""
    model, tokenizer = reference_model.load()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    rows = data.encode(tokenizer, data.problems(("bus",), "train", batch * steps, seed=0))
    arguments = TrainingArguments(
        output_dir=str(out / "training"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to=[],
    )

    plan = SparsityPlan.default(model)  # a plan for everyone; `elision sparselora calibrate` makes yours
    with sparsify(model, plan) as sparse:  # the first line
        Trainer(
            model,
            arguments,
            train_dataset=Dataset.from_list(rows),
            data_collator=lambda rows: data.collate(rows, tokenizer.pad_token_id),
            callbacks=[sparse.schedule],  # the second: it keeps the first steps dense
        ).train()
        print(sparse.summary())

    model.save_pretrained(str(out / "adapter"))
    print(f"adapter in {out / 'adapter'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    main(given.out, given.steps)
