"""What dropped syncs save on real links: two ranks on this machine, over loopback and between network namespaces.

    python benchmarks/tp_latency.py                       all links: half an hour and more on four idle cores
    python benchmarks/tp_latency.py --quick               a tiny model, few turns, to see that all of it runs
    python benchmarks/tp_latency.py --out results.json    keep the JSON line there, and a page beside it; a killed run
                                                          goes on with the links that are missing
    python benchmarks/tp_latency.py --overhead            what surrounds the bare loop in a decoded token, by kind
    python benchmarks/tp_latency.py --vllm PYTHON         all-reduces in vLLM's shared memory too, in that environment

A Llama of 42 M parameters in 12 blocks with random weights, fp32, gloo. A link of 10 Gbit, 1 Gbit or 200 Mbit is a
pair of network namespaces joined by veth, each end behind `tc ... tbf`; that needs Linux, root and iproute2, and is
skipped with a message where the kernel forbids it. Variants take turns, medians count:

    single process      the whole model on one rank's core, no tensor parallelism
    transformers        transformers' own tensor parallelism
    all syncs           our runtime with an empty plan
    plan                8 of the 12 blocks dropped
    all dropped, int8   every block's first sync left out, or sent in int8
    bare, bare dropped  a loop over torch.distributed with the same maths and nothing else around it

`ideal` is what the dropped syncs cost: their number times one all-reduce of that size, measured cold between
computation (elision.spd.runtimes.latency). `model` is the same by alpha and beta, fitted to all-reduces of other sizes
(elision.spd.costs). How much slower the empty plan is than transformers is the median over pairs that are milliseconds
apart, token by token; transformers loaded a second time ("twin") says what no difference looks like there.
Each rank has the cores of its share: its computing thread the first and gloo's loop thread the second. On a single core
that thread starves for milliseconds behind the computation, so there it becomes SCHED_BATCH.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import json
import math
import os
import pstats
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import machine
import torch
import torch.distributed as dist
import tp_latency_report
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from elision import files
from elision.blocks import decoder
from elision.spd import SyncPlan
from elision.spd.block import plain_block, shard, span, spd_block
from elision.spd.costs import saving, treatments
from elision.spd.int8 import all_reduce_on_rank
from elision.spd.runtimes import latency
from elision.spd.runtimes import transformers as runtime
from elision.spd.runtimes.latency import Workload
from elision.spd.simulate import local_block

RANKS = 2
RATES = {"loopback": None, "10gbit": 10_000_000_000, "1gbit": 1_000_000_000, "200mbit": 200_000_000}  # bits a second
WORK = (Workload(1, 32, 24), Workload(8, 32, 24), Workload(1, 128), Workload(1, 512))
QUICK = (Workload(1, 8, 2), Workload(2, 8))
PLAN = SyncPlan(RANKS, tuple(range(1, 9)))


def config(quick: bool) -> LlamaConfig:
    """The model's; 42 M parameters."""
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "vocab_size": 8192}
    if quick:
        sizes = {"hidden_size": 64, "intermediate_size": 176, "vocab_size": 256}
    return LlamaConfig(
        **sizes,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )


# --- what a rank does ---------------------------------------------------------------------------------------------


