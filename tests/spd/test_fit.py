"""Fitted corrections against least squares written out, and what they leave untouched."""

from __future__ import annotations

import pytest
import torch

from elision import InputError
from elision.blocks import decoder
from elision.layerwise import layer_calls
from elision.spd import SyncPlan, correct, simulate, uncorrect
from elision.spd.fit import RIDGE
from elision.spd.simulate import Simulation, head_outputs
from tests.spd.tiny import bits, left_padded, tiny, token_ids

RANKS, ALL = 3, (0, 1, 2)
DATA = [left_padded((9, 14)), {"input_ids": token_ids(4, 12, seed=2)}]


@torch.no_grad()
def block_inputs(model, index: int, plan: SyncPlan) -> list[tuple[torch.Tensor, dict, torch.Tensor]]:
    """What block `index` is given by the simulated blocks before it: hidden states, arguments and real tokens."""
    found = []
    for batch in DATA:
        with simulate(model, plan):
            hidden = model(**batch, output_hidden_states=True).hidden_states[index]
        calls = layer_calls(decoder(model), batch)
        found.append((hidden, calls[index][1], batch.get("attention_mask", batch["input_ids"] * 0 + 1).bool()))
    return found


@torch.no_grad()
def attention_of_ranks(model, index: int, plan: SyncPlan) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per rank its heads' output A_i and its share P_i, on every real token (tokens, channels)."""
    block = decoder(model).blocks[index]
    inputs = block_inputs(model, index, plan)
    with Simulation([block], RANKS):
        heads = torch.cat([head_outputs(block, x, kwargs)[real] for x, kwargs, real in inputs])
    columns = block.o.weight.tensor_split(RANKS, dim=1)
    return [(a, a @ o.T) for a, o in zip(heads.tensor_split(RANKS, dim=1), columns, strict=True)]


@pytest.mark.parametrize("family", ["llama", "granite", "opt"])
@pytest.mark.parametrize("kind", ["constant", "gain", "local_o"])
def test_a_correction_is_the_least_squares_fit_on_the_students_own_stream(family, kind):
    model, plan = tiny(family), SyncPlan(RANKS, ALL)
    treated = correct(model, plan, iter(DATA), kind, quiet=True)
    assert treated.model is model and treated.plan == SyncPlan(RANKS, ALL, {0: kind, 1: kind, 2: kind})
    for index in ALL:
        shares = attention_of_ranks(model, index, treated.plan)
        total = sum(p for _, p in shares)
        correction = model.get_submodule(f"model.{'decoder.' * (family == 'opt')}layers.{index}.spd_correction")
        for rank, (a, p) in enumerate(shares):
            constant = correction.constant[rank]
            ones = torch.ones(len(a), 1, dtype=torch.float64)
            if kind == "constant":
                expected = (total - p).mean(0)
            elif kind == "gain":
                expected = torch.empty_like(constant)
                for c in range(24):
                    gain, expected[c] = torch.linalg.lstsq(torch.cat([p[:, c : c + 1], ones], 1), total[:, c]).solution
                    assert correction.gain[rank, c].item() == pytest.approx(gain.item(), rel=1e-8)
            else:
                strength = (len(a) * RIDGE * a.square().mean()).sqrt() * torch.eye(8, dtype=torch.float64)
                rows = torch.cat([torch.cat([a, ones], 1), torch.cat([strength, 0 * ones[:8]], 1)])
                own_o = model_o(model, index).tensor_split(RANKS, dim=1)[rank]
                solution = torch.linalg.lstsq(rows, torch.cat([total, strength @ own_o.T])).solution
                expected = solution[-1]
                local = correction.local_o.tensor_split(RANKS, dim=1)[rank]
                torch.testing.assert_close(local, solution[:-1].T, rtol=0, atol=1e-7)
            torch.testing.assert_close(constant, expected, rtol=0, atol=1e-7)


def model_o(model, index: int) -> torch.Tensor:
    return decoder(model).blocks[index].o.weight


