"""Two real processes over gloo give what one gives that accumulates over the same micro-batches.

Channels are chosen for each micro-batch, by each rank from its own, so nothing about the method depends on who holds
which; a rank that chose from other rows, or gradients that were not reduced, would show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, multiprocessing

from tests.sparselora import loop

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Adapters = dict[str, Tensor]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the processes found."""
    place = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=loop.rank_main, args=(rank, place)) for rank in range(loop.RANKS)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=400)
        assert [process.exitcode for process in processes] == [0] * loop.RANKS
    finally:
        for process in processes:
            process.kill()
    return place


def alone(path: Any, ranks: int = 1) -> tuple[Adapters, dict[str, int]]:
    """One process; with `ranks`, on the micro-batches of the first of so many only."""
    try:
        return loop.trained(0, ranks, path)
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def same(one: Adapters, other: Adapters, tolerance: float) -> bool:
    assert one.keys() == other.keys()
    return all(bool((one[n] - other[n]).abs().max() <= tolerance * one[n].abs().max()) for n in one)


def test_a_hand_written_loop_on_the_fast_path_is_the_reference() -> None:
    (fast, counted), (reference, _) = alone("fast"), alone("reference")
    assert counted == {"dense (first steps)": 4, "sparse": 8, "fast": 12}
    assert same(fast, reference, 1e-6)  # norms and softmax are in single precision in one of them
    assert not same(fast, {n: p.detach() for n, p in loop.adapters(loop.tiny.lora()).items()}, 1e-3)


def test_gradients_that_are_not_reduced_would_show(ranks: Path) -> None:
    found, _ = torch.load(ranks / "ddp-fast0.pt")
    assert not same(found, alone("fast", loop.RANKS)[0], 1e-3)


@pytest.mark.parametrize(
    ("name", "path", "paths"),
    [
        ("ddp-fast", "fast", {"fast": 6}),
        ("ddp-reference", "reference", {}),
        ("fsdp2-fast", "fast", {"fast": 6}),
        ("fsdp2-checkpointed", "fast", {"fast": 6}),
        ("fsdp2-reference", "reference", {}),
        (
            "fsdp2-parts",
            "reference",
            {"reference (FSDP2 without a unit for each layer)": 6},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_two_processes_give_what_one_gives(ranks: Path, name: str, path: str, paths: dict[str, int]) -> None:
    expected, _ = alone(path)
    found = [torch.load(ranks / f"{name}{rank}.pt") for rank in range(loop.RANKS)]
    for adapters, counted in found:
        assert same(adapters, expected, 1e-12)
        assert counted == {"dense (first steps)": 2, "sparse": 4, **paths}


def test_mixed_precision_under_fsdp2(ranks: Path) -> None:
    (fast, counted), (reference, _) = (torch.load(ranks / f"fsdp2-mixed-{path}0.pt") for path in ("fast", "reference"))
    assert counted == {"dense (first steps)": 2, "sparse": 4, "fast": 6}
    assert same(fast, reference, 2e-2)
    before = {n: p.detach() for n, p in loop.adapters(loop.tiny.lora(dtype=torch.float32)).items()}
    assert not same(reference, before, 5e-2) and {p.dtype for p in fast.values()} == {torch.float32}
