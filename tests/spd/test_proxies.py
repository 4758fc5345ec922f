"""The fast orders against their formulas, and against the exact one where blocks do differ."""

from __future__ import annotations

import math

import pytest
import torch

from elision import InputError
from elision.blocks import decoder
from elision.spd import SyncPlan, curve, order, proxies, scores, sensitivity, simulate
from elision.spd.activations import sources
from elision.spd.streams import IGNORED, next_tokens, step
from tests.spd.tiny import bits, left_padded, tiny, token_ids

DATA = [left_padded(), {"input_ids": token_ids(3, 7, seed=2)}]
METHODS = ("sequential", "single", "fisher", "output_error", "integrated")


def graded():
    """A model whose block 2 matters least and block 1 most: the attention output that the ranks share is scaled."""
    model = tiny("llama", num_hidden_layers=4)
    with torch.no_grad():
        for block, scale in zip(decoder(model).blocks, (0.02, 1.0, 0.0005, 0.1), strict=True):
            block.o.weight.mul_(scale)
            block.o.bias.mul_(0)
        model.lm_head.weight.mul_(0.2)
    return model


@pytest.mark.parametrize("method", ["fisher", "output_error"])
def test_a_fast_method_finds_an_order_that_is_plain_to_see(method):
    found = order(graded(), DATA, 3, method, quiet=True)
    assert (found[0], found[-1]) == (2, 1)


def test_fisher_is_its_formula_and_one_backward_pass_does_for_all_blocks():
    model, expected, loss_sum, tokens = graded(), torch.zeros(4).double(), 0.0, 0
    for batch in DATA:
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach()
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        inputs = {"inputs_embeds": embedded, "attention_mask": batch.get("attention_mask")}
        seen = []
        handles = [layer.register_forward_hook(lambda m, a, y, s=seen: s.append(y)) for layer in model.model.layers]
        logits = model(**inputs).logits
        for handle in handles:
            handle.remove()
        scored = real[:, 1:] & real[:, :-1]
        log_p = logits.log_softmax(-1)[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        loss = -log_p[scored].sum()
        gradients = torch.autograd.grad(loss, seen)
        loss_sum, tokens = loss_sum + loss.item(), tokens + int(scored.sum())
        for j in range(4):
            changed = []
            with torch.no_grad(), simulate(model, SyncPlan(3, (j,))):
                handle = model.model.layers[j].register_forward_hook(lambda m, a, y, s=changed: s.append(y))
                model(**inputs)
                handle.remove()
            dot = (gradients[j] * (changed[0] - seen[j])).sum(-1)[real]
            expected[j] += dot.square().sum().item() / 2
    expected *= torch.tensor(loss_sum / tokens).double().exp() / tokens
    assert scores(model, DATA, 3, "fisher", quiet=True) == pytest.approx(expected.tolist(), rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_single_and_sequential_are_what_they_say():
    model = graded()
    dense = curve(model, DATA, 3, (), quiet=True)[0]
    expected = [curve(model, DATA, 3, (j,), quiet=True)[1] - dense for j in range(4)]
    assert scores(model, DATA, 3, "single", quiet=True) == pytest.approx(expected, abs=1e-9)
    exact = sensitivity(model, DATA, 3, quiet=True)
    assert scores(model, DATA, 3, "sequential", quiet=True) == exact.blocks
    assert order(model, DATA, 3, "sequential", quiet=True) == exact.order


@torch.no_grad()
@pytest.mark.parametrize("family", ["opt", "granite"])
def test_a_sync_is_dropped_by_shares_from_the_plain_block_to_spd(family):
    model = tiny(family)
    block, (source, _) = decoder(model).blocks[1], sources(decoder(model), DATA)
    x, kwargs, real = source.embedded, source.kwargs[1], source.real
    ends = [proxies.partly_dropped(block, 3, torch.tensor(t).double(), x, kwargs)[real] for t in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(ends[0], step(block, None, x, kwargs)[real], rtol=0, atol=1e-12)
    torch.testing.assert_close(ends[2], step(block, 3, x, kwargs)[real], rtol=0, atol=1e-12)
    assert all((ends[1] - end).abs().max() > 1e-3 for end in (ends[0], ends[2]))


def test_integrated_is_the_slope_of_perplexity_at_its_groups_midpoint(monkeypatch):
    """Against finite differences of the whole model's perplexity."""
    monkeypatch.setattr(proxies, "GROUPS", 2)
    model = tiny("opt", num_hidden_layers=4)

    def perplexity(t: list[float]) -> float:
        found = [proxies._slopes(decoder(model), batch, 3, torch.tensor(t, dtype=torch.float64)) for batch in DATA]
        tokens = sum(int((next_tokens(batch) != IGNORED).sum()) for batch in DATA)
        return math.exp(sum(loss for loss, _ in found) / tokens)

    expected = []
    for block in range(4):
        t = [0.5, 0.5, 1.0, 1.0] if block < 2 else [0.0, 0.0, 0.5, 0.5]
        up, down = ([x + s * 1e-5 * (i == block) for i, x in enumerate(t)] for s in (1, -1))
        expected.append((perplexity(up) - perplexity(down)) / 2e-5)
    assert scores(model, DATA, 3, "integrated", quiet=True) == pytest.approx(expected, rel=1e-5)


def test_integrated_with_a_group_a_block_follows_the_exact_path(monkeypatch):
    model = tiny("opt", num_hidden_layers=4)
    with torch.no_grad():
        for block, scale in zip(decoder(model).blocks, (0.1, 0.3, 0.05, 0.2), strict=True):
            block.o.weight.mul_(scale)
    exact = torch.tensor(sensitivity(model, DATA, 3, quiet=True).blocks)
    errors = []
    for groups in (1, 4):
        monkeypatch.setattr(proxies, "GROUPS", groups)
        errors.append((torch.tensor(scores(model, DATA, 3, "integrated", quiet=True)) - exact).abs().max())
    assert errors[1] < 0.15 * exact.abs().max() and errors[1] < errors[0]


@pytest.mark.parametrize("method", METHODS)
def test_one_rank_costs_nothing_and_the_model_is_left_as_it_was(method):
    model = tiny("opt").train()
    state = bits(model)
    assert scores(model, DATA, 1, method, quiet=True) == pytest.approx([0, 0, 0], abs=1e-9)
    assert bits(model) == state and model.training


def test_an_unknown_method_is_refused():
    with pytest.raises(InputError, match="method 'random' is not known: use one of sequential, single, fisher, output"):
        order(tiny("llama"), DATA, 3, "random", quiet=True)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("method", ["fisher", "output_error", "integrated"])
def test_a_run_that_was_cut_short_goes_on_after_its_last_whole_batch(method, tmp_path, monkeypatch):
    model, calls = graded(), []
    name = "_slopes" if method == "integrated" else "_batch"
    work = getattr(proxies, name)

    def scored(ranks: int = 3):
        return proxies.all_scores(decoder(model), DATA, [("dropped", ranks)], method, tmp_path / "state.json", True)

    def interrupted(*given):
        if calls:
            raise KeyboardInterrupt
        calls.append(given)
        return work(*given)

    expected = scores(model, DATA, 3, method, quiet=True)
    monkeypatch.setattr(proxies, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        scored()
    monkeypatch.setattr(proxies, name, lambda *given: calls.append(given) or work(*given))
    total = len(DATA) * (proxies.GROUPS if method == "integrated" else 1)
    assert scored() == (expected,) and len(calls) == total
    assert scored() == (expected,) and len(calls) == total
    assert scored(6) != (expected,) and len(calls) == 2 * total
