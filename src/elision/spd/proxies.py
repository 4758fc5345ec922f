"""Cheaper ways to say which blocks can spare their sync (maths: Cheaper orders); sensitivity.py has the exact one.

    sequential      PPL(SPD on i..L-1) - PPL(SPD on i+1..L-1)        L/2 + 1.5 forward passes
    single          PPL(SPD on i) - PPL(dense)                       L/2 + 2 forward passes
    fisher          half the sum over tokens of (g_i . d_i)^2        three forward and one backward pass, for all blocks
    output_error    sum of |d_i|^2 over sum of |y_i - x_i|^2         two forward passes, for all blocks
    integrated      dPPL/dt_i, its group's syncs half dropped        one forward and backward pass a group of blocks

d_i = SPD_i(x_i) - y_i is what dropping block i's sync changes in its output y_i, g_i the gradient of the summed loss
there. The loss is at a minimum as far as training went, so the first-order term g . d says little, and its square, a
token at a time, stands in for the curvature d' H d. It is one number a block from one backward pass, and another
number of ranks or another treatment (int8, attention skipped) is one more forward pass.

The backward pass goes block by block: it keeps each block's input and computes the block once more, a third forward
pass, so that it needs one block's graph and, where the model is streamed, one block's weights at a time.

Interaction between blocks is what that leaves out. Let t_i say how much of block i's sync is dropped, from 0, the plain
block, to 1, SPD's: u_i = X + P_i + (1 - t_i) (sum_j P_j - P_i). The exact sensitivity is the integral of dPPL/dt_i over
t_i from 0 to 1, later blocks at 1, earlier ones at 0. "integrated" moves a whole group of neighbouring blocks at a time
and takes the integral by its midpoint: t = 1/2 in the group, 1 after it, 0 before it. One backward pass then has the
derivatives of all its blocks; as many groups as blocks would come back to the exact path. It keeps the whole graph, so
a streamed model is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from elision.blocks import Block, Decoder
from elision.errors import InputError
from elision.layerwise import INPUTS, layer_calls
from elision.progress import progress
from elision.spd.block import add_residual, attention_share, mlp_share, spd_output
from elision.spd.plan import EXCLUSIVE, SyncPlan
from elision.spd.sensitivity import ascending, covered_by_all, sequential
from elision.spd.simulate import Simulation, check_plain, check_visited, head_outputs, local_block
from elision.spd.streams import (
    IGNORED,
    Batch,
    Journal,
    State,
    check_batches,
    evaluating,
    losses,
    measure,
    next_tokens,
    treat,
)
from elision.streaming import resident

Method = Literal["sequential", "single", "fisher", "output_error", "integrated"]
GROUPS = 2  # of blocks that "integrated" moves together


def order(
    model: nn.Module, batches: Iterable[Batch], ranks: int, method: Method = "integrated", *, quiet: bool = False
) -> tuple[int, ...]:
    """Blocks in the order in which to drop their syncs, the one that matters least first; as `scores` otherwise."""
    return ascending(scores(model, batches, ranks, method, quiet=quiet))


def scores(
    model: nn.Module,
    batches: Iterable[Batch],
    ranks: int,
    method: Method = "integrated",
    *,
    treatment: str = "dropped",
    quiet: bool = False,
) -> tuple[float, ...]:
    """How much each block's sync matters by `method`, or what another `treatment` of it costs: "int8", "skipped".

    In perplexity, but for "output_error", which is a share. Other arguments are those of `sensitivity`, which also
    keeps what "sequential" measures in a file.

    Raises:
        InputError: an unknown method or treatment, "sequential" or "integrated" for another treatment than "dropped",
            or what `sensitivity` refuses.
    """
    view = covered_by_all(model, (ranks,))
    data = check_batches(batches, view.config)
    return all_scores(view, data, [(treatment, ranks)], method, None, quiet)[0]


def all_scores(
    view: Decoder,
    data: Sequence[Batch],
    ways: Sequence[tuple[str, int]],
    method: str,
    state: State,
    quiet: bool,
) -> tuple[tuple[float, ...], ...]:
    """`scores` for each (treatment, ranks) of `ways`, what they share computed once; data is checked already."""
    if method not in get_args(Method):
        raise InputError(f"method {method!r} is not known: use one of {', '.join(get_args(Method))}")
    for how, _ in ways:
        if how not in EXCLUSIVE:
            raise InputError(f"treatment {how!r} is not known: use one of {', '.join(EXCLUSIVE)}")
        if method in ("sequential", "integrated") and how != "dropped":
            raise InputError(f"method {method!r} measures dropped syncs, not {how}: use single or fisher")
    if method == "sequential":
        return tuple(found.blocks for found in sequential(view, data, [ranks for _, ranks in ways], state, quiet))
    if method == "single":
        plans = [SyncPlan.of(n, {block.index: how}) for how, n in ways for block in view.blocks]
        title = f"Single blocks, {_said(ways)}"
        dense, *single = measure(view, data, [SyncPlan(1), *plans], state=state, quiet=quiet, title=title)
        increases = [quality.perplexity - dense.perplexity for quality in single]
        size = len(view.blocks)
        return tuple(tuple(increases[i * size : (i + 1) * size]) for i in range(len(ways)))
    if method != "integrated":
        check_visited(view)
    else:
        for block in view.blocks:
            check_plain(block)
    journal = Journal.of(state, view)
    if method == "integrated":
        return tuple(_integrated(view, data, ranks, journal, quiet) for _, ranks in ways)
    fisher = method == "fisher"
    sums = torch.zeros(len(ways), len(view.blocks), 2, dtype=torch.float64)
    title = f"Sync sensitivity, {method.replace('_', ' ')}, {_said(ways)}"
    rows = journal.rows(data, [method, ways])
    with evaluating(view.model), progress(title, len(data), quiet) as advance:
        advance(len(rows))
        for batch in data[len(rows) :]:
            loss, parts = _batch(view, batch, ways, fisher)
            rows.append((loss, parts.tolist()))
            journal.keep()
            advance(1)
    total, tokens = 0.0, _scored(data)
    for loss, parts in rows:
        sums += torch.tensor(parts, dtype=torch.float64)
        total += loss
    if not fisher:
        return tuple(tuple(row.tolist()) for row in sums[..., 0] / sums[..., 1])
    return tuple(tuple(row.tolist()) for row in math.exp(total / tokens) * sums[..., 0] / tokens)


def _said(ways: Sequence[tuple[str, int]]) -> str:
    """What is measured, in words: "dropped and int8, 2, 4 ranks"."""
    treatments, ranks = dict.fromkeys(how for how, _ in ways), dict.fromkeys(str(n) for _, n in ways)
    return f"{' and '.join(treatments)}, {', '.join(ranks)} ranks"


def _batch(view: Decoder, batch: Batch, ways: Sequence[tuple[str, int]], fisher: bool) -> tuple[float, Tensor]:
    """(summed loss, (ways, layers, 2)) of one batch: each score's numerator, and output_error's denominator."""
    inputs = {name: batch[name].to(view.model.device) for name in INPUTS if name in batch}
    with torch.no_grad():
        calls = layer_calls(view, inputs)
        streams = [calls[0][0]]
        for block, (_, kwargs) in zip(view.blocks, calls, strict=True):
            with resident(block.layer):
                streams.append(block.layer(streams[-1], **kwargs))
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    loss, gradient = 0.0, torch.zeros(())
    if fisher:
        with torch.enable_grad():
            last = streams[-1].requires_grad_()
            summed = sum(
                losses(view, last, next_tokens(batch).to(real.device)), last.new_zeros((), dtype=torch.float64)
            )
        (gradient,) = torch.autograd.grad(summed, last)
        loss = summed.item()
    found = torch.zeros(len(ways), len(view.blocks), 2, dtype=torch.float64)
    for block, (_, kwargs) in reversed(list(zip(view.blocks, calls, strict=True))):
        index = block.index
        with resident(block.layer):
            x, y = streams[index].detach(), streams[index + 1].detach()
            with torch.no_grad():
                for i, (how, ranks) in enumerate(ways):
                    change = (treat(block, (how, ranks, None), x, kwargs) - y)[real].double()
                    if fisher:
                        found[i, index, 0] = (gradient[real].double() * change).sum(-1).square().sum() / 2
                    else:
                        found[i, index, 0] = change.square().sum()
                        found[i, index, 1] = (y - x)[real].double().square().sum()
            if fisher and index:
                with torch.enable_grad():
                    again = block.layer(x.requires_grad_(), **kwargs)
                (gradient,) = torch.autograd.grad(again, x, gradient)
                del again  # and with its graph the block's weights
    return loss, found


def _scored(data: Sequence[Batch]) -> int:
    """Tokens that are scored."""
    return sum(int((next_tokens(batch) != IGNORED).sum()) for batch in data)


def _integrated(view: Decoder, data: Sequence[Batch], ranks: int, journal: Journal, quiet: bool) -> tuple[float, ...]:
    """dPPL/dt of every block, at its group's midpoint."""
    layers = len(view.blocks)
    groups = min(GROUPS, layers)
    tokens = _scored(data)
    found = [0.0] * layers
    with evaluating(view.model), progress("Sync sensitivity, integrated", groups * len(data), quiet) as advance:
        for group in range(groups):
            first, last = (layers * edge // groups for edge in (group, group + 1))
            dropped = torch.tensor([0.0] * first + [0.5] * (last - first) + [1.0] * (layers - last))
            rows = journal.rows(data, ["integrated", ranks, dropped.tolist()])
            advance(len(rows))
            for batch in data[len(rows) :]:
                loss, slope = _slopes(view, batch, ranks, dropped)
                rows.append((loss, slope.tolist()))
                journal.keep()
                advance(1)
            total, slopes = 0.0, torch.zeros(layers, dtype=torch.float64)
            for loss, slope in rows:
                total += loss
                slopes += torch.tensor(slope, dtype=torch.float64)
            found[first:last] = (math.exp(total / tokens) * slopes / tokens).tolist()[first:last]
    return tuple(found)


def _slopes(view: Decoder, batch: Batch, ranks: int, dropped: Tensor) -> tuple[float, Tensor]:
    """(summed loss, its derivative (layers,) by t) of one batch at t = `dropped`."""
    inputs = {name: batch[name].to(view.model.device) for name in INPUTS if name in batch}
    with torch.no_grad():
        calls = layer_calls(view, inputs)
    hidden = calls[0][0].detach()
    t = dropped.to(hidden).requires_grad_()
    with torch.enable_grad():
        for block, (_, kwargs) in zip(view.blocks, calls, strict=True):
            hidden = partly_dropped(block, ranks, t[block.index], hidden, kwargs)
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        loss = sum(losses(view, hidden, next_tokens(batch).to(hidden.device)), loss)
    return loss.item(), torch.autograd.grad(loss, t)[0].double().cpu()


def partly_dropped(block: Block, ranks: int, t: Tensor, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """One stream through one block with the share `t` of its first sync dropped: 0 the plain block, 1 SPD's."""
    with Simulation([block], ranks):
        heads = head_outputs(block, hidden, kwargs)
    local = [local_block(block, rank, ranks) for rank in range(ranks)]
    shares = [attention_share(own, part) for own, part in zip(heads.tensor_split(ranks, dim=-1), local, strict=True)]
    attended = reduce(torch.add, shares)
    total = attended
    for part, share in zip(local, shares, strict=True):
        seen = share + (1 - t) * (attended - share)
        u = add_residual(hidden, seen, part.residual_multiplier, part.o_bias)
        total = total + mlp_share(u, part)
    return spd_output(hidden, total, local[0])
