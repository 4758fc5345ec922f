"""Quality under many plans at once, each block's work done once per distinct prefix.

Two plans that treat the blocks up to j alike have the same activations up to j. So one pass over the blocks carries a
set of streams, starts as a single one, and splits a stream at a block only where its plans part:

    dropped {}, {3}, {2, 3}    block 0, 1: one stream;  block 2: {} and {3} | {2, 3};  block 3: three streams

Plans for different numbers of ranks, int8 syncs and skipped attention are told apart in the same way, so one pass
measures several N and shares their dense prefix. For the suffixes {i..L-1} of the sequential sensitivity this is
the exact order's cost (maths: Which blocks): the dense prefix is run once and every plan starts from it, L/2 + 1.5
forward passes in all (output heads apart) instead of L + 1. Blocks are visited once, in order, for all plans, so that
a model larger than memory needs one block's weights at a time (streaming.py). The price is memory: one activation per
plan for the batch at hand.

Beside perplexity stands the mean KL divergence from the dense model, KL(dense || plan): it moves before perplexity
does, and falls apart less with the text.

Losses are kept per batch and plan, in a state file if one is given, rewritten after each batch. A run that was killed
goes on after its last whole batch, and ends with the same numbers bit for bit. The file is a journal of measurements
keyed by weights, data and plans: several runs may use one in turn, and none reads another's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from elision import files
from elision.blocks import Block, Decoder
from elision.errors import InputError
from elision.layerwise import INPUTS, check_length, fingerprint, hash_tensor, layer_calls
from elision.progress import progress
from elision.spd.corrections import Correction, correction_of
from elision.spd.plan import SyncPlan
from elision.spd.simulate import Simulation, check_carried, check_visited, made_for
from elision.streaming import resident, undispatched

Batch = Mapping[str, Tensor]
Sums = Sequence[float]  # summed loss, summed KL divergence
Way = tuple[str, int, str | None] | None  # how a block is treated, for how many ranks, how corrected; None: it is not

VERSION = 2  # of the state file
IGNORED = -100  # label of a position that is not scored, as in torch's cross-entropy
HEAD_ROWS = 1024  # positions per call of the output head: bounds the logits' memory
ORIGIN = ("_name_or_path", "architectures", "dtype", "spd_plan", "transformers_version")  # of a config: where a model
# came from and how it is kept, which differs between copies that compute the same


class Quality(NamedTuple):
    """What a plan makes of a model, on one text."""

    perplexity: float
    kl: float  # mean KL divergence from the dense model, nats a scored token


class Journal:
    """A state file: rows of measurements of one model, a row a batch, each list under the hash of what it follows from.

    The weights are hashed once, when the journal is opened, for that reads all of them: they must not change meanwhile.
    """

    def __init__(self, path: str | Path | None, view: Decoder) -> None:
        """Open `path`; None: nothing is kept."""
        self.path = None if path is None else Path(path)
        self.lists: dict[str, list[Any]] = {}
        if self.path is not None:
            self.lists = _read_journal(self.path)
            digest = hashlib.sha256()
            hash_weights(digest, view)
            self.weights = digest.hexdigest()

    @classmethod
    def of(cls, state: State, view: Decoder) -> Journal:
        """`state` itself where it is a journal already."""
        return state if isinstance(state, Journal) else cls(state, view)

    def rows(self, batches: Sequence[Batch], what: Any) -> list[Any]:
        """The rows that are known of the measurement that `what`, JSON values, names; new ones are appended to it."""
        if self.path is None:
            return []
        key = json.dumps([fingerprint(batches), what, self.weights])
        return self.lists.setdefault(hashlib.sha256(key.encode()).hexdigest()[:16], [])

    def keep(self) -> None:
        """Write what is known."""
        if self.path is not None:
            files.write_json(self.path, {"version": VERSION, "losses": self.lists})


State = str | Path | Journal | None  # what is given for a state file


def measure(
    view: Decoder,
    batches: Sequence[Batch],
    plans: Sequence[SyncPlan],
    *,
    reference: Sequence[Tensor] | None = None,
    state: State = None,
    quiet: bool = False,
    title: str = "Measuring perplexity",
) -> tuple[Quality, ...]:
    """Quality of the simulated model under every plan.

    Args:
        view: the model, one whose blocks can be simulated with the plans' ranks.
        batches: what `check_batches` returned.
        plans: what to measure; corrections that they name must be in the model.
        reference: what `last_hidden` gave for the model that divergence is taken from, where its blocks were another's
            weights than `view`'s; by default `view` itself with every sync in place.
        state: file to resume from and to keep up to date, or its `Journal` where several measurements share one.
        quiet: show no progress bar.
        title: what the bar says.

    Raises:
        InputError: a block that cannot be simulated, a state file that is not one, a perplexity that is not finite.
    """
    check_visited(view)
    ways = [tuple(_way(plan, block.index) for block in view.blocks) for plan in plans]
    dense = (None,) * len(view.blocks)
    if reference is None and dense not in ways:
        ways.append(dense)
    targets = [next_tokens(batch) for batch in batches]
    journal = Journal.of(state, view)
    rows = journal.rows(batches, ways)
    cost = sum(len({way[: block.index + 1] for way in ways}) for block in view.blocks) + len(ways)
    with evaluating(view.model), progress(title, cost * len(batches), quiet) as advance:
        advance(cost * len(rows))
        known: Sequence[Tensor | None] = reference or [None] * len(batches)
        for batch, target, base in list(zip(batches, targets, known, strict=True))[len(rows) :]:
            rows.append(_sums(view, batch, target, ways, base, advance))
            journal.keep()
    tokens = sum(int((target != IGNORED).sum()) for target in targets)
    return tuple(_quality(column, tokens) for column in list(zip(*rows, strict=True))[: len(plans)])


def _way(plan: SyncPlan, block: int) -> Way:
    how = plan.treatment(block)
    return None if how == "dense" else (how, plan.ranks, plan.corrections.get(block))


def _quality(sums: Sequence[Sums], tokens: int) -> Quality:
    loss, kl = (math.fsum(column) / tokens for column in zip(*sums, strict=True))
    if not loss < 700:  # also catches nan; exp overflows a little later
        raise InputError(f"loss of {loss} per token is out of range: the model or its dtype fails on this data")
    return Quality(math.exp(loss), kl)


@torch.no_grad()
def last_hidden(view: Decoder, batches: Sequence[Batch]) -> list[Tensor]:
    """The last block's output (batch, sequence, hidden) for each batch, with every sync in place."""
    found = []
    with evaluating(view.model):
        for batch in batches:
            calls = layer_calls(view, {name: batch[name].to(view.model.device) for name in INPUTS if name in batch})
            hidden = calls[0][0]
            for block, (_, kwargs) in zip(view.blocks, calls, strict=True):
                with resident(block.layer):
                    hidden = block.layer(hidden, **kwargs)
            found.append(hidden)
    return found


