"""How long a LoRA fine-tuning step takes: Hugging Face PEFT, what is lossless to leave out, and SparseLoRA.

    python benchmarks/finetune_step.py                    shapes S1 and S2 of the bars, 25% output tokens
    python benchmarks/finetune_step.py --quick            a tiny shape, to see that all of it runs
    python benchmarks/finetune_step.py --resume runs.jsonl   keep timings there, go on where it stopped

Random weights in bfloat16, full rows, LoRA r 32 on Q, K, V, O, AdamW. Variants take turns, one warm-up and one timed
step a turn, and the median over the turns counts, so that a machine that slows down slows all of them. `ideal` is the
ratio of the operations that have to be done (elision.sparselora.flops, causal attention), `efficiency` the measured
share of it, both over PEFT with bfloat16 adapters, whose arithmetic is that of the others. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from elision.sparselora import Elisions, Factors, SparsityPlan, flops, lossless, sparsify, tokens

VARIANTS = ("PEFT", "PEFT bf16 adapters", "dense + lossless", "sparse", "sparse + lossless")
BASE = "PEFT bf16 adapters"  # what ideal and efficiency are relative to


@dataclass(frozen=True)
class Setting:
    """A model's shape and a batch's."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    rows: int
    length: int
    vocabulary: int = 32_000


SETTINGS = {
    "S1": Setting(1024, 2816, 16, 16, 8, 8, 512),
    "S2": Setting(2048, 5632, 32, 8, 4, 4, 512),
    "tiny": Setting(64, 192, 4, 2, 3, 2, 32, 256),
    "llama3-8b": Setting(4096, 14336, 32, 8, 32, 8, 512, 128_256),  # for a GPU
}


def build(setting: Setting, device: str) -> Any:
    """A Llama with random weights and LoRA on Q, K, V, O, both factors random."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden,
        intermediate_size=setting.intermediate,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.kv_heads,
        use_cache=False,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    adapter = LoraConfig(
        r=32, lora_alpha=64, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, adapter).train()


def plan_for(model: Any, setting: Setting) -> SparsityPlan:
    """FFN 99% but in the first tenth and the last layer, Q, K, V, O 75% in the deeper half."""
    layers = setting.layers
    first = -(-layers // 10)
    ffn = tuple(0.99 if first <= layer < layers - 1 else 0.0 for layer in range(layers))
    deep = tuple(0.75 if layer >= layers // 2 else 0.0 for layer in range(layers))
    facts = SparsityPlan.uniform(model, 0.0).model
    return SparsityPlan(facts, ffn=ffn, qk=deep, vo=deep, dense_steps=0.0)


def batch_for(setting: Setting, share: float, device: str) -> dict[str, torch.Tensor]:
    """Full rows of random tokens, the last `share` of each an answer."""
    ids = torch.randint(
        0, setting.vocabulary, (setting.rows, setting.length), generator=torch.Generator().manual_seed(1)
    )
    labels = ids.clone()
    labels[:, : setting.length - round(share * setting.length)] = tokens.IGNORED
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def operations(setting: Setting, model: Any, batch: dict[str, torch.Tensor], plan: SparsityPlan, variant: str) -> float:
    """What a variant has to compute: floating-point operations of a forward and backward."""
    shape, kinds = flops.Shape.of(model), tokens.classify(batch["labels"].cpu(), batch["attention_mask"].cpu())
    exact = variant.endswith("lossless")
    work = flops.Workload.of(kinds, padded=not exact)
    cost = flops.step(shape, work, flops.adapters_of(model), plan if variant.startswith("sparse") else None)
    total = cost.total(causal=True)
    if not exact:
        return total
    last = setting.layers - 1  # where rows that bear no loss need keys and values only
    for name in ("q", "o", "gate", "up", "down"):
        inputs, outputs = shape.projections[name]
        kept = 1.0 - plan.sparsity(last, name) if variant.startswith("sparse") else 1.0
        rows = work.context * kept + work.tokens - work.context - work.logits
        total -= 4.0 * rows * inputs * outputs
        if name in ("q", "o"):
            total -= 6.0 * (work.tokens - work.logits) * 32 * (inputs + outputs)
    return total


@contextmanager
def prepared(model: Any, plan: SparsityPlan, factors: Factors, variant: str) -> Iterator[None]:
    """`model` as the variant trains it."""
    dtype = torch.bfloat16 if variant == BASE else torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None
    handle: AbstractContextManager[Any] = nullcontext()
    if variant == "dense + lossless":
        handle = lossless(model, path="fast")
    elif variant == "sparse":
        handle = sparsify(model, plan, factors, path="fast", elisions=Elisions.none())
    elif variant == "sparse + lossless":
        handle = sparsify(model, plan, factors, path="fast")
    with handle:
        yield


def timed(model: Any, batch: dict[str, torch.Tensor], device: str) -> tuple[float, float]:
    """Seconds of one step after one to warm up, and the peak of memory in MB."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    seconds = 0.0
    for _ in range(2):
        reset_peak(device)
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds, peak(device)


