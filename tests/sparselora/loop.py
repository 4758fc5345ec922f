"""A hand-written accelerate loop over micro-batches, for one process or for each of several."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from elision.sparselora import sparsify
from tests.sparselora import tiny

RANKS, ACCUMULATED, STEPS = 2, 2, 3
RATE = 0.1


def micro_batches() -> list[dict[str, Tensor]]:
    """Of all ranks, in the order in which one process would take them; each with an equal number of targets."""
    shapes = [((5, 3), (3, 2)), ((4, 6), (2, 3)), ((7, 2), (1, 4)), ((3, 3), (3, 2))]
    return [tiny.batch(*shapes[i % 4], left=i % 3 == 0) for i in range(RANKS * ACCUMULATED * STEPS)]


def trained(rank: int, ranks: int, path: Any) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Adapters after STEPS steps of SGD, the first of them dense, and what the handle counted."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED * RANKS // ranks)
    model = tiny.lora()
    with sparsify(model, tiny.plan(model, 0.6, dense_steps=0.3), path=path) as handle:
        wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(adapters(model).values(), lr=RATE))
        for index, batch in enumerate(micro_batches()[rank::ranks]):
            handle.step(index // (ACCUMULATED * RANKS // ranks) / STEPS)
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(**batch, use_cache=False).loss)
                optimizer.step()
                optimizer.zero_grad()
        counted = {**handle.forwards, **handle.paths}
    return {name: p.detach().clone() for name, p in adapters(model).items()}, counted


def sharded(
    rank: int, ranks: int, path: Any, parts: bool = False, checkpointed: bool = False, mixed: bool = False
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The same under FSDP2, in the units in which accelerate wraps a model (it does so on GPUs alone): each layer, the
    embeddings, final norm and head, and the rest. `parts`: each attention and each MLP instead of each layer.
    `mixed`: gathered in bfloat16.
    """
    model: Any = tiny.lora(dtype=torch.float32) if mixed else tiny.lora()
    shard = partial(fully_shard, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16 if mixed else None))
    inner = model.get_base_model()
    if checkpointed:
        tiny.checkpoint(model, reentrant=False)
    with sparsify(model, tiny.plan(model, 0.6, dense_steps=0.3), path=path) as handle:
        layers = [[layer.self_attn, layer.mlp] if parts else [layer] for layer in inner.model.layers]
        for unit in (*(unit for layer in layers for unit in layer), inner.model.embed_tokens):
            shard(unit)
        shard([inner.model.norm, inner.lm_head])
        shard(model)
        optimizer = torch.optim.SGD(adapters(model).values(), lr=RATE)
        for index, batch in enumerate(micro_batches()[rank::ranks]):
            handle.step(index // ACCUMULATED / STEPS)
            (model(**batch, use_cache=False).loss / ACCUMULATED).backward()
            if index % ACCUMULATED == ACCUMULATED - 1:
                optimizer.step()
                optimizer.zero_grad()
        counted = {**handle.forwards, **handle.paths}
    full = {name: p.detach().full_tensor() for name, p in adapters(model).items()}  # type: ignore[attr-defined]
    return full, counted


def adapters(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def rank_main(rank: int, place: Path) -> None:
    """What one of RANKS processes does: every case in turn, each result in a file of its own."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), GLOO_SOCKET_IFNAME="lo")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # accelerate asks for them, and joins what is joined
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place / 'store'}", rank=rank, world_size=RANKS)
    for name, case, path in (
        ("ddp-fast", trained, "fast"),
        ("ddp-reference", trained, "reference"),
        ("fsdp2-fast", sharded, "fast"),
        ("fsdp2-checkpointed", partial(sharded, checkpointed=True), "fast"),
        ("fsdp2-reference", sharded, "reference"),
        ("fsdp2-mixed-fast", partial(sharded, mixed=True), "fast"),
        ("fsdp2-mixed-reference", partial(sharded, mixed=True), "reference"),
        ("fsdp2-parts", partial(sharded, parts=True), "auto"),
    ):
        torch.save(case(rank, RANKS, path), place / f"{name}{rank}.pt")
    dist.destroy_process_group()