@torch.no_grad()
def _sums(
    view: Decoder,
    batch: Batch,
    target: Tensor,
    ways: Sequence[tuple[Way, ...]],
    base: Tensor | None,
    advance: Callable[[int], None],
) -> list[Sums]:
    """(summed loss, summed KL divergence from `base`, or from the dense stream) of one batch under each of `ways`."""
    device = view.model.device
    calls = layer_calls(view, {name: batch[name].to(device) for name in INPUTS if name in batch})
    streams: list[tuple[list[int], Tensor]] = [(list(range(len(ways))), calls[0][0])]
    for block, (_, kwargs) in zip(view.blocks, calls, strict=True):
        split = []
        with resident(block.layer):
            while streams:
                members, hidden = streams.pop(0)
                parts: dict[Way, list[int]] = {}
                for member in members:
                    parts.setdefault(ways[member][block.index], []).append(member)
                for way, part in parts.items():
                    split.append((part, treat(block, way, hidden, kwargs)))
                    advance(1)
        streams = split
    if base is None:
        base = next(hidden for members, hidden in streams if not any(ways[members[0]]))
    found: dict[int, Sums] = {}
    for (members, _), sums in zip(streams, _scores(view, [h for _, h in streams], base, target), strict=True):
        for member in members:
            found[member] = sums
            advance(1)
    return [found[member] for member in range(len(ways))]


