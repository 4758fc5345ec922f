"""How the loss on data grows when one part of one layer is sparse and everything else dense.

For every layer, part and sparsity of a grid that is a forward pass of its own; but they all agree up to their layer. So
the walk goes through the blocks once per batch, with one dense stream, and lets go a new stream at block j for each
part and sparsity of j, which is dense from there on:

    streams that pass block j:   1 + (parts x grid) x (j + 1),   half of what separate forwards would compute

Each block is visited once per batch for all of them, so a model on disk (streaming.py) is read once per batch, and one
activation per stream of the batch at hand is all that is kept. Losses per batch go into a journal as they are made: a
run that was killed goes on behind its last whole batch and ends with the same numbers bit for bit.

The forward is the masked-dense reference of a training step (reference.py): context tokens sparse, outputs dense.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from elision import blocks, files
from elision.errors import InputError
from elision.evaluate import evaluating
from elision.layerwise import INPUTS, check_length, fingerprint, hash_tensor, layer_calls
from elision.progress import progress
from elision.sparselora import factors as factoring
from elision.sparselora import tokens
from elision.sparselora.choices import BlockChoices, SparseBatch
from elision.sparselora.factors import Factors
from elision.sparselora.plan import PARTS, SparsityPlan
from elision.sparselora.reference import masked
from elision.streaming import resident

Batch = Mapping[str, Tensor]
Choice = tuple[float, ...]  # sparsities by part and layer: ffn of all layers, then qk, then vo

_SAMPLE = 4096  # entries of a weight that tell it from another
_HEAD_ROWS = 1024  # positions per call of the output head: bounds the logits' memory


class Journal:
    """Losses by what they were measured on, in a file if there is one; several runs may share it."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = path
        self.rows: dict[str, list[list[float]]] = {}
        if path is not None and Path(path).exists():
            data = files.read_json(path, "state file")
            if not isinstance(data, dict) or data.get("version") != 1 or not isinstance(data.get("losses"), dict):
                raise InputError(f"state file {path} was not written by a calibration: delete it or give another path")
            self.rows = data["losses"]

    def save(self) -> None:
        """Write the file anew, if there is one."""
        if self.path is not None:
            files.write_json(self.path, {"version": 1, "losses": self.rows})


def singles(plan: SparsityPlan, grid: Sequence[float]) -> list[Choice]:
    """The dense choice, then each layer's each part at each sparsity, all else dense: layers outermost."""
    layers = plan.model.layers
    dense = (0.0,) * (len(PARTS) * layers)
    found = [dense]
    for layer in range(layers):
        for number in range(len(PARTS)):
            place = number * layers + layer
            found += [(*dense[:place], sparsity, *dense[place + 1 :]) for sparsity in grid]
    return found


def losses(
    model: nn.Module,
    batches: Sequence[Batch],
    plan: SparsityPlan,
    choices: Sequence[Choice],
    journal: Journal,
    *,
    factors: Factors | None = None,
    quiet: bool = False,
    title: str = "Measuring losses",
) -> list[float]:
    """Mean loss in nats per output token of `model` under every choice.

    Args:
        model: measured as it is, its adapters included, in eval mode.
        batches: dicts with input_ids and labels (batch, sequence), optionally attention_mask and position_ids.
        plan: whose switches hold; its sparsities do not.
        choices: see Choice.
        journal: of what was measured before.
        factors: of the plan's selection, where it needs them.
        quiet: show no progress bar.
        title: what the bar says.

    Raises:
        InputError: a loss that is not finite, or a journal that was changed by hand.
    """
    view = blocks.decoder(model)
    rows = journal.rows.setdefault(_key(view, model, batches, plan, choices, factors), [])
    if not isinstance(rows, list) or any(not isinstance(row, list) or len(row) != len(choices) for row in rows):
        raise InputError(f"state file {journal.path} has other losses than were measured: delete it and measure anew")
    layers = plan.model.layers
    work = sum(len(_prefixes(choices, layers, block + 1)) for block in range(layers)) + len(choices)
    with evaluating(model), progress(title, work * len(batches), quiet) as advance:
        advance(work * len(rows))
        for batch in batches[len(rows) :]:
            rows.append(_batch_losses(view, batch, plan, choices, factors, advance))
            journal.save()
    count = sum(int((batch["labels"][:, 1:] != tokens.IGNORED).sum()) for batch in batches)
    found = [math.fsum(column) / count for column in zip(*rows, strict=True)]
    if not all(map(math.isfinite, found)):
        raise InputError("the loss on this data is not finite: the model or its dtype fails on it")
    return found


