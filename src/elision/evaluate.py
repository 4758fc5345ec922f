"""What a change cost in quality: perplexity, answers by greedy decoding, and how sure one can be of a difference."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from elision.data import IGNORED
from elision.errors import InputError
from elision.families import check_positions
from elision.layerwise import check_length

Z = statistics.NormalDist().inv_cdf(0.975)  # of a two-sided 95% interval
FEW = 100  # rows, beyond which Student's t is taken for the normal
PHRASE = 4  # words of an answer that is no worked solution, at most
# Not the digits of a word (CO2, v1.5); a hyphen behind one is no sign (3-5); commas part groups of three (1,234).
_NUMBER = re.compile(r"(?:(?<!\w)-)?(?<!\w)(?<!\w\.)(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?![^\W\d]+\d)")


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


class RowLoss(NamedTuple):
    """Summed cross-entropy in nats of one row of text, and how many tokens it is the sum of."""

    nats: float
    tokens: int


class Divergence(NamedTuple):
    """How far a model's predictions are from the dense model's, per predicted token."""

    kl: Interval  # KL(dense || model), nats
    agreement: Interval  # share of tokens for which both rank the same token first


def row_losses(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[RowLoss]:
    """Cross-entropy of every row of `batches`; of the labels where a batch has them, else of all real tokens."""
    found: list[RowLoss] = []
    with evaluating(model):
        for batch in batches:
            _check(model, batch)
            labels = _targets(batch).cpu()
            kept = labels != IGNORED
            logits = _logits(model, batch)
            nats = F.cross_entropy(logits[kept].float(), labels[kept].to(logits.device), reduction="none").cpu()
            sums = torch.zeros(len(labels), dtype=torch.float64).index_add_(0, kept.nonzero()[:, 0], nats.double())
            found += [RowLoss(*row) for row in zip(sums.tolist(), kept.sum(dim=1).tolist(), strict=True)]
    return found


def loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Mean cross-entropy in nats per predicted token; of the labels where a batch has them, else of all real tokens.

    Raises:
        InputError: no token to predict.
    """
    rows = row_losses(model, batches)
    return _mean([row.nats for row in rows], [row.tokens for row in rows]).value


