"""Scores against plain formulas."""

from __future__ import annotations

import copy
import math
import random
import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from elision import evaluate
from elision.errors import InputError
from elision.loading import load_tokenizer
from tests.spd.tiny import left_padded, tiny


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def test_loss_is_the_models_own_over_labels_and_over_tokens(model: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 50, (3, 9))
    labels = ids.clone()
    labels[:, :4] = -100
    expected = model(input_ids=ids, labels=labels).loss.item()
    model.train()
    assert evaluate.loss(model, [{"input_ids": ids, "labels": labels}]) == pytest.approx(expected, rel=1e-5)
    assert model.training
    expected = model(input_ids=ids, labels=ids).loss.item()
    assert evaluate.perplexity(model, [{"input_ids": ids}]) == pytest.approx(math.exp(expected), rel=1e-5)


def test_loss_weighs_tokens_not_batches(model: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 50, (4, 7))
    whole = evaluate.loss(model, [{"input_ids": ids}])
    parts = evaluate.loss(model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}])
    assert parts == pytest.approx(whole, rel=1e-6)
    padded = torch.cat([ids, torch.zeros_like(ids)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1)
    assert evaluate.loss(model, [{"input_ids": padded, "attention_mask": mask}]) == pytest.approx(whole, rel=1e-5)


def test_the_side_of_the_padding_does_not_matter() -> None:
    opt = tiny("opt")
    left = left_padded((5, 8))
    rolled = {name: torch.stack([row.roll(-gap) for row, gap in zip(left[name], (3, 0), strict=True)]) for name in left}
    labelled = {**left, "labels": left["input_ids"]}
    found = [evaluate.row_losses(opt, [batch]) for batch in (rolled, left, labelled)]
    assert [[row.tokens for row in rows] for rows in found] == [[4, 7]] * 3
    for rows in found[1:]:
        assert [row.nats for row in rows] == pytest.approx([row.nats for row in found[0]], rel=1e-12)


def test_batches_go_where_the_model_is() -> None:
    class Elsewhere(torch.nn.Module):
        device = torch.device("meta")

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            assert input_ids.is_meta
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))

    batches = [{"input_ids": torch.ones(2, 5, dtype=torch.int64)}]
    assert evaluate.loss(Elsewhere(), batches) == pytest.approx(math.log(50), rel=1e-6)
    assert evaluate.divergence(Elsewhere(), Elsewhere(), batches).kl.value == 0.0


def test_nothing_to_predict_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(InputError, match="no token to predict"):
        evaluate.loss(model, [{"input_ids": torch.zeros((2, 1), dtype=torch.int64)}])


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (
            {"input_ids": torch.full((2, 8), 5000)},
            "input_ids of a batch have token 5000, the model's vocabulary has",
        ),
        ({"input_ids": torch.full((2, 8), -1)}, "token -1"),
        ({"input_ids": torch.ones(2, 8, dtype=torch.int64), "labels": torch.full((2, 8), 50)}, "labels .* token 50"),
        ({"input_ids": torch.ones(2, 8, dtype=torch.int64), "labels": torch.ones(8)}, "give them the same shape"),
        ({"input_ids": torch.ones(8, dtype=torch.int64)}, r"input_ids \(8,\) of torch.int64, not \(batch, sequence\)"),
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused(model: Any, batch: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        evaluate.loss(model, [batch])
    with pytest.raises(InputError, match=words):
        evaluate.divergence(model, model, [batch])


def test_prompts_outside_the_vocabulary_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match=r"the prompts have token \d+, the model's vocabulary has 50"):
        evaluate.answers(model, load_tokenizer("reference"), ["def add(a, b): zebra"], 4)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7. #### 7", "7"),
        ("#### 1,200.", "1200"),
        ("so it is 12, or 13", "13"),
        ("nothing", ""),
        ("#### 5\nQuestion: 9", "5"),
        ("minus -3.5", "-3.5"),
    ],
)
def test_final_answer(text: str, answer: str) -> None:
    assert evaluate.final_answer(text) == answer


