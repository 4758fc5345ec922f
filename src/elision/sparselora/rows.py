"""The rows that a fast step computes: real tokens that the loss can see, in the order that suits the work.

A batch (batch, sequence) becomes T rows, once, on the CPU, before the model runs:

    [ sparse (context) | dense, not loss-bearing | loss-bearing ]

so that what is pruned, what needs a query in the last block and what needs logits are runs of rows, known by Python
integers: nothing in forward or backward asks a tensor for a count. Where labels, mask and position ids lie on a GPU
they are fetched together first, the one time that the host waits; where they were left on the CPU it never does. Only
attention needs the sequence order. There rows go to a grid of (segments, longest segment), real tokens first: attention
is causal, so what stands behind the last real token of a segment is seen by none of them, and no mask is needed (but
for sliding windows). Segments of very different lengths, as packed rows have them, go to several grids, so that short
ones are not computed at the length of the longest.

What may be left out without changing the loss (each a switch of `Elisions`):

    padding     no token attends to it
    tail        tokens after the last loss-bearing one of their segment (attention is causal)
    last block  what its other tokens are for are keys and values: no query, no output, no MLP
    logits      the loss reads them at loss-bearing positions
    inputs      no gradient is computed below the first adapter, whatever asks for one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elision.sparselora import tokens
from elision.sparselora.tokens import TokenKinds


@dataclass(frozen=True)
class Elisions:
    """What a step leaves out although it is exact to do it; False computes it."""

    padding: bool = True
    tail: bool = True
    last_block: bool = True
    logits: bool = True  # output.logits is None then
    inputs: bool = True

    @classmethod
    def none(cls) -> Elisions:
        return cls(False, False, False, False, False)

    def effective(self) -> Elisions:
        """Those that are possible together: all logits need every token to go through every block."""
        return self if self.logits else replace(self, tail=False, last_block=False)


_SHORT = 64  # tokens: below, the length of a segment hardly tells in the time of attention
_WORTH = 0.75  # several grids are taken where they have no more slots than this share of one grid's


@dataclass(frozen=True)
class Grid:
    """(segments, length) of the slots, from `start` on, with a segment in each line."""

    segments: int
    length: int  # of the longest segment in it
    start: int
    first: int = 0  # column that no loss-bearing row stands before; the length where there is none

    @property
    def slots(self) -> slice:
        return slice(self.start, self.start + self.segments * self.length)


@dataclass(frozen=True)
class Rows:
    """T rows of a batch; T = len(order). All tensors hold int64."""

    order: Tensor  # (T,): position of each row in the flattened batch
    sparse: int  # rows [0, sparse) are computed sparsely
    bearing: int  # rows [T - bearing, T) bear the loss
    targets: Tensor  # (bearing,): the token that each of them predicts
    grids: tuple[Grid, ...]  # one behind the other
    grid: Tensor  # (slots,): row at each slot, 0 where there is none
    slots: Tensor  # (T,): slot of each row
    columns: Tensor | None = None  # (slots,): place in the sequence, to measure distances by; None: the grid's columns

    @property
    def total(self) -> int:
        return len(self.order)

    @property
    def full(self) -> bool:
        """Whether every slot of the grid has a row."""
        return self.total == len(self.grid)

    def tail(self) -> Rows:
        """The grids from column `first` on, for the rows that bear the loss; other rows have no slot there."""
        grids: list[Grid] = []
        kept, slots = [], self.slots
        for grid in self.grids:
            new = Grid(grid.segments, grid.length - grid.first, grids[-1].slots.stop if grids else 0)
            place = self.slots - grid.start
            moved = new.start + place // grid.length * new.length + place % grid.length - grid.first
            slots = torch.where(place >= 0, moved, slots)  # a later grid takes its own again
            kept.append(self.grid[grid.slots].view(grid.segments, grid.length)[:, grid.first :].flatten())
            grids.append(new)
        return replace(self, slots=slots, grid=torch.cat(kept), grids=tuple(grids), columns=None)

    def to(self, device: torch.device) -> Rows:
        """On `device`, all in one transfer."""
        found = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        packed = sent(torch.cat([value.flatten() for value in found.values()]), device)
        parts = iter(packed.split([value.numel() for value in found.values()]))
        return replace(self, **{name: next(parts).view(value.shape) for name, value in found.items()})


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; to a GPU out of pinned memory, so that the host does not wait for what the GPU has to do
    before it gets to the copy.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _left_out(kinds: TokenKinds, elisions: Elisions) -> Tensor:
    """(batch, sequence), True at tokens that have no row."""
    left_out = torch.zeros_like(kinds.dense)
    if elisions.padding:
        left_out |= kinds.padding
    if elisions.tail:
        left_out |= kinds.elided
    return left_out


def between(kinds: TokenKinds, sparse: Tensor, elisions: Elisions) -> bool:
    """Whether dense rows would stand between sparse context and sparse outputs, so that neither `Rows.sparse` nor any
    other prefix tells the sparse ones.
    """
    dense = ~_left_out(kinds, elisions) & ~sparse & ~kinds.loss_bearing
    return bool((sparse & kinds.loss_bearing).any()) and bool(dense.any())


def arrange(
    kinds: TokenKinds,
    labels: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    sparse: Tensor | None,
    elisions: Elisions,
) -> Rows:
    """The rows of a batch.

    Args:
        kinds: of the tokens, as `tokens.classify` tells them.
        labels: of the call, on the CPU.
        attention_mask: likewise.
        position_ids: likewise.
        sparse: (batch, sequence), True at the tokens computed sparsely; None: nowhere.
        elisions: what is left out.
    """
    left_out, here = _left_out(kinds, elisions), labels.device  # whatever the caller's default device is
    sparse = torch.zeros_like(left_out) if sparse is None else sparse
    position = (~left_out).flatten().nonzero().squeeze(1)
    kind = (1 - (sparse & ~kinds.loss_bearing).long() + kinds.loss_bearing.long()).flatten()[position]
    by_kind = torch.argsort(kind, stable=True)
    order = position[by_kind]
    bearing = int(kinds.loss_bearing.sum())

    sequence = labels.shape[1]
    segment = position // sequence * sequence
    segment = segment + tokens.segments(labels, attention_mask, position_ids).flatten()[position]
    pad = kinds.padding.flatten()[position]
    in_sequence = torch.argsort(segment * 2 + pad.long(), stable=True)  # a segment's real tokens first
    lengths = torch.unique_consecutive(segment[in_sequence], return_counts=True)[1]
    number = torch.repeat_interleave(torch.arange(len(lengths), device=here), lengths)
    within = torch.arange(len(position), device=here) - (lengths.cumsum(0) - lengths)[number]
    grids, starts = _grids(lengths.tolist())
    slot = torch.empty_like(position)
    slot[in_sequence] = torch.tensor(starts, device=here)[number] + within
    slots = slot[by_kind]
    grid = torch.zeros(grids[-1].slots.stop, dtype=torch.long, device=here)
    grid.index_copy_(0, slots, torch.arange(len(slots), device=here))

    column, columns = position[in_sequence] % sequence, None
    if bool((column - within != (column - within)[within == 0][number]).any()):  # masked tokens in between
        columns = torch.zeros_like(grid).index_copy_(0, slot[in_sequence], column)
    return Rows(
        order=order,
        sparse=int(sparse.sum()),
        bearing=bearing,
        targets=labels.flatten()[order[len(order) - bearing :] + 1],
        grids=tuple(_with_first(each, slots[len(slots) - bearing :]) for each in grids),
        grid=grid,
        slots=slots,
        columns=columns,
    )


def grouped(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of the segments of these lengths that share a grid; the first of each group is its longest.

    Where that leaves out enough slots, a segment shares its grid with those of more than half, up to double its length.
    """
    descending = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for segment in descending:
        if not groups or 2 * max(lengths[segment], _SHORT) <= lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(segment)
    slots = sum(len(group) * lengths[group[0]] for group in groups)
    return [descending] if slots > _WORTH * len(lengths) * max(lengths) else groups


def _grids(lengths: list[int]) -> tuple[list[Grid], list[int]]:
    """Grids for segments of these lengths, and the slot at which each segment starts."""
    grids: list[Grid] = []
    starts = [0] * len(lengths)
    for group in grouped(lengths):
        grid = Grid(len(group), lengths[group[0]], grids[-1].slots.stop if grids else 0)
        grids.append(grid)
        for line, segment in enumerate(sorted(group)):
            starts[segment] = grid.start + line * grid.length
    return grids, starts


def _with_first(grid: Grid, bearing: Tensor) -> Grid:
    """`grid`, told the slots of the rows that bear the loss."""
    own = bearing[(bearing >= grid.slots.start) & (bearing < grid.slots.stop)] - grid.start
    return replace(grid, first=int((own % grid.length).min()) if len(own) else grid.length)
