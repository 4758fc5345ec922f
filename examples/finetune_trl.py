"""SparseLoRA with TRL's SFTTrainer, which computes its loss over completions and packs rows: the same two lines.

pip install 'elision[trl]'
python examples/finetune_trl.py --steps 60 --out runs/trl
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig

from elision import data, reference_model
from elision.sparselora import SparsityPlan, sparsify

try:
    from trl import SFTConfig, SFTTrainer
except ModuleNotFoundError:
    sys.exit("error: this example needs TRL: pip install 'elision[trl]'")


def main(out: Path, steps: int = 60, batch: int = 2) -> None:
    """Train an adapter and save it to `out`."""
    model, tokenizer = reference_model.load()
    problems = data.problems(("bus",), "train", 8 * batch * steps, seed=0)
    rows = [{"prompt": problem.prompt, "completion": f" {problem.solution}"} for problem in problems]
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(out / "training"),
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=2e-3,
            max_length=512,
            packing=True,
            bf16=False,
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    )

    with sparsify(trainer.model, SparsityPlan.default(trainer.model)) as sparse:
        trainer.add_callback(sparse.schedule)
        trainer.train()
        print(sparse.summary())

    trainer.model.save_pretrained(str(out / "adapter"))
    print(f"adapter in {out / 'adapter'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    main(given.out, given.steps)
