"""Weights laid out so that every channel is a row: Q | K | V and gate | up stacked, O and down transposed.

A pruned product gathers channels of a weight in every step. As rows they are contiguous runs; as columns, one number
at a time. So each block's frozen weights move into four storages,

    qkv   (q + k + v channels, hidden)             o      (q channels, hidden)
    up    (gate + up channels, hidden)             down   (intermediate, hidden)

and the modules' own parameters lie in their memory: same objects, names, shapes, values. There is no second copy, and
`remove` gives every parameter memory of its own again, bit for bit. Each keeps a storage object for itself, as large as
the weight: accelerate and safetensors take two names of one storage for one weight, and save the first alone.

A quantised weight stays as it is and is dequantised each time that it is read, in full: the dense rows of a batch need
all of it, so that dequantising the gathered channels alone would be work on top. Under autocast the same holds of the
cast to the dtype of the products. Weights that FSDP2 shards are its own to lay out: they are read while they are whole,
in forward and again in backward.

The price: a transposed view is not contiguous, and a dense product through it may round differently in the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import dlpack

from elision.blocks import Block, Projection, matrix, quantised


class Matrix:
    """The weights of `modules` stacked by rows, or of one module transposed; called, it gives rows of that."""

    def __init__(self, modules: list[nn.Linear], transposed: bool = False) -> None:
        self.modules = modules
        self.transposed = transposed
        self.storage: Tensor | None = None  # of the laid out weights, in whose memory the modules' own lie

    def __call__(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        if self.storage is not None:
            return self.storage[rows].to(dtype)
        weights = [matrix(module).detach().to(dtype) for module in self.modules]
        whole = weights[0] if len(weights) == 1 else torch.cat(weights)
        return (whole.T if self.transposed else whole)[rows]

    def refresh(self) -> None:
        """Lay the weights out if they are not, or not any more (the model was moved, or a parameter replaced)."""
        if any(quantised(module) or isinstance(module.weight, DTensor) for module in self.modules):
            self.storage = None
        elif not self._in_place():
            self.storage = None  # first, so that what is replaced is not held
            self.storage = self._lay_out()

    def remove(self) -> None:
        """Give every parameter that lies in our memory contiguous memory of its own."""
        if self.storage is not None:
            start = self.storage.data_ptr()
            for module in self.modules:
                if start <= module.weight.data_ptr() < start + self.storage.nbytes:
                    module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)
        self.storage = None

    def _lay_out(self) -> Tensor:
        weights = [module.weight.detach() for module in self.modules]
        if self.transposed:
            (weight,) = weights
            storage = weight.T.contiguous()
            self.modules[0].weight.data = storage.T
            return storage
        if len(weights) == 1 and weights[0].is_contiguous():
            return weights[0]
        storage = torch.cat(weights)
        for module, view in zip(self.modules, storage.split([len(weight) for weight in weights]), strict=True):
            module.weight.data = _apart(view)
        return storage

    def _in_place(self) -> bool:
        """Whether the parameters still lie where they were put."""
        if self.storage is None:
            return False
        start = self.storage.data_ptr()
        for module in self.modules:
            weight = module.weight.T if self.transposed else module.weight
            if weight.data_ptr() != start or weight.dtype != self.storage.dtype or not weight.is_contiguous():
                return False
            start += weight.nbytes
        return True


@dataclass
class BlockWeights:
    """The weights of one block."""

    qkv: Matrix
    o: Matrix
    up: Matrix
    down: Matrix


class Layout:
    """The weights of `blocks` while laid out by rows. Modules are looked up anew: they may be exchanged meanwhile."""

    def __init__(self, blocks: tuple[Block, ...]) -> None:
        self.blocks = blocks
        self.weights: list[BlockWeights] = [BlockWeights(*(Matrix([]) for _ in range(4))) for _ in blocks]

    @torch.no_grad()
    def refresh(self) -> None:
        """Lay out every block that is not, or not any more; weights that blocks share (layer_replication) once."""
        seen: dict[tuple[Any, ...], Matrix] = {}
        for block, weights in zip(self.blocks, self.weights, strict=True):
            inputs = [p for p in (block.gate, block.up) if p is not None]
            groups = ([block.q, block.k, block.v], [block.o], inputs, [block.down])
            for name, group in zip(("qkv", "o", "up", "down"), groups, strict=True):
                modules = [*dict.fromkeys(projection.base for projection in group)]
                own = [id(module.weight) for module in modules]
                found: Matrix = seen.get((name, *own)) or getattr(weights, name)
                if own != [id(module.weight) for module in found.modules]:
                    found = Matrix(modules, transposed=name in ("o", "down"))
                setattr(weights, name, found)
                seen[name, *own] = found
                found.refresh()

    @torch.no_grad()
    def remove(self) -> None:
        """Put every weight back into memory of its own."""
        for weights in self.weights:
            for found in vars(weights).values():
                found.remove()


def _apart(view: Tensor) -> Tensor:
    """The same memory, kept alive by it, behind a storage that begins and ends where the view does."""
    return dlpack.from_dlpack(dlpack.to_dlpack(view))  # type: ignore[attr-defined]


def stacked_bias(projections: list[Projection], dtype: torch.dtype) -> Tensor | None:
    """Biases of stacked maps one after the other in `dtype`, zero where a map has none; None where none has one."""
    biases = [projection.bias for projection in projections]
    if all(bias is None for bias in biases):
        return None
    like = next(bias for bias in biases if bias is not None)
    parts = [like.new_zeros(p.out_features) if b is None else b for p, b in zip(projections, biases, strict=True)]
    return torch.cat(parts).detach().to(dtype)
