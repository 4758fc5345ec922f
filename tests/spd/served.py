"""Checkpoints that carry a plan, and real processes that serve them with transformers' tensor parallelism."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteria
from transformers.distributed import DistributedConfig

from elision.blocks import decoder
from elision.errors import InputError
from elision.spd import SyncPlan, save
from elision.spd.corrections import attach
from elision.spd.runtimes import ranks as run
from elision.spd.runtimes import transformers as runtime
from elision.spd.simulate import carry
from tests.spd.tiny import left_padded, tiny, token_ids

Case = tuple[str, dict[str, Any], SyncPlan]  # family, sizes, plan
NEW = 8  # tokens generated


def model_of(family: str, plan: SyncPlan, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """A tiny model, with random corrections where `plan` names some, as if healed for it; the same at every call."""
    model = tiny(family, dtype=dtype, **sizes)
    carry(decoder(model), plan)
    generator = torch.Generator().manual_seed(5)
    for index, kind in plan.corrections.items():
        for parameter in attach(decoder(model).blocks[index], kind, plan.ranks).parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def checkpoint(place: Path, family: str, plan: SyncPlan, **sizes: Any) -> str:
    """Write that model as a checkpoint that carries `plan`."""
    return str(save(model_of(family, plan, **sizes), plan, place))


Task = tuple[Callable[..., Any], tuple[Any, ...]]  # called on every rank with its number first


def spawn(ranks: int, place: Path, tasks: dict[str, Task], killed: tuple[int, ...] = ()) -> dict[str, list[Any]]:
    """Do `tasks` in turn in `ranks` joined processes; by task, what each rank returned (None: killed before)."""
    place.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(rank, ranks, place, tasks)) for rank in range(ranks)]
    try:
        for process in processes:
            process.start()
        deadline = time.monotonic() + 400
        for process in processes:
            process.join(timeout=deadline - time.monotonic())
        codes = [process.exitcode for process in processes]
        assert codes == [-signal.SIGKILL if rank in killed else 0 for rank in range(ranks)]
    finally:
        for process in processes:
            process.kill()
    outs = {name: [place / f"{name}{rank}.pt" for rank in range(ranks)] for name in tasks}
    return {
        name: [torch.load(path, weights_only=False) if path.exists() else None for path in paths]
        for name, paths in outs.items()
    }


def _rank(rank: int, ranks: int, place: Path, tasks: dict[str, Task]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = f"file://{place / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=run.JOINING)
    for name, (body, arguments) in tasks.items():
        torch.save(body(rank, *arguments), place / f"{name}{rank}.pt")
    dist.destroy_process_group()


def log_probabilities(model: nn.Module) -> Tensor:
    """Of every next token, at every real position of a batch with padding on the left and of one without."""
    parts = []
    for batch in ({"input_ids": token_ids()}, left_padded()):
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        parts.append(model(**batch).logits.float().log_softmax(-1)[real])
    return torch.cat(parts)


def greedy(generate: Callable[..., Any], **further: Any) -> Tensor:
    """Tokens after a left-padded batch of prompts, by way of the key/value cache."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True, **further}
    return generate(left_padded(), **options)


class Syncs(TorchDispatchMode):
    """Counts the all-reduces inside that blocks call for (the embedding's goes another way), and int8's all-to-alls."""

    count = int8 = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.c10d.allreduce_.default
        self.int8 += func is torch.ops.c10d.alltoall_base_.default
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def serve(rank: int, places: list[str], dtype: torch.dtype | str = "auto") -> list[dict[str, Any]]:
    """What one rank sees of every checkpoint: log-probabilities, tokens, syncs of one forward pass."""
    seen = []
    for place in places:
        model = runtime.load(place, dtype=dtype)
        with Syncs() as syncs, torch.no_grad():
            model(token_ids())
        generate = partial(runtime.generate, model)
        tokens = greedy(generate)
        if model.config.spd_plan.get("skipped"):  # a static cache filled in chunks makes room ahead of all blocks
            assert torch.equal(greedy(generate, cache_implementation="static", prefill_chunk_size=3), tokens)
        found = {"log_probabilities": log_probabilities(model), "tokens": tokens}
        seen.append({**found, "syncs": syncs.count, "int8": syncs.int8})
    return seen


@torch.no_grad()
def _code(model: Any) -> dict[str, str]:
    """What every module of `model` runs, and the layout of its weights: what a speed could differ by."""
    return {
        name: f"{module.forward.__module__}.{module.forward.__qualname__} "
        + ", ".join(f"{key} {getattr(value, 'placements', '')}" for key, value in module._parameters.items())
        for name, module in model.named_modules()
    }


