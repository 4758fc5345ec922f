"""How well channels are chosen, and at what price: `python benchmarks/estimators.py MODEL [--data rows.jsonl]`.

Every way of choosing (elision.sparselora.estimator) on the inputs that the model's own blocks get from one batch of
context tokens, against the oracle, by part and sparsity, averaged over blocks:

    overlap   share of the channels kept that the oracle keeps too
    energy    sum of the squared oracle scores of the channels kept, over that of the oracle's own choice
    FLOPs     of choosing, over a dense step's (forward and backward, everything lossless left out)
    time      of choosing for all blocks, over a dense step's on this machine, medians of turns

"whitened" makes its factors on other rows than those that it is judged on. Without --data: word problems of a family
that the embedded model was not trained on. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from elision import blocks, data
from elision.evaluate import evaluating
from elision.loading import load_model
from elision.sparselora import Factors, SparsityPlan, flops, tokens
from elision.sparselora.choices import BlockChoices, SparseBatch
from elision.sparselora.forecasts import workloads
from elision.sparselora.plan import PARTS, Part
from elision.sparselora.stopwatch import step_seconds
from elision.sparselora.train import Settings, add_adapter

SELECTIONS = ("oracle", "sampled", "whitened", "svd", "weights", "random")
ASKED: dict[Part, str] = {"ffn": "up", "qk": "k", "vo": "v"}  # the projection whose kept channels are looked at


@torch.no_grad()
def inputs_of(model: Any, batch: dict[str, Tensor]) -> dict[tuple[int, bool], Tensor]:
    """What attention and MLP of every block get at the batch's context tokens, by (layer, whether the MLP)."""
    rows = tokens.classify(batch["labels"], batch["attention_mask"]).kept
    found: dict[tuple[int, bool], Tensor] = {}

    def keep(key: tuple[int, bool], module: Any, args: tuple[Any, ...]) -> None:
        found[key] = args[0][rows.reshape(args[0].shape[:-1])]

    hooks = [
        projection.module.register_forward_pre_hook(partial(keep, key))
        for block in blocks.decoder(model).blocks
        for key, projection in (((block.index, False), block.v), ((block.index, True), block.up))
    ]
    try:
        with evaluating(model):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def choose(view: blocks.Decoder, plan: SparsityPlan, factors: Factors | None, seen: dict) -> dict[tuple, Tensor]:
    """Kept channels by layer and part."""
    kept = {}
    for block in view.blocks:
        choices = BlockChoices(block, plan, factors)
        batch = SparseBatch(torch.empty(0, dtype=torch.bool))
        for part in PARTS:
            x = seen[block.index, part == "ffn"]
            kept[block.index, part] = choices.kept_in(batch, ASKED[part], lambda x=x: x)
    return kept


def oracle_scores(view: blocks.Decoder, plan: SparsityPlan, seen: dict) -> dict[tuple, Tensor]:
    """The exact criteria by layer and part."""
    return {
        (block.index, part): BlockChoices(block, plan, None)._scores(part, seen[block.index, part == "ffn"], 0)
        for block in view.blocks
        for part in PARTS
    }


def main() -> None:
    """Measure, print the table, end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="reference", help="directory, Hugging Face id or 'reference'")
    parser.add_argument("--data", type=Path, help="prompts and answers, .json or .jsonl")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--sparsities", default="0.5,0.75,0.9,0.99")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    model, tokenizer = load_model(given.model)
    source = data.load_examples(given.data) if given.data else data.problems(("trips",), "train", 3 * given.rows, 7)
    rows = data.encode(tokenizer, source, given.max_length)
    if len(rows) < 2 * given.rows:
        parser.error(f"--data has {len(rows)} usable rows, {2 * given.rows} are needed: give more, or fewer --rows")
    batch = data.collate(rows[: given.rows], tokenizer.pad_token_id)
    others = [
        data.collate(rows[i : i + given.rows], tokenizer.pad_token_id) for i in range(given.rows, len(rows), given.rows)
    ]
    view = blocks.decoder(model)
    seen = inputs_of(model, batch)
    factors = {"svd": Factors.compute(model, given.rank), "whitened": Factors.whitened(model, others, given.rank)}
    (work,) = workloads([batch])
    adapted = add_adapter(model, Settings(steps=1))
    shape, adapters = flops.Shape.of(adapted), flops.adapters_of(adapted)
    dense = flops.step(shape, work, adapters).total()
    nothing = SparsityPlan.uniform(model, 0.0, dense_steps=0.0)
    step = step_seconds(adapted, [batch], {"dense": nothing}, given.turns)["dense"]
    found = []
    for sparsity in map(float, given.sparsities.split(",")):
        plans = {
            name: SparsityPlan.uniform(model, sparsity, selection=name, rank=given.rank, dense_steps=0.0)
            for name in SELECTIONS
        }
        scores = oracle_scores(view, plans["oracle"], seen)
        best = choose(view, plans["oracle"], None, seen)
        for name, plan in plans.items():
            seconds = []
            for _ in range(given.turns):
                start = time.perf_counter()
                kept = choose(view, plan, factors.get(name), seen)
                seconds.append(time.perf_counter() - start)
            row: dict[str, Any] = {"sparsity": sparsity, "selection": name}
            for part in PARTS:
                keys = [(block.index, part) for block in view.blocks]
                shared = [torch.isin(kept[key], best[key]).double().mean().item() for key in keys]
                energies = [scores[key].square() for key in keys]
                row[f"{part} overlap"] = statistics.fmean(shared)
                row[f"{part} energy"] = statistics.fmean(
                    float(energy[kept[key]].sum() / energy[best[key]].sum())
                    for key, energy in zip(keys, energies, strict=True)
                )
            row["flops"] = flops.step(shape, work, adapters, plan).estimator / dense
            row["time"] = statistics.median(seconds) / step
            found.append(row)
    table = Table(title=f"Choosing channels: {given.model}, {work.context} context tokens")
    for head in ("sparsity", "selection", *(f"{part} {what}" for part in PARTS for what in ("overlap", "energy"))):
        table.add_column(head, justify="right")
    table.add_column("FLOPs of a dense step", justify="right")
    table.add_column("time of a dense step", justify="right")
    for row in found:
        values = [f"{value:.1%}" for key, value in row.items() if key not in ("sparsity", "selection", "flops", "time")]
        table.add_row(f"{row['sparsity']:.0%}", row["selection"], *values, f"{row['flops']:.2%}", f"{row['time']:.2%}")
    Console(width=150).print(table)
    told = {"model": given.model, "rank": given.rank, "context": work.context, "torch": torch.__version__}
    print(json.dumps({"benchmark": "estimators", **told, "threads": given.threads, "rows": found}))


if __name__ == "__main__":
    main()
