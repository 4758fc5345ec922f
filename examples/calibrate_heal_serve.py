"""SPD from a model to served text: calibrate, heal, save, generate on tensor-parallel ranks.

python examples/calibrate_heal_serve.py --rows 32 --out runs/spd
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from elision import data, reference_model, spd
from elision.reference_model.corpus import library_texts
from elision.spd.runtimes import tasks
from elision.spd.runtimes.launch import launch


def main(out: Path, rows: int = 32, length: int = 256, ranks: int = 2, epochs: int = 2) -> None:
    """Write a checkpoint that carries its plan to `out`, and serve a prompt from it."""
    model, tokenizer = reference_model.load()
    batches = data.text_batches(tokenizer, library_texts("train"), length, rows=4, limit=rows)
    held_out = data.text_batches(tokenizer, library_texts("test"), length, rows=4, limit=rows)

    # All but the most sensitive blocks lose the sync after their attention, and are taught to put out what they did
    # before. What that costs is measured on text that neither step has seen.
    plan = spd.calibrate(model, batches, ranks, drop=0.9, method="fisher")
    recipe = spd.Recipe(epochs=epochs)
    healed = spd.carry_out(model, plan, batches, held_out=held_out, recipe=recipe)
    found = healed.plan.verified
    assert found is not None
    print(f"{len(plan.dropped)} of {model.config.num_hidden_layers} blocks without their sync")
    print(f"perplexity {found.dense:.2f}, dropped as they are {found.zero_shot:.2f}, healed {found.planned:.2f}")

    checkpoint = healed.save_pretrained(out / "served", tokenizer)
    prompt = tokenizer("def add(a, b):", return_tensors="pt")
    with healed.simulate(), torch.no_grad():  # this process computes what the ranks will
        expected = healed.model.generate(**prompt, max_new_tokens=16, do_sample=False)
    options = {"max_new_tokens": 16, "do_sample": False}
    served = launch(
        ranks, tasks.generate, str(checkpoint), spd.read_plan(checkpoint), dict(prompt), options, "auto", 60.0
    )
    print(tokenizer.decode(served[0], skip_special_tokens=True))
    print(f"{ranks} ranks generated {'the same' if torch.equal(served, expected) else 'not the same'} as one process")
    print(f"vllm serve {checkpoint} --tensor-parallel-size {ranks}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32)
    given = parser.parse_args()
    main(given.out, given.rows)
