"""Perplexity under many choices of dropped syncs at once, each block's work done once per distinct prefix.

Two choices that drop the same blocks up to block j have the same activations up to j. So one pass over the blocks
carries a set of streams, starts as a single one, and splits a stream at a block only where its choices part:

    choices {}, {3}, {2, 3}    block 0, 1: one stream;  block 2: {} and {3} | {2, 3};  block 3: three streams

For the suffixes {i..L-1} of the sequential sensitivity this is METHODS 2.2's cost exactly: the dense prefix is run
once and every choice starts from it, L/2 + 1.5 forward passes in all (output heads apart) instead of L + 1. Blocks
are visited once, in order, for all choices. The price is memory: one activation per choice for the batch at hand.

Losses are kept per batch and choice, in a state file if one is given, rewritten after each batch. A run that was
killed goes on after its last whole batch, and ends with the same numbers bit for bit. The file is a journal of
measurements keyed by weights, data, ranks and choices: several runs may share one, and none reads another's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elision import files
from elision.blocks import Block, Decoder
from elision.errors import InputError
from elision.progress import progress
from elision.spd.corrections import Correction
from elision.spd.simulate import Simulation, check_plain

Batch = Mapping[str, Tensor]
Choice = tuple[int, ...]  # dropped blocks, ascending

IGNORED = -100  # label of a position that is not scored, as in torch's cross-entropy
INPUTS = ("input_ids", "attention_mask", "position_ids")
HEAD_ROWS = 1024  # positions per call of the output head: bounds the logits' memory


def perplexities(
    view: Decoder,
    batches: Sequence[Batch],
    ranks: int,
    choices: Sequence[Choice],
    *,
    state: str | Path | None = None,
    quiet: bool = False,
    title: str = "Measuring perplexity",
) -> tuple[float, ...]:
    """Perplexity of the simulated model for every choice of dropped blocks.

    Args:
        view: the model, one whose blocks can be simulated with `ranks`.
        batches: what `check_batches` returned.
        ranks: tensor-parallel ranks.
        choices: for each result, the blocks that drop their sync, ascending.
        state: file to resume from and to keep up to date.
        quiet: show no progress bar.
        title: what the bar says.

    Raises:
        InputError: a block that cannot be simulated, a state file that is not one, a perplexity that is not finite.
    """
    for block in view.blocks:
        check_plain(block)
    targets = [next_tokens(batch) for batch in batches]
    journal = _read_journal(state)
    rows = journal.setdefault(_key(view, batches, ranks, choices), []) if state is not None else []
    cost = sum(_parts(choices, block.index) for block in view.blocks) + len(choices)
    with evaluating(view.model), progress(title, cost * len(batches), quiet) as advance:
        advance(cost * len(rows))
        for batch, target in list(zip(batches, targets, strict=True))[len(rows) :]:
            rows.append(_losses(view, batch, target, ranks, choices, advance))
            if state is not None:
                files.write_json(state, {"version": 1, "losses": journal})
    tokens = sum(int((target != IGNORED).sum()) for target in targets)
    return tuple(_perplexity(column, tokens) for column in zip(*rows, strict=True))


def _perplexity(summed: Sequence[float], tokens: int) -> float:
    mean = math.fsum(summed) / tokens
    if not mean < 700:  # also catches nan; exp overflows a little later
        raise InputError(f"loss of {mean} per token is out of range: the model or its dtype fails on this data")
    return math.exp(mean)


@torch.no_grad()
def _losses(
    view: Decoder, batch: Batch, target: Tensor, ranks: int, choices: Sequence[Choice], advance: Callable[[int], None]
) -> list[float]:
    """The summed loss of one batch under every choice."""
    device = view.model.device
    calls = layer_calls(view, {name: batch[name].to(device) for name in INPUTS if name in batch})
    streams: list[tuple[list[int], Tensor]] = [(list(range(len(choices))), calls[0][0])]
    for block, (_, kwargs) in zip(view.blocks, calls, strict=True):
        split = []
        while streams:
            members, hidden = streams.pop(0)
            for drops in (False, True):
                part = [member for member in members if (block.index in choices[member]) == drops]
                if part:
                    split.append((part, step(block, ranks if drops else None, hidden, kwargs)))
                    advance(1)
        streams = split
    found = [0.0] * len(choices)
    for members, hidden in streams:
        loss = _loss(view, hidden, target.to(device))
        for member in members:
            found[member] = loss
            advance(1)
    return found


def step(
    block: Block, ranks: int | None, hidden: Tensor, kwargs: Mapping[str, Any], correction: Correction | None = None
) -> Tensor:
    """One stream through one block: as the model has it (ranks None), or with its first sync dropped."""
    if ranks is None:
        return block.layer(hidden, **kwargs)
    corrections = {} if correction is None else {block.index: correction}
    with Simulation([block], ranks, corrections):
        return block.layer(hidden, **kwargs)


def _parts(choices: Sequence[Choice], block: int) -> int:
    """Number of streams that pass `block`: choices that differ up to and including it."""
    return len({tuple(index for index in choice if index <= block) for choice in choices})


def layer_calls(view: Decoder, inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, dict[str, Any]]]:
    """What the model hands each decoder layer for `inputs`: embeddings, and per layer its masks and positions.

    The model's own forward makes them, with layers that only note their arguments.
    """
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def note(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        calls.append((hidden_states, kwargs))
        return hidden_states

    layers = [block.layer for block in view.blocks]
    try:
        for layer in layers:
            layer.forward = note
        view.model.base_model(**inputs, use_cache=False)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
    return calls


def _loss(view: Decoder, hidden: Tensor, target: Tensor) -> float:
    """Summed next-token loss of the last block's output (batch, sequence, hidden) where there is a target."""
    return sum(part.item() for part in losses(view, hidden, target))


