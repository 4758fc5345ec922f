"""A short polish: all healed blocks together, against what the dense model would say next.

Distillation looks at one block at a time and weighs every channel of its output alike. What counts in the end is the
next token, so a few epochs on the same calibration text follow that minimise

    KL(dense || healed)        mean over real tokens, in nats

through the whole model. The dense model itself is not needed: its last block's outputs are the teacher's stream at the
end of the walk, and the output head, which healing leaves alone, turns them into logits, a slice at a time. Memory is
that of a training step of the whole model, activations of every block included.

Syncs in int8 are served as they are; the rounding in them has no slope, so backward passes through the exact sync
instead (straight-through).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from elision.blocks import Decoder
from elision.progress import progress
from elision.spd.activations import Source, served
from elision.spd.corrections import Correction
from elision.spd.plan import SyncPlan
from elision.spd.streams import HEAD_ROWS, step
from elision.spd.student import Kept, Student, as_dtype, cut, mean, train, training


def polish(
    view: Decoder,
    plan: SyncPlan,
    students: Mapping[int, Student],
    corrections: Mapping[int, Correction],
    data: Sequence[Source],
    teacher: Sequence[Tensor],
    *,
    epochs: int,
    peak: float,
    held_out: float,
    seed: int,
    kept: Kept | None = None,
    quiet: bool = False,
) -> None:
    """Train the students together, in place; they end with the weights that were best on the held-out batches.

    Args:
        view: the model that the students are blocks of.
        plan: what its ranks compute.
        students: by block.
        corrections: of dropped blocks that are no students, by block.
        data: the batches.
        teacher: the dense model's last block's output for each, before the final norm.
        epochs: at most.
        peak: learning rate.
        held_out: share of the batches, the last ones.
        seed: of the order of batches.
        kept: where every epoch is written down.
        quiet: show no progress bar.
    """
    trained = {f"{index}.{n}": p for index, student in students.items() for n, p in student.trained.items()}
    training_batches = cut(held_out, len(data))
    flags = {parameter: parameter.requires_grad for parameter in view.model.parameters()}
    with training(students.values()), progress("Polishing", epochs * training_batches, quiet) as advance:
        for parameter in set(flags) - set(trained.values()):
            parameter.requires_grad_(False)

        def backward(index: int) -> None:
            hidden = forward(view, plan, students, corrections, data[index])
            real = data[index].real
            rows = hidden[real]
            leaf = rows.detach().requires_grad_()  # the head's slices go backward one by one, the blocks once
            for part in divergences(view, leaf, teacher[index][real]):
                part.backward()
            assert leaf.grad is not None
            rows.backward(leaf.grad)
            advance(1)

        @torch.no_grad()
        def judge() -> float:
            losses = []
            for source, target in zip(data[training_batches:], teacher[training_batches:], strict=True):
                hidden = forward(view, plan, students, corrections, source)
                parts = divergences(view, hidden[source.real], target[source.real])
                losses.append(sum(part.item() for part in parts))
            return mean(losses)

        try:
            train(
                trained,
                backward,
                judge,
                count=training_batches,
                epochs=epochs,
                peak=peak,
                seed=seed,
                kept=kept,
                name="polish",
            )
        finally:
            for parameter in set(flags) - set(trained.values()):
                parameter.requires_grad_(flags[parameter])


def forward(
    view: Decoder,
    plan: SyncPlan,
    students: Mapping[int, Student],
    corrections: Mapping[int, Correction],
    source: Source,
) -> Tensor:
    """The last block's output (batch, sequence, hidden) as the plan's ranks compute it, with gradients."""
    hidden = source.embedded
    for block in view.blocks:
        kwargs, dtype = source.kwargs[block.index], block.o.weight.dtype
        if block.index in students:
            hidden = students[block.index](hidden, kwargs)
            continue
        x, kwargs = hidden.to(dtype), as_dtype(kwargs, dtype)
        if block.index in plan.int8 and torch.is_grad_enabled():
            exact = step(block, None, x, kwargs)
            hidden = exact + (served(block, plan, x.detach(), kwargs) - exact).detach()
        else:
            hidden = served(block, plan, x, kwargs, corrections.get(block.index))
    return hidden


def divergences(view: Decoder, rows: Tensor, teacher: Tensor) -> Iterator[Tensor]:
    """KL(dense || healed) of tokens' last hidden states (tokens, hidden), in parts that add up to the mean."""
    dtype = next(view.lm_head.parameters()).dtype
    for student, dense in zip(rows.split(HEAD_ROWS), teacher.split(HEAD_ROWS), strict=True):
        with torch.no_grad():
            target = _log_probabilities(view, dense.to(dtype))
        found = _log_probabilities(view, student.to(dtype))
        yield F.kl_div(found, target, reduction="sum", log_target=True) / len(rows)


def _log_probabilities(view: Decoder, hidden: Tensor) -> Tensor:
    logits = view.logits(hidden)
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
