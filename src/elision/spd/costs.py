"""What a sync costs and what a plan saves: the alpha-beta model of an all-reduce.

An all-reduce of n bytes over N ranks takes

    T(n) = alpha + beta * 2 (N - 1) / N * n

alpha is what an all-reduce of next to nothing takes, every message and launch of it included, so it belongs to its
number of ranks; beta is the inverse of what nccl-tests prints as bus bandwidth, and 2 (N - 1) / N * n are the bytes
that leave a rank in any all-reduce that moves no byte twice (ring, or reduce-scatter and all-gather). Both are
measured, on the links that serve: `elision spd probe` does it.

In decode n is a few kilobytes and alpha is all that counts, so a sync in int8 saves nothing and a dropped one does; in
prefill n is megabytes and beta counts. What a block costs under each treatment, its sync after the MLP included:

    dense      two all-reduces
    dropped    one, of the same size (maths: The block)
    int8       one, and one whose two exchanges carry int8 with a scale a token (int8.py)
    skipped    one: attention, its computation included, is left out of the block

The model leaves out that a dropped sync also removes the wait for the slower rank, so real savings may be a little
larger; that int8 quantises, and that syncs may hide behind computation, so they may be smaller.

`Device` and `Shape` estimate the computation beside it by its roofline: the larger of operations over the rate of
arithmetic and bytes over memory bandwidth. It is an estimate for planning, with the rates that a device reaches, not
those of its data sheet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from elision.errors import InputError
from elision.spd.plan import SyncPlan

TREATMENTS = ("dense", "dropped", "int8", "skipped")
_SCALE = 4  # bytes of the fp32 scale that goes with a token's int8 values


@dataclass(frozen=True)
class Link:
    """What all-reduces cost between `ranks` ranks: alpha in seconds, beta in seconds per byte that leaves a rank.

    Raises:
        InputError: ranks below 1; alpha or beta that is negative or not finite.
    """

    ranks: int
    alpha: float
    beta: float

    def __post_init__(self) -> None:
        if not isinstance(self.ranks, int) or isinstance(self.ranks, bool) or self.ranks < 1:
            raise InputError(f"ranks {self.ranks!r} is not a whole number of at least 1: give the ranks of the link")
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise InputError(f"{name} {value!r} is not a time of at least 0: give seconds, as probe measures them")

    def all_reduce(self, size: float) -> float:
        """Seconds of an all-reduce of `size` bytes a rank; one rank has nobody to wait for."""
        if self.ranks == 1:
            return 0.0
        return self.alpha + self.beta * 2 * (self.ranks - 1) / self.ranks * size

    def int8_all_reduce(self, hidden: int, tokens: int) -> float:
        """Seconds of an all-reduce of (tokens, hidden) numbers in int8, its arithmetic aside.

        Each exchange sends every other rank hidden / ranks values and one scale a token.
        """
        return self.all_reduce(tokens * (hidden + _SCALE * self.ranks))

    @classmethod
    def fit(cls, ranks: int, sizes: Sequence[float], seconds: Sequence[float]) -> Link:
        """The alpha and beta of least relative error for all-reduces of `sizes` bytes that took `seconds`.

        Raises:
            InputError: fewer than two sizes, or a time that is not positive.
        """
        if len(set(sizes)) < 2 or len(sizes) != len(seconds) or not all(t > 0 for t in seconds):
            raise InputError(f"{len(set(sizes))} sizes with {len(seconds)} times do not make a fit: time two or more")
        traffic = [2 * (ranks - 1) / ranks * size for size in sizes]
        # Both sides over the measured time: alpha * (1 / t) + beta * (x / t) = 1.
        rows = [(1 / t, x / t) for x, t in zip(traffic, seconds, strict=True)]
        aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
        a, b = (sum(row[i] for row in rows) for i in (0, 1))
        determinant = aa * bb - ab * ab
        alpha, beta = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
        if alpha < 0:
            alpha, beta = 0.0, b / bb
        if beta < 0:
            alpha, beta = a / aa, 0.0
        return cls(ranks, alpha, beta)


@dataclass(frozen=True)
class Compute:
    """Seconds that one rank computes in one block: attention with its norm and projections, and the MLP."""

    attention: float = 0.0
    mlp: float = 0.0


def block_seconds(
    treatment: str, link: Link, hidden: int, tokens: int, *, width: int = 2, compute: Compute | None = None
) -> float:
    """Seconds of one block under `treatment`, one of TREATMENTS.

    Args:
        treatment: how the sync after attention is treated.
        link: between the ranks.
        hidden: size of the residual stream.
        tokens: that go through the block at once: batch in decode, batch x length in prefill.
        width: bytes of a number in an all-reduce that is not in int8.
        compute: what the block computes; None for its syncs alone.

    Raises:
        InputError: an unknown treatment.
    """
    if treatment not in TREATMENTS:
        raise InputError(f"treatment {treatment!r} is not known: use one of {', '.join(TREATMENTS)}")
    compute = compute or Compute()
    sync = link.all_reduce(width * hidden * tokens)
    first = {"dense": sync, "int8": link.int8_all_reduce(hidden, tokens)}.get(treatment, 0.0)
    attention = 0.0 if treatment == "skipped" else compute.attention
    return attention + first + compute.mlp + sync


def treatments(plan: SyncPlan, layers: int) -> tuple[str, ...]:
    """The treatment of each of `layers` blocks under `plan`."""
    return tuple(plan.treatment(block) for block in range(layers))


@dataclass(frozen=True)
class Saving:
    """Seconds of a forward pass with all syncs and under a plan."""

    before: float
    after: float

    @property
    def seconds(self) -> float:
        """What the plan saves; negative where it costs."""
        return self.before - self.after

    @property
    def share(self) -> float:
        """The saved part of the time with all syncs."""
        return self.seconds / self.before if self.before else 0.0


def saving(
    treated: Sequence[str],
    link: Link,
    hidden: int,
    tokens: int,
    *,
    width: int = 2,
    compute: Compute | None = None,
    rest: float = 0.0,
) -> Saving:
    """What treating each block as `treated` says saves; `rest` are seconds outside the blocks (embedding, head).

    Other arguments and errors are those of `block_seconds`.
    """
    costs = {
        name: block_seconds(name, link, hidden, tokens, width=width, compute=compute) for name in {"dense", *treated}
    }
    return Saving(rest + len(treated) * costs["dense"], rest + sum(costs[name] for name in treated))


@dataclass(frozen=True)
class Device:
    """What one rank's device reaches: operations a second in matrix products, bytes a second from its memory."""

    flops: float
    bandwidth: float

    def seconds(self, operations: float, size: float) -> float:
        """The roofline's time for so many operations on so many bytes."""
        return max(operations / self.flops, size / self.bandwidth)


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that decide what a forward pass costs.

    Raises:
        InputError: one of them is not a whole number of at least 1.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    projections: int = 3  # of the MLP: gate, up and down, or two without a gate

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{entry.name} {value!r} is not a whole number of at least 1: give the model's size")

    @property
    def attention_weights(self) -> int:
        """Numbers in one block's Q, K, V and O."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def mlp_weights(self) -> int:
        """Numbers in one block's MLP."""
        return self.projections * self.hidden * self.intermediate

    def compute(
        self, device: Device, ranks: int, *, batch: int, new: int, before: int = 0, width: int = 2
    ) -> tuple[Compute, float]:
        """(one block's Compute, seconds outside the blocks) on each of `ranks`, by the roofline.

        Args:
            device: of every rank.
            ranks: that share the model.
            batch: sequences.
            new: tokens a sequence in this pass: 1 in decode, the prompt's in prefill.
            before: tokens a sequence already in the key/value cache.
            width: bytes of a number.
        """
        tokens, seen = batch * new, before + new
        mixing = 4.0 * self.heads * self.head_dim * batch * new * (before + (new + 1) / 2)
        cache = 2.0 * self.kv_heads * self.head_dim * batch * seen * width
        return (
            Compute(
                attention=device.seconds(
                    2.0 * tokens * self.attention_weights / ranks, width * self.attention_weights / ranks
                )
                + device.seconds(mixing / ranks, cache / ranks),
                mlp=device.seconds(2.0 * tokens * self.mlp_weights / ranks, width * self.mlp_weights / ranks),
            ),
            device.seconds(
                2.0 * batch * self.hidden * self.vocabulary / ranks, width * self.hidden * self.vocabulary / ranks
            ),
        )
