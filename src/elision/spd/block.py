"""A tensor-parallel decoder block with one sync or two, from one rank's viewpoint.

N ranks share a block in the Megatron layout: Q, K, V, gate and up are split by columns (whole heads, channels), O and
down by rows. Every rank knows the block's input X; with A_i its heads' attention output, P_i = A_i Wo_i is its share
of the attention sub-layer, b the bias of O, c that of down, r the residual multiplier (1 but for Granite):

    plain                                        SPD: no sync after attention
    u      = X + r (all_reduce(P_i) + b)         u_i = X + r (P_i + b)
    output = u + r (all_reduce(Z_i) + c)         output = X + r (all_reduce(P_i + Z_i) + b + c)
    Z_i    = MLP_i(norm(u)), without c           Z_i = MLP_i(norm(u_i)), without c

P_i rides along in the one sync that is left, so attention's output still reaches every rank's residual in full, and
each P_i, b and c is counted exactly once. What is lost is only this: the MLP of rank i sees its own heads' P_i where
it would have seen all of them. With one rank nothing is lost.

A correction gives that MLP a guess of what it does not see, without communication (maths: Corrections). It touches the
local MLP input alone, never the residual stream, where the true sum arrives in any case:

    u_i = X + r (g_i P_i + b + m_i)              g_i a gain per channel, m_i a constant
    u_i = X + r (A_i M_i + b + m_i)              M_i an O of its own, for the MLP input only

The sync is handed in as a function, so the same lines run under torch.distributed, in a serving engine, and N times
in one process (simulate.py). Everything here is a pure function of its arguments, works on any leading dimensions and
carries gradients. How the attention output A_i comes about (rotation, masks, cache) is the caller's matter: it is the
same with and without the sync.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from elision.shapes import Float

AllReduce = Callable[[Tensor], Tensor]  # the sum over ranks, the same on every rank


@dataclass(frozen=True)
class Shard:
    """What one rank holds of every block, counted in query heads, key/value heads and MLP channels."""

    heads: range
    kv_heads: range
    channels: range


def shard(rank: int, ranks: int, heads: int, kv_heads: int, intermediate: int) -> Shard:
    """The contiguous share of `rank`: equal groups of heads, channels that differ by at most one unit.

    With more ranks than key/value heads, each of those is held by ranks / kv_heads neighbouring ranks. `ranks` must
    divide `heads`, and divide `kv_heads` or be a multiple of it (blocks.check_ranks tells a user so).
    """
    assert 0 <= rank < ranks and heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)
    if kv_heads >= ranks:
        own_kv = _even(rank, ranks, kv_heads)
    else:
        own_kv = range(rank * kv_heads // ranks, rank * kv_heads // ranks + 1)
    return Shard(_even(rank, ranks, heads), own_kv, _even(rank, ranks, intermediate))


def _even(rank: int, ranks: int, units: int) -> range:
    """Cut `units` into `ranks` contiguous parts; the first units % ranks of them are one longer."""
    size, longer = divmod(units, ranks)
    start = rank * size + min(rank, longer)
    return range(start, start + size + (rank < longer))


def span(units: range, width: int = 1) -> slice:
    """The channels that `units` (heads of `width` channels each) take up."""
    return slice(units.start * width, units.stop * width)


@dataclass(frozen=True)
class LocalBlock:
    """One rank's part of a block after its attention: its shares of O and the MLP, and what every rank holds whole.

    Weights are in nn.Linear's layout (out, in). `gate` is None for a two-layer MLP. Biases are None where absent.
    """

    o: Float[Tensor, "hidden local_heads"]
    up: Float[Tensor, "local_channels hidden"]
    down: Float[Tensor, "hidden local_channels"]
    norm: Callable[[Tensor], Tensor]  # the norm before the MLP
    activation: Callable[[Tensor], Tensor]
    gate: Float[Tensor, "local_channels hidden"] | None = None
    up_bias: Float[Tensor, "local_channels"] | None = None
    gate_bias: Float[Tensor, "local_channels"] | None = None
    o_bias: Float[Tensor, "hidden"] | None = None  # b, whole on every rank
    down_bias: Float[Tensor, "hidden"] | None = None  # c, whole on every rank
    residual_multiplier: float = 1.0  # r
    mlp_o: Float[Tensor, "hidden local_heads"] | None = None  # M_i; these three correct an SPD block's MLP input
    mlp_gain: Float[Tensor, "hidden"] | None = None  # g_i
    mlp_constant: Float[Tensor, "hidden"] | None = None  # m_i


def attention_share(heads: Float[Tensor, "*batch local_heads"], local: LocalBlock) -> Float[Tensor, "*batch hidden"]:
    """P_i: this rank's heads through its columns of O, without O's bias."""
    return F.linear(heads, local.o)


def mlp_share(u: Float[Tensor, "*batch hidden"], local: LocalBlock) -> Float[Tensor, "*batch hidden"]:
    """Z_i: this rank's channels of the MLP on the norm of `u`, without the down projection's bias."""
    h = local.norm(u)
    inner = F.linear(h, local.up, local.up_bias)
    if local.gate is None:
        inner = local.activation(inner)
    else:
        inner = local.activation(F.linear(h, local.gate, local.gate_bias)) * inner
    return F.linear(inner, local.down)


def add_residual(
    x: Float[Tensor, "*batch hidden"],
    y: Float[Tensor, "*batch hidden"],
    multiplier: float,
    *biases: Float[Tensor, "hidden"] | None,
) -> Float[Tensor, "*batch hidden"]:
    """X + r (y + biases): the residual stream takes in a sub-layer's output, and every bias once."""
    for bias in biases:
        y = y if bias is None else y + bias
    return x + (y if multiplier == 1.0 else y * multiplier)


