"""SparseLoRA in plain masked-dense form: slow, obvious, and the oracle of every faster path.

Every frozen product is computed in full; then, on the sparse rows (context tokens) only, what the method would not
have computed is taken out again (maths: Which channels):

    q, k, v     an unselected output channel keeps nothing but its bias
    gate, up    an unselected output channel is absent: zero, without bias
    o, down     an unselected input channel is left out of the product; the bias stays

Adapters are not touched: PEFT adds them to all channels of all rows, around these maps. So after gate and up an
unselected FFN channel holds act(dg) * du of the adapters alone (0 without them); the adapter of down sees it, the base
product of down does not. Autograd then gives the exact gradient of exactly this computation.

DoRA (Liu et al. 2024) computes m / ||W + s B A|| * (W x + s B A x) + bias, m trained. Its base product W x is masked as
any other; the norm is that of the full weight, so that the weight which is trained is the one which is merged. PEFT
takes the bias from the base's output before it scales and adds it again behind, so an absent channel must keep its bias
until then: `without_bias` takes it away behind the adapter.

`MaskedLinear` stands where a frozen nn.Linear (or a 4-bit one) stood and shares everything with it: parameters,
buffers, hooks. State dict, PEFT's merging, `to` and optimizers see no difference.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from elision.shapes import Bool, Float
from elision.sparselora import select
from elision.sparselora.adapters import dora
from elision.sparselora.choices import BlockChoices, SparseBatch
from elision.sparselora.standin import eagerly

INPUT_SIDE = ("o", "down")  # pruned by columns; the others are pruned by rows
ABSENT = ("gate", "up")  # an unselected output of these loses its bias too


def prune_outputs(
    y: Float[Tensor, "*rows outputs"],
    sparse: Bool[Tensor, "*rows"],
    keep: Bool[Tensor, " outputs"],
    bias: Float[Tensor, " outputs"] | None,
) -> Float[Tensor, "*rows outputs"]:
    """`y`, an output of a base product with its bias, with unselected channels of sparse rows at `bias` (None: 0)."""
    fill = torch.zeros((), dtype=y.dtype, device=y.device) if bias is None else bias.to(y.dtype)
    return torch.where(sparse[..., None] & ~keep, fill, y)


def prune_inputs(
    x: Float[Tensor, "*rows inputs"], sparse: Bool[Tensor, "*rows"], keep: Bool[Tensor, " inputs"]
) -> Float[Tensor, "*rows inputs"]:
    """`x`, an input of a base product, with unselected channels of sparse rows at 0."""
    return x.masked_fill(sparse[..., None] & ~keep, 0.0)


def masked(base: nn.Linear, choices: BlockChoices, projections: dict[str, slice | None]) -> MaskedLinear:
    """A `MaskedLinear` in place of `base` that computes as a `base` of its class does."""
    kind = type(base)
    return (MaskedLinear if kind is nn.Linear else _masked(kind))(base, choices, projections)


@cache
def _masked(kind: type[nn.Linear]) -> type[MaskedLinear]:
    return type(f"Masked{kind.__name__}", (MaskedLinear, kind), {})


class MaskedLinear(nn.Linear):
    """The linear map `base`, masked on the sparse rows of the batch that its block is in; `base` itself otherwise.

    `projections` names the projections of the block that this map computes (several where they are fused), each with
    its rows (None: all).
    """

    def __init__(self, base: nn.Linear, choices: BlockChoices, projections: dict[str, slice | None]) -> None:
        # Not nn.Linear.__init__, which would allocate. The dictionaries of parameters, buffers and hooks become the
        # base's own: whatever is registered, moved or replaced here is so there. An instance's own `forward` (of
        # accelerate's device hooks) would shadow ours.
        self.__dict__.update({name: value for name, value in vars(base).items() if name != "forward"})
        self.choices = choices
        self.projections = projections

    def forward(self, input: Tensor) -> Tensor:
        batch = self.choices.batch
        if batch is None:
            return super().forward(input)
        return eagerly(self._masked, input, batch)  # what a batch chose belongs into no graph

    def _masked(self, input: Tensor, batch: SparseBatch) -> Tensor:
        sparse, keep = batch.rows_for(input), self._keep(input)
        if any(name in INPUT_SIDE for name in self.projections):
            return super().forward(prune_inputs(input, sparse, keep))
        absent = any(name in ABSENT for name in self.projections) and not self.biased
        return prune_outputs(super().forward(input), sparse, keep, None if absent else self.bias)

    @property
    def wrapper(self) -> nn.Module:
        """What stands at the projection: PEFT's layer around this map, or this map."""
        return self.choices.block.projections[next(iter(self.projections))].module

    @property
    def biased(self) -> bool:
        """Whether a bias is to be taken away behind the adapter."""
        return self.bias is not None and bool(dora(self.wrapper)) and any(name in ABSENT for name in self.projections)

    def without_bias(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Hook of the layer around this map: absent channels of sparse rows lose the bias that DoRA needed."""
        batch = self.choices.batch
        if batch is None or module is self or not self.biased:
            return None
        assert self.bias is not None
        return torch.where(batch.rows_for(args[0])[..., None] & ~self._keep(args[0]), output - self.bias, output)

    def _keep(self, input: Tensor) -> Tensor:
        """True at the kept channels, of the inputs for o and down, of the outputs otherwise."""
        side = self.in_features if any(name in INPUT_SIDE for name in self.projections) else self.out_features
        keep = torch.ones(side, dtype=torch.bool, device=input.device)
        for name, rows in self.projections.items():
            part = keep if rows is None else keep[rows]
            part.copy_(select.mask(self.choices.kept(name, input), len(part)))
        return keep
