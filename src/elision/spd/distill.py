"""Healing: give a dropped block's weights the chance to make up for the sync that it lost (maths: Healing).

Block-to-block distillation. The teacher is the block with both syncs, the student the same block with one; the student
learns to put out what the teacher does, on calibration text, one block after the other in ascending order:

    loss = |student(x) - t|^2 / |t - x|^2        both summed over the batch's real tokens

Two streams walk through the model: the teacher's, of the original weights, gives the targets t; the student's, of the
blocks healed so far, gives the inputs x, through int8 syncs where the plan sends them. So a block also learns to undo
what is left of its predecessors' errors. The paper feeds the teacher's stream to both (`teacher_inputs`), which cannot.
Dividing by |t - x|^2, what the block adds to its input, makes losses comparable between blocks and keeps one learning
rate for all. A short polish end to end may follow (polish.py).

Some batches are held out; after each epoch the block is judged on them, its best weights are kept, and it stops early
when it gets no better. A block that cannot be improved keeps the weights it had. Weights of less than 32 bits are
trained as float32 and rounded once, at the end.

Nothing depends on time or on where a run was cut: each block's order of batches follows from the seed and its number.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from elision.blocks import Block, Decoder
from elision.errors import InputError
from elision.layerwise import fingerprint
from elision.progress import progress
from elision.spd.activations import Source, served, sources
from elision.spd.artifact import Treated
from elision.spd.corrections import Correction, correction_of
from elision.spd.fit import attach_fit
from elision.spd.lowrank import attach_lowrank
from elision.spd.plan import CORRECTIONS, SyncPlan
from elision.spd.polish import polish
from elision.spd.regroup import grouped, permute
from elision.spd.simulate import carry, check_visited, covered, facts
from elision.spd.streams import Batch, check_batches, check_weights, evaluating, hash_weights, step
from elision.spd.student import Kept, Student, cut, mean, train, training
from elision.streaming import execution_devices, is_streamed, relocate, resident

DEFAULT_CORRECTION = "gain"  # of a block whose plan says "correct", where the recipe names none: two vectors a rank


@dataclass(frozen=True)
class Recipe:
    """How each block is trained: AdamW, betas (0.9, 0.95), no weight decay, short warmup, cosine to zero."""

    epochs: int = 10
    lr: float | None = None  # None: 0.256 / hidden, at most 1e-3: 1e-3 up to width 256, 6e-5 at 4096
    held_out: float = 0.1  # share of the batches, the last ones, at least one
    teacher_inputs: bool = False  # the paper's way: inputs from the teacher's stream
    seed: int = 0
    correction: str | None = None  # kind to fit where the plan says so, and before a block is trained
    lora: int = 0  # rank of what matrices learn; 0: all of them in full
    polish: int = 0  # epochs of all healed blocks together, against the dense model's next-token distribution
    polish_lr: float | None = None  # None: a third of lr

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("lora", 0), ("polish", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} {value!r} is not a whole number of at least {least}: give one")
        for name in ("lr", "polish_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} {value!r} is not a learning rate: give a positive number such as 0.001")
        if not 0 < self.held_out < 1:
            raise InputError(
                f"held_out {self.held_out!r} is not a share of the batches (--judging): give one such as 0.1"
            )
        if self.correction not in (None, *CORRECTIONS):
            raise InputError(f"correction {self.correction!r} is not known: use one of {', '.join(CORRECTIONS)}")

    def learning_rate(self, hidden: int) -> float:
        """The peak, for a model of that width."""
        return min(1e-3, 0.256 / hidden) if self.lr is None else self.lr

    def polish_rate(self, hidden: int) -> float:
        """The peak of the polish."""
        return self.learning_rate(hidden) / 3 if self.polish_lr is None else self.polish_lr


def heal(
    model: nn.Module,
    plan: SyncPlan,
    batches: Iterable[Batch],
    *,
    blocks: Sequence[int] | None = None,
    recipe: Recipe | None = None,
    state: str | Path | None = None,
    quiet: bool = False,
) -> Treated:
    """Distil dropped blocks towards what they put out with their sync, in place.

    What the plan says in `healing` is done: "correct" fits a correction alone, "b2b" distils, "hg+b2b" regroups the
    heads first.

    Args:
        model: the original model; corrections that the plan names take part and are trained too. Its weights change.
        plan: which blocks are dropped, for how many ranks.
        batches: as for `sensitivity`; each is one step of training. Every real token counts, labels do not matter.
        blocks: the dropped blocks to distil; by default those that the plan's `healing` names, all where it names none.
        recipe: how to train; the defaults suit models from a few million parameters up.
        state: directory that keeps each healed block: give the same one and the original model again, and a killed
            run goes on after its last whole block (or epoch of the polish), to the same bytes. A streamed model
            needs one: its healed blocks' weights are there, as long as the model is used.
        quiet: show no progress bar.

    Returns:
        The model and the plan with `healed` blocks in it and nothing left to heal.

    Raises:
        InputError: fewer than two batches or all held out, a plan or a model with healed blocks already, a block that
            is not dropped, a streamed model without `state` or with a polish, or what `simulate` and `sensitivity`
            refuse.
    """
    recipe = recipe or Recipe()
    view = covered(model, plan.ranks)
    plan.check(facts(view))
    if plan.healed:
        raise InputError(f"plan has healed blocks {list(plan.healed)} already: heal the original model")
    check_weights(view, plan)
    chosen, fitted = _treatments(plan, blocks, recipe)
    healed = replace(plan, healed=chosen, corrections={**plan.corrections, **fitted}, healing={}, verified=None)
    check_visited(view)
    corrections = {i: correction_of(view.blocks[i], plan.ranks, kind) for i, kind in plan.corrections.items()}
    checked = check_batches(batches, view.config)
    check_enough(checked, chosen, recipe)
    if state is not None and Path(state).exists() and not Path(state).is_dir():
        raise InputError(f"state {state} is a file: give a directory")
    check_streamed(view, recipe, state)
    orders: dict[int, tuple[int, ...]] = {}
    if apart := [i for i, how in plan.healing.items() if how == "hg+b2b" and i in chosen and i not in plan.heads]:
        orders = grouped(view, plan, checked, apart, quiet)
        healed = replace(healed, heads={**plan.heads, **orders})
    kept = None if state is None else Kept(Path(state), _key(view, checked, healed, recipe))
    walk = Walk(sources(view, checked), healed)
    students: dict[int, Student] = {}
    carry(
        view, healed
    )  # before any weight changes, so that a run cut short leaves no model that passes for the original
    with evaluating(view.model), progress("Healing", len(view.blocks), quiet) as advance:
        for block in view.blocks:
            with resident(block.layer):
                if order := orders.get(block.index):
                    permute(block, order)
                targets = walk.targets(block)
                if kind := fitted.get(block.index):
                    corrections[block.index] = attach_fit(block, plan.ranks, kind, walk.student, walk.data)
                student = None
                if block.index in chosen:
                    lowrank = attach_lowrank(block, recipe.lora, recipe.seed) if recipe.lora else None
                    student = Student(block, healed, corrections.get(block.index), lowrank)
                    if not (kept and kept.restore(str(block.index), student.trained)):
                        inputs = walk.teacher if recipe.teacher_inputs else walk.student
                        distil(student, inputs, targets, walk.data, recipe)
                        if kept:
                            kept.keep(str(block.index), student.trained)
                walk.on(block, targets, student, corrections.get(block.index))
                if student and recipe.polish:
                    students[block.index] = student
                elif student:
                    student.merge()
                if kept and is_streamed(block.layer) and (student or kind):
                    _put_away(block, student, kept)
            advance(1)
        if students:
            polish(
                view,
                healed,
                students,
                corrections,
                walk.data,
                walk.teacher,
                epochs=recipe.polish,
                peak=recipe.polish_rate(view.blocks[0].hidden_size),
                held_out=recipe.held_out,
                seed=recipe.seed * 1009 + len(view.blocks),
                kept=kept,
                quiet=quiet,
            )
    for student in students.values():
        student.merge()
    return Treated(view.model, healed)


def check_enough(checked: Sequence[Batch], chosen: Sequence[int], recipe: Recipe) -> None:
    """Raise InputError unless there are batches to distil the `chosen` blocks on and others to judge them by."""
    if len(checked) < 2:
        raise InputError(
            "data holds one batch: give at least two (more --rows, and text that fills them), because some are held "
            "out to judge the others"
        )
    if chosen and cut(recipe.held_out, len(checked)) < 1:
        raise InputError(
            f"held_out {recipe.held_out} of {len(checked)} batches leaves none to train on: give more batches or a "
            "smaller share (--judging)"
        )


def check_streamed(view: Decoder, recipe: Recipe, state: str | Path | None) -> None:
    """Raise InputError where a model of which one block is in memory cannot be healed so."""
    if not is_streamed(view.blocks[0].layer):
        if any(execution_devices(block.layer) for block in view.blocks):
            raise InputError(
                "model is dispatched by accelerate, which does not keep what offloaded blocks learn: load it onto one "
                "device, or read it block by block with elision.spd.open_streamed (--stream)"
            )
        return
    if state is None:
        raise InputError("model is streamed, so its healed blocks need a place on disk: give state, a directory")
    if recipe.polish:
        raise InputError(
            f"polish {recipe.polish} trains all healed blocks together, of a streamed model one is in memory: leave it "
            "out, or load the model whole"
        )


def _put_away(block: Block, student: Student | None, kept: Kept) -> None:
    """Leave a streamed block's new weights on disk, where they are read from now on."""
    name = str(block.index)
    if student is None or student.lowrank is not None:  # what was trained, and is kept already, is not all there is
        name = f"{name}-whole"
        kept.keep(name, dict(block.layer.named_parameters()))
    relocate(block.layer, kept.path(name))


