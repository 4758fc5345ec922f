"""Cheaper ways to say which blocks can spare their sync (METHODS 3.2), beside the exact one of sensitivity.py.

    sequential      PPL(SPD on i..L-1) - PPL(SPD on i+1..L-1)        L/2 + 1.5 forward passes
    single          PPL(SPD on i) - PPL(dense)                       L/2 + 2 forward passes
    fisher          half the sum over tokens of (g_i . d_i)^2        two forward and one backward pass, for all blocks
    output_error    sum of |d_i|^2 over sum of |y_i - x_i|^2         two forward passes, for all blocks

d_i = SPD_i(x_i) - y_i is what dropping block i's sync changes in its output y_i, g_i the gradient of the summed loss
there. The loss is at a minimum as far as training went, so the first-order term g . d says little, and its square, a
token at a time, stands in for the curvature d' H d. It is one number a block from one backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from elision.blocks import Decoder
from elision.errors import InputError
from elision.progress import progress
from elision.spd.sensitivity import sensitivity
from elision.spd.simulate import check_plain, covered
from elision.spd.streams import (
    IGNORED,
    INPUTS,
    Batch,
    check_batches,
    evaluating,
    layer_calls,
    losses,
    next_tokens,
    perplexities,
    step,
)

Method = Literal["sequential", "single", "fisher", "output_error"]


def order(
    model: nn.Module, batches: Iterable[Batch], ranks: int, method: Method = "fisher", *, quiet: bool = False
) -> tuple[int, ...]:
    """Blocks in the order in which to drop their syncs, the one that matters least first; as `scores` otherwise."""
    found = scores(model, batches, ranks, method, quiet=quiet)
    return tuple(sorted(range(len(found)), key=found.__getitem__))


def scores(
    model: nn.Module, batches: Iterable[Batch], ranks: int, method: Method = "fisher", *, quiet: bool = False
) -> tuple[float, ...]:
    """How much each block's sync matters by `method`.

    In perplexity, but for "output_error", which is a share. Arguments are those of `sensitivity`, which also keeps
    what "sequential" measures in a file.

    Raises:
        InputError: an unknown method, or what `sensitivity` refuses.
    """
    if method not in get_args(Method):
        raise InputError(f"method {method!r} is not known: use one of {', '.join(get_args(Method))}")
    if method == "sequential":
        return sensitivity(model, batches, ranks, quiet=quiet).blocks
    view = covered(model, ranks)
    data = check_batches(batches, view.config.vocab_size)
    if method == "single":
        choices = [(), *((block.index,) for block in view.blocks)]
        dense, *single = perplexities(view, data, ranks, choices, quiet=quiet, title=f"Single drops, {ranks} ranks")
        return tuple(perplexity - dense for perplexity in single)
    for block in view.blocks:
        check_plain(block)
    fisher = method == "fisher"
    sums = torch.zeros(len(view.blocks), 2, dtype=torch.float64)
    total, tokens = 0.0, 0
    with evaluating(view.model), progress("Sync sensitivity, fast", len(data), quiet) as advance:
        for batch in data:
            loss, parts = _batch(view, batch, ranks, fisher)
            sums += parts
            total += loss
            tokens += int((next_tokens(batch) != IGNORED).sum())
            advance(1)
    if not fisher:
        return tuple((sums[:, 0] / sums[:, 1]).tolist())
    return tuple((math.exp(total / tokens) * sums[:, 0] / tokens).tolist())


def _batch(view: Decoder, batch: Batch, ranks: int, fisher: bool) -> tuple[float, Tensor]:
    """(summed loss, (layers, 2)) of one batch; the numerator of each block's score, and output_error's denominator."""
    inputs = {name: batch[name].to(view.model.device) for name in INPUTS if name in batch}
    with torch.no_grad():
        calls = layer_calls(view, inputs)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    with torch.set_grad_enabled(fisher):
        streams = [calls[0][0].detach().requires_grad_(fisher)]
        for block, (_, kwargs) in zip(view.blocks, calls, strict=True):
            streams.append(step(block, None, streams[-1], kwargs))
        loss = torch.zeros((), dtype=torch.float64, device=real.device)
        if fisher:
            loss = sum(losses(view, streams[-1], next_tokens(batch).to(real.device)), loss)
    gradients: Sequence[Tensor] = torch.autograd.grad(loss, streams[1:]) if fisher else ()
    found = torch.zeros(len(view.blocks), 2, dtype=torch.float64)
    with torch.no_grad():
        for block, (_, kwargs) in zip(view.blocks, calls, strict=True):
            x, y = streams[block.index], streams[block.index + 1]
            change = (step(block, ranks, x, kwargs) - y)[real].double()
            if fisher:
                found[block.index, 0] = (gradients[block.index][real].double() * change).sum(-1).square().sum() / 2
            else:
                found[block.index, 0] = change.square().sum()
                found[block.index, 1] = (y - x)[real].double().square().sum()
    return loss.item(), found