class Bare:
    """The model on this rank as a plain loop: block.py's functions on contiguous shards, and an all-reduce."""

    def __init__(self, model: Any, rank: int, reduce: Callable[[Tensor], Tensor], dropped: bool) -> None:
        self.config, self.view, self.reduce = model.config, decoder(model), reduce
        self.step = spd_block if dropped else plain_block
        self.blocks = []
        for block in self.view.blocks:
            own = shard(rank, RANKS, block.heads, block.kv_heads, block.intermediate_size)
            rows = span(own.heads, block.head_dim)  # as many key/value heads as heads
            qkv = torch.cat([p.weight[rows] for p in (block.q, block.k, block.v)]).detach()
            whole = local_block(block, rank, RANKS)
            parts = {name: getattr(whole, name).detach().contiguous() for name in ("o", "up", "gate", "down")}
            self.blocks.append((block, qkv, dataclasses.replace(whole, **parts)))

    def __call__(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> SimpleNamespace:
        """Logits of the last position, and keys and values of all so far."""
        model: Any = self.view.model.base_model
        x = model.embed_tokens(input_ids)
        before = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        tokens = input_ids.shape[1]
        cos, sin = (t.unsqueeze(1) for t in model.rotary_emb(x, torch.arange(before, before + tokens)[None]))
        cache = []
        for index, (block, qkv, local) in enumerate(self.blocks):
            joined = F.linear(block.attention_norm(x), qkv).unflatten(-1, (3, -1, block.head_dim))
            q, k, v = (t.transpose(1, 2) for t in joined.unbind(2))
            q, k = (t * cos + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * sin for t in (q, k))
            if past_key_values is not None:
                k, v = (torch.cat(pair, 2) for pair in zip(past_key_values[index], (k, v), strict=True))
            cache.append((k, v))
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1)
            x = self.step(x, heads.transpose(1, 2).flatten(2), local, self.reduce)
        return SimpleNamespace(logits=self.view.logits(x[:, -1:]), past_key_values=cache)


def settle(rank: int) -> str:
    """Keep gloo's loop thread from starving behind this rank's computation; say how."""
    if not hasattr(os, "sched_setaffinity"):
        return "left to the system"
    cores = sorted(os.sched_getaffinity(0))
    others = [int(task) for task in os.listdir("/proc/self/task") if int(task) != os.getpid()]
    share = len(cores) // RANKS
    own = cores[rank * share : (rank + 1) * share] or cores
    if len(own) > 1:
        os.sched_setaffinity(0, own[:1])
        for thread in others:
            os.sched_setaffinity(thread, own[1:])
        return "a core each for computation and gloo's loop"
    for thread in others:
        os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
    return "one core, gloo's loop SCHED_BATCH"


