"""Weights laid out so that every channel is a row: Q | K | V and gate | up stacked, O and down transposed.

A pruned product gathers channels of a weight in every step. As rows they are contiguous runs; as columns, one number
at a time. So each block's frozen weights move into four storages,

    qkv      (q + k + v channels, hidden)          o      (q channels, hidden)
    gate_up  (gate + up channels, hidden)          down   (intermediate, hidden)

and the modules' own parameters become views of them: same objects, names, shapes, values. There is no second copy,
the state dict does not change, and `remove` gives every parameter a storage of its own again, bit for bit.

The price: a transposed view is not contiguous, and a dense product through it may round differently in the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elision.blocks import Block, Projection


@dataclass
class BlockWeights:
    """The storages of one block, biases stacked likewise (copies: they are small, and read anew for every forward)."""

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor


class Layout:
    """The weights of `blocks` while laid out by rows."""

    def __init__(self, blocks: tuple[Block, ...]) -> None:
        self.blocks = blocks
        self.weights: list[BlockWeights | None] = [None] * len(blocks)

    @torch.no_grad()
    def refresh(self) -> None:
        """Lay out every block that is not, or not any more (its model was moved, or a parameter replaced)."""
        for index, block in enumerate(self.blocks):
            weights = self.weights[index]
            if weights is None or not _in_place(block, weights):
                self.weights[index] = None  # first, so that what is replaced is not held
                self.weights[index] = BlockWeights(
                    _stack(_stacked(block)[0]), _transpose(block.o), _stack(_stacked(block)[1]), _transpose(block.down)
                )

    @torch.no_grad()
    def remove(self) -> None:
        """Give every parameter that is a view of ours its own contiguous storage."""
        for block, weights in zip(self.blocks, self.weights, strict=True):
            if weights is None:
                continue
            ours = {tensor.untyped_storage().data_ptr() for tensor in vars(weights).values()}
            for projection in block.projections.values():
                parameter = projection.base.weight
                if _shares(parameter, ours):
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        self.weights = [None] * len(self.blocks)


def stacked_bias(projections: list[Projection]) -> Tensor | None:
    """Biases of stacked maps one after the other, zero where a map has none; None where none has one."""
    biases = [projection.bias for projection in projections]
    if all(bias is None for bias in biases):
        return None
    like = next(bias for bias in biases if bias is not None)
    parts = [like.new_zeros(p.out_features) if b is None else b for p, b in zip(projections, biases, strict=True)]
    return torch.cat(parts).detach()


def _stacked(block: Block) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """The modules that make Q, K, V and those that make gate and up: one each where the family fuses them."""
    assert block.gate is not None
    groups = ((block.q, block.k, block.v), (block.gate, block.up))
    first, second = ([*dict.fromkeys(projection.base for projection in group)] for group in groups)
    return first, second


def _stack(modules: list[nn.Linear]) -> Tensor:
    if len(modules) == 1 and modules[0].weight.is_contiguous():
        return modules[0].weight.detach()
    storage = torch.cat([module.weight.detach() for module in modules])
    for module, view in zip(modules, storage.split([len(module.weight) for module in modules]), strict=True):
        module.weight.data = view
    return storage


def _transpose(projection: Projection) -> Tensor:
    weight = projection.base.weight
    storage = weight.detach().T.contiguous()
    weight.data = storage.T
    return storage


def _in_place(block: Block, weights: BlockWeights) -> bool:
    """Whether the parameters still are the views that they were made."""
    for modules, storage in zip(_stacked(block), (weights.qkv, weights.gate_up), strict=True):
        start = storage.data_ptr()
        for module in modules:
            weight = module.weight
            if weight.data_ptr() != start or weight.dtype != storage.dtype or not weight.is_contiguous():
                return False
            start += weight.nbytes
    return all(
        p.base.weight.data_ptr() == t.data_ptr() and p.base.weight.dtype == t.dtype and p.base.weight.T.is_contiguous()
        for p, t in ((block.o, weights.o), (block.down, weights.down))
    )


def _shares(parameter: Tensor, storages: set[int]) -> bool:
    return parameter.untyped_storage().data_ptr() in storages
