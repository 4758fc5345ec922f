"""A rank's whole forward pass, written out over block.py: in threads of this process, and in real gloo processes.

Independent of simulate.py: every rank computes its own heads' attention from its own rows of Q, K and V.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from elision.blocks import Block, Decoder, decoder
from elision.spd.block import AllReduce, Shard, plain_block, shard, span, spd_block
from elision.spd.corrections import NAME
from elision.spd.simulate import local_block
from tests.spd.tiny import corrected, token_ids

Case = tuple[str, dict[str, int], tuple[int, ...], dict[int, str]]  # family, sizes, dropped blocks, corrections


def own_attention(block: Block, own: Shard, h: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Causal attention of one rank's heads on the normed input h (batch, sequence, hidden): (..., own heads * dim)."""

    def project(projection, units, norm):
        rows = span(units, block.head_dim)
        bias = None if projection.bias is None else projection.bias[rows]
        heads = F.linear(h, projection.weight[rows], bias).unflatten(-1, (-1, block.head_dim))
        return (heads if norm is None else norm(heads)).transpose(1, 2)

    q = project(block.q, own.heads, block.q_norm)
    k = project(block.k, own.kv_heads, block.k_norm)
    v = project(block.v, own.kv_heads, None)
    if rope is not None:
        cos, sin = (part.unsqueeze(1) for part in rope)
        q, k = (t * cos + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * sin for t in (q, k))
    k, v = (t.repeat_interleave(len(own.heads) // len(own.kv_heads), dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * block.attention.scaling
    back = torch.arange(h.shape[1])[:, None] - torch.arange(h.shape[1])
    window = block.sliding_window or h.shape[1]
    scores = scores.masked_fill((back < 0) | (back >= window), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)


def rank_hidden(view: Decoder, x: Tensor, rank: int, ranks: int, dropped: tuple[int, ...], reduce: AllReduce) -> Tensor:
    """The last block's output on `rank`, from the embeddings x (batch, sequence, hidden)."""
    rope = None
    if hasattr(view.model.base_model, "rotary_emb"):
        rope = view.model.base_model.rotary_emb(x, torch.arange(x.shape[1])[None])
    for block in view.blocks:
        own = shard(rank, ranks, block.heads, block.kv_heads, block.intermediate_size)
        heads = own_attention(block, own, block.attention_norm(x), rope)
        step = spd_block if block.index in dropped else plain_block
        x = step(x, heads, local_block(block, rank, ranks, getattr(block.layer, NAME, None)), reduce)
    return x


def logits_in_threads(model, ids: Tensor, ranks: int, dropped: tuple[int, ...]) -> Tensor:
    """What `ranks` ranks compute, each in a thread of its own, checked to be the same on all of them."""
    view = decoder(model)
    barrier = threading.Barrier(ranks, timeout=60)
    board: list[Tensor] = [torch.empty(0)] * ranks

    def reduce_on(rank: int) -> AllReduce:
        def reduce(tensor: Tensor) -> Tensor:
            board[rank] = tensor
            barrier.wait()
            total = sum(board[1:], board[0])
            barrier.wait()
            return total

        return reduce

    with torch.no_grad():
        x = model(ids, output_hidden_states=True).hidden_states[0]

    @torch.no_grad()
    def run(rank: int) -> Tensor:
        return view.logits(rank_hidden(view, x, rank, ranks, dropped, reduce_on(rank)))

    with ThreadPoolExecutor(ranks) as pool:
        first, *others = pool.map(run, range(ranks))
    for other in others:
        assert torch.equal(first, other)
    return first


def gloo_rank(rank: int, ranks: int, cases: list[Case], store: str, out: str) -> None:
    """Body of one process: joins the others at `store`, computes with dist.all_reduce, rank 0 writes to `out`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    syncs = 0

    def reduce(tensor: Tensor) -> Tensor:
        nonlocal syncs
        syncs += 1
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    results = []
    try:
        for family, sizes, dropped, kinds in cases:
            syncs = 0
            model = corrected(family, ranks, kinds, **sizes)
            view = decoder(model)
            with torch.no_grad():
                x = model(token_ids(), output_hidden_states=True).hidden_states[0]
                logits = view.logits(rank_hidden(view, x, rank, ranks, dropped, reduce))
            everyone = [torch.empty_like(logits) for _ in range(ranks)]
            dist.all_gather(everyone, logits)
            assert all(torch.equal(logits, other) for other in everyone)
            results.append({"logits": logits, "syncs": syncs})
        if rank == 0:
            torch.save(results, out)
    finally:
        dist.destroy_process_group()
