"""Healing: give a dropped block's weights the chance to make up for the sync that it lost (METHODS 2.2, 3.2).

Block-to-block distillation. The teacher is the block with both syncs, the student the same block with one; the student
learns to put out what the teacher does, on calibration text, one block after the other in ascending order:

    loss = |student(x) - t|^2 / |t - x|^2        both summed over the batch's real tokens

Two streams walk through the model: the teacher's, of the original weights, gives the targets t; the student's, of the
blocks healed so far, gives the inputs x. So a block also learns to undo what is left of its predecessors' errors. The
paper feeds the teacher's stream to both (`teacher_inputs`), which cannot. Dividing by |t - x|^2, what the block adds to
its input, makes losses comparable between blocks and keeps one learning rate for all.

Some batches are held out; after each epoch the block is judged on them, its best weights are kept, and it stops early
when it gets no better. A block that cannot be improved keeps the weights it had. Weights of less than 32 bits are
trained as float32 and rounded once, at the end.

Nothing depends on time or on where a run was cut: each block's order of batches follows from the seed and its number.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elision import files
from elision.blocks import Block, Decoder
from elision.errors import InputError
from elision.progress import progress
from elision.spd.activations import Source, sources
from elision.spd.artifact import Treated
from elision.spd.corrections import Correction, correction_of
from elision.spd.plan import SyncPlan
from elision.spd.simulate import check_plain, covered, facts
from elision.spd.streams import Batch, check_batches, evaluating, fingerprint, hash_tensor, step

BETAS = (0.9, 0.95)
WARMUP = 0.05  # share of the steps
PATIENCE = 2  # epochs without an improvement before a block stops


@dataclass(frozen=True)
class Recipe:
    """How each block is trained: AdamW, betas (0.9, 0.95), no weight decay, short warmup, cosine to zero."""

    epochs: int = 10
    lr: float | None = None  # None: 0.256 / hidden, at most 1e-3: 1e-3 up to width 256, 6e-5 at 4096
    held_out: float = 0.1  # share of the batches, the last ones, at least one
    teacher_inputs: bool = False  # the paper's way: inputs from the teacher's stream
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or self.epochs < 1:
            raise InputError(f"epochs {self.epochs!r} is not a whole number of at least 1: give one")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise InputError(f"lr {self.lr!r} is not a learning rate: give a positive number such as 0.001")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out {self.held_out!r} is not a share of the batches: give a number such as 0.1")

    def learning_rate(self, hidden: int) -> float:
        """The peak, for a model of that width."""
        return min(1e-3, 0.256 / hidden) if self.lr is None else self.lr


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

    Args:
        model: the original model; corrections that the plan names take part and are trained too. Its weights change.
        plan: which blocks are dropped, for how many ranks.
        batches: as for `sensitivity`; each is one step of training. Every real token counts, labels do not matter.
        blocks: the dropped blocks to heal; all of them by default.
        recipe: how to train; the defaults suit models from a few million parameters up.
        state: directory that keeps each healed block: give the same one and the original model again, and a killed
            run goes on after its last whole block, to the same bytes.
        quiet: show no progress bar.

    Returns:
        The model and the plan with `healed` blocks in it.

    Raises:
        InputError: fewer than two batches, a plan with healed blocks already, a block that is not dropped, or what
            `simulate` and `sensitivity` refuse.
    """
    recipe = recipe or Recipe()
    view = covered(model, plan.ranks)
    plan.check(facts(view))
    if plan.healed:
        raise InputError(f"plan has healed blocks {list(plan.healed)} already: heal the original model")
    chosen = tuple(plan.dropped if blocks is None else blocks)
    healed = replace(plan, healed=chosen)
    for block in view.blocks:
        check_plain(block)
    corrections = {i: correction_of(view.blocks[i], plan.ranks, kind) for i, kind in plan.corrections.items()}
    checked = check_batches(batches, view.config.vocab_size)
    if len(checked) < 2:
        raise InputError("data holds one batch: give at least two, because some are held out to judge the others")
    kept = None if state is None else Kept(Path(state), _key(view, checked, healed, recipe))
    walk = Walk(view, sources(view, checked), plan, corrections)
    with evaluating(view.model), progress("Healing", len(view.blocks), quiet) as advance:
        for block in view.blocks:
            targets = walk.targets(block)
            if block.index in chosen and not (kept and kept.restore(block)):
                inputs = walk.teacher if recipe.teacher_inputs else walk.student
                student = Student(block, plan.ranks, corrections.get(block.index))
                distil(student, inputs, targets, walk.data, recipe)
                if kept:
                    kept.keep(block)
            walk.on(block, targets)
            advance(1)
    return Treated(view.model, healed)


