"""How much perplexity each dropped sync costs (maths: Which blocks).

    sensitivity(i) = PPL(SPD on i..L-1) - PPL(SPD on i+1..L-1)

Measured on the user's text exactly: streams.py shares the dense prefix between the L + 1 plans, and between numbers
of ranks where several are given. Blocks in ascending order of sensitivity are dropped first; `curve` measures what the
first k of them cost together, which is not the sum of their sensitivities.

Sensitivities of blocks that hardly matter are noise: their order among themselves means nothing, and limits are best
given relative to the dense perplexity.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from elision.blocks import Decoder
from elision.errors import InputError
from elision.spd.plan import SyncPlan
from elision.spd.simulate import covered, facts
from elision.spd.streams import Batch, Quality, State, check_batches, check_weights, measure


@dataclass(frozen=True)
class Sensitivity:
    """perplexities[i] is measured with SPD on blocks i..L-1, so perplexities[L] is the dense model's."""

    ranks: int
    perplexities: tuple[float, ...]

    @property
    def dense(self) -> float:
        """Perplexity with every sync in place."""
        return self.perplexities[-1]

    @property
    def blocks(self) -> tuple[float, ...]:
        """Sensitivity of each block, in perplexity."""
        return tuple(a - b for a, b in zip(self.perplexities, self.perplexities[1:], strict=False))

    @property
    def order(self) -> tuple[int, ...]:
        """Blocks by ascending sensitivity: the order in which to drop their syncs."""
        return ascending(self.blocks)


def ascending(scores: Sequence[float]) -> tuple[int, ...]:
    """Blocks by ascending score; of equal ones the first comes first."""
    return tuple(sorted(range(len(scores)), key=scores.__getitem__))


def sensitivity(
    model: nn.Module,
    batches: Iterable[Batch],
    ranks: int,
    *,
    state: str | Path | None = None,
    quiet: bool = False,
) -> Sensitivity:
    """Exact sequential sensitivity of every block, in about L/2 + 1.5 forward passes over the data.

    Args:
        model: a causal LM, without unmerged adapters. It is measured in eval mode and left as it was.
        batches: dicts with input_ids (batch, sequence), optionally attention_mask, position_ids and labels.
            Perplexity is taken over labels where given, else over the real tokens.
        ranks: tensor-parallel ranks.
        state: file that keeps what was measured: give the same path again and a killed run goes on.
        quiet: show no progress bar.

    Raises:
        InputError: a model or `ranks` that SPD's maths does not cover, one with healed or regrouped blocks, or data
            without a token to score.
    """
    return sensitivities(model, batches, (ranks,), state=state, quiet=quiet)[0]


def sensitivities(
    model: nn.Module,
    batches: Iterable[Batch],
    ranks: Sequence[int],
    *,
    state: str | Path | None = None,
    quiet: bool = False,
) -> tuple[Sensitivity, ...]:
    """`sensitivity` for several numbers of ranks, whose dense prefix is computed once for all.

    Each further number costs L/2 + 0.5 forward passes. Arguments and errors are those of `sensitivity`.
    """
    view = covered_by_all(model, ranks)
    return sequential(view, check_batches(batches, view.config), ranks, state, quiet)


def covered_by_all(model: nn.Module, ranks: Sequence[int]) -> Decoder:
    """View `model`, after making sure that SPD covers it with each of `ranks` and that it is an original.

    Raises:
        InputError: as `simulate.covered`, or its blocks are healed or regrouped, so that without their plan they are
            another model's.
    """
    if not ranks:
        raise InputError("ranks is empty: give at least one number of tensor-parallel ranks")
    views = [covered(model, each) for each in ranks]
    check_weights(views[0])
    return views[0]


def sequential(
    view: Decoder, batches: Sequence[Batch], ranks: Sequence[int], state: State, quiet: bool
) -> tuple[Sensitivity, ...]:
    """`sensitivities` of what is checked already."""
    layers = len(view.blocks)
    plans = [SyncPlan(each, tuple(range(first, layers))) for each in ranks for first in range(layers + 1)]
    title = f"Sync sensitivity, {', '.join(map(str, ranks))} ranks"
    found = [quality.perplexity for quality in measure(view, batches, plans, state=state, quiet=quiet, title=title)]
    size = layers + 1
    return tuple(Sensitivity(each, tuple(found[i * size : (i + 1) * size])) for i, each in enumerate(ranks))


def curve(
    model: nn.Module,
    batches: Iterable[Batch],
    ranks: int,
    order: Sequence[int],
    *,
    state: str | Path | None = None,
    quiet: bool = False,
) -> tuple[float, ...]:
    """Perplexity with the first k blocks of `order` dropped as they are, for k = 0..len(order).

    Arguments and errors are those of `sensitivity`; also InputError where `order` is not distinct blocks of the model.
    """
    view = covered_by_all(model, (ranks,))
    SyncPlan(ranks, tuple(order)).check(facts(view))
    data = check_batches(batches, view.config)
    (found,) = curves(view, data, [(ranks, order)], state, quiet, title="Perplexity along the order")
    return tuple(quality.perplexity for quality in found)


def curves(
    view: Decoder,
    batches: Sequence[Batch],
    orders: Sequence[tuple[int, Sequence[int]]],
    state: State,
    quiet: bool,
    title: str = "Zero-shot curve",
) -> tuple[tuple[Quality, ...], ...]:
    """For each (ranks, order), the quality with the first k blocks of that order dropped as they are."""
    plans = [SyncPlan(ranks, tuple(order[:k])) for ranks, order in orders for k in range(len(order) + 1)]
    title = f"{title}, {', '.join(str(ranks) for ranks, _ in orders)} ranks"
    found = iter(measure(view, batches, plans, state=state, quiet=quiet, title=title))
    return tuple(tuple(next(found) for _ in range(len(order) + 1)) for _, order in orders)
