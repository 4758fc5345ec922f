"""The choice of treatments against brute force, and what is told where nothing is worth it."""

from __future__ import annotations

import itertools
import random

import pytest

from elision import InputError
from elision.blocks import decoder
from elision.spd import Workload, planner
from elision.spd.costs import Compute, Link
from elision.spd.planner import Option, choose, options
from tests.spd.tiny import tiny

LINK = Link(4, alpha=2e-5, beta=1e-10)


def best_by_force(blocks, budget):
    """The most that can be saved, trying everything."""
    return max(
        sum(option.seconds for option in picks if option)
        for picks in itertools.product(*([None, *own] for own in blocks))
        if sum(option.loss for option in picks if option) <= budget
    )


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_saves_more_within_the_budget(seed, monkeypatch):
    draw = random.Random(seed)
    blocks = [
        [
            Option(how, draw.randrange(0, 40) / 1000, draw.choice([1e-5, 2e-5, 3e-5]))
            for how in "abc"[: draw.randrange(4)]
        ]
        for _ in range(6)
    ]
    budget = 0.05  # losses are whole thousandths, so that rounding up to the budget's parts changes nothing
    picks = choose(blocks, budget)
    assert all(pick is None or pick in own for pick, own in zip(picks, blocks, strict=True))
    assert sum(pick.loss for pick in picks if pick) <= budget + 1e-12
    assert sum(pick.seconds for pick in picks if pick) == pytest.approx(best_by_force(blocks, budget), rel=1e-9)
    monkeypatch.setattr(planner, "STEPS", 2)  # so coarse that it must lose something somewhere: the test can fail
    coarse = choose(blocks, budget)
    assert sum(pick.loss for pick in coarse if pick) <= budget + 1e-12


def test_nothing_is_healed_that_need_not_be():
    blocks = [[Option("dropped", 0.004, 1e-5), Option("dropped", 0.0016, 1e-5, "b2b")] for _ in range(3)]
    assert [pick and pick.healing for pick in choose(blocks, 0.0121)] == [None, None, None]
    healed = [pick.healing for pick in choose(blocks, 0.0101) if pick]
    assert len(healed) == 3 and healed.count("b2b") == 1
    assert choose(blocks, 0.0) == [None, None, None]


def test_losses_that_are_gains_buy_nothing():
    losses = {"dropped": (-0.5, 0.3, 0.3), "int8": (0.0, 0.0, 0.0)}
    decode = Workload(Link(4, 2e-5, 0.0), layers=3, hidden=64, tokens=1)  # bytes cost nothing: int8 saves nothing
    assert [[option.treatment for option in own] for own in options(losses, decode)] == [["dropped"]] * 3
    picks = choose(options(losses, decode), 0.01)
    assert [pick and pick.treatment for pick in picks] == ["dropped", None, None]
    prefill = Workload(LINK, layers=3, hidden=4096, tokens=2048)  # bytes count: int8 saves part of the time for nothing
    picks = choose(options(losses, prefill), 0.01)
    assert [pick and pick.treatment for pick in picks] == ["dropped", "int8", "int8"]
    healing = options(losses, prefill, ("b2b",))[1]
    assert [(option.treatment, option.loss, option.healing) for option in healing][:2] == [
        ("dropped", 0.3, None),
        ("dropped", pytest.approx(0.075), "b2b"),
    ]


class TestWorkload:
    def test_of_a_model_it_takes_the_step_apart(self):
        view = decoder(tiny("llama"))
        work = Workload.of_model(view, LINK, tokens=1, step=1e-3)
        assert work.saving(["dense"] * 3).before == pytest.approx(1e-3)
        sync = LINK.all_reduce(2 * 24)
        assert work.seconds("dropped") == pytest.approx(sync)
        assert work.seconds("skipped") > work.seconds("dropped")  # attention's computation goes too
        block = view.blocks[0]
        weights = {name: p.weight.numel() for name, p in block.projections.items()}
        share = sum(weights[name] for name in "qkvo") / sum(weights.values())
        assert work.seconds("skipped") - sync == pytest.approx(share * (1e-3 - 6 * sync) / 3)

    def test_it_says_when_not_to_bother(self):
        slow = Workload(LINK, 32, 4096, 1, compute=Compute(5e-4, 1e-3))
        reason = slow.refusal()
        assert reason is not None and "do not bother" in reason and "\n" not in reason
        most = slow.saving(["dropped"] * 32)
        assert most.share < 0.03 and f"{100 * most.share:.1f}% less" in reason
        assert Workload(LINK, 32, 4096, 1, compute=Compute(1e-4, 2e-4)).refusal() is None

    def test_a_step_shorter_than_its_syncs_is_refused(self):
        with pytest.raises(InputError, match="no longer than its 6 syncs"):
            Workload.of_model(decoder(tiny("llama")), LINK, tokens=1, step=1e-5)
        with pytest.raises(InputError, match="tokens 0 is not"):
            Workload(LINK, 3, 24, 0)
