"""What a change cost in quality: perplexity, answers by greedy decoding, and how sure one can be of a difference."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from elision.data import IGNORED
from elision.errors import InputError

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Interval(NamedTuple):
    """An estimate and its 95% confidence interval."""

    value: float
    low: float
    high: float


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Mean cross-entropy in nats per predicted token; of the labels where a batch has them, else of all real tokens.

    Raises:
        InputError: no token to predict.
    """
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            labels = batch.get("labels")
            if labels is None:
                mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
                labels = batch["input_ids"].masked_fill(mask == 0, IGNORED)
            kept = labels[:, 1:] != IGNORED
            count += int(kept.sum())
            total += F.cross_entropy(logits[kept].float(), labels[:, 1:][kept], reduction="sum").item()
    if count == 0:
        raise InputError("the data has no token to predict: give text, or labels other than -100")
    return total / count


def perplexity(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """The exponential of `loss`."""
    return math.exp(loss(model, batches))


def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    rows: int = 64,
    advance: Callable[[int], object] = lambda _: None,
) -> list[str]:
    """Greedy continuations of `prompts`, in their order; `advance` is told how many came out of each batch."""
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out = [""] * len(prompts)
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with evaluating(model):
        for first in range(0, len(prompts), rows):
            chosen = by_length[first : first + rows]
            ids = [tokenizer.encode(prompts[i]) for i in chosen]
            length = max(map(len, ids))
            input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in ids])
            mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
            made = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=end,
            )
            for i, row in zip(chosen, made[:, length:].tolist(), strict=True):
                out[i] = str(tokenizer.decode(row[: row.index(end)] if end in row else row)).strip()
            advance(len(chosen))
    return out


def final_answer(text: str) -> str:
    """What follows "####", else the last number of the text; "" where there is neither."""
    if "####" in text:
        text = text.rsplit("####", 1)[1]
        return text.split("\n")[0].strip().rstrip(".").replace(",", "")
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else ""


def accuracy(correct: Sequence[bool | int]) -> Interval:
    """Share of correct answers with its Wilson 95% interval.

    Raises:
        InputError: no answers.
    """
    n = len(correct)
    if n == 0:
        raise InputError("no answers to score: give at least one problem")
    p = sum(map(int, correct)) / n
    z = statistics.NormalDist().inv_cdf(0.975)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(p, centre - half, centre + half)


def paired_difference(a: Sequence[bool | int], b: Sequence[bool | int]) -> Interval:
    """Mean of a - b over the same problems with its 95% interval, normal in the mean of the paired differences.

    Raises:
        InputError: lists of different length, or fewer than two problems.
    """
    if len(a) != len(b) or len(a) < 2:
        raise InputError(f"{len(a)} and {len(b)} answers cannot be paired: score both on the same two or more problems")
    differences = [int(x) - int(y) for x, y in zip(a, b, strict=True)]
    mean = statistics.fmean(differences)
    half = statistics.NormalDist().inv_cdf(0.975) * statistics.stdev(differences) / math.sqrt(len(differences))
    return Interval(mean, mean - half, mean + half)