def _treatments(plan: SyncPlan, blocks: Sequence[int] | None, recipe: Recipe) -> tuple[tuple[int, ...], dict[int, str]]:
    """The blocks to distil, and the kind of correction to fit by block."""
    distilled = tuple(i for i, how in plan.healing.items() if how != "correct")
    chosen = tuple(blocks) if blocks is not None else distilled if plan.healing else plan.dropped
    fitted = {i: recipe.correction or DEFAULT_CORRECTION for i, how in plan.healing.items() if how == "correct"}
    if recipe.correction is not None:
        fitted |= dict.fromkeys(chosen, recipe.correction)
    return chosen, {i: kind for i, kind in fitted.items() if i not in plan.corrections}


class Walk:
    """The teacher's and the student's stream at the same block; each a list of hidden states, one a batch."""

    def __init__(self, data: list[Source], plan: SyncPlan) -> None:
        self.data, self.plan = data, plan
        self.teacher = self.student = [source.embedded for source in data]

    @torch.no_grad()
    def targets(self, block: Block) -> list[Tensor]:
        """What the original block makes of the teacher's stream."""
        return [
            step(block, None, x, source.kwargs[block.index]) for x, source in zip(self.teacher, self.data, strict=True)
        ]

    @torch.no_grad()
    def on(self, block: Block, targets: list[Tensor], student: Student | None, correction: Correction | None) -> None:
        """Move both streams past `block`: the student's as it will be served, the teacher's as it was."""
        kwargs = [source.kwargs[block.index] for source in self.data]
        self.student = [
            student(x, each) if student else served(block, self.plan, x, each, correction)
            for x, each in zip(self.student, kwargs, strict=True)
        ]
        self.teacher = targets


def distil(
    student: Student, inputs: Sequence[Tensor], targets: Sequence[Tensor], data: Sequence[Source], recipe: Recipe
) -> None:
    """Train one block in place; it ends with the weights that were best on the held-out batches."""
    triples = list(zip(inputs, targets, data, strict=True))
    count = cut(recipe.held_out, len(triples))

    @torch.no_grad()
    def judge() -> float:
        return mean([student.loss(*triple).item() for triple in triples[count:]])

    with training([student]):
        train(
            student.trained,
            lambda index: student.loss(*triples[index]).backward(),
            judge,
            count=count,
            epochs=recipe.epochs,
            peak=recipe.learning_rate(student.block.hidden_size),
            seed=recipe.seed * 1009 + student.block.index,
        )


def _key(view: Decoder, batches: Sequence[Batch], plan: SyncPlan, recipe: Recipe) -> str:
    """Hash of all that the healed weights follow from; the plan's measurements are not among it."""
    bare = replace(plan, calibration=None, model=None, verified=None).to_dict()
    digest = hashlib.sha256(json.dumps([fingerprint(batches), bare, asdict(recipe)]).encode())
    hash_weights(digest, view)
    return digest.hexdigest()[:16]