def _prefixes(choices: Sequence[Choice], layers: int, count: int) -> set[Choice]:
    """What the first `count` layers have, over the choices."""
    return {
        tuple(choice[i * layers + layer] for i in range(len(PARTS)) for layer in range(count)) for choice in choices
    }


@torch.no_grad()
def _batch_losses(
    view: blocks.Decoder,
    batch: Batch,
    plan: SparsityPlan,
    choices: Sequence[Choice],
    factors: Factors | None,
    advance: Callable[[int], None],
) -> list[float]:
    """Summed loss of one batch under every choice."""
    device, layers = view.model.device, plan.model.layers
    inputs = {name: batch[name].to(device) for name in INPUTS if name in batch}
    given = {name: batch[name].cpu() for name in ("attention_mask", "position_ids") if name in batch}
    kinds = tokens.classify(batch["labels"].cpu(), **given)
    rows = kinds.kept if plan.dense_outputs else (kinds.context | kinds.dense) & ~kinds.elided
    calls = layer_calls(view, inputs)
    streams: list[tuple[list[int], Tensor]] = [(list(range(len(choices))), calls[0][0])]
    for block, (_, kwargs) in zip(view.blocks, calls, strict=True):
        places = [i * layers + block.index for i in range(len(PARTS))]
        split = []
        with resident(block.layer):
            while streams:
                members, hidden = streams.pop(0)
                for own in dict.fromkeys(tuple(choices[m][p] for p in places) for m in members):
                    with _masked(block, plan, own, factors, rows):
                        out = block.layer(hidden, **kwargs)
                    split.append(([m for m in members if tuple(choices[m][p] for p in places) == own], out))
                    advance(1)
        streams = split
    target = batch["labels"][:, 1:].to(device)
    found = [0.0] * len(choices)
    for members, hidden in streams:
        loss = _loss(view, hidden, target)
        for member in members:
            found[member] = loss
            advance(1)
    return found


def _loss(view: blocks.Decoder, hidden: Tensor, target: Tensor) -> float:
    """Summed next-token loss of the last block's output (batch, sequence, hidden) where there is a target."""
    scored = target != tokens.IGNORED
    total = 0.0
    for row, label in zip(hidden[:, :-1][scored].split(_HEAD_ROWS), target[scored].split(_HEAD_ROWS), strict=True):
        logits = view.logits(row)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total += F.cross_entropy(logits, label, reduction="sum").item()
    return total


@contextmanager
def _masked(
    block: blocks.Block, plan: SparsityPlan, own: Sequence[float], factors: Factors | None, rows: Tensor
) -> Iterator[None]:
    """`block` as the reference has it under `plan` with sparsities `own` (of PARTS), sparse at `rows`."""
    if not any(own) or not bool(rows.any()):
        yield
        return
    layers = range(plan.model.layers)
    here = {part: [own[i] if layer == block.index else 0.0 for layer in layers] for i, part in enumerate(PARTS)}
    plan = replace(plan, **here)
    choices = BlockChoices(block, plan, factors)
    choices.batch = SparseBatch(rows)
    maps: dict[tuple[nn.Module, str], dict[str, slice | None]] = {}
    for name, projection in block.projections.items():
        if plan.sparsity(block.index, name) > 0:
            maps.setdefault(projection.slot, {})[name] = projection.rows
    bases = {slot: getattr(*slot) for slot in maps}
    hooks = []
    try:
        for (holder, attribute), projections in maps.items():
            stand_in = masked(bases[holder, attribute], choices, projections)
            setattr(holder, attribute, stand_in)
            hooks.append(stand_in.wrapper.register_forward_hook(stand_in.without_bias))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for (holder, attribute), base in bases.items():
            setattr(holder, attribute, base)


