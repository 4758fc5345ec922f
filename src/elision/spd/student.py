"""A dropped block as something to train, and the loop that trains one block or all of them together.

What is trained is either every parameter of the decoder layer, or low-rank factors beside its matrices with its vectors
(lowrank.py); a correction's tensors belong to the layer and take part in both. The loop is the same for a block and for
the polish: AdamW, warmup and cosine, judged on held-out batches after each epoch, best weights kept, early stopping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elision import files
from elision.blocks import Block
from elision.spd.activations import Source, served
from elision.spd.corrections import Correction
from elision.spd.lowrank import NAME as LOWRANK
from elision.spd.lowrank import LowRank, vectors
from elision.spd.plan import SyncPlan

BETAS = (0.9, 0.95)
WARMUP = 0.05  # share of the steps
PATIENCE = 2  # epochs in a row that may pass without an improvement; training stops after one more


class Student:
    """A block as the plan's ranks compute it, with what of it is trained by name."""

    def __init__(
        self, block: Block, plan: SyncPlan, correction: Correction | None = None, lowrank: LowRank | None = None
    ) -> None:
        self.block, self.plan, self.correction, self.lowrank = block, plan, correction, lowrank
        self.trained: dict[str, nn.Parameter] = dict(block.layer.named_parameters())
        if lowrank is not None:
            own = {f"{LOWRANK}.{name}" for name, _ in lowrank.named_parameters()} | set(vectors(block.layer))
            corrected = {id(each) for each in correction.parameters()} if correction is not None else set()
            self.trained = {n: p for n, p in self.trained.items() if n in own or id(p) in corrected}

    def __call__(self, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The block's output in the dtype of its weights."""
        dtype = self.block.o.weight.dtype
        with self.lowrank.applied(self.block.layer) if self.lowrank else nullcontext():
            return served(self.block, self.plan, x.to(dtype), as_dtype(kwargs, dtype), self.correction)

    def loss(self, x: Tensor, target: Tensor, source: Source) -> Tensor:
        """|student(x) - t|^2 / |t - x|^2 over real tokens, a scalar in the training dtype."""
        y = self(x, source.kwargs[self.block.index])
        t, scale = target.to(y.dtype), source.real.unsqueeze(-1)
        return ((y - t) * scale).square().sum() / ((t - x.to(y.dtype)) * scale).square().sum().clamp_min(1e-30)

    def merge(self) -> None:
        """Write what low-rank factors learned into the matrices."""
        if self.lowrank is not None:
            self.lowrank.merge(self.block.layer)


@contextmanager
def training(students: Iterable[Student]) -> Iterator[None]:
    """Inside, what the students train wants gradients and their layers are float32 at least; afterwards all is back."""
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())  # whatever the caller computes under
        for student in students:
            layer = student.block.layer
            flags = {parameter: parameter.requires_grad for parameter in layer.parameters()}
            stack.callback(_restore, student, flags, student.block.o.weight.dtype)
            if student.block.o.weight.dtype.itemsize < 4:
                layer.float()
            layer.requires_grad_(False)
            for parameter in student.trained.values():
                parameter.requires_grad_(True)
        yield


def _restore(student: Student, flags: Mapping[nn.Parameter, bool], dtype: torch.dtype) -> None:
    factors = set() if student.lowrank is None else set(student.lowrank.parameters())  # these keep their precision
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
        parameter.grad = None
        if parameter not in factors:
            parameter.data = parameter.data.to(dtype)


