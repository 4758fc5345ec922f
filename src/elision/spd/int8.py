"""An all-reduce whose messages are int8: the sync after attention made four times lighter instead of dropped.

Every rank owns a contiguous part of the channels, and the sum comes about in two exchanges (maths: The block):

    send    rank i quantises its P_i, one scale a token, and sends each owner its part (all-to-all)
    sum     the owner adds up what it got, dequantised, in fp32 and in rank order
    return  the owner quantises its part of the sum, one scale a token, and sends it to all (all-gather)

A scale is max|.| / 127 over the channels that it covers, so nothing saturates and zero stays zero. Every rank ends up
with the same bytes, so the residual stream stays equal on all of them. The error is at most half a scale per message:
absolute, not relative, so a token with one outlying channel loses precision in the others.

`all_reduce` has all ranks' shares in one process; `all_reduce_on_rank` is one rank's side of the same sum, bit for bit,
with the two exchanges handed in. A message is bytes: for each token its values and, behind them, its scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from elision.shapes import Float

LEVELS = 127  # of each sign
_SCALE = 4  # bytes of a token's scale behind its values

Exchange = Callable[[Tensor], Tensor]  # between ranks; see all_reduce_on_rank


def quantise(x: Float[Tensor, "*batch channels"]) -> tuple[Tensor, Tensor]:
    """(int8 values, fp32 scales): `values * scale` is `x` to within half a scale; scales are (*batch, 1).

    Rounds half to even, as the hardware does. A token of zeros has scale 0.
    """
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / LEVELS
    values = torch.where(scale > 0, wide / scale, 0.0).round().clamp(-LEVELS, LEVELS)
    return values.to(torch.int8), scale


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """The fp32 numbers that int8 `values` with their `scale` stand for."""
    return values.float() * scale


def all_reduce(shares: Sequence[Float[Tensor, "*batch channels"]]) -> Float[Tensor, "*batch channels"]:
    """What every rank has after an int8 all-reduce of `shares`, one a rank; in their dtype.

    Where the number of ranks does not divide the channels, the first parts are one channel longer.
    """
    sent = [quantise(share) for share in shares]
    parts = [values.tensor_split(len(shares), dim=-1) for values, _ in sent]
    returned = []
    for owner in range(len(shares)):
        total = torch.zeros_like(parts[0][owner], dtype=torch.float32)
        for rank, (_, scale) in enumerate(sent):
            total = total + dequantise(parts[rank][owner], scale)
        returned.append(dequantise(*quantise(total)) if total.shape[-1] else total)
    return torch.cat(returned, dim=-1).to(shares[0].dtype)


def all_reduce_on_rank(
    share: Float[Tensor, "*batch channels"], rank: int, ranks: int, all_to_all: Exchange, all_gather: Exchange
) -> Float[Tensor, "*batch channels"]:
    """What `all_reduce` of every rank's share is, computed on `rank` with two exchanges of int8.

    Args:
        share: this rank's P_i; there are at least as many channels as ranks.
        rank: this rank's number.
        ranks: how many take part.
        all_to_all: (ranks, ...) int8 to the same: part j goes to rank j, part i came from rank i.
        all_gather: (...) int8 to (ranks, ...), every rank's in rank order.
    """
    values, scale = quantise(share)
    parts = values.tensor_split(ranks, dim=-1)
    widths = [part.shape[-1] for part in parts]
    assert widths[-1] > 0
    received = all_to_all(torch.stack([_pack(part, scale, widths[0]) for part in parts]))
    total = torch.zeros((*share.shape[:-1], widths[rank]), dtype=torch.float32, device=share.device)
    for message in received.unbind():
        total = total + dequantise(*_unpack(message, widths[rank]))
    returned = all_gather(_pack(*quantise(total), widths[0]))
    sums = [dequantise(*_unpack(*pair)) for pair in zip(returned.unbind(), widths, strict=True)]
    return torch.cat(sums, dim=-1).to(share.dtype)


def _pack(values: Tensor, scale: Tensor, width: int) -> Tensor:
    """int8 (*batch, width + 4): the values, zeros up to `width`, the bytes of the scale."""
    return torch.cat([F.pad(values, (0, width - values.shape[-1])), scale.view(torch.int8)], dim=-1)


def _unpack(message: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The first `width` values of a message, and its scale."""
    return message[..., :width], message[..., -_SCALE:].contiguous().view(torch.float32)
