"""Corrections of the local MLP input that need no training: least squares on calibration text (maths: Corrections).

Rank i's MLP should see S = sum_j P_j and sees P_i = A_i Wo_i. Of S it can say what its own share tells about it:

    constant    m_i = E[S - P_i]
    gain        g_i, m_i minimise E|g_i P_i + m_i - S|^2, channel by channel
    local_o     M_i, m_i minimise E|A_i M_i + m_i - S|^2 + ridge |M_i - Wo_i|^2

each better than the one before on the text it was fitted to, and dearer: a vector, two vectors, a second O. All three
follow from sums over tokens, so the text streams by once. Blocks are fitted in ascending order on what the blocks
before them put out, corrected or with their sync in int8, because that is what they will be given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor, nn

from elision.blocks import Block, Decoder
from elision.errors import InputError
from elision.progress import progress
from elision.spd.activations import Source, served, sources
from elision.spd.artifact import Treated
from elision.spd.block import attention_share
from elision.spd.corrections import Correction, attach, correction_of, detach
from elision.spd.plan import CORRECTIONS, SyncPlan
from elision.spd.simulate import Simulation, check_plain, covered, facts, head_outputs, healed_beside, local_block
from elision.spd.streams import Batch, check_batches, check_weights, evaluating

RIDGE = 1e-4  # of M_i - Wo_i, in units of the mean square of A_i's channels: keeps directions that hardly occur
SILENT = 1e-12  # mean square taken for that of channels which put out less: a rank whose heads are zero keeps its Wo_i


def correct(
    model: nn.Module,
    plan: SyncPlan,
    batches: Iterable[Batch],
    kind: str = "constant",
    *,
    blocks: Sequence[int] | None = None,
    quiet: bool = False,
) -> Treated:
    """Fit a correction of the local MLP input for dropped blocks, and give it to the model beside its weights.

    Args:
        model: the model, which gets a submodule `spd_correction` in each corrected block; its weights stay as they
            are, and `uncorrect` takes the submodules away. Its own forward does not change.
        plan: which blocks are dropped, for how many ranks.
        batches: as for `sensitivity`; every real token counts, labels do not matter.
        kind: "constant", "gain" or "local_o".
        blocks: the dropped blocks to correct; all of them by default.
        quiet: show no progress bar.

    Returns:
        The model and the plan with the corrections in it.

    Raises:
        InputError: an unknown kind, a block that is not dropped or was healed beside its correction, or
            what `simulate` and `sensitivity` refuse.
    """
    if kind not in CORRECTIONS:
        raise InputError(f"correction {kind!r} is not known: use one of {', '.join(CORRECTIONS)}")
    view = covered(model, plan.ranks)
    plan.check(facts(view))
    check_weights(view, plan)
    chosen = dict.fromkeys(plan.dropped if blocks is None else blocks, kind)
    corrected = replace(plan, corrections={**plan.corrections, **chosen}, verified=None)
    _check_not_beside(view, chosen)
    for block in view.blocks:
        check_plain(block)
    for index in set(corrected.corrections) - set(chosen):
        correction_of(view.blocks[index], plan.ranks, corrected.corrections[index])
    data = sources(view, check_batches(batches, view.config))
    hidden = [source.embedded for source in data]
    with evaluating(view.model), torch.no_grad(), progress("Correcting", len(view.blocks), quiet) as advance:
        for block in view.blocks:
            correction = None
            if block.index in chosen:
                correction = attach_fit(block, plan.ranks, kind, hidden, data)
            elif block.index in corrected.corrections:
                correction = correction_of(block, plan.ranks, corrected.corrections[block.index])
            hidden = [
                served(block, plan, x, source.kwargs[block.index], correction)
                for x, source in zip(hidden, data, strict=True)
            ]
            advance(1)
    return Treated(view.model, corrected)


def uncorrect(model: nn.Module, plan: SyncPlan) -> SyncPlan:
    """Take every correction away from the model, and return the plan without them.

    Raises:
        InputError: a block was healed beside its correction.
    """
    view = covered(model, plan.ranks)
    _check_not_beside(view, range(len(view.blocks)))
    for block in view.blocks:
        detach(block)
    return replace(plan, corrections={}, verified=None)


def _check_not_beside(view: Decoder, blocks: Iterable[int]) -> None:
    """Raise InputError where one of `blocks` was healed beside a correction, without which its weights are wrong."""
    if fixed := sorted(set(healed_beside(view)) & set(blocks)):
        raise InputError(
            f"block {fixed[0]} was healed beside its correction, which its weights need: leave it, or load the "
            "original model"
        )


@torch.no_grad()
def attach_fit(block: Block, ranks: int, kind: str, hidden: Sequence[Tensor], data: Sequence[Source]) -> Correction:
    """Give a block that gets `hidden` (one tensor a batch) its fitted correction."""
    tensors = fit(block, ranks, kind, hidden, data)
    correction = attach(block, kind, ranks)
    for name, parameter in correction.named_parameters():
        parameter.copy_(tensors[name])
    return correction


def fit(block: Block, ranks: int, kind: str, hidden: Sequence[Tensor], data: Sequence[Source]) -> dict[str, Tensor]:
    """The correction's tensors for a block that gets `hidden` (one tensor a batch), in float64."""
    moments = [Moments() for _ in range(ranks)]
    with Simulation([block], ranks):
        for x, source in zip(hidden, data, strict=True):
            heads = head_outputs(block, x, source.kwargs[block.index])[source.real].tensor_split(ranks, dim=-1)
            shares = [attention_share(own, local_block(block, rank, ranks)) for rank, own in enumerate(heads)]
            total = reduce(torch.add, shares)
            for moment, own, share in zip(moments, heads, shares, strict=True):
                regressor = {"constant": None, "gain": share, "local_o": own}[kind]
                moment.add(total - share, regressor, crossed=kind == "local_o")
    if kind == "constant":
        return {"constant": torch.stack([moment.mean() for moment in moments])}
    slopes, constants = zip(*(moment.regression() for moment in moments), strict=True)
    if kind == "gain":
        return {"constant": torch.stack(constants), "gain": 1 + torch.stack(slopes)}
    return {"constant": torch.stack(constants), "local_o": block.o.weight + torch.cat(slopes).T}