def _key(
    view: blocks.Decoder,
    model: nn.Module,
    batches: Sequence[Batch],
    plan: SparsityPlan,
    choices: Sequence[Choice],
    factors: Factors | None,
) -> str:
    """Names a measurement by everything that it depends on."""
    switches = [plan.selection, plan.rank, plan.rotary_pairs, plan.dense_outputs, plan.seed]
    weights = weights_of(view, model)
    digest = hashlib.sha256(json.dumps([fingerprint(batches), weights, switches, choices]).encode())
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            hash_tensor(digest, name, parameter)
    if factors is not None:
        factors.hash_pairs(digest)
    return digest.hexdigest()[:16]


def weights_of(view: blocks.Decoder, model: nn.Module) -> str:
    """Hash of what a loss depends on beside the adapters' tensors: samples of all weights, and how adapters are set."""
    digest = hashlib.sha256(factoring.fingerprint(view).encode())

    def sample(name: str, weight: Tensor) -> None:
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        entries = weight.detach().reshape(-1)[:: max(1, weight.numel() // _SAMPLE)]
        digest.update(entries.to("cpu", torch.float32).numpy().tobytes())

    for block in view.blocks:
        with resident(block.layer):
            for name, projection in block.projections.items():
                sample(f"{block.index} {name}", projection.matrix)
            for name, parameter in block.layer.named_parameters():
                if parameter.ndim == 1 and parameter.is_floating_point():  # norms and biases
                    sample(f"{block.index} {name}", parameter)
    for name, parameter in view.model.named_parameters():
        if ".layers." not in name and parameter.is_floating_point() and parameter.device.type != "meta":
            sample(name, parameter)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            settings = [module.active_adapters, sorted(module.scaling.items()), module.merged, module.disable_adapters]
            digest.update(json.dumps([name, *settings]).encode())
    return digest.hexdigest()


def check(batches: Any, config: PretrainedConfig) -> list[Batch]:
    """The batches as a list, to be gone through more than once, with what is read of them alone.

    Raises:
        InputError: there are none, one lacks input_ids or labels of its shape, has a list where a tensor belongs, or
            tokens or labels outside the vocabulary or beyond the model's positions, or there is nothing to learn.
    """
    checked = [_checked(batch, number, config) for number, batch in enumerate(batches)]
    if not checked:
        raise InputError("data holds no batches: give at least one dict with input_ids and labels")
    if not any(bool((batch["labels"][:, 1:] != tokens.IGNORED).any()) for batch in checked):
        raise InputError("every label of the data is -100, so there is no loss: keep the answers' labels")
    return checked


def _checked(batch: Any, number: int, config: PretrainedConfig) -> Batch:
    given = tokens.read(batch, f"batch {number}") if isinstance(batch, Mapping) else {}
    ids = given.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.is_floating_point():
        raise InputError(f"batch {number} has no input_ids (batch, sequence) of token numbers: tokenize the data")
    if "labels" not in given:
        raise InputError(f"batch {number} has no labels, which tell context from output: give batches with labels")
    for name in ("labels", "attention_mask"):
        if name in given and given[name].shape != ids.shape:
            shapes = f"{tuple(given[name].shape)}, input_ids {tuple(ids.shape)}"
            raise InputError(f"batch {number}: {name} has shape {shapes}: give them the same shape")
    vocabulary = config.vocab_size
    for name, found in (("token", ids), ("label", given["labels"][given["labels"] != tokens.IGNORED])):
        if bool(((found < 0) | (found >= vocabulary)).any()):
            raise InputError(f"batch {number} has a {name} outside the vocabulary of {vocabulary}: use its tokenizer")
    check_length(config, given, f"batch {number}")
    return given
