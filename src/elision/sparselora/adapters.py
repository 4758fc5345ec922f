"""PEFT's LoRA layers as the method reads them: which adapters are active, their factors stacked and cast once.

What is understood: LoRA and rsLoRA (a scaling), DoRA (a factor for every output, narrow.py), several adapters active at
once (their ranks side by side), dropout. The masks of dropout are drawn from the adapter's own dropout module, on a
tensor of the shape that it sees in the model's own forward and in that forward's order: the fast step and the reference
drop the same inputs after the same seed.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from elision.blocks import Block, Projection, matrix
from elision.sparselora.narrow import Adapters, weight_norm

DORA = "DoraLinearVariant"

Masks = dict[nn.Module, Tensor]  # of every row, by the LoRA layer that drops


def active(layer: LoraLayer) -> list[str]:
    """Names of the adapters that `layer` adds to its base."""
    return [name for name in layer.active_adapters if name in layer.lora_A or name in layer.lora_embedding_A]


def variants(layer: LoraLayer) -> dict[str, str]:
    """The kind of each active adapter that is not plain LoRA, by its name."""
    return {name: type(layer.lora_variant[name]).__name__ for name in active(layer) if name in layer.lora_variant}


def dropout(layer: LoraLayer, name: str) -> float:
    """Share of the inputs that adapter `name` drops now."""
    module: Any = layer.lora_dropout[name]
    return getattr(module, "p", 0.0) if module.training else 0.0


def draw(block: Block, shape: tuple[int, int], order: Tensor) -> Masks:
    """Masks of the rows `order` of a batch of this shape, True where an input stays; drawn in the model's order."""
    found: Masks = {}
    for projection in block.projections.values():
        layer: Any = projection.module
        for name in _names(layer) if layer not in found else []:
            if dropout(layer, name):
                ones = torch.ones(*shape, layer.in_features, dtype=layer.lora_A[name].weight.dtype, device=order.device)
                found[layer] = (layer.lora_dropout[name](ones) != 0).flatten(0, 1).index_select(0, order)
    return found


def stacked(
    projections: list[Projection],
    dtype: torch.dtype,
    masks: Masks,
    chosen: slice = slice(None),
    low: int = 0,
    high: int | None = None,
) -> Adapters:
    """Active adapters of stacked projections, cast to `dtype`, for the outputs [low, high) of the stack.

    `chosen` are the rows that the stack is computed on, of all that `masks` are for.
    """
    found, start, rank = Adapters(), 0, 0
    modules: Any = dict.fromkeys(projection.module for projection in projections)
    factors: list[Tensor] = []
    scales: list[Tensor] = []
    weighted = any(dora(module) for module in modules)
    for module in modules:
        stop = start + module.out_features
        first, last = max(start, low), min(stop, stop if high is None else high)
        if first < last:
            part, names = slice(first - start, last - start), _names(module)
            if weighted:
                scales.append(_scale(module, dtype)[part])
            if names:
                a, b = _factors(module, names)
                factors.append(a)
                found.b.append(b[part].to(dtype))
                found.ranks.append(slice(rank, rank + len(a)))
                found.outputs.append(slice(first - low, last - low))
                found.masks.append(masks[module][chosen] if module in masks else None)
                rank += len(a)
        start = stop
    if factors:
        found.a = (factors[0] if len(factors) == 1 else torch.cat(factors)).to(dtype)
    if weighted:
        found.scale = torch.cat(scales)
    return found


def _names(module: nn.Module) -> list[str]:
    return active(module) if isinstance(module, LoraLayer) else []


def dora(module: Any) -> list[str]:
    """The active adapters of `module` that are DoRA."""
    return [name for name in _names(module) if name in module.lora_variant]


def _factors(layer: Any, names: list[str]) -> tuple[Tensor, Tensor]:
    """(ranks, inputs) and (outputs, ranks) of the adapters `names` together, every factor of theirs in the second."""
    a = [layer.lora_A[name].weight for name in names]
    b = []
    for name in names:
        share = dropout(layer, name)
        factor = layer.scaling[name] / (1.0 - share) if share < 1.0 else 0.0
        b.append(layer.lora_B[name].weight * factor)
    return (a[0], b[0]) if len(names) == 1 else (torch.cat(a), torch.cat(b, dim=1))


def _scale(module: Any, dtype: torch.dtype) -> Tensor:
    """(outputs,): DoRA's magnitude over the norm of the weight, which it takes as a constant; ones for plain LoRA."""
    if not (names := dora(module)):
        return torch.ones(module.out_features, dtype=dtype, device=next(module.parameters()).device)
    (name,) = names
    b = module.lora_B[name].weight * module.scaling[name]
    norm = weight_norm(matrix(module.get_base_layer()), module.lora_A[name].weight, b)
    return (module.lora_magnitude_vector[name].weight / norm).to(dtype)
