"""The whole path: SparseLoRA fine-tuning, merge, SPD calibration, healing, a checkpoint that vLLM serves.

python examples/finetune_to_serving.py --steps 60 --out runs/whole
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from elision import data, reference_model, spd
from elision.sparselora import SparsityPlan
from elision.sparselora.train import Settings, add_adapter, train


def main(out: Path, steps: int = 60, batch: int = 8, ranks: int = 2, rows: int = 32, length: int = 256) -> None:
    """Write an adapter and a checkpoint that carries its plan to `out`."""
    model, tokenizer = reference_model.load()
    problems = data.problems(("bus",), "train", batch * steps, seed=0)

    settings = Settings(steps, batch, learning_rate=2e-3, rank=16)
    model = add_adapter(model, settings)
    train(model, tokenizer, problems, SparsityPlan.default(model), out / "adapter", settings)
    merged = model.merge_and_unload().eval()

    # Calibration is on text like that which will be served. Half of the blocks lose the sync after their attention,
    # those that can spare it best, and are taught to put out what they did before.
    text = [f"{problem.prompt} {problem.solution}" for problem in data.problems(("bus",), "test", 8 * rows, seed=0)]
    batches = data.text_batches(tokenizer, text, length, rows=4, limit=rows)
    plan = spd.calibrate(merged, batches, ranks, drop=0.5)
    treated = spd.heal(merged, plan, batches, recipe=spd.Recipe(epochs=2))
    checkpoint = treated.save_pretrained(out / "served", tokenizer)

    with treated.simulate():  # this process computes what the ranks would
        prompt = tokenizer(problems[0].prompt, return_tensors="pt")
        with torch.no_grad():
            answer = treated.model.generate(**prompt, max_new_tokens=24, do_sample=False)
    print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    print(f"{len(plan.dropped)} of {plan.model.layers} blocks without their sync; serve it with")
    print(f"vllm serve {checkpoint} --tensor-parallel-size {ranks}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    main(given.out, given.steps)
