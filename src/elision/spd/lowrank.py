"""Low-rank healing: what a block has to learn, as W + B A beside each frozen matrix W (LoRA, arXiv 2106.09685).

Few megabytes then say what healing changed, and they ship beside a base that stays untouched (adapter.py). While a
block is being healed, `applied` shows its modules W + B A in place of W; at the end `merge` writes the sum into W,
rounded once, because that is what ranks serve. Norm weights and biases are trained as they are: they are vectors.

The factors stay with the layer that they belong to, as entries of its state dict:

    model.layers.3.spd_lowrank.a.self_attn-q_proj    (rank, in)     starts random
    model.layers.3.spd_lowrank.b.self_attn-q_proj    (out, rank)    starts at zero, so that the block starts as it is
    model.layers.3.spd_lowrank.base                  (32,) uint8    SHA-256 of the matrices that they belong to
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from elision.blocks import Block
from elision.layerwise import hash_tensor

NAME = "spd_lowrank"  # of the submodule, and so in every state dict that holds one


def merged(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W + B A in the factors' precision, rounded once to the weight's dtype."""
    return (weight.to(a.dtype) + b @ a).to(weight.dtype)


class LowRank(nn.Module):
    """The factors of every matrix of one decoder layer."""

    base: Tensor

    def __init__(self, layer: nn.Module, rank: int, generator: torch.Generator | None = None) -> None:
        """Factors that change nothing yet: float64 for a float64 layer, else float32."""
        super().__init__()
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name, module in matrices(layer).items():
            weight = module.weight
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            a = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            self.a[name] = nn.Parameter(a.to(weight.device, dtype))
            self.b[name] = nn.Parameter(weight.new_zeros(module.out_features, rank, dtype=dtype))
        self.register_buffer("base", fingerprint(layer))

    @contextmanager
    def applied(self, layer: nn.Module) -> Iterator[None]:
        """Inside, every matrix of `layer` reads as W + B A, with gradients to the factors; W itself stays."""
        shown = matrices(layer)
        try:
            for name, module in shown.items():  # an attribute of the instance comes before the parameter of that name
                vars(module)["weight"] = merged(module.weight, self.a[name], self.b[name])
            yield
        finally:
            for module in shown.values():
                vars(module).pop("weight", None)

    @torch.no_grad()
    def merge(self, layer: nn.Module) -> None:
        """Write W + B A into W."""
        for name, module in matrices(layer).items():
            module.weight.copy_(merged(module.weight, self.a[name], self.b[name]))


def matrices(layer: nn.Module) -> dict[str, nn.Linear]:
    """The layer's linear maps; names have "-" for ".", as a parameter's must."""
    return {name.replace(".", "-"): module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def vectors(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The layer's own norm weights and biases by name."""
    own = (each for each in layer.named_parameters() if not each[0].startswith("spd_"))
    return {name: parameter for name, parameter in own if parameter.dim() < 2}


def fingerprint(layer: nn.Module) -> Tensor:
    """SHA-256 of the layer's matrices, (32,) uint8."""
    digest = hashlib.sha256()
    for name, module in sorted(matrices(layer).items()):
        hash_tensor(digest, name, module.weight)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def attach_lowrank(block: Block, rank: int, seed: int) -> LowRank:
    """Give the block's layer factors that change nothing yet, in place of those that it may have."""
    lowrank = LowRank(block.layer, rank, torch.Generator().manual_seed(seed * 100_003 + block.index))
    block.layer.add_module(NAME, lowrank)
    return lowrank


def lowrank_of(block: Block) -> LowRank | None:
    """The factors that the block's layer has."""
    found = getattr(block.layer, NAME, None)
    return found if isinstance(found, LowRank) else None


def detach_lowrank(block: Block) -> None:
    """Take the factors away, if there are any; what was merged stays."""
    if hasattr(block.layer, NAME):
        delattr(block.layer, NAME)