def rank_main(place: str, out: str, turns: int, quick: bool) -> None:
    """One rank on one link: all variants in turns; rank 0 writes what it found."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    model = runtime.load(place, SyncPlan(RANKS), timeout=120.0, drop=False)
    rank = dist.get_rank()
    dist.all_reduce(torch.zeros(1))
    threads = settle(rank)
    distributed = DistributedConfig(tp_size=RANKS, tp_plan="auto")
    own, twin = (
        AutoModelForCausalLM.from_pretrained(place, distributed_config=distributed, dtype=torch.float32)
        for _ in range(2)
    )
    whole = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    everything = tuple(range(layers))

    def reduce(share: Tensor) -> Tensor:
        dist.all_reduce(share)
        return share

    def alone(workload: Workload) -> list[float]:
        took = latency.timed(whole, workload) if rank == 0 else []
        dist.barrier()
        return took

    plans = {"all syncs": SyncPlan(RANKS), "plan": PLAN}
    plans |= {"all dropped": SyncPlan(RANKS, everything), "int8": SyncPlan(RANKS, int8=everything)}
    variants: dict[str, Callable[[Workload], list[float]]] = {
        "single process": alone,
        "transformers": lambda workload: latency.timed(own, workload),
        **{name: latency.under(model, plan) for name, plan in plans.items()},
    }
    for name, dropped in (("bare", False), ("bare dropped", True)):
        bare = Bare(whole, rank, reduce, dropped)
        with torch.no_grad():
            ids = torch.arange(3, 19)[None]
            with runtime.drop_syncs(model, plans["all dropped" if dropped else "all syncs"]):
                expected = model(ids).logits[:, -1:]
            torch.testing.assert_close(bare(ids).logits, expected, rtol=1e-4, atol=1e-4)
        variants[name] = lambda workload, bare=bare: latency.timed(bare, workload)
    work = QUICK if quick else WORK
    times: dict[str, dict[str, list[float]]] = {}
    pairs: dict[str, dict[str, list[float]]] = {}
    alike = {"transformers": own, "empty plan": model, "twin": twin}
    for workload in work:
        if rank == 0:
            print(f"{workload.name}: {turns} turns of {len(variants)} variants", file=sys.stderr, flush=True)
        times |= latency.compare(variants, [workload], turns)
        with torch.no_grad(), runtime.drop_syncs(model, plans["all syncs"]):
            pairs[workload.name] = side_by_side(alike, workload, (12 if workload.steps else 3) * turns)
    link, _ = latency.probe(turns=5 if quick else 30)

    def int8_sync(tensor: Tensor) -> Tensor:
        return all_reduce_on_rank(tensor, rank, RANKS, all_to_all, all_gather)

    rows = []
    for workload in work:
        repeats = 5 if quick else 50
        sync = latency.cold_all_reduce(4 * hidden * workload.passing, repeats)
        message = torch.randn(workload.passing, hidden)
        int8 = latency.cold(lambda message=message: int8_sync(message), repeats)
        took = {name: statistics.median(seconds) for name, seconds in times[workload.name].items() if seconds}
        base = took.get("all syncs", float("nan"))
        bare = took.get("bare", float("nan"))
        for name, seconds in took.items():
            plan = plans.get(name, plans["all dropped"] if name == "bare dropped" else plans["all syncs"])
            reference = bare if name.startswith("bare") else base
            quartiles = statistics.quantiles(times[workload.name][name], n=4, method="inclusive")
            rows.append(
                {
                    "workload": workload.name,
                    "variant": name,
                    "ms": 1e3 * seconds,
                    "quartiles_ms": [1e3 * quartiles[0], 1e3 * quartiles[2]],
                    "saved_ms": 1e3 * (reference - seconds),
                    "saved": 1 - seconds / reference,
                    "all_reduce_ms": 1e3 * (int8 if plan.int8 else sync),
                    "ideal_ms": 1e3 * (len(plan.dropped) * sync + len(plan.int8) * (sync - int8)),
                    "model_ms": 1e3 * saving(treatments(plan, layers), link, hidden, workload.passing, width=4).seconds,
                }
            )
    if rank == 0:
        found = {
            "empty_plan": [
                {"workload": name, "pairs": len(took["twin"])}
                | {key: over(took[key], took["transformers"]) for key in ("empty plan", "twin")}
                for name, took in pairs.items()
            ],
            "threads": threads,
            "alpha_us": 1e6 * link.alpha,
            "gbytes_per_s": 1e-9 / link.beta if link.beta else None,
        }
        Path(out).write_text(json.dumps({**found, "rows": rows}), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def side_by_side(models: dict[str, Any], workload: Workload, repeats: int) -> dict[str, list[float]]:
    """Seconds of `repeats` decoded tokens or prompt passes by model, one of each model's before anyone's next.

    What is 50 ms apart is seldom told apart by the machine; the models take turns in going first.
    """
    tokens = workload.tokens if workload.steps else 0
    ids = torch.arange(workload.batch * workload.tokens).view(workload.batch, -1) % 997 + 3
    caches = (
        {name: model(input_ids=ids, use_cache=True).past_key_values for name, model in models.items()} if tokens else {}
    )
    took: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        first = repeat % len(models)
        for name in [*list(models)[first:], *list(models)[:first]]:
            given = {"past_key_values": caches[name]} if tokens else {}
            start = latency.clock()
            out = models[name](input_ids=ids[:, :1] if tokens else ids, use_cache=True, logits_to_keep=1, **given)
            spent = latency.clock() - start
            if repeat:
                took[name].append(spent)
            if tokens:
                caches[name] = out.past_key_values
    return took


def over(slow: list[float], fast: list[float]) -> list[float]:
    """By how much `slow` exceeds `fast`, as a share: median over pairs, and its 95% interval from order statistics."""
    ratios = sorted(a / b - 1 for a, b in zip(slow, fast, strict=True))
    # the median of all pairs there could be lies below the k-th least with probability P(Binomial(pairs, 1/2) < k)
    below, k = 0.5 ** len(ratios), 1
    while (more := below + math.comb(len(ratios), k) * 0.5 ** len(ratios)) <= 0.025:
        below, k = more, k + 1
    return [statistics.median(ratios), ratios[k - 1], ratios[-k]]


KINDS = {  # of Python functions by their file, and of built-in ones by their name; the first that fits
    "waiting in the all-reduce": ("c10d.wait>", "wait_tensor", "allreduce"),
    "products and attention": ("_nn.linear>", "scaled_dot_product", "embedding"),
    "DTensor and collectives, in Python": (
        "distributed/tensor",
        "functional_collectives",
        "distributed_c10d",
        "_ops.py",
    ),
    "transformers' modules": ("transformers/",),
    "calls of modules and hooks": ("torch/nn/modules/module.py",),
    "elision": ("elision/",),
}


def overhead_main(place: str, out: str, tokens: int) -> None:
    """One rank: where the time of a decoded token goes beside what the bare loop takes; rank 0 writes it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    model = runtime.load(place, SyncPlan(RANKS), timeout=120.0, drop=False)
    rank = dist.get_rank()
    dist.all_reduce(torch.zeros(1))
    settle(rank)
    whole = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    workload = Workload(1, 32, tokens)

    def reduce(share: Tensor) -> Tensor:
        dist.all_reduce(share)
        return share

    found = []
    for name, plan in (("all syncs", SyncPlan(RANKS)), ("all dropped", SyncPlan(RANKS, tuple(range(12))))):
        bare = Bare(whole, rank, reduce, bool(plan.dropped))
        both = {name: latency.under(model, plan), "bare": lambda workload, bare=bare: latency.timed(bare, workload)}
        took = latency.compare(both, [workload], 4)[workload.name]
        with runtime.drop_syncs(model, plan):
            profile = cProfile.Profile()
            profile.runcall(latency.timed, model, workload)
        own = {kind: 0.0 for kind in [*KINDS, "all else"]}
        for (file, _, function), (_, _, seconds, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
            place_of = f"{file} {function}"
            kind = next((kind for kind, marks in KINDS.items() if any(mark in place_of for mark in marks)), "all else")
            own[kind] += 1e3 * seconds / (tokens + 1)  # the prompt's pass is one more
        medians = {key: 1e3 * statistics.median(seconds) for key, seconds in took.items()}
        found.append({"variant": name, "ms": medians[name], "bare_ms": medians["bare"], "profiled_ms": own})
    if rank == 0:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def show_overhead(found: list[dict[str, Any]], console: Console) -> None:
    """A column a variant: what it takes, what the bare loop takes, what the profiler saw."""
    table = Table(title="A decoded token, batch 1, loopback, ms")
    for head in ("", *(each["variant"] for each in found)):
        table.add_column(head, justify="right" if head else "left")
    table.add_row("as it is", *(f"{each['ms']:.2f}" for each in found))
    table.add_row("bare loop", *(f"{each['bare_ms']:.2f}" for each in found))
    table.add_section()
    for kind in found[0]["profiled_ms"]:
        table.add_row(f"under the profiler: {kind}", *(f"{each['profiled_ms'][kind]:.2f}" for each in found))
    console.print(table)


def shared_memory_main(out: str, quick: bool) -> None:
    """One rank in vLLM's environment: its shared-memory all-reduce, cold, at every workload's size."""
    import vllm._C  # noqa: F401, registers the operations

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    dist.all_reduce(torch.zeros(1))
    settle(rank)
    handle = torch.ops._C.init_shm_manager("elision-tp-latency", RANKS, rank, 1)
    dist.barrier()
    torch.ops._C.join_shm_manager(handle, "elision-tp-latency")
    dist.barrier()
    rows = []
    for workload in QUICK if quick else WORK:
        tensor = torch.zeros(workload.passing, config(quick).hidden_size)
        took = latency.cold(lambda tensor=tensor: torch.ops._C.shm_allreduce(handle, tensor), 5 if quick else 50)
        rows.append({"workload": workload.name, "all_reduce_ms": 1e3 * took})
    if rank == 0:
        Path(out).write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def all_to_all(messages: Tensor) -> Tensor:
    """As int8's exchange wants it."""
    received = torch.empty_like(messages)
    dist.all_to_all_single(received, messages)
    return received


def all_gather(message: Tensor) -> Tensor:
    """Likewise."""
    everyone = message.new_empty((RANKS, *message.shape))
    dist.all_gather(list(everyone.unbind()), message)
    return everyone


# --- links ---------------------------------------------------------------------------------------------------------


class LinkRefused(RuntimeError):
    """This machine cannot make the link; the message says why."""


@contextmanager
def joined(rate: int | None) -> Iterator[list[tuple[list[str], dict[str, str]]]]:
    """For each rank, what its command begins with and its environment, on a link of `rate` bits a second."""
    if rate is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        yield [([], address) for _ in range(RANKS)]
        return
    if shutil.which("ip") is None or shutil.which("tc") is None:
        raise LinkRefused("ip and tc are missing: install iproute2")
    names = [f"elision-{os.getpid()}-{end}" for end in range(RANKS)]
    burst = max(65_536, rate // 8 // 1000)  # what goes out in a millisecond
    try:
        for name in names:
            _do("ip", "netns", "add", name)
        _do("ip", "link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth1", "netns", names[1])
        for end, name in enumerate(names):
            inside = ("ip", "netns", "exec", name)
            _do(*inside, "ip", "address", "add", f"10.77.0.{end + 1}/24", "dev", f"veth{end}")
            _do(*inside, "ip", "link", "set", "lo", "up")
            _do(*inside, "ip", "link", "set", f"veth{end}", "up")
            shape = ("rate", f"{rate}bit", "burst", str(burst), "latency", "500ms")
            _do(*inside, "tc", "qdisc", "add", "dev", f"veth{end}", "root", "tbf", *shape)
        address = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500"}
        yield [
            (["ip", "netns", "exec", name], {**address, "GLOO_SOCKET_IFNAME": f"veth{end}"})
            for end, name in enumerate(names)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LinkRefused(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


def measure(place: str, name: str, turns: int, quick: bool) -> dict[str, Any]:
    """Start the ranks on a link, wait, and give what rank 0 found.

    Raises:
        LinkRefused: the link cannot be made here.
    """
    with joined(RATES[name]) as ends:
        return {"link": name, **run(ends, sys.executable, ["--rank-of", place, "--turns", str(turns)], quick)}


def run(ends: list[tuple[list[str], dict[str, str]]], python: str, options: list[str], quick: bool) -> Any:
    """Start this program in every rank and wait; what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as room:
        out = str(Path(room) / "out.json")
        command = [python, __file__, *options, "--rank-out", out, *(["--quick"] if quick else [])]
        ranks = []
        for rank, (prefix, address) in enumerate(ends):
            environment = os.environ | address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
            environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            ranks.append(subprocess.Popen([*prefix, *command], env=environment))
        try:
            codes = [process.wait() for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        if any(codes):
            raise SystemExit(f"a rank failed: {' '.join(command)}: exit codes {codes}")
        return json.loads(Path(out).read_text(encoding="utf-8"))


# --- what is shown -------------------------------------------------------------------------------------------------


def show(found: dict[str, Any], console: Console) -> None:
    """One link's table."""
    rate = found["gbytes_per_s"]
    title = (
        f"{found['link']}: alpha {found['alpha_us']:.0f} us, {rate:.3g} GB/s; {found['threads']}"
        if rate
        else found["link"]
    )
    table = Table(title=title)
    for head in ("workload", "variant", "ms", "quartiles", "saved", "saved ms", "ideal ms", "model ms", "one sync ms"):
        table.add_column(head, justify="left" if head in ("workload", "variant") else "right")
    for row in found["rows"]:
        low, high = row["quartiles_ms"]
        cells = [row["workload"], row["variant"], f"{row['ms']:.2f}", f"{low:.2f} to {high:.2f}"]
        plain = row["variant"] in ("single process", "transformers", "all syncs", "bare")
        saved = [f"{row['saved_ms']:.2f}", f"{row['ideal_ms']:.2f}", f"{row['model_ms']:.2f}"]
        table.add_row(*cells, f"{row['saved']:.1%}", *(["", "", ""] if plain else saved), f"{row['all_reduce_ms']:.3f}")
    console.print(table)


def main() -> None:
    """Measure link by link; tables, bars, one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", default=",".join(RATES), help=f"of {', '.join(RATES)}; comma-separated")
    parser.add_argument("--turns", type=int, default=15, help="turns of each variant")
    parser.add_argument("--out", type=Path, help="file for the JSON line, with a page beside it")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two turns")
    parser.add_argument("--overhead", action="store_true", help="profile a decoded token on loopback instead")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vLLM")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--shared-memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank-out", help=argparse.SUPPRESS)
    given = parser.parse_args()
    turns = 2 if given.quick else given.turns
    if given.rank_of and given.overhead:
        return overhead_main(given.rank_of, given.rank_out, 8 if given.quick else 128)
    if given.rank_of:
        return rank_main(given.rank_of, given.rank_out, turns, given.quick)
    if given.shared_memory:
        return shared_memory_main(given.rank_out, given.quick)
    if unknown := [name for name in given.links.split(",") if name not in RATES]:
        parser.error(f"--links {unknown[0]} is not known: use {', '.join(RATES)}")
    console = Console(width=150)
    settings = {**machine.about(), "quick": given.quick, "turns": turns}
    found: dict[str, Any] = {"benchmark": "tp_latency", **settings, "bars": [], "links": [], "vllm": None}
    if given.out and given.out.exists():
        before = json.loads(given.out.read_text(encoding="utf-8"))
        if any(before.get(key) != found[key] for key in ("machine", "cores", "torch", "quick", "turns")):
            parser.error(f"--out {given.out} has a run under other settings: give another file, or delete it")
        found = before

    def keep() -> None:
        if given.out:
            files.write_text(given.out, json.dumps(found) + "\n")
            tp_latency_report.write(given.out)

    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(given.quick))
        found["parameters"] = model.num_parameters()
        model.save_pretrained(place)
        if given.overhead:
            with joined(None) as ends:
                rows = run(ends, sys.executable, ["--rank-of", place, "--overhead"], given.quick)
            show_overhead(rows, console)
            return print(json.dumps({"benchmark": "tp_latency_overhead", **settings, "rows": rows}))
        for name in given.links.split(","):
            if all(link["link"] != name for link in found["links"]):
                load = os.getloadavg()[0]
                try:
                    found["links"].append({**measure(place, name, turns, given.quick), "load": load})
                except LinkRefused as refused:
                    console.print(f"{name} skipped: {refused}")
                    continue
                # two turns of a tiny model meet or miss nothing
                found["bars"] = [] if given.quick else tp_latency_report.verdicts(found["links"])
                keep()
            show(next(link for link in found["links"] if link["link"] == name), console)
    if given.vllm and not found["vllm"]:
        with joined(None) as ends:
            found["vllm"] = run(ends, given.vllm, ["--shared-memory"], given.quick)
        keep()
    for row in found["vllm"] or []:
        console.print(f"vLLM's shared memory, {row['workload']}: one all-reduce {row['all_reduce_ms']:.3f} ms")
    for each in found["bars"]:
        console.print(tp_latency_report.said(each).replace("*", ""))
    print(json.dumps(found))
    return None


if __name__ == "__main__":
    main()