def spd_share(
    x: Float[Tensor, "*batch hidden"], heads: Float[Tensor, "*batch local_heads"], local: LocalBlock
) -> Float[Tensor, "*batch hidden"]:
    """P_i + Z_i: what this rank puts into the only sync of an SPD block."""
    partial = attention_share(heads, local)
    return partial + mlp_share(mlp_input(x, heads, partial, local), local)


def mlp_input(
    x: Float[Tensor, "*batch hidden"],
    heads: Float[Tensor, "*batch local_heads"],
    partial: Float[Tensor, "*batch hidden"],
    local: LocalBlock,
) -> Float[Tensor, "*batch hidden"]:
    """u_i: what this rank's MLP sees without the sync, from X, A_i and P_i; corrected where `local` says so."""
    seen = partial if local.mlp_o is None else F.linear(heads, local.mlp_o)
    if local.mlp_gain is not None:
        seen = seen * local.mlp_gain
    return add_residual(x, seen, local.residual_multiplier, local.o_bias, local.mlp_constant)


def spd_output(
    x: Float[Tensor, "*batch hidden"], total: Float[Tensor, "*batch hidden"], local: LocalBlock
) -> Float[Tensor, "*batch hidden"]:
    """An SPD block's output from X and the sum of all ranks' `spd_share`; the same on every rank."""
    return add_residual(x, total, local.residual_multiplier, local.o_bias, local.down_bias)


def spd_block(
    x: Float[Tensor, "*batch hidden"],
    heads: Float[Tensor, "*batch local_heads"],
    local: LocalBlock,
    all_reduce: AllReduce,
) -> Float[Tensor, "*batch hidden"]:
    """The block with one sync (maths: The block): X and this rank's attention output A_i to the block's output."""
    return spd_output(x, all_reduce(spd_share(x, heads, local)), local)


def plain_block(
    x: Float[Tensor, "*batch hidden"],
    heads: Float[Tensor, "*batch local_heads"],
    local: LocalBlock,
    all_reduce: AllReduce,
    first: AllReduce | None = None,
) -> Float[Tensor, "*batch hidden"]:
    """The block with both syncs, equal to the unsharded one: what `spd_block` is measured against.

    `first` is the sync after attention where it is another one, in int8.
    """
    r = local.residual_multiplier
    u = add_residual(x, (first or all_reduce)(attention_share(heads, local)), r, local.o_bias)
    return add_residual(u, all_reduce(mlp_share(u, local)), r, local.down_bias)
