"""Calibration text on its way through the model, all of it one block at a time.

Fitting or distilling block j needs every batch's input of block j, and block j's alone. So the walk goes block by
block over all batches, where a forward pass goes batch by batch over all blocks: each block is visited once, and one
activation per batch and stream is all that is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elision.blocks import Block, Decoder
from elision.layerwise import INPUTS, layer_calls
from elision.spd.corrections import Correction
from elision.spd.plan import SyncPlan
from elision.spd.simulate import Simulation
from elision.spd.streams import Batch


class Source(NamedTuple):
    """One batch at the door of the first block."""

    embedded: Tensor  # (batch, sequence, hidden)
    kwargs: list[dict[str, Any]]  # what the model hands each layer besides: mask, positions
    real: Tensor  # (batch, sequence), true where a token is no padding


@torch.no_grad()
def sources(view: Decoder, batches: Sequence[Batch]) -> list[Source]:
    """Every batch as the first block gets it, on the model's device."""
    found = []
    for batch in batches:
        inputs = {name: batch[name].to(view.model.device) for name in INPUTS if name in batch}
        calls = layer_calls(view, inputs)
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        found.append(Source(calls[0][0], [kwargs for _, kwargs in calls], real))
    return found


def served(
    block: Block, plan: SyncPlan, hidden: Tensor, kwargs: Mapping[str, Any], correction: Correction | None = None
) -> Tensor:
    """One stream through one block as the plan's ranks compute it: sync dropped, in int8, left out with attention."""
    corrections = {} if correction is None else {block.index: correction}
    dropped, int8, skipped = (
        [block] if block.index in chosen else [] for chosen in (plan.dropped, plan.int8, plan.skipped)
    )
    with Simulation(dropped, plan.ranks, corrections, int8=int8, skipped=skipped):
        return block.layer(hidden, **kwargs)