def test_accuracy_interval_covers_as_often_as_it_says() -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(2000):
        interval = evaluate.accuracy([rng.random() < 0.7 for _ in range(60)])
        covered += interval.low <= 0.7 <= interval.high
    assert 0.93 < covered / 2000 < 0.97
    assert evaluate.accuracy([1] * 10).high == pytest.approx(1.0) and evaluate.accuracy([1] * 10).low < 0.8
    with pytest.raises(InputError, match="no answers"):
        evaluate.accuracy([])


def test_paired_difference_covers_and_refuses_lists_that_do_not_pair() -> None:
    rng = random.Random(1)
    covered = 0
    for _ in range(1000):
        pairs = [(rng.random() < 0.8, rng.random() < 0.7) for _ in range(200)]
        interval = evaluate.paired_difference([a for a, _ in pairs], [b for _, b in pairs])
        covered += interval.low <= 0.1 <= interval.high
    assert 0.93 < covered / 1000 < 0.97
    with pytest.raises(InputError, match="2 and 3 answers cannot be paired"):
        evaluate.paired_difference([1, 0], [1, 0, 1])


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (3, 4.3027), (4, 3.1824), (10, 2.2622), (31, 2.0423), (61, 2.0003)])
def test_few_rows_have_students_interval(n: int, t: float) -> None:
    values = [float(k) for k in range(n)]
    found = evaluate.paired_difference(values, [0.5] * n)
    assert found.high - found.value == pytest.approx(t * statistics.stdev(values) / math.sqrt(n), rel=2e-5)
    rows = [evaluate.RowLoss(0.1 * value, 1) for value in values]
    low, high = (math.log(bound) for bound in evaluate.perplexity_interval(rows)[1:])
    assert (high - low) / 2 == pytest.approx(0.1 * t * statistics.stdev(values) / math.sqrt(n), rel=2e-5)
    assert evaluate.paired_difference([1.0, 0.0] * 100, [0] * 200).high == pytest.approx(0.5 + 1.95996 * 0.5 / 199**0.5)


def test_answers_that_all_differ_alike_leave_room_for_others() -> None:
    assert evaluate.paired_difference([1, 1], [0, 0]) == (1, pytest.approx(-0.315, abs=0.001), 1)
    value, low, high = evaluate.paired_difference([1, 0, 1], [1, 0, 1])
    assert (value, low) == (0, -high) and 0.5 < high < 0.6
    assert evaluate.paired_difference([0] * 20, [1] * 20).high < 0


def batch_of(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 50, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_row_losses_add_up_to_the_loss(model: Any) -> None:
    batches = [batch_of(3, 9), batch_of(2, 9)]
    rows = evaluate.row_losses(model, batches)
    assert len(rows) == 5 and {row.tokens for row in rows} == {8}
    mean = sum(row.nats for row in rows) / sum(row.tokens for row in rows)
    assert mean == pytest.approx(evaluate.loss(model, batches), rel=1e-9)
    by_hand = (
        model(batches[1]["input_ids"]).logits[:, :-1].log_softmax(-1).gather(2, batches[1]["input_ids"][:, 1:, None])
    )
    assert rows[3].nats == pytest.approx(-by_hand[0].sum().item(), rel=1e-5)


def test_a_models_distance_to_itself_is_nothing(model: Any) -> None:
    apart = evaluate.divergence(model, model, [batch_of(3, 9)])
    assert apart.kl == (0, 0, 0) and apart.agreement == (1, 1, 1)
    rows = evaluate.row_losses(model, [batch_of(3, 9)])
    assert evaluate.perplexity_change(rows, rows) == (0, 0, 0)


def test_divergence_by_hand(model: Any) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    batch = batch_of(4, 7)
    batch["attention_mask"][0, 4:] = 0
    apart = evaluate.divergence(other, model, [batch])
    kept = batch["attention_mask"][:, 1:] == 1
    with torch.no_grad():
        p, q = (m(**batch).logits[:, :-1][kept].double().log_softmax(-1) for m in (model, other))
    assert apart.kl.value == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert apart.agreement.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert apart.kl.low < apart.kl.value < apart.kl.high


def test_shares_and_distances_have_no_interval_beyond_what_they_can_be(model: Any) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(other.parameters()))[7] += 4  # one token's embedding, so that rows differ in how far they are off
    ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 7, 7]])
    apart = evaluate.divergence(other, model, [{"input_ids": ids}])
    assert 0 == apart.kl.low < apart.kl.value < apart.kl.high
    assert 0 < apart.agreement.value < apart.agreement.high == 1
    (one,) = {math.isnan(each.low) for each in evaluate.divergence(other, model, [{"input_ids": ids[1:]}])}
    assert one


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draw = random.Random(0)
    inside = 0
    for _ in range(400):
        rows = []
        for _ in range(40):
            tokens = draw.randint(5, 50)
            rows.append(evaluate.RowLoss(tokens * draw.gauss(2.0, 0.5), tokens))
        low, high = evaluate.perplexity_interval(rows)[1:]
        inside += low <= math.exp(2.0) <= high
    assert 0.91 <= inside / 400 <= 0.98