def train(
    trained: Mapping[str, nn.Parameter],
    backward: Callable[[int], None],
    judge: Callable[[], float],
    *,
    count: int,
    epochs: int,
    peak: float,
    seed: int,
    kept: Kept | None = None,
    name: str = "",
) -> None:
    """Train `trained` in place; it ends with the values that `judge` liked best, those before training among them.

    Args:
        trained: parameters by name.
        backward: of training batch i, leaves gradients.
        judge: a loss on what is held out; not a number is worse than any.
        count: number of training batches, each once an epoch.
        epochs: how many at most.
        peak: learning rate.
        seed: of the order of batches, which differs from epoch to epoch.
        kept: where to write down every epoch under `name`, and to go on from.
        name: see there.
    """
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=BETAS, weight_decay=0.0)
    found = kept.resume(name) if kept else None
    if found is None:
        first, since, best, best_loss = 0, 0, _copy(trained), _number(judge())
    else:
        first, since, best, best_loss = _resume(found, trained, optimizer, count)
    steps = epochs * count
    for epoch in range(first, epochs):
        if since > PATIENCE:
            break
        generator = torch.Generator().manual_seed(seed * 1009 + epoch)
        for done, index in enumerate(torch.randperm(count, generator=generator).tolist(), epoch * count):
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule(done, steps)
            backward(index)
            optimizer.step()
            optimizer.zero_grad()
        judged = _number(judge())
        since += 1
        if judged < best_loss:
            best, best_loss, since = _copy(trained), judged, 0
        if kept:
            kept.keep(name, _state(trained, best, optimizer, [epoch + 1, since, best_loss]))
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter.copy_(best[key])


def _number(loss: float) -> float:
    """A loss that is not a number as one that any other improves on."""
    return math.inf if math.isnan(loss) else loss


def _state(
    trained: Mapping[str, nn.Parameter], best: Mapping[str, Tensor], optimizer: Any, numbers: list[float]
) -> dict[str, Tensor]:
    """All that the rest of a training follows from."""
    tensors = {"numbers": torch.tensor(numbers, dtype=torch.float64)}
    for key, parameter in trained.items():
        moments = optimizer.state[parameter]
        tensors |= {f"now.{key}": parameter.detach(), f"best.{key}": best[key]}
        if moments:  # a parameter that got no gradient has none
            tensors |= {f"{moment}.{key}": moments[moment] for moment in ("exp_avg", "exp_avg_sq")}
    return tensors


@torch.no_grad()
def _resume(
    found: Mapping[str, Tensor], trained: Mapping[str, nn.Parameter], optimizer: Any, count: int
) -> tuple[int, int, dict[str, Tensor], float]:
    epoch, since, best_loss = found["numbers"].tolist()
    for key, parameter in trained.items():
        parameter.copy_(found[f"now.{key}"])
        if f"exp_avg.{key}" in found:
            moments = {name: found[f"{name}.{key}"].to(parameter.device) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(epoch * count)), **moments}
    best = {key: found[f"best.{key}"].to(parameter.device) for key, parameter in trained.items()}
    return int(epoch), int(since), best, best_loss


def schedule(done: int, steps: int) -> float:
    """Linear warmup, then half a cosine; 0 < factor <= 1."""
    warmup = max(1, round(WARMUP * steps))
    if done < warmup:
        return (done + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, steps - warmup)))


def cut(held_out: float, batches: int) -> int:
    """How many of the batches are trained on; the rest, at least one, judges."""
    return batches - max(1, math.ceil(held_out * batches))


def mean(losses: Sequence[float]) -> float:
    """The mean, summed exactly."""
    return math.fsum(losses) / len(losses)


def _copy(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trained.items()}


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every floating tensor in it as `dtype`: masks and rotations in the training precision."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: as_dtype(each, dtype) for name, each in value.items()}
    return tuple(as_dtype(each, dtype) for each in value) if isinstance(value, tuple) else value


class Kept:
    """What a killed run has done already, a file each, found by all that it depends on."""

    def __init__(self, directory: Path, key: str) -> None:
        self.directory, self.key = directory, key

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, atomically."""
        stored = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
        files.write(self.path(name), lambda path: save_file(stored, path))

    def resume(self, name: str) -> dict[str, Tensor] | None:
        """What a run with the same key left under `name`."""
        path = self.path(name)
        return load_file(path) if path.exists() else None

    @torch.no_grad()
    def restore(self, name: str, trained: Mapping[str, nn.Parameter]) -> bool:
        """Give parameters the values that a run with the same key left, if one did."""
        found = self.resume(name)
        if found is None:
            return False
        for key, parameter in trained.items():
            parameter.copy_(found[key])
        return True

    def path(self, name: str) -> Path:
        """The file of what is kept under `name`."""
        return self.directory / f"{self.key}-{name}.safetensors"
