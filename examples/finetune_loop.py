"""SparseLoRA in a loop of one's own: tell the schedule how far training is, once a step.

python examples/finetune_loop.py --steps 60 --out runs/loop
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from elision import data, reference_model
from elision.sparselora import SparsityPlan, sparsify


def main(out: Path, steps: int = 60, batch: int = 8) -> None:
    """Train an adapter and save it to `out`."""
    model, tokenizer = reference_model.load()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    rows = data.encode(tokenizer, data.problems(("bus",), "train", batch * steps, seed=0))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)

    model.train()  # in eval mode, as `from_pretrained` leaves a model, every forward is dense
    with sparsify(model, SparsityPlan.default(model)) as sparse:
        for step in range(steps):
            sparse.step(step / steps)
            loss = model(**data.collate(rows[step * batch : (step + 1) * batch], tokenizer.pad_token_id)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % max(1, steps // 10) == 0:
                print(f"step {step}: loss {loss.item():.3f}")
        print(sparse.summary())

    model.save_pretrained(str(out / "adapter"))
    print(f"adapter in {out / 'adapter'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    main(given.out, given.steps)