def test_each_kind_guesses_the_missing_share_better_than_the_one_before():
    errors = []
    for kind in (None, "constant", "gain", "local_o"):
        model = tiny("llama")
        if kind is not None:
            correct(model, SyncPlan(RANKS, (0,)), DATA, kind, quiet=True)
        shares = attention_of_ranks(model, 0, SyncPlan(RANKS))
        total, error = sum(p for _, p in shares), 0.0
        for rank, (a, p) in enumerate(shares):
            guess = p
            if kind is not None:
                own = model.model.layers[0].spd_correction.local(rank, slice(8 * rank, 8 * rank + 8))
                guess = p if own["mlp_o"] is None else a @ own["mlp_o"].T
                guess = guess * (1.0 if own["mlp_gain"] is None else own["mlp_gain"]) + own["mlp_constant"]
            error += (guess - total).square().sum().item()
        errors.append(error)
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.9 * errors[2] < 0.8 * errors[0]


@pytest.mark.parametrize("kind", ["gain", "local_o"])
def test_a_rank_whose_heads_are_zero_gets_the_constant_alone(kind):
    model = tiny("llama", attention_bias=False)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[:4] = 0  # the key/value head of rank 0
    constant = correct(model, SyncPlan(RANKS, (0,)), DATA, quiet=True).model.model.layers[0].spd_correction.constant
    fitted = correct(model, SyncPlan(RANKS, (0,)), DATA, kind, quiet=True).model.model.layers[0].spd_correction
    torch.testing.assert_close(fitted.constant[0], constant[0], rtol=0, atol=1e-12)
    assert all(bool(parameter.isfinite().all()) for parameter in fitted.parameters())
    assert fitted.local_o is None or torch.equal(fitted.local_o[:, :8], model_o(model, 0)[:, :8])


def test_blocks_can_be_chosen_and_others_keep_what_they_have():
    model, plan = tiny("llama"), SyncPlan(RANKS, (0, 2))
    first = correct(model, plan, DATA, "gain", blocks=[0], quiet=True)
    gain = model.model.layers[0].spd_correction.gain.clone()
    second = correct(model, first.plan, DATA, "constant", blocks=[2], quiet=True)
    assert second.plan.corrections == {0: "gain", 2: "constant"}
    assert torch.equal(model.model.layers[0].spd_correction.gain, gain)
    once = correct(tiny("llama"), plan, DATA, "constant", quiet=True)  # block 2 fitted behind another block 0
    assert not torch.equal(
        once.model.model.layers[2].spd_correction.constant, model.model.layers[2].spd_correction.constant
    )


def test_the_model_is_left_as_it_was_but_for_its_corrections():
    model = tiny("opt").train()
    state, ids = bits(model), token_ids()
    modules = [name for name, _ in model.named_modules()]
    with torch.no_grad():
        dense = model(ids).logits
        treated = correct(model, SyncPlan(RANKS, ALL), DATA, quiet=True)
        assert torch.equal(model(ids).logits, dense)
    assert {name: value for name, value in bits(model).items() if "spd_correction" not in name} == state
    assert model.training and model.model.decoder.layers[0].training
    assert uncorrect(model, treated.plan) == SyncPlan(RANKS, ALL)
    assert bits(model) == state and [name for name, _ in model.named_modules()] == modules


def test_padding_and_precision_make_no_difference():
    ids = token_ids(2, 9)
    pad = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(ids)], 1)
    padded = {"input_ids": torch.cat([pad, ids], 1), "attention_mask": mask}
    padded["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    found = []
    for batch, dtype in (({"input_ids": ids}, torch.float64), (padded, torch.float64), (padded, torch.bfloat16)):
        model = tiny("llama", dtype=dtype)
        correct(model, SyncPlan(RANKS, ALL), [batch], "gain", quiet=True)
        found.append(model.model.layers[0].spd_correction.constant)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)
    assert found[2].dtype == torch.bfloat16 and (found[2] - found[1]).norm() < 0.1 * found[1].norm()


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("correction 'bias' is not known: use one of constant, gain, local_o", {"kind": "bias"}),
        ("corrections block 1 keeps its sync", {"blocks": [1]}),
        ("data holds no batches", {"batches": []}),
    ],
)
def test_bad_input_changes_nothing(match, arguments):
    model = tiny("llama")
    state = bits(model)
    with pytest.raises(InputError, match=match) as caught:
        correct(model, SyncPlan(RANKS, (0, 2)), **{"batches": DATA, "quiet": True, **arguments})
    assert "\n" not in str(caught.value) and bits(model) == state
