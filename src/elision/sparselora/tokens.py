"""Which tokens of a batch may be sparse: labels, attention mask and position ids to kinds of tokens.

Labels are those of a causal LM: aligned with the inputs, shifted by one in the loss. Position t of a row is
(maths: Who is dense)

    loss-bearing  if labels[t + 1] carries a target and stands in t's segment: the loss reads the logits of t
    dense         if it is loss-bearing or carries a target itself: an output token
    context       if it is any other real token: the only kind that is ever computed sparsely
    padding       otherwise

so the last prompt token, which predicts the first output token, is dense. A segment is a whole row, or one sequence
of a packed row. A token after the last loss-bearing position of its segment is `elided`: attention is causal, so
nothing that the loss reads depends on it, and it has no say in which channels are kept.

Rows are taken as packed where transformers does so that makes no key/value cache: position ids are given and a mask is
not, and a segment starts where a position does not follow its predecessor (resets to 0). With a mask, attention
crosses such a boundary, and the row stays one segment. With a cache it crosses too, and the default of transformers is
to make one: a training forward whose call does not say gets use_cache=False (apply.py), evaluation is the caller's.

A target counts whatever the mask says of its place, because the loss counts it: a masked position with a target, or
before one, is dense and not padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from elision.errors import InputError
from elision.shapes import Bool, Int

READ = ("input_ids", "attention_mask", "position_ids", "labels")  # of a batch of data; other fields are not
IGNORED = -100  # the label that carries no target (torch's and transformers' ignore_index)


@dataclass(frozen=True)
class TokenKinds:
    """Boolean (batch, sequence) masks. Context and dense are disjoint; what is in neither is padding."""

    context: Tensor
    dense: Tensor
    loss_bearing: Tensor  # a part of dense
    elided: Tensor  # context or dense, and read by nothing

    @property
    def kept(self) -> Tensor:
        """Context tokens that are left after elision: those that are sparse, and choose the channels."""
        return self.context & ~self.elided

    @property
    def padding(self) -> Tensor:
        """Neither context nor dense."""
        return ~(self.context | self.dense)


def read(batch: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    """The fields of READ that a batch has, less those that are None.

    Raises:
        InputError: one is no tensor; names it and `what` the batch is.
    """
    found = {name: batch[name] for name in READ if name in batch and batch[name] is not None}
    for name, value in found.items():
        _check_tensor(f"{what}: {name}", value)
    return found


def _check_tensor(what: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise InputError(f"{what} is a {type(value).__name__}: give a tensor (batch, sequence)")


class Given:
    """What of a call tells its tokens apart, brought to the CPU when it is first asked for, by one transfer."""

    def __init__(self, labels: Any, attention_mask: Any, position_ids: Any) -> None:
        self._tensors = (labels, attention_mask, position_ids)

    @cached_property
    def on_cpu(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Labels, mask and position ids.

        Raises:
            InputError: one is no tensor, a dict of masks made before the call, say.
        """
        for name, value in zip(("labels", "attention_mask", "position_ids"), self._tensors, strict=True):
            if value is not None:
                _check_tensor(name, value)
        labels, mask, positions = _fetched(self._tensors)
        assert labels is not None
        return labels, mask, positions


def _fetched(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`tensors` on the CPU. Each transfer of its own would be one more wait for the device: integers go together."""
    away = [tensor for tensor in tensors if tensor is not None and tensor.device.type != "cpu"]
    if len({tensor.device for tensor in away}) != 1 or any(tensor.is_floating_point() for tensor in away):
        return [None if tensor is None else tensor.cpu() for tensor in tensors]
    packed = torch.cat([tensor.flatten().long() for tensor in away]).cpu()
    parts = iter(packed.split([tensor.numel() for tensor in away]))
    here = {id(tensor): next(parts).view(tensor.shape) for tensor in away}
    return [None if tensor is None else here.get(id(tensor), tensor) for tensor in tensors]


def classify(labels: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> TokenKinds:
    """Kinds of the tokens of a batch.

    Args:
        labels: (batch, sequence) integers; IGNORED where there is no target.
        attention_mask: (batch, sequence), zero at padding; None: no padding.
        position_ids: (batch, sequence) or (1, sequence) integers; without a mask they tell packed sequences apart.

    Raises:
        InputError: a tensor of another shape.
    """
    _check_shapes(labels, attention_mask, position_ids)
    segment = segments(labels, attention_mask, position_ids)
    target = labels != IGNORED
    loss_bearing = torch.zeros_like(target)
    loss_bearing[:, :-1] = target[:, 1:] & (segment[:, 1:] == segment[:, :-1])
    dense = loss_bearing | target
    context = ~dense if attention_mask is None else (attention_mask != 0) & ~dense
    elided = (context | dense) & ~reaches(loss_bearing, segment)
    return TokenKinds(context, dense, loss_bearing, elided)


def segments(
    labels: Int[Tensor, "batch sequence"], attention_mask: Tensor | None, position_ids: Tensor | None
) -> Int[Tensor, "batch sequence"]:
    """Number of the segment that each position stands in, counted from 0 in every row."""
    if position_ids is None or attention_mask is not None:
        return torch.zeros_like(labels)
    starts = torch.zeros_like(position_ids)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts.cumsum(dim=1).expand_as(labels)


def reaches(
    loss_bearing: Bool[Tensor, "batch sequence"], segment: Int[Tensor, "batch sequence"]
) -> Bool[Tensor, "batch sequence"]:
    """True where a loss-bearing position follows, or stands, in the same segment of the row."""
    position = torch.arange(segment.shape[1], device=segment.device).expand_as(segment)
    last = torch.full_like(segment, -1).scatter_reduce(
        1, segment, torch.where(loss_bearing, position, -1).to(segment.dtype), "amax"
    )  # by segment number: there are at most as many segments as positions
    return position <= last.gather(1, segment)


def _check_shapes(labels: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
    if labels.ndim != 2:
        raise InputError(f"labels have shape {tuple(labels.shape)}: give (batch, sequence), one label per token")
    batch, sequence = labels.shape
    if attention_mask is not None and attention_mask.shape != labels.shape:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, labels {(batch, sequence)}: give a mask of the "
            "labels' shape, or none and position_ids"
        )
    if position_ids is not None and position_ids.shape not in {(batch, sequence), (1, sequence)}:
        raise InputError(
            f"position_ids have shape {tuple(position_ids.shape)}, labels {(batch, sequence)}: give one per token"
        )
