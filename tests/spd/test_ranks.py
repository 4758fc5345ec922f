"""Real processes with gloo run block.py and agree with the simulation."""

from __future__ import annotations

import pytest
import torch
from torch import multiprocessing

from elision.spd import SyncPlan, simulate
from tests.spd.ranks import Case, gloo_rank
from tests.spd.tiny import corrected, token_ids

HEADS = {"num_attention_heads": 4}
GROUPED = {**HEADS, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 39}
KINDS = {0: "constant", 1: "gain", 2: "local_o"}
# With 4 ranks, key/value heads are held twice.
CASES: dict[int, list[Case]] = {
    2: [("llama", GROUPED, (0, 2), {}), ("opt", HEADS, (0, 1, 2), KINDS), ("qwen3", GROUPED, (), {})],
    4: [("llama", GROUPED, (0, 1, 2), KINDS), ("opt", HEADS, (2,), {}), ("granite", GROUPED, (1,), {1: "gain"})],
}


@pytest.mark.parametrize("ranks", CASES)
def test_gloo_ranks_agree_with_the_simulation(ranks, tmp_path):
    context = multiprocessing.get_context("spawn")
    arguments = (ranks, CASES[ranks], str(tmp_path / "store"), str(tmp_path / "out.pt"))
    processes = [context.Process(target=gloo_rank, args=(rank, *arguments)) for rank in range(ranks)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=120)
        assert [process.exitcode for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
    for (family, sizes, dropped, kinds), result in zip(CASES[ranks], torch.load(tmp_path / "out.pt"), strict=True):
        model = corrected(family, ranks, kinds, **sizes)
        with torch.no_grad():
            dense = model(token_ids()).logits
            with simulate(model, SyncPlan(ranks, dropped)):
                uncorrected = model(token_ids()).logits
            with simulate(model, SyncPlan(ranks, dropped, kinds)):
                simulated = model(token_ids()).logits
        torch.testing.assert_close(result["logits"], simulated, rtol=0, atol=1e-12)
        assert result["syncs"] == 2 * model.config.num_hidden_layers - len(dropped)
        assert ((simulated - uncorrected).abs().max() > 1e-3) == bool(kinds)
        if dropped:
            assert (simulated - dense).abs().max() > 1e-3