def reset_peak(device: str) -> None:
    """Let the high-water mark of memory start again from here, where the system can."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux


def peak(device: str) -> float:
    """High-water mark of memory in MB; not a number where the system does not tell."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return float("nan")


def measure(name: str, share: float, rounds: int, device: str, log: Path | None, console: Console) -> list[dict]:
    """Rows of the result for one shape and output share."""
    done = [json.loads(line) for line in log.read_text().splitlines()] if log and log.exists() else []
    done = [run for run in done if (run["shape"], run["output_share"], run["device"]) == (name, share, device)]
    setting = SETTINGS[name]
    model = build(setting, device)
    plan, batch = plan_for(model, setting), batch_for(setting, share, device)
    factors = Factors.compute(model, plan.rank, plan)
    for turn in range(rounds):
        for variant in VARIANTS:
            if any(run["variant"] == variant and run["turn"] == turn for run in done):
                continue
            with prepared(model, plan, factors, variant):
                seconds, megabytes = timed(model, batch, device)
            run = {"shape": name, "output_share": share, "device": device, "variant": variant, "turn": turn}
            run |= {"ms": 1e3 * seconds, "peak_mb": megabytes}
            console.print(f"{name} {share:.0%} turn {turn + 1}/{rounds}  {variant}: {run['ms']:.0f} ms", style="dim")
            done.append(run)
            if log:
                with log.open("a") as file:
                    file.write(json.dumps(run) + "\n")
    took = {v: statistics.median(run["ms"] for run in done if run["variant"] == v) for v in VARIANTS}
    needs = {v: operations(setting, model, batch, plan, v) for v in VARIANTS}
    rows = []
    for variant in VARIANTS:
        ideal, over = needs[BASE] / needs[variant], took[BASE] / took[variant]
        rows.append(
            {
                "variant": variant,
                "shape": name,
                "output_share": share,
                "device": device,
                "step_ms": round(took[variant], 1),
                "speedup": round(took["PEFT"] / took[variant], 3),
                "speedup_bf16": round(over, 3),
                "ideal": round(ideal, 3),
                "efficiency": round(over / ideal, 3),
                "gflops": float(f"{needs[variant] / 1e9:.4g}"),
                "tokens_per_s": round(setting.rows * setting.length / took[variant] * 1e3),
                "peak_mb": round(max(run["peak_mb"] for run in done if run["variant"] == variant)),
            }
        )
    return rows


def show(rows: list[dict], console: Console) -> None:
    """The table, and what sparsity alone gains over dense + lossless."""
    table = Table(title="LoRA fine-tuning step")
    heads = ("shape", "output", "variant", "step ms", "over PEFT", "over PEFT bf16", "ideal", "efficiency")
    for head in (*heads, "GFLOP", "tokens/s", "peak MB"):
        table.add_column(head, justify="left" if head in ("shape", "variant") else "right")
    for row in rows:
        values = [row["shape"], f"{row['output_share']:.0%}", row["variant"], f"{row['step_ms']:.0f}"]
        values += [f"{row[key]:.2f}x" for key in ("speedup", "speedup_bf16", "ideal")] + [f"{row['efficiency']:.0%}"]
        table.add_row(*values, f"{row['gflops']:.4g}", str(row["tokens_per_s"]), str(row["peak_mb"]))
    console.print(table)
    for shape, share in dict.fromkeys((row["shape"], row["output_share"]) for row in rows):
        own = {row["variant"]: row for row in rows if (row["shape"], row["output_share"]) == (shape, share)}
        dense, sparse = own["dense + lossless"], own["sparse + lossless"]
        gain, ideal = dense["step_ms"] / sparse["step_ms"], dense["gflops"] / sparse["gflops"]
        console.print(f"{shape} {share:.0%}: sparse + lossless over dense + lossless {gain:.2f}x, ideal {ideal:.2f}x")


def main() -> None:
    """Measure, print the table, end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="S1,S2", help=f"of {', '.join(SETTINGS)}; comma-separated")
    parser.add_argument("--shares", default="0.25", help="shares of output tokens, comma-separated")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", type=Path, help="file of timings to go on from and to add to")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, two turns")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    shapes, rounds = (["tiny"], 2) if given.quick else (given.shapes.split(","), given.rounds)
    if unknown := [name for name in shapes if name not in SETTINGS]:
        parser.error(f"--shapes {unknown[0]} is not known: use {', '.join(SETTINGS)}")
    console = Console(width=150)
    rows = []
    for name in shapes:
        for share in given.shares.split(","):
            rows += measure(name, float(share), rounds, given.device, given.resume, console)
    show(rows, console)
    versions = {"torch": torch.__version__, "threads": given.threads, "rounds": rounds}
    print(json.dumps({"benchmark": "finetune_step", **versions, "rows": rows}))


if __name__ == "__main__":
    main()