def treat(block: Block, way: Way, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """One stream through one block, which is treated as `way` says."""
    if way is None or way[0] == "dropped":
        _, ranks, kind = way or (None, None, None)
        return step(block, ranks, hidden, kwargs, None if kind is None else correction_of(block, ranks or 1, kind))
    how, ranks, _ = way
    with Simulation((), ranks, int8=[block] if how == "int8" else (), skipped=[block] if how == "skipped" else ()):
        return block.layer(hidden, **kwargs)


def step(
    block: Block, ranks: int | None, hidden: Tensor, kwargs: Mapping[str, Any], correction: Correction | None = None
) -> Tensor:
    """One stream through one block: as the model has it (ranks None), or with its first sync dropped."""
    if ranks is None:
        return block.layer(hidden, **kwargs)
    corrections = {} if correction is None else {block.index: correction}
    with Simulation([block], ranks, corrections):
        return block.layer(hidden, **kwargs)


def _scores(view: Decoder, hidden: Sequence[Tensor], base: Tensor, target: Tensor) -> list[Sums]:
    """Summed loss, and KL divergence from `base`, of each stream's last output where there is a target."""
    target = target.to(base.device)
    found: list[Sums] = [(0.0, 0.0)] * len(hidden)
    for places in (target != IGNORED).nonzero().split(HEAD_ROWS):
        row, column = places.unbind(-1)
        label = target[row, column]
        true = _log_probabilities(view, base[row, column])
        for i, stream in enumerate(hidden):
            own = true if stream is base else _log_probabilities(view, stream[row, column])
            loss = F.nll_loss(own, label, reduction="sum").item()
            kl = 0.0 if stream is base else (true.exp() * (true - own)).sum().item()
            found[i] = (found[i][0] + loss, found[i][1] + kl)
    return found


def _log_probabilities(view: Decoder, hidden: Tensor) -> Tensor:
    logits = view.logits(hidden)
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


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


def check_batches(batches: Iterable[Batch], config: PretrainedConfig) -> list[Batch]:
    """The batches as a list, to be gone through more than once, without what is None in them.

    Raises:
        InputError: there are none, one lacks input_ids or has tensors that do not fit them, tokens outside the
            vocabulary or beyond the model's positions, or not one position is scored.
    """
    checked = list(batches)
    if not checked:
        raise InputError("data holds no batches: give at least one dict with input_ids")
    for index, batch in enumerate(checked):
        if isinstance(batch, Mapping) and any(value is None for value in batch.values()):
            batch = checked[index] = {name: value for name, value in batch.items() if value is not None}
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise InputError(f"batch {index} has no input_ids (batch, sequence) of token numbers: tokenize the data")
        for name in ("attention_mask", "labels"):
            if name in batch and batch[name].shape != ids.shape:
                shapes = f"{tuple(batch[name].shape)}, input_ids {tuple(ids.shape)}"
                raise InputError(f"batch {index}: {name} has shape {shapes}: give them the same shape")
        if (places := batch.get("position_ids")) is not None and places.shape not in (ids.shape, (1, ids.shape[1])):
            shapes = f"{tuple(places.shape)}, input_ids {tuple(ids.shape)}"
            raise InputError(
                f"batch {index}: position_ids has shape {shapes}: give each token its place, or leave it out"
            )
        check_length(config, batch, f"batch {index}")
        labels, vocabulary = batch.get("labels", ids), config.vocab_size
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


def check_weights(view: Decoder, plan: SyncPlan | None = None) -> None:
    """Raise InputError unless the model's weights are the original's, or those that `plan` was carried out on."""
    if plan is not None:
        check_carried(view, plan)
    made = made_for(view)
    if made is not None and (plan is None or not (plan.healed or plan.heads)):  # what is measured would be wrong
        raise InputError(
            f"model has blocks {sorted({*made.healed, *made.heads})} healed or regrouped already: "
            "load the original model, or give the plan that came with this one"
        )


def hash_weights(digest: Any, view: Decoder) -> None:
    """Feed every tensor of the model to a hashlib digest, block by block: the same whether it is streamed or not.

    Its config too, because a rotary base, an epsilon, a window or a multiplier stands in no tensor.
    """
    settings = {name: value for name, value in view.model.config.to_dict().items() if name not in ORIGIN}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    layers = {
        f"{name}.": block
        for name, module in view.model.named_modules()
        for block in view.blocks
        if module is block.layer
    }
    inside = {module for block in view.blocks for module in block.layer.modules()}
    with undispatched(module for module in view.model.modules() if module not in inside):
        for name, tensor in view.model.state_dict().items():
            if not name.startswith(tuple(layers)):
                hash_tensor(digest, name, tensor)
    for prefix, block in layers.items():
        with resident(block.layer):
            for name, tensor in block.layer.state_dict().items():
                hash_tensor(digest, f"{prefix}{name}", tensor)


def _read_journal(state: Path) -> dict[str, list[Any]]:
    if not state.exists():
        return {}
    data = files.read_json(state, "state file")
    if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("losses"), dict):
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
