"""How long a LoRA fine-tuning step takes: what a user could pick, what is lossless to leave out, and SparseLoRA.

    python benchmarks/finetune_step.py                    shapes S1 and S2 of the bars, 25% output tokens
    python benchmarks/finetune_step.py --shares 0.1,0.25,0.5
    python benchmarks/finetune_step.py --padded           rows as long as GSM8K's problems, padded to the longest
    python benchmarks/finetune_step.py --breakdown        where one step's time goes, by kind of operation
    python benchmarks/finetune_step.py --quick            a tiny shape, to see that all of it runs
    python benchmarks/finetune_step.py --resume runs.jsonl   keep timings there, go on where it stopped

Random weights in bfloat16, LoRA r 32 on Q, K, V, O, AdamW. Variants take turns, one warm-up and one timed step a turn,
three of those that are held against bars, and the median of all counts, so that a machine that slows down slows all of
them; one that takes twice as long as PEFT has a single turn:

    PEFT                  as Hugging Face runs it: adapters in float32
    PEFT bf16 adapters    the arithmetic of all below
    compiled              that, under torch.compile
    padding-free          that, with rows packed into one
    Liger                 that, with Liger's kernels (on a GPU, where they are installed)
    published algorithm   the operations of the published SparseLoRA code (published.py)
    dense + lossless      elision.sparselora.lossless: exact, and the baseline of sparsity
    sparse                SparseLoRA without the lossless elisions
    sparse + lossless     SparseLoRA as it comes

`ideal` is the ratio of the operations that have to be done (elision.sparselora.flops, causal attention), `efficiency`
the measured share of it, both over PEFT with bf16 adapters. Attention's own time, which sparsity leaves as it is, is
its share of profiled steps, after the rounds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import finetune_step_report
import lengths
import machine
import published
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from elision import files
from elision.sparselora import Elisions, Factors, SparsityPlan, flops, lossless, sparsify, tokens

OTHERS = ("PEFT", "PEFT bf16 adapters", "compiled", "padding-free", "Liger", "published algorithm")
VARIANTS = (*OTHERS, "dense + lossless", "sparse", "sparse + lossless")
BASE = "PEFT bf16 adapters"  # what ideal and efficiency are relative to
JUDGED = (BASE, "dense + lossless", "sparse", "sparse + lossless")  # by bars
KINDS = ("attention", "base products", "adapters", "estimator", "head and loss", "gathers", "optimizer", "pointwise")


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


def as_published(plan: SparsityPlan) -> SparsityPlan:
    """The plan with the published algorithm's way of choosing channels."""
    return replace(plan, selection="svd")


