"""The tensors that correct a dropped block's local MLP input, kept in the decoder layer that they belong to.

A `Correction` is a submodule of its decoder layer under the name `spd_correction`, so its parameters are entries of
the model's state dict beside the block's weights, and travel with them: to a device, into a copy, into a checkpoint.

    model.layers.3.spd_correction.constant    (ranks, hidden)                 m_i is row i
    model.layers.3.spd_correction.gain        (ranks, hidden)                 g_i is row i; kind "gain"
    model.layers.3.spd_correction.local_o     (hidden, heads * head_dim)      columns as O's, M_i those of rank i;
                                                                              kind "local_o"

The model's own forward does not look at them: they act in a simulation or a runtime whose plan names them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from elision.blocks import Block
from elision.errors import InputError

NAME = "spd_correction"  # of the submodule, and so in every state dict that holds one


class Correction(nn.Module):
    """What corrects one block's MLP input on every rank; it starts out as no correction at all."""

    constant: nn.Parameter
    gain: nn.Parameter | None
    local_o: nn.Parameter | None

    def __init__(self, kind: str, ranks: int, o: Tensor) -> None:
        """`o` is the block's output projection (hidden, heads * head_dim), whose dtype and device it takes."""
        super().__init__()
        self.kind = kind
        hidden = o.shape[0]
        self.constant = nn.Parameter(o.new_zeros(ranks, hidden))
        self.gain = nn.Parameter(o.new_ones(ranks, hidden)) if kind == "gain" else None
        self.local_o = nn.Parameter(o.detach().clone()) if kind == "local_o" else None

    def local(self, rank: int, heads: slice) -> dict[str, Any]:
        """What `rank`, whose heads take up the channels `heads`, holds of it: fields of block.LocalBlock."""
        return {
            "mlp_constant": self.constant[rank],
            "mlp_gain": None if self.gain is None else self.gain[rank],
            "mlp_o": None if self.local_o is None else self.local_o[:, heads],
        }


def attach(block: Block, kind: str, ranks: int) -> Correction:
    """Give `block` a correction of `kind` that does nothing yet, in place of one that it may have."""
    correction = Correction(kind, ranks, block.o.weight)
    block.layer.add_module(NAME, correction)
    return correction


def detach(block: Block) -> None:
    """Take `block`'s correction away, if it has one."""
    if hasattr(block.layer, NAME):
        delattr(block.layer, NAME)


def correction_of(block: Block, ranks: int, kind: str) -> Correction:
    """The correction that `block` has.

    Raises:
        InputError: it has none, or one of another kind or for another number of ranks.
    """
    correction = getattr(block.layer, NAME, None)
    remedy = "give the model and the plan that elision.spd.correct or elision.spd.read returned together"
    if not isinstance(correction, Correction):
        raise InputError(f"plan corrects block {block.index} ({kind}), this model has no correction there: {remedy}")
    if (correction.kind, len(correction.constant)) != (kind, ranks):
        raise InputError(
            f"plan corrects block {block.index} by {kind} for {ranks} ranks, this model's correction there is "
            f"{correction.kind} for {len(correction.constant)}: {remedy}"
        )
    return correction


@torch.no_grad()
def fill(correction: Correction, tensors: dict[str, Tensor], where: str) -> None:
    """Copy `tensors`, by parameter name, into `correction`, whose dtype and device they take; others are left out.

    Raises:
        InputError: one is missing, or has another shape than its parameter.
    """
    for name, parameter in correction.named_parameters():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != parameter.shape:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise InputError(f"{where}.{name} {found}, the plan needs {tuple(parameter.shape)}: save it again")
        parameter.copy_(tensor)
