"""Head grouping on a model: heads move between ranks, the plain model stays what it was (maths: Healing).

Rows of Q, K, V and the matching columns of O move together, a key/value head with its query heads, so the sum over
heads has the same terms in another order: the plain model's outputs are equal up to that order's rounding, and the
inverse permutation gives the weights back bit for bit. A plan remembers in `heads` which original query head stands at
each place of a regrouped block, nothing else has to know: checkpoints and runtimes see an ordinary model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elision.blocks import Block, Decoder
from elision.errors import InputError
from elision.progress import progress
from elision.spd.activations import Source, sources
from elision.spd.artifact import Treated
from elision.spd.block import add_residual, mlp_share
from elision.spd.heads import assign, distances, scatter
from elision.spd.plan import SyncPlan
from elision.spd.simulate import carry, check_carried, check_plain, covered, facts, local_block
from elision.spd.streams import Batch, check_batches, check_weights, evaluating, step
from elision.streaming import resident


def regroup(
    model: nn.Module,
    plan: SyncPlan,
    batches: Iterable[Batch],
    *,
    blocks: Sequence[int] | None = None,
    quiet: bool = False,
) -> Treated:
    """Move the heads of dropped blocks between ranks as the paper does: scatter, then match to MLP shards, in place.

    Args:
        model: the original model. What it computes with every sync in place does not change.
        plan: which blocks are dropped, for how many ranks; none of `blocks` corrected or healed yet.
        batches: as for `sensitivity`; a few hundred tokens a head are plenty.
        blocks: the dropped blocks to regroup; all of them by default.
        quiet: show no progress bar.

    Returns:
        The model and the plan with `heads` of those blocks in it.

    Raises:
        InputError: key/value heads that are replicated (more ranks than there are), a block that is not dropped or is
            treated already, or what `simulate` and `sensitivity` refuse.
    """
    view = covered(model, plan.ranks)
    plan.check(facts(view))
    chosen = tuple(plan.dropped if blocks is None else blocks)
    if stray := sorted(set(chosen) - set(plan.dropped)):
        raise InputError(f"block {stray[0]} keeps its sync: name it in dropped, or do not regroup it")
    check_weights(view, plan)
    for block in view.blocks:
        check_plain(block)
    orders = grouped(view, plan, check_batches(batches, view.config), chosen, quiet)
    regrouped = replace(plan, heads={**plan.heads, **orders}, verified=None)
    carry(view, regrouped)  # before any head moves: a run cut short leaves no model that passes for the original
    for index, order in orders.items():
        permute(view.blocks[index], order)
    return Treated(view.model, regrouped)


def grouped(
    view: Decoder, plan: SyncPlan, batches: Sequence[Batch], blocks: Sequence[int], quiet: bool
) -> dict[int, tuple[int, ...]]:
    """The order of heads that `regroup` gives each of `blocks`, nothing moved yet; the model may be streamed.

    Raises:
        InputError: key/value heads that are replicated, or a block that is treated already.
    """
    check_movable(view, plan.ranks)
    kv_heads = view.blocks[0].kv_heads
    if treated := sorted(set(blocks) & {*plan.corrections, *plan.healed, *plan.heads}):
        raise InputError(f"block {treated[0]} is treated already: regroup the heads of the original model")
    orders: dict[int, tuple[int, ...]] = {}
    data = sources(view, batches)
    with _eager(view):
        eager = sources(view, batches)
    with evaluating(view.model), torch.no_grad(), progress("Grouping heads", len(view.blocks), quiet) as advance:
        hidden = [source.embedded for source in data]
        for block in view.blocks:
            with resident(block.layer):
                if block.index in blocks:
                    with _eager(view):
                        grams = [_gram(block, x, source) for x, source in zip(hidden, eager, strict=True)]
                    groups = scatter(distances(torch.stack(grams).sum(0), kv_heads), plan.ranks)
                    squares = [_squares(block, groups, x, source) for x, source in zip(hidden, data, strict=True)]
                    shards = assign(torch.stack(squares).sum(0).sqrt())
                    units = [unit for shard in range(plan.ranks) for unit in groups[shards.index(shard)]]
                    orders[block.index] = _query_heads(units, block)
                hidden = [step(block, None, x, s.kwargs[block.index]) for x, s in zip(hidden, data, strict=True)]
            advance(1)
    return orders


def check_movable(view: Decoder, ranks: int) -> None:
    """Raise InputError where `ranks` ranks hold copies of key/value heads, so that no head can move between them."""
    kv_heads = view.blocks[0].kv_heads
    if ranks > kv_heads:
        raise InputError(
            f"{ranks} ranks replicate the model's {kv_heads} key/value heads, so heads cannot move between them: "
            f"give at most {kv_heads} ranks, or leave the heads where they are"
        )


def ungroup(model: nn.Module, plan: SyncPlan) -> SyncPlan:
    """Give every head its original place back, bit for bit, and return the plan without `heads`.

    Raises:
        InputError: the model is not the one that was regrouped, or a regrouped block is corrected or healed, which
            holds for its order of heads only.
    """
    view = covered(model, plan.ranks)
    check_carried(view, plan)
    if treated := sorted(set(plan.heads) & {*plan.corrections, *plan.healed}):
        raise InputError(f"block {treated[0]} was treated with its heads regrouped: load the original model instead")
    for index, order in plan.heads.items():
        permute(view.blocks[index], inverse(order))
    original = replace(plan, heads={}, verified=None)
    carry(view, original)
    return original


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes `order`."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


@torch.no_grad()
def permute(block: Block, order: Sequence[int]) -> None:
    """Put query head order[p] at place p, in place; key/value heads follow their query heads, which must stay together.

    Raises:
        InputError: `order` is no permutation of the query heads, or tears those of one key/value head apart.
    """
    size = block.heads // block.kv_heads
    units = [order[place] // size for place in range(0, len(order), size)]
    if sorted(order) != list(range(block.heads)) or _query_heads(units, block) != tuple(order):
        raise InputError(
            f"heads {list(order)} of block {block.index} are no order of its {block.heads} query heads that keeps the "
            f"{size} of a key/value head together: regroup the original model"
        )
    for projection, heads in ((block.q, order), (block.k, units), (block.v, units)):
        rows = _channels(heads, block)
        for tensor in (projection.weight, projection.bias):
            if tensor is not None:
                tensor.copy_(tensor[rows.to(tensor.device)])
    block.o.weight.copy_(block.o.weight[:, _channels(order, block).to(block.o.weight.device)])


def _query_heads(units: Sequence[int], block: Block) -> tuple[int, ...]:
    """The query heads that read these key/value heads, in their order."""
    size = block.heads // block.kv_heads
    return tuple(unit * size + g for unit in units for g in range(size))


def _channels(heads: Sequence[int], block: Block) -> Tensor:
    """The channels of these heads, in their order."""
    return (torch.tensor(heads).unsqueeze(1) * block.head_dim + torch.arange(block.head_dim)).flatten()


def _gram(block: Block, x: Tensor, source: Source) -> Tensor:
    """Inner products (heads, heads) of the attention score maps, queries that are padding left out, in float64."""
    assert block.attention_norm is not None
    normed = block.attention_norm(x)
    maps = block.attention(hidden_states=normed, **source.kwargs[block.index])[1]  # (batch, heads, query, key)
    found = maps.new_zeros((block.heads, block.heads), dtype=torch.float64)
    for row, real in zip(maps, source.real, strict=True):  # one at a time: in float64, a batch of maps is large
        flat = row[:, real].flatten(1).double()
        found += flat @ flat.T
    return found


def _squares(block: Block, groups: Sequence[Sequence[int]], x: Tensor, source: Source) -> Tensor:
    """At [g, s], the squared norm of MLP shard s's output on what group g of units sees, in float64."""
    ranks = len(groups)
    with _heads_of(block) as outputs:
        block.layer(x, **source.kwargs[block.index])
    heads, x = outputs[0][source.real], x[source.real]
    shards = [local_block(block, rank, ranks) for rank in range(ranks)]
    found = torch.zeros(ranks, ranks, dtype=torch.float64)
    for group, members in enumerate(groups):
        columns = _channels(_query_heads(members, block), block).to(x.device)
        partial = F.linear(heads[:, columns], block.o.weight[:, columns])
        u = add_residual(x, partial, block.residual_multiplier, block.o.bias)
        for rank, shard in enumerate(shards):
            found[group, rank] = mlp_share(u, shard).double().square().sum()
    return found


@contextmanager
def _heads_of(block: Block) -> Iterator[list[Tensor]]:
    """Notes what the output projection is given."""
    outputs: list[Tensor] = []
    hook = block.o.base.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
    try:
        yield outputs
    finally:
        hook.remove()


@contextmanager
def _eager(view: Decoder) -> Iterator[None]:
    """Attention that says its score maps inside. Padding's own rows may come out as nan there."""
    before: Any = view.model.config._attn_implementation
    view.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        view.model.set_attn_implementation(before)