def batch_for(setting: Setting, share: float | None, device: str) -> dict[str, torch.Tensor]:
    """Random tokens: full rows, the last `share` of each an answer; None: rows of GSM8K's lengths, padded."""
    generator = torch.Generator().manual_seed(1)
    full = round((1 - (share or 0)) * setting.length)
    pairs = [(full, setting.length - full)] * setting.rows
    if share is None:
        pairs = lengths.draw(setting.rows, 1, setting.length)
    longest = max(map(sum, pairs))
    ids = torch.randint(0, setting.vocabulary, (setting.rows, longest), generator=generator)
    labels, mask = torch.full_like(ids, tokens.IGNORED), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(pairs):
        mask[row, : prompt + answer] = 1
        labels[row, prompt : prompt + answer] = ids[row, prompt : prompt + answer]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def packed(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch's rows one after another in a single one, told apart by their positions, as collators pack them."""
    real = batch["attention_mask"].bool()
    positions = torch.arange(real.shape[1], device=real.device).expand_as(real)
    labels = batch["labels"].clone()
    labels[:, 0] = tokens.IGNORED  # no row predicts the next one's first token
    found = {"input_ids": batch["input_ids"], "labels": labels, "position_ids": positions}
    return {name: tensor[real][None] for name, tensor in found.items()}


def operations(model: Any, batch: dict[str, torch.Tensor], plan: SparsityPlan, variant: str) -> tuple[float, float]:
    """What a variant has to compute: operations of a forward and backward in floating point, and attention's share."""
    shape, kinds = flops.Shape.of(model), tokens.classify(batch["labels"].cpu(), batch["attention_mask"].cpu())
    exact, pruned = variant.endswith("lossless"), variant.startswith(("sparse", "published"))
    plan = as_published(plan) if variant.startswith("published") else plan
    work = flops.Workload.fast(kinds) if exact else flops.Workload.of(kinds, padded=True)
    if variant == "padding-free":
        real = batch["attention_mask"].sum(dim=1).tolist()
        work = flops.Workload(tuple(real), work.context, sum(real))
    cost = flops.step(shape, work, flops.adapters_of(model), plan if pruned else None)
    return cost.total(causal=True), cost.attention / 2


def available(device: str) -> tuple[str, ...]:
    """The variants that can run here."""
    liger = device == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    return tuple(variant for variant in VARIANTS if variant != "Liger" or liger)


@contextmanager
def prepared(
    model: Any, plan: SparsityPlan, factors: Factors, batch: dict[str, torch.Tensor], variant: str
) -> Iterator[Callable[[], torch.Tensor]]:
    """Make `model` what the variant trains; yields what runs a forward on `batch` and returns its loss."""
    dtype = torch.float32 if variant == "PEFT" else torch.bfloat16
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None
    given = packed(batch) if variant == "padding-free" else batch
    handle: AbstractContextManager[Any] = nullcontext()
    called = model
    if variant == "dense + lossless":
        handle = lossless(model, path="fast")
    elif variant == "sparse":
        handle = sparsify(model, plan, path="fast", elisions=Elisions.none())
    elif variant == "sparse + lossless":
        handle = sparsify(model, plan, path="fast")
    elif variant == "published algorithm":
        kinds = tokens.classify(batch["labels"].cpu(), batch["attention_mask"].cpu())
        handle = published.applied(model, plan, kinds.context.to(batch["labels"].device), factors)
    elif variant == "compiled":
        called = torch.compile(model)
    elif variant == "Liger":
        handle = liger(model)
    with handle:
        yield lambda: called(**given).loss


@contextmanager
def liger(model: Any) -> Iterator[None]:
    """`model`'s own modules with Liger's kernels; their forwards are put back afterwards."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama  # pyright: ignore[reportMissingImports]

    inner = model.get_base_model()
    before = {module: dict(vars(module)) for module in inner.modules()}
    apply_liger_kernel_to_llama(model=inner)
    try:
        yield
    finally:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)


def timed(model: Any, loss: Callable[[], torch.Tensor], device: str, steps: int = 1) -> tuple[list[float], float]:
    """Milliseconds of each of `steps` steps after one to warm up, and the peak of memory in MB."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    took = []
    for _ in range(1 + steps):
        reset_peak(device)
        start = time.perf_counter()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(1e3 * (time.perf_counter() - start))
    return took[1:], peak(device)


def profiled(model: Any, loss: Callable[[], torch.Tensor]) -> tuple[Any, float]:
    """What the profiler saw of a step, after one to warm up, and how many milliseconds the step took under it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU, activity.CUDA] if torch.cuda.is_available() else [activity.CPU]
    loss().backward()
    with torch.profiler.profile(activities=kinds, record_shapes=True) as profile:
        start = time.perf_counter()
        loss().backward()
        optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took = 1e3 * (time.perf_counter() - start)
    return profile.events(), took


def breakdown(model: Any, loss: Callable[[], torch.Tensor], setting: Setting, plan: SparsityPlan) -> dict[str, float]:
    """Share of one step's time by KINDS: operations told apart by their names and shapes, and by what called them."""
    found: dict[str, float] = {kind: 0.0 for kind in KINDS}
    for event in profiled(model, loss)[0]:
        if event.name.startswith(("aten::", "autograd::")) or "Optimizer" in event.name:
            own = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
            kind = "attention" if of_attention(event) else kind_of(event.name, event.input_shapes, setting, plan.rank)
            found[kind] += own
    total = sum(found.values())
    return {kind: round(spent / total, 4) for kind, spent in found.items()}


def attention_share(model: Any, loss: Callable[[], torch.Tensor], steps: int = 3) -> float:
    """Share of a step's time that attention itself takes, forward and backward: the median of `steps` profiled ones."""
    shares = []
    for _ in range(steps):
        events, took = profiled(model, loss)
        own = [event for event in events if of_attention(event) and not of_attention(event.cpu_parent)]
        spent = sum(e.device_time_total if torch.cuda.is_available() else e.cpu_time_total for e in own)
        shares.append(1e-3 * spent / took)
    return statistics.median(shares)


def of_attention(event: Any) -> bool:
    """Whether an event of the profiler is attention, or something that attention called; no event is not."""
    names = ("_Causal", "scaled_dot_product", "ScaledDotProduct")  # causal.py's, torch's forward, its backward
    return event is not None and (any(name in event.name for name in names) or of_attention(event.cpu_parent))


def kind_of(name: str, shapes: Any, setting: Setting, rank: int) -> str:
    """Which of KINDS an operation with inputs of these shapes is."""
    sizes = {size for shape in shapes or () for size in (shape if isinstance(shape, list) else [])}
    if "attention" in name or name in ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data"):
        return "attention"
    if setting.vocabulary in sizes or "nll_loss" in name or "log_softmax" in name:
        return "head and loss"
    if "Optimizer" in name or "_foreach" in name or "_fused_adam" in name:
        return "optimizer"
    if name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::linear", "aten::matmul"):
        return "estimator" if rank in sizes else "adapters" if 32 in sizes or 96 in sizes else "base products"
    if name.startswith(("aten::index", "aten::gather", "aten::scatter", "aten::nonzero", "aten::masked")):
        return "gathers"
    return "pointwise"


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


def measure(name: str, share: float | None, rounds: int, device: str, log: Path | None, console: Console) -> list[dict]:
    """Rows of the result for one shape and output share."""
    done = [json.loads(line) for line in log.read_text().splitlines()] if log and log.exists() else []
    done = [run for run in done if (run["shape"], run["output_share"], run["device"]) == (name, share, device)]
    setting = SETTINGS[name]
    model = build(setting, device)
    plan, batch = plan_for(model, setting), batch_for(setting, share, device)
    factors = Factors.compute(model, plan.rank, as_published(plan))
    variants = available(device)
    for turn in range(rounds):
        for variant in variants:
            if any(run["variant"] == variant and run["turn"] == turn for run in done):
                continue
            first = {run["variant"]: min(run["ms"]) for run in done if run["turn"] == 0}
            if turn and first[variant] > 2 * first["PEFT"]:
                continue  # one time tells enough of a variant that nobody would pick
            with prepared(model, plan, factors, batch, variant) as loss:
                took, megabytes = timed(model, loss, device, 3 if variant in JUDGED else 1)
            run = {"shape": name, "output_share": share, "device": device, "variant": variant, "turn": turn}
            run |= {"ms": took, "peak_mb": megabytes}
            told = ", ".join(f"{ms:.0f}" for ms in took)
            console.print(f"{name} {output(share)} turn {turn + 1}/{rounds}  {variant}: {told} ms", style="dim")
            done.append(run)
            if log:
                with log.open("a") as file:
                    file.write(json.dumps(run) + "\n")
    times = {v: [ms for run in done if run["variant"] == v for ms in run["ms"]] for v in variants}
    took = {variant: statistics.median(ms) for variant, ms in times.items()}
    needs = {v: operations(model, batch, plan, v) for v in variants}
    shares = {}
    for variant in ("dense + lossless", "sparse + lossless"):
        with prepared(model, plan, factors, batch, variant) as loss:
            shares[variant] = attention_share(model, loss)
    rows, size = [], int(batch["attention_mask"].sum())
    for variant in variants:
        ideal, over = needs[BASE][0] / needs[variant][0], took[BASE] / took[variant]
        attention_ms = round(shares[variant] * took[variant], 1) if variant in shares else None
        rows.append(
            {
                "variant": variant,
                "shape": name,
                "output_share": share,
                "device": device,
                "step_ms": round(took[variant], 1),
                "quartiles_ms": quartiles(times[variant]),
                "speedup": round(took["PEFT"] / took[variant], 3),
                "speedup_bf16": round(over, 3),
                "ideal": round(ideal, 3),
                "efficiency": round(over / ideal, 3),
                "attention_ms": attention_ms,
                "gflops": float(f"{needs[variant][0] / 1e9:.4g}"),
                "attention_gflops": float(f"{needs[variant][1] / 1e9:.4g}"),
                "tokens_per_s": round(size / took[variant] * 1e3),
                "peak_mb": round(max(run["peak_mb"] for run in done if run["variant"] == variant)),
            }
        )
    return rows


def quartiles(ms: list[float]) -> list[float]:
    """The first and the third, in tenths; of a single time, itself twice."""
    first, _, third = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else (ms[0],) * 3
    return [round(first, 1), round(third, 1)]


def show(rows: list[dict], console: Console) -> None:
    """The table, and what sparsity alone gains over dense + lossless."""
    table = Table(title="LoRA fine-tuning step")
    heads = ("shape", "output", "variant", "step ms", "over PEFT", "over PEFT bf16", "ideal", "efficiency")
    for head in (*heads, "GFLOP", "tokens/s", "peak MB"):
        table.add_column(head, justify="left" if head in ("shape", "variant") else "right")
    for row in rows:
        values = [row["shape"], output(row["output_share"]), row["variant"], f"{row['step_ms']:.0f}"]
        values += [f"{row[key]:.2f}x" for key in ("speedup", "speedup_bf16", "ideal")] + [f"{row['efficiency']:.0%}"]
        table.add_row(*values, f"{row['gflops']:.4g}", str(row["tokens_per_s"]), str(row["peak_mb"]))
    console.print(table)
    for shape, share in dict.fromkeys((row["shape"], row["output_share"]) for row in rows):
        own = {row["variant"]: row for row in rows if (row["shape"], row["output_share"]) == (shape, share)}
        dense, sparse = own["dense + lossless"], own["sparse + lossless"]
        gain, ideal = dense["step_ms"] / sparse["step_ms"], dense["gflops"] / sparse["gflops"]
        rest, limit = finetune_step_report.beyond_attention(dense, sparse)
        console.print(
            f"{shape} {output(share)}: sparse + lossless over dense + lossless {gain:.2f}x, ideal {ideal:.2f}x; "
            f"without attention's own time {rest:.2f}x, ideal {limit:.2f}x"
        )


def output(share: float | None) -> str:
    """How a batch's share of output tokens is called."""
    return "padded" if share is None else f"{share:.0%}"


def show_breakdown(name: str, share: float | None, device: str, console: Console) -> list[dict]:
    """Table and rows of where the milliseconds of one step go, for PEFT, the lossless step and the sparse one."""
    setting = SETTINGS[name]
    model = build(setting, device)
    plan, batch = plan_for(model, setting), batch_for(setting, share, device)
    factors = Factors.compute(model, plan.rank, as_published(plan))
    rows = []
    for variant in (BASE, "dense + lossless", "sparse + lossless"):
        with prepared(model, plan, factors, batch, variant) as loss:
            rows.append({"variant": variant, "shape": name, "output_share": share, "device": device})
            rows[-1]["step_ms"] = round(timed(model, loss, device)[0][0], 1)  # without the profiler
            shares = breakdown(model, loss, setting, plan)
            rows[-1]["breakdown"] = {kind: round(share * rows[-1]["step_ms"], 2) for kind, share in shares.items()}
    table = Table(title=f"Where a step's time goes: {name}, {output(share)}")
    for head in ("", *(row["variant"] for row in rows)):
        table.add_column(head, justify="right" if head else "left")
    for kind in KINDS:
        table.add_row(kind, *(f"{row['breakdown'][kind] / row['step_ms']:.1%}" for row in rows))
    console.print(table)
    return rows


def main() -> None:
    """Measure, print the table, end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="S1,S2", help=f"of {', '.join(SETTINGS)}; comma-separated")
    parser.add_argument("--shares", default="0.25", help="shares of output tokens, comma-separated")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", type=Path, help="file of timings to go on from and to add to")
    parser.add_argument("--out", type=Path, help="file for the JSON line, with a page beside it")
    parser.add_argument("--padded", action="store_true", help="rows of GSM8K's lengths instead of full ones")
    parser.add_argument("--breakdown", action="store_true", help="profile one step instead of timing")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, two turns")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    shapes, rounds = (["tiny"], 2) if given.quick else (given.shapes.split(","), given.rounds)
    if unknown := [name for name in shapes if name not in SETTINGS]:
        parser.error(f"--shapes {unknown[0]} is not known: use {', '.join(SETTINGS)}")
    if given.out and given.breakdown:
        parser.error("--out keeps timings: leave out --breakdown")
    console = Console(width=150)
    rows = []
    for name in shapes:
        for share in [None] if given.padded else [float(share) for share in given.shares.split(",")]:
            if given.breakdown:
                rows += show_breakdown(name, share, given.device, console)
            else:
                rows += measure(name, share, rounds, given.device, given.resume, console)
    if not given.breakdown:
        show(rows, console)
    settings = {"threads": given.threads, "rounds": rounds}
    line = json.dumps({"benchmark": "finetune_step", **machine.about(), **settings, "rows": rows})
    if given.out:
        files.write_text(given.out, line + "\n")
        finetune_step_report.write(given.out)
    print(line)


if __name__ == "__main__":
    main()
