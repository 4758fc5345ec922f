"""The fast orders against their formulas, and against the exact one where blocks do differ."""

from __future__ import annotations

import pytest
import torch

from elision import InputError
from elision.blocks import decoder
from elision.spd import SyncPlan, curve, order, scores, sensitivity, simulate
from tests.spd.tiny import bits, left_padded, tiny, token_ids

DATA = [left_padded(), {"input_ids": token_ids(3, 7, seed=2)}]
METHODS = ("sequential", "single", "fisher", "output_error")


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
    assert scores(model, DATA, 3, quiet=True) == pytest.approx(expected.tolist(), rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_single_and_sequential_are_what_they_say():
    model = graded()
    dense = curve(model, DATA, 3, (), quiet=True)[0]
    expected = [curve(model, DATA, 3, (j,), quiet=True)[1] - dense for j in range(4)]
    assert scores(model, DATA, 3, "single", quiet=True) == pytest.approx(expected, abs=1e-9)
    exact = sensitivity(model, DATA, 3, quiet=True)
    assert scores(model, DATA, 3, "sequential", quiet=True) == exact.blocks
    assert order(model, DATA, 3, "sequential", quiet=True) == exact.order


@pytest.mark.parametrize("method", METHODS)
def test_one_rank_costs_nothing_and_the_model_is_left_as_it_was(method):
    model = tiny("opt").train()
    state = bits(model)
    assert scores(model, DATA, 1, method, quiet=True) == pytest.approx([0, 0, 0], abs=1e-9)
    assert bits(model) == state and model.training


def test_an_unknown_method_is_refused():
    with pytest.raises(InputError, match="method 'random' is not known: use one of sequential, single, fisher, output"):
        order(tiny("llama"), DATA, 3, "random", quiet=True)  # pyright: ignore[reportArgumentType]