class Walk:
    """The teacher's and the student's stream at the same block; each a list of hidden states, one a batch."""

    def __init__(
        self, view: Decoder, data: list[Source], plan: SyncPlan, corrections: Mapping[int, Correction]
    ) -> None:
        self.data, self.plan, self.corrections = data, plan, corrections
        self.teacher = self.student = [source.embedded for source in data]

    @torch.no_grad()
    def targets(self, block: Block) -> list[Tensor]:
        """What the original block makes of the teacher's stream."""
        return [
            step(block, None, x, source.kwargs[block.index]) for x, source in zip(self.teacher, self.data, strict=True)
        ]

    @torch.no_grad()
    def on(self, block: Block, targets: list[Tensor]) -> None:
        """Move both streams past `block`, whose weights are the student's by now."""
        ranks = self.plan.ranks if block.index in self.plan.dropped else None
        self.student = [
            step(block, ranks, x, source.kwargs[block.index], self.corrections.get(block.index))
            for x, source in zip(self.student, self.data, strict=True)
        ]
        self.teacher = targets


@dataclass(frozen=True)
class Student:
    """A block with its first sync dropped, as something to train."""

    block: Block
    ranks: int
    correction: Correction | None

    def loss(self, x: Tensor, target: Tensor, source: Source) -> Tensor:
        """|student(x) - t|^2 / |t - x|^2 over real tokens, a scalar in the training dtype."""
        dtype = self.block.o.weight.dtype
        y = step(self.block, self.ranks, x.to(dtype), _as(source.kwargs[self.block.index], dtype), self.correction)
        t, scale = target.to(dtype), source.real.unsqueeze(-1)
        return ((y - t) * scale).square().sum() / ((t - x.to(dtype)) * scale).square().sum().clamp_min(1e-30)


def distil(
    student: Student, inputs: Sequence[Tensor], targets: Sequence[Tensor], data: Sequence[Source], recipe: Recipe
) -> None:
    """Train one block in place; it ends with the weights that were best on the held-out batches."""
    layer, stored = student.block.layer, student.block.o.weight.dtype
    trained = {parameter: parameter.requires_grad for parameter in layer.parameters()}
    if stored.itemsize < 4:
        layer.float()
    triples = list(zip(inputs, targets, data, strict=True))
    cut = len(triples) - max(1, math.ceil(recipe.held_out * len(triples)))
    training, held_out = triples[:cut], triples[cut:]
    try:
        layer.requires_grad_(True)
        _train(student, training, held_out, recipe)
    finally:
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
        layer.to(stored)


def _train(
    student: Student,
    training: Sequence[tuple[Tensor, Tensor, Source]],
    held_out: Sequence[tuple[Tensor, Tensor, Source]],
    recipe: Recipe,
) -> None:
    layer = student.block.layer
    peak = recipe.learning_rate(student.block.hidden_size)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=peak, betas=BETAS, weight_decay=0.0)
    generator = torch.Generator().manual_seed(recipe.seed * 100_003 + student.block.index)
    steps, done, since = recipe.epochs * len(training), 0, 0
    best, best_loss = _copy(layer), _judge(student, held_out)
    for _ in range(recipe.epochs):
        for index in torch.randperm(len(training), generator=generator).tolist():
            for group in optimizer.param_groups:
                group["lr"] = peak * _schedule(done, steps)
            loss = student.loss(*training[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
        judged = _judge(student, held_out)
        since += 1
        if judged < best_loss:  # a loss that is no number is none
            best, best_loss, since = _copy(layer), judged, 0
        if since > PATIENCE:
            break
    layer.load_state_dict(best)


def _schedule(done: int, steps: int) -> float:
    """Linear warmup, then half a cosine; 0 < factor <= 1."""
    warmup = max(1, round(WARMUP * steps))
    if done < warmup:
        return (done + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def _judge(student: Student, held_out: Sequence[tuple[Tensor, Tensor, Source]]) -> float:
    """Mean loss over the held-out batches."""
    return math.fsum(student.loss(*triple).item() for triple in held_out) / len(held_out)


def _copy(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


def _as(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every floating tensor in it as `dtype`: masks and rotations in the training precision."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: _as(each, dtype) for name, each in value.items()}
    return tuple(_as(each, dtype) for each in value) if isinstance(value, tuple) else value


class Kept:
    """Blocks that are healed already, a file each, found by all that they depend on."""

    def __init__(self, directory: Path, key: str) -> None:
        if directory.exists() and not directory.is_dir():
            raise InputError(f"state {directory} is a file: give a directory")
        self.directory, self.key = directory, key

    def keep(self, block: Block) -> None:
        """Write the block's weights, atomically."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in block.layer.state_dict().items()}
        files.write(self._path(block), lambda path: save_file(tensors, path))

    def restore(self, block: Block) -> bool:
        """Give the block the weights that a run with the same key left, if one did."""
        if not self._path(block).exists():
            return False
        block.layer.load_state_dict(load_file(self._path(block)))
        return True

    def _path(self, block: Block) -> Path:
        return self.directory / f"{self.key}-{block.index}.safetensors"


def _key(view: Decoder, batches: Sequence[Batch], plan: SyncPlan, recipe: Recipe) -> str:
    """Hash of all that the healed weights follow from; the plan's measurements are not among it."""
    bare = replace(plan, calibration=None, model=None).to_dict()
    digest = hashlib.sha256(json.dumps([fingerprint(batches), bare, asdict(recipe)]).encode())
    for name, tensor in view.model.state_dict().items():
        hash_tensor(digest, name, tensor)
    return digest.hexdigest()[:16]