def test_pairing_sees_what_two_intervals_would_not() -> None:
    draw = random.Random(0)
    base = [evaluate.RowLoss(20 * draw.gauss(2.0, 0.5), 20) for _ in range(60)]
    worse = [evaluate.RowLoss(row.nats + 20 * draw.gauss(0.01, 0.005), 20) for row in base]
    low, high = evaluate.perplexity_change(worse, base)[1:]
    assert 0 < low < math.expm1(0.01) < high < 0.02
    apart = [evaluate.perplexity_interval(rows) for rows in (base, worse)]
    assert apart[0].high > apart[1].low
    with pytest.raises(InputError, match="on the same text"):
        evaluate.perplexity_change(worse[1:], base)


def test_one_row_has_no_interval() -> None:
    value, low, high = evaluate.perplexity_interval([evaluate.RowLoss(4.0, 2)])
    assert value == pytest.approx(math.exp(2)) and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ("so 7 + 8 = 15.", "15.0", True),
        ("#### 1,200", "She has 1200. #### 1200", True),
        ("15", "16", False),
        ("The answer is TRUE", "the answer  is true", True),
        ("false", "true", False),
        ("", "3", False),
        ("CO2", "H2", False),
        ("B2B", "2", False),
        ("about 1,2,3", "123", False),
        ("the range is 3-5", "5", True),
        ("#### 7 eggs", "7", True),
        ("7", "#### 7 eggs", True),
        ("#### yes", "Yes", True),
        ("x = -3", "3", False),
        ("1/4", "3/4", False),
        ("So it is 1/4.", "1/4", True),
        ("9:30", "10:30", False),
        ("2020-01-05", "1999-12-05", False),
        ("5 January 2020", "9 March 2020", False),
        ("Berlin, 1900", "Paris, 1900", False),
        ("It was paris, 1900", "Paris, 1900.", True),
        ("15", "The answer is 15", True),
        ("7 + 8 = 15", "The answer is 15", True),
        ("She gets 7 and has 15 now, so 15", "In all there are 7 and 8, that is 15.", True),
        ("#### 1/4", "#### 3/4", False),
        ("3/4 of 20 is 15.\n#### 15", "Half of 30 is 15.\n#### 15", True),
        ("x is \N{MINUS SIGN}3", "-3", True),
        ("\N{MINUS SIGN}3", "3", False),
    ],
)
def test_exact_match(given: str, expected: str, same: bool) -> None:
    assert evaluate.exact_match(given, expected) is same


def test_answers_beyond_a_table_of_positions_are_refused_before_any_is_given() -> None:
    tokenizer = load_tokenizer("reference")
    with pytest.raises(InputError, match=r"^a prompt with 64 tokens of answer has \d+ tokens, this OPT model has 64"):
        evaluate.answers(tiny("opt", vocab_size=len(tokenizer)), tokenizer, ["a", "one more"], 64)