def perplexity(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """The exponential of `loss`."""
    return math.exp(loss(model, batches))


def perplexity_interval(rows: Sequence[RowLoss]) -> Interval:
    """Perplexity of all tokens with its 95% interval, rows being what was drawn at random."""
    return Interval(*map(_exp, _mean([row.nats for row in rows], [row.tokens for row in rows])))


def perplexity_change(rows: Sequence[RowLoss], baseline: Sequence[RowLoss]) -> Interval:
    """Relative change of perplexity against `baseline` on the same rows, paired; 0.01 is 1% more.

    Raises:
        InputError: the two are not of the same rows.
    """
    if [row.tokens for row in rows] != [row.tokens for row in baseline]:
        raise InputError(f"{len(rows)} and {len(baseline)} rows of text differ: score both models on the same text")
    differences = [row.nats - other.nats for row, other in zip(rows, baseline, strict=True)]
    return Interval(*(_exp(value) - 1 for value in _mean(differences, [row.tokens for row in rows])))


def divergence(model: nn.Module, dense: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Divergence:
    """KL(dense || model) and top-1 agreement on the tokens that `loss` scores.

    Raises:
        InputError: no token to predict, or models of different vocabularies.
    """
    check_vocabularies(model, dense)
    distances: list[float] = []
    same: list[float] = []
    tokens: list[int] = []
    with evaluating(model), evaluating(dense):
        for batch in batches:
            for each in (model, dense):
                _check(each, batch)
            kept = _targets(batch).cpu() != IGNORED
            changed, target = (_logits(each, batch)[kept].float().log_softmax(-1).cpu() for each in (model, dense))
            kl = (target.exp() * (target - changed)).sum(-1)
            agrees = changed.argmax(-1) == target.argmax(-1)
            for sums, values in ((distances, kl), (same, agrees)):
                zeros = torch.zeros(len(kept), dtype=torch.float64)
                sums += zeros.index_add_(0, kept.nonzero()[:, 0], values.double()).tolist()
            tokens += kept.sum(dim=1).tolist()
    return Divergence(_within(_mean(distances, tokens), math.inf), _within(_mean(same, tokens), 1.0))


def check_vocabularies(model: nn.Module, dense: nn.Module) -> None:
    """Raise InputError where two models predict over vocabularies of different sizes, between which there is no KL."""
    sizes = [getattr(getattr(each, "config", None), "vocab_size", None) for each in (model, dense)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise InputError(
            f"the model has a vocabulary of {sizes[0]}, the baseline one of {sizes[1]}, so their predictions cannot be "
            "compared: give a baseline of the same vocabulary"
        )


def _targets(batch: Mapping[str, Tensor]) -> Tensor:
    """(rows, tokens - 1) labels that the logits of all positions but the last predict.

    A token whose predecessor is padding has nothing to be predicted from, so that padding may be on either side.
    """
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    labels = (batch["input_ids"] if labels is None else labels)[:, 1:]
    if mask is None:
        return labels
    real = mask.bool()
    return labels.masked_fill(~(real[:, 1:] & real[:, :-1]), IGNORED)


def _check(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Raise InputError where the model would fail on the batch with an IndexError, or a device with an assertion."""
    ids, vocabulary = batch["input_ids"], getattr(getattr(model, "config", None), "vocab_size", None)
    if ids.ndim != 2 or ids.is_floating_point():
        raise InputError(
            f"a batch has input_ids {tuple(ids.shape)} of {ids.dtype}, not (batch, sequence) of token numbers: "
            "tokenize the data"
        )
    for name in ("attention_mask", "labels"):
        if batch.get(name) is not None and batch[name].shape != ids.shape:
            raise InputError(
                f"{name} of a batch have shape {tuple(batch[name].shape)}, its input_ids {tuple(ids.shape)}: "
                "give them the same shape"
            )
    check_length(getattr(model, "config", None), batch, "a batch")
    labels = batch.get("labels")
    given = {"input_ids": ids} | ({} if labels is None else {"labels": labels.masked_fill(labels == IGNORED, 0)})
    for name, found in given.items():
        if vocabulary is not None and found.numel():
            check_tokens(vocabulary, torch.stack(found.aminmax()).tolist(), f"{name} of a batch")


def check_tokens(vocabulary: int, tokens: Iterable[int], what: str) -> None:
    """Raise InputError, naming `what`, where one of `tokens` is none of the model's."""
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise InputError(
                f"{what} have token {token}, the model's vocabulary has {vocabulary}: "
                "tokenize with the model's own tokenizer"
            )


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    device = getattr(model, "device", batch["input_ids"].device)
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels" and value is not None}
    return model(**inputs, use_cache=False).logits[:, :-1]


def _mean(sums: Sequence[float], tokens: Sequence[int]) -> Interval:
    """Mean over all tokens; its interval is that of a ratio of means over rows, none (nan) where there is one row."""
    total, n = sum(tokens), len(tokens)
    if total == 0:
        raise InputError("the data has no token to predict: give text, or labels other than -100")
    mean = sum(sums) / total
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    spread = sum((value - mean * count) ** 2 for value, count in zip(sums, tokens, strict=True))
    half = _errors(n) * math.sqrt(n / (n - 1) * spread) / total
    return Interval(mean, mean - half, mean + half)


def _within(found: Interval, most: float) -> Interval:
    """The part of an interval from 0 to `most`; nan stays."""
    return Interval(*(min(max(value, 0.0), most) for value in found))


@cache
def _errors(n: int) -> float:
    """How many standard errors a 95% interval of a mean of `n` values goes to either side.

    Student's t with n - 1 degrees of freedom: the probability within t is a finite sum over the angle whose tangent is
    t / sqrt(n - 1) (Abramowitz and Stegun, 26.7.3 and 26.7.4), inverted by bisection.
    """
    if n > FEW:
        return Z
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        term = math.sin(angle) * (1.0 if n % 2 else math.cos(angle))
        inside = 0.0
        for k in range(2 - n % 2, n - 1, 2):
            inside += term
            term *= math.cos(angle) ** 2 * k / (k + 1)
        share = inside if n % 2 else 2 / math.pi * (angle + inside)
        low, high = (angle, high) if share < 0.95 else (low, angle)
    return math.sqrt(n - 1) * math.tan(low)


def _exp(value: float) -> float:
    """The exponential, infinite where it would overflow."""
    return math.inf if value > 700 else math.exp(value)


def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    rows: int = 64,
    advance: Callable[[int], object] = lambda _: None,
) -> list[str]:
    """Greedy continuations of `prompts`, in their order; `advance` is told how many came out of each batch.

    Raises:
        InputError: a prompt and its answer may be longer than the model's positions.
    """
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    longest = max(map(len, encoded), default=0) + max_new_tokens
    check_positions(getattr(model, "config", None), longest, f"a prompt with {max_new_tokens} tokens of answer")
    if (vocabulary := getattr(getattr(model, "config", None), "vocab_size", None)) is not None:
        check_tokens(vocabulary, (token for row in encoded for token in row), "the prompts")
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out = [""] * len(prompts)
    end = tokenizer.eos_token_id
    pad = next((token for token in (tokenizer.pad_token_id, end) if token is not None), 0)
    with evaluating(model):
        for first in range(0, len(prompts), rows):
            chosen = by_length[first : first + rows]
            ids = [encoded[i] for i in chosen]
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
    """The last number of the line behind "####", or else of the text; without a number, what stands behind "####"."""
    line = _end(text)
    if numbers := _NUMBER.findall(line):
        return numbers[-1].replace(",", "")
    return line if "####" in text else ""


def exact_match(given: str, expected: str) -> bool:
    """The final answers are the same number ("15" and "15.0" are); where one is no number, the texts the same words.

    A few words that hold more than their number ("1/4", "9:30", "Berlin, 1900") must come again as they are, at the
    end of what was given.
    """
    if _is_phrase(expected) and (len(_NUMBER.findall(_end(expected))) > 1 or _is_phrase(given)):
        words = [_end(text).lower().split() for text in (given, expected)]
        return words[0][-len(words[1]) :] == words[1]
    ends = final_answer(given), final_answer(expected)
    try:
        return float(ends[0]) == float(ends[1])
    except ValueError:
        words = [text.rpartition("####")[2].lower().split() for text in (given, expected)]
        return words[0] == words[1]


def _end(text: str) -> str:
    """What stands behind "####" on its line, or else the text."""
    _, marked, line = text.replace("\N{MINUS SIGN}", "-").rpartition("####")
    return (line.split("\n")[0] if marked else line).strip().rstrip(".")


def _is_phrase(text: str) -> bool:
    """Whether an answer is no solution and no number with its unit, but a few words that hold numbers."""
    numbers = list(_NUMBER.finditer(end := _end(text)))
    if not numbers or "=" in end or len(end.split()) > PHRASE:
        return False
    return len(numbers) > 1 or bool(re.search(r"\w", end[: numbers[0].start()]))


def accuracy(correct: Sequence[bool | int]) -> Interval:
    """Share of correct answers with its Wilson 95% interval.

    Raises:
        InputError: no answers.
    """
    n = len(correct)
    if n == 0:
        raise InputError("no answers to score: give at least one problem")
    p = sum(map(int, correct)) / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return Interval(p, centre - half, centre + half)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Mean of a - b over the same problems with its 95% interval, that of a mean of the paired differences.

    Where these are all alike, and of right and wrong answers, it goes as far as the share of others may (Wilson's).

    Raises:
        InputError: lists of different length, or fewer than two problems.
    """
    if len(a) != len(b) or len(a) < 2:
        raise InputError(f"{len(a)} and {len(b)} answers cannot be paired: score both on the same two or more problems")
    differences = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    mean = statistics.fmean(differences)
    half = _errors(len(differences)) * statistics.stdev(differences) / math.sqrt(len(differences))
    if {*a, *b} <= {0, 1} and len({*differences}) == 1:  # no spread seen is not none
        half = (1 + abs(mean)) * (1 - accuracy([1] * len(differences)).low)
        return Interval(mean, max(-1.0, mean - half), min(1.0, mean + half))
    return Interval(mean, mean - half, mean + half)
