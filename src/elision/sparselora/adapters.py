"""PEFT's LoRA layers as the fast path reads them: which adapters are active, their factors stacked and cast once."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor

from elision.blocks import Projection
from elision.sparselora.linear import Adapters


def active(layer: LoraLayer) -> list[str]:
    """Names of the adapters that `layer` adds to its base."""
    return [name for name in layer.active_adapters if name in layer.lora_A or name in layer.lora_embedding_A]


def stacked(projections: list[Projection], dtype: torch.dtype, low: int = 0, high: int | None = None) -> Adapters:
    """Active adapters of stacked projections, cast once, for the outputs [low, high) of the stack."""
    found, start, rank = Adapters(), 0, 0
    factors: list[Tensor] = []
    modules: Any = dict.fromkeys(projection.module for projection in projections)
    for module in modules:
        stop = start + module.out_features
        first, last = max(start, low), min(stop, stop if high is None else high)
        if isinstance(module, LoraLinear) and first < last and (names := active(module)):
            factor: Any = module.lora_A[names[0]].weight
            other: Any = module.lora_B[names[0]].weight
            other = other[first - start : last - start] * module.scaling[names[0]]
            factors.append(factor)
            found.b.append(other.to(dtype))
            found.ranks.append(slice(rank, rank + len(factor)))
            found.outputs.append(slice(first - low, last - low))
            rank += len(factor)
        start = stop
    if factors:
        found.a = (factors[0] if len(factors) == 1 else torch.cat(factors)).to(dtype)
    return found
