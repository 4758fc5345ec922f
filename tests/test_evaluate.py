"""Scores against plain formulas."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from elision import evaluate
from elision.errors import InputError


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


def test_nothing_to_predict_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(InputError, match="no token to predict"):
        evaluate.loss(model, [{"input_ids": torch.zeros((2, 1), dtype=torch.int64)}])


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
