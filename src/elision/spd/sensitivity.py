"""How much perplexity each dropped sync costs, and the plan that follows from it (METHODS 2.2).

    sensitivity(i) = PPL(SPD on i..L-1) - PPL(SPD on i+1..L-1)

Measured on the user's text, for one number of ranks, exactly: streams.py shares the dense prefix between the L + 1
choices. Blocks in ascending order of sensitivity are dropped first; `curve` measures what the first k of them cost
together, which is not the sum of their sensitivities, and `calibrate` reads the plan off that curve.

Sensitivities of blocks that hardly matter are noise: their order among themselves means nothing, and limits are best
given relative to the dense perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

import elision
from elision.blocks import Decoder
from elision.errors import InputError
from elision.spd.plan import Calibration, SyncPlan
from elision.spd.simulate import covered, facts
from elision.spd.streams import Batch, check_batches, fingerprint, perplexities


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
        return tuple(sorted(range(len(self.blocks)), key=self.blocks.__getitem__))


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
        InputError: a model or `ranks` that SPD's maths does not cover, or data without a token to score.
    """
    view = covered(model, ranks)
    return _sensitivity(view, check_batches(batches, view.config.vocab_size), ranks, state, quiet)


def _sensitivity(
    view: Decoder, batches: Sequence[Batch], ranks: int, state: str | Path | None, quiet: bool
) -> Sensitivity:
    layers = len(view.blocks)
    suffixes = [tuple(range(first, layers)) for first in range(layers + 1)]
    title = f"Sync sensitivity, {ranks} ranks"
    return Sensitivity(ranks, perplexities(view, batches, ranks, suffixes, state=state, quiet=quiet, title=title))


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
    view = covered(model, ranks)
    SyncPlan(ranks, tuple(order)).check(facts(view))
    return _curve(view, check_batches(batches, view.config.vocab_size), ranks, order, state, quiet)


def _curve(
    view: Decoder, batches: Sequence[Batch], ranks: int, order: Sequence[int], state: str | Path | None, quiet: bool
) -> tuple[float, ...]:
    choices = [tuple(sorted(order[:k])) for k in range(len(order) + 1)]
    title = f"Zero-shot curve, {ranks} ranks"
    return perplexities(view, batches, ranks, choices, state=state, quiet=quiet, title=title)


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    ranks: int,
    *,
    max_loss: float | None = None,
    drop: float | None = None,
    state: str | Path | None = None,
    quiet: bool = False,
) -> SyncPlan:
    """Measure sensitivities and the zero-shot curve, and plan as many dropped syncs as the limit allows.

    Args:
        model: as in `sensitivity`, likewise `batches`, `ranks`, `state` and `quiet`.
        batches: see there; gone through twice.
        ranks: see there.
        max_loss: allowed relative increase of perplexity. The plan is the longest prefix of the order whose measured
            increase stays within it. 0.01 (one percent) where neither limit is given.
        drop: share of the blocks to drop instead, 0 to 1, rounded to whole blocks.
        state: see there.
        quiet: see there.

    Raises:
        InputError: as in `sensitivity`; also where both limits are given or one is out of range.
    """
    if max_loss is not None and drop is not None:
        raise InputError(f"max_loss={max_loss} and drop={drop} are both given: give one limit")
    if drop is not None and not 0 <= drop <= 1:
        raise InputError(f"drop={drop} is not a share of the blocks: give a number from 0 to 1")
    limit = 0.01 if max_loss is None else max_loss
    if not 0 <= limit < math.inf:
        raise InputError(f"max_loss={limit} is not an increase of perplexity: give 0.01 for one percent")
    view = covered(model, ranks)
    data = check_batches(batches, view.config.vocab_size)
    measured = _sensitivity(view, data, ranks, state, quiet)
    losses = _curve(view, data, ranks, measured.order, state, quiet)
    if drop is not None:
        count = math.floor(drop * len(view.blocks) + 0.5)
    else:
        count = max(k for k, loss in enumerate(losses) if loss <= losses[0] * (1 + limit))
    return SyncPlan(
        ranks=ranks,
        dropped=measured.order[:count],
        model=facts(view),
        calibration=Calibration(
            data=fingerprint(data),
            sensitivities=measured.blocks,
            order=measured.order,
            perplexities=losses,
            versions={
                "elision": elision.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        ),
    )