def losses(view: Decoder, hidden: Tensor, target: Tensor) -> Iterator[Tensor]:
    """The same sum in parts of HEAD_ROWS positions, each a scalar that carries gradients."""
    scored = target != IGNORED
    rows, labels = hidden[:, :-1][scored].split(HEAD_ROWS), target[scored].split(HEAD_ROWS)
    for row, label in zip(rows, labels, strict=True):
        logits = view.logits(row)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        yield F.cross_entropy(logits, label, reduction="sum")


def next_tokens(batch: Batch) -> Tensor:
    """The token that each position but the last predicts (batch, sequence - 1), IGNORED where it is not scored.

    Labels if the batch has them, else the real tokens. A token whose predecessor is padding has nothing to be
    predicted from and is never scored, so that the side of the padding makes no difference.
    """
    labels = batch.get("labels", batch["input_ids"])[:, 1:]
    if "attention_mask" in batch:
        real = batch["attention_mask"].bool()
        labels = labels.masked_fill(~(real[:, 1:] & real[:, :-1]), IGNORED)
    return labels.long()


def check_batches(batches: Iterable[Batch], vocabulary: int) -> list[Batch]:
    """The batches as a list, to be gone through more than once.

    Raises:
        InputError: there are none, one lacks input_ids or has tensors that do not fit them, tokens outside the
            vocabulary, or not one position is scored.
    """
    checked = list(batches)
    if not checked:
        raise InputError("data holds no batches: give at least one dict with input_ids")
    for index, batch in enumerate(checked):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise InputError(f"batch {index} has no input_ids (batch, sequence) of token numbers: tokenize the data")
        for name in ("attention_mask", "labels"):
            if name in batch and batch[name].shape != ids.shape:
                shapes = f"{tuple(batch[name].shape)}, input_ids {tuple(ids.shape)}"
                raise InputError(f"batch {index}: {name} has shape {shapes}: give them the same shape")
        labels = batch.get("labels", ids)
        for name, tokens in (("input_ids", ids), ("labels", labels[labels != IGNORED])):
            outside = tokens[(tokens < 0) | (tokens >= vocabulary)]
            if outside.numel():
                raise InputError(
                    f"batch {index}: {name} has token {int(outside[0])}, the vocabulary has {vocabulary}: "
                    "tokenize with the model's own tokenizer"
                )
    if not any(bool((next_tokens(batch) != IGNORED).any()) for batch in checked):
        raise InputError("data has no token to score, every label is -100 or padding: give labels or longer texts")
    return checked


def fingerprint(batches: Sequence[Batch]) -> str:
    """Short hash of everything in the data that a measurement depends on."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in (*INPUTS, "labels"):
            if name in batch:
                hash_tensor(digest, name, batch[name])
    return digest.hexdigest()[:16]


def _key(view: Decoder, batches: Sequence[Batch], ranks: int, choices: Sequence[Choice]) -> str:
    digest = hashlib.sha256(json.dumps([fingerprint(batches), ranks, choices]).encode())
    for name, tensor in view.model.state_dict().items():
        hash_tensor(digest, name, tensor)
    return digest.hexdigest()[:16]


def hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Feed a tensor's name, type, shape and bytes to a hashlib digest."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _read_journal(state: str | Path | None) -> dict[str, list[list[float]]]:
    if state is None or not Path(state).exists():
        return {}
    data = files.read_json(state, "state file")
    if not isinstance(data, dict) or data.get("version") != 1 or not isinstance(data.get("losses"), dict):
        raise InputError(f"state file {state} was not written by a calibration: delete it or give another path")
    return data["losses"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside; afterwards every module is back in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