class Moments:
    """Sums over tokens from which the regression of what a rank misses, D = S - P_i, follows.

    On a regressor Y (tokens, d) it is either `crossed`, D = Y B + m with B (d, hidden), or channel by channel,
    D = Y * s + m with s (hidden,) and d = hidden. Products are taken in the data's precision, sums over batches in
    float64.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.crossed = False
        self.sums: dict[str, Tensor] = {}

    def add(self, missing: Tensor, regressor: Tensor | None, *, crossed: bool = False) -> None:
        """Take in tokens of D (tokens, hidden) and, unless only the mean is wanted, of Y."""
        self.tokens += len(missing)
        self.crossed = crossed
        d = missing if missing.dtype == torch.float64 else missing.float()
        self._sum("d", d.sum(0, dtype=torch.float64))
        if regressor is not None:
            y = regressor.to(d.dtype)
            self._sum("y", y.sum(0, dtype=torch.float64))
            self._sum("yy", y.T @ y if crossed else (y * y).sum(0, dtype=torch.float64))
            self._sum("yd", y.T @ d if crossed else (y * d).sum(0, dtype=torch.float64))

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + value.double()

    def mean(self) -> Tensor:
        """E[D] (hidden,)."""
        return self.sums["d"] / self.tokens

    def regression(self) -> tuple[Tensor, Tensor]:
        """(B or s, m): slopes and intercept."""
        d, y, yy, yd = (self.sums[name] / self.tokens for name in ("d", "y", "yy", "yd"))
        if not self.crossed:
            variance, covariance = yy - y * y, yd - y * d
            slopes = torch.where(variance > 1e-12 * yy, covariance / variance, 0.0)  # a channel that stands still
            return slopes, d - slopes * y
        ridge = RIDGE * yy.diagonal().mean().clamp_min(SILENT) * torch.eye(len(y), dtype=y.dtype, device=y.device)
        slopes = torch.linalg.solve(yy - torch.outer(y, y) + ridge, yd - torch.outer(y, d), left=True)
        return slopes, d - y @ slopes