def toggle(rank: int, place: str, plan: SyncPlan) -> dict[str, Any]:
    """transformers' own tensor parallelism, ours with an empty plan, and with `plan` dropped and given back."""
    own: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        place, distributed_config=DistributedConfig(tp_size=plan.ranks, tp_plan="auto")
    )
    model = runtime.load(place)
    seen = {"own": own(token_ids()).logits, "empty": model(token_ids()).logits}
    seen |= {f"{name} code": _code(made) for name, made in (("own", own), ("empty", model))}
    with runtime.drop_syncs(model, plan):
        seen["dropped"] = model(token_ids()).logits
        try:
            runtime.drop_syncs(model, plan)
        except InputError as error:
            seen["twice"] = str(error)
    seen["removed"] = model(token_ids()).logits
    seen["config"] = model.config.to_json_string()
    return seen


def adapted(rank: int, place: str) -> list[str]:
    """The sentences with which the forward of a served model is refused that was given an adapter."""
    found = []
    for skipped in ((), (0,)):
        model = runtime.load(place, drop=False)
        with runtime.drop_syncs(model, SyncPlan(2, () if skipped else (0,), skipped=skipped)):
            block = decoder(model).blocks[0]
            block.mlp.up_proj = nn.Sequential(block.mlp.up_proj)  # as PEFT wraps it
            try:
                model(token_ids())
            except InputError as error:
                found.append(str(error))
    return found


def asked(rank: int, place: str) -> dict[str, Any]:
    """Tokens after lists and after tensors, between requests that are refused."""
    model, found = runtime.load(place), {}
    ids = token_ids()
    short = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    for name, inputs, options in (
        ("tensor", ids, {}),
        ("ragged", {"input_ids": [[5, 6], [7]]}, {}),
        ("lists", {"input_ids": ids.tolist(), "attention_mask": [[1] * ids.shape[1]] * len(ids)}, {}),
        ("lambda", ids, {"prefix_allowed_tokens_fn": lambda *_: [5]}),
        ("row", {"input_ids": ids[0].tolist()}, {}),
    ):
        try:
            found[name] = runtime.generate(model, inputs, **short, **options)
        except InputError as error:
            found[name] = str(error)
    return found


def otherwise_corrected(rank: int, place: str, plan: SyncPlan) -> str:
    """The sentence with which a plan is refused that corrects a checkpoint's block in another way than its own."""
    model = runtime.load(place, drop=False)
    try:
        runtime.drop_syncs(model, plan)
    except InputError as error:
        return str(error)
    return "dropped"


def sample(rank: int, place: str) -> Tensor:
    """Sampled tokens, from a random state that differs from rank to rank."""
    model = runtime.load(place)
    torch.manual_seed(rank)
    return runtime.generate(model, token_ids(seed=rank), max_new_tokens=NEW, do_sample=True, temperature=2.0)


def late(rank: int, place: str) -> Tensor:
    """Tokens of a second request, for which rank 0 comes later than an all-reduce would wait, and rank 1 the third."""
    model = runtime.load(place, timeout=4.0)
    ids = token_ids(rows=1)
    for latest in (None, 0, 1):
        if rank == latest:
            time.sleep(6.0)
        tokens = runtime.generate(model, ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    return tokens


def refused(rank: int, places: list[str], plan: SyncPlan | None = None) -> str:
    """The sentence with which this rank's checkpoint is refused."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="DTensor random")  # transformers fills what is missing first
            runtime.load(places[rank], plan)
    except InputError as error:
        return str(error)
    return "loaded"


class _Dying(StoppingCriteria):
    """Asked after every token; kills or fails one rank after the third."""

    def __init__(self, how: str) -> None:
        self.how, self.left = how, 3

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        self.left -= 1
        if self.left == 0:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError("out of memory for the fun of it")
        return torch.zeros(1, dtype=torch.bool)


def lose(rank: int, place: str, lost: int, how: str) -> dict[str, Any]:
    """What a rank says, and when, after two refused requests and the loss of rank `lost` in a third."""
    model = runtime.load(place)
    for wrong in ({"inputs": torch.tensor([[10**6]])}, {"inputs": token_ids(rows=1), "max_new_tokens": -1}):
        with suppress(ValueError):  # which every rank refuses alike, and outlives
            runtime.generate(model, **wrong)
            raise AssertionError("nothing was refused")
    if rank == lost:
        inner = model.generate
        model.generate = lambda **options: inner(**options, stopping_criteria=[_Dying(how)])
    start = time.monotonic()
    try:
        runtime.generate(model, token_ids(rows=1), max_new_tokens=40, min_new_tokens=40, do_sample=False)
    except (run.RankLostError, MemoryError) as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - start}
    return {"error": "none", "seconds": time.monotonic() - start}
