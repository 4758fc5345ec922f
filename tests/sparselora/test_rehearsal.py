"""The rehearsal: what it learns is what a plain loop learns, it is taken back, and a kill does not repeat it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elision.errors import InputError
from elision.sparselora import SparsityPlan, calibrate, rehearsal
from tests.sparselora import tiny

RATE = 0.01


def lessons(number: int = 6) -> list[dict[str, Tensor]]:
    return [tiny.batch((5 + i % 3, 4), (3, 2 + i % 2)) for i in range(number)]


def adapter(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def learn(model: Any, batches: list[dict[str, Tensor]]) -> None:
    """The same by hand, on the PEFT model as it is: no fast path, no elision."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    for step, batch in enumerate(batches):
        tiny.loss_of(model, **batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 4)
        optimizer.step()
        optimizer.zero_grad()


def plan(model: Any, **settings: Any) -> SparsityPlan:
    given = {"flops": 0.9, "grid": (0.5, 0.9), "selection": "weights", "dense_steps": 0.0, "quiet": True, **settings}
    return calibrate(model, [tiny.batch((9, 7), (2, 3))], **given)


def test_it_learns_what_a_plain_loop_learns_and_is_taken_back() -> None:
    model, other = tiny.lora(), tiny.lora()
    model.eval()
    before = tiny.bits(model)
    learn(other, lessons())
    with tiny.InDouble(), rehearsal.rehearsed(model, lessons(), RATE, quiet=True):
        learned = adapter(model)
        assert not model.training
    for name, expected in adapter(other).items():
        torch.testing.assert_close(learned[name], expected, rtol=1e-9, atol=1e-9)
        assert not torch.equal(learned[name], adapter(model)[name])
    assert tiny.bits(model) == before and not model.training
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(KeyboardInterrupt), rehearsal.rehearsed(model, lessons(), RATE, quiet=True):
        raise KeyboardInterrupt
    assert tiny.bits(model) == before


def test_a_plan_is_that_of_the_model_that_has_learned() -> None:
    model, other = tiny.lora(), tiny.lora()
    before = tiny.bits(model)
    with tiny.InDouble():
        found = plan(model, rehearse=lessons(), learning_rate=RATE).calibration
        bare = plan(model).calibration
        learn(other, lessons())
        expected = plan(other).calibration
    assert tiny.bits(model) == before
    assert found is not None and bare is not None and expected is not None
    assert (found.rehearsed, bare.rehearsed) == (6, 0)
    assert found.loss == pytest.approx(expected.loss, rel=1e-9) != bare.loss
    torch.testing.assert_close(torch.tensor(found.ffn), torch.tensor(expected.ffn), rtol=1e-4, atol=1e-6)
    assert found.measured_increase == pytest.approx(expected.measured_increase, rel=1e-5)


def test_gradients_of_the_caller_s_are_left_alone_and_not_learned_from() -> None:
    model, other = tiny.lora(), tiny.lora()
    learn(other, lessons(1))
    waiting = {name: torch.ones_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        p.grad = waiting.get(name)
    with tiny.InDouble(), rehearsal.rehearsed(model, lessons(1), RATE, quiet=True):
        for name, expected in adapter(other).items():
            torch.testing.assert_close(adapter(model)[name], expected, rtol=1e-9, atol=1e-9)
    for name, p in model.named_parameters():
        assert p.grad is waiting.get(name) and (p.grad is None or bool((p.grad == 1).all()))


def test_a_rerun_recalls_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = tiny.lora(), tmp_path / "journal"
    settings = {"rehearse": lessons(), "learning_rate": RATE, "state": state}
    first = plan(model, **settings)
    kept = tmp_path / "journal.safetensors"
    assert kept.exists()
    trained = []
    train = rehearsal._train
    monkeypatch.setattr(rehearsal, "_train", lambda *given: trained.append(train(*given)))
    assert plan(model, **settings) == first and not trained
    state.unlink()  # killed between the rehearsal and the first batch
    assert plan(model, **settings) == first and not trained
    plan(model, **{**settings, "learning_rate": RATE / 2})  # other lessons are learned
    plan(model, **{**settings, "rehearse": lessons(5)})
    assert len(trained) == 2
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(InputError, match=r"journal.safetensors is not whole .*: delete it"):
        plan(model, **settings)


def test_bad_input_is_named(tmp_path: Path) -> None:
    model, state = tiny.lora(), tmp_path / "journal"
    before = tiny.bits(model)
    unlabelled = [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tiny.base(), {}, "has no LoRA|nothing to train|no adapter"),
        (model, {"learning_rate": 0.0}, r"learning_rate 0.0 is not between 0 and 1"),
        (model, {"rehearse": unlabelled}, "batch 0 has no labels"),
        (model, {"flops": 0.01}, "flops=0.01 cannot be met"),
    ]
    for given, settings, message in cases:
        with pytest.raises(InputError, match=message):
            plan(given, **{"rehearse": lessons(), "state": state, **settings})
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "layernorm" in name).fill_(float("nan"))
    with pytest.raises(InputError, match="loss of rehearsed step 0 is not finite"):
        plan(model, rehearse=lessons(), state=state)
    assert list(tmp_path.iterdir()) == [] and tiny.bits(model).keys() == before.keys()
