"""Data on its way through a decoder, one block at a time, and what of it a measurement depends on.

Measurements go block by block where a forward pass goes through the whole model: `layer_calls` tells what each block
would be handed, so that the walk is the caller's own, and each block is visited once for everything that is to go
through it. `fingerprint` names the data in a journal of measurements.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from elision.blocks import Decoder
from elision.families import check_positions

INPUTS = ("input_ids", "attention_mask", "position_ids")  # of a batch, less its labels


def layer_calls(view: Decoder, inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, dict[str, Any]]]:
    """What the model hands each decoder layer for `inputs`: embeddings, and per layer its masks and positions.

    The model's own forward makes them, with layers that only note their arguments.
    """
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def note(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        calls.append((hidden_states, kwargs))
        return hidden_states

    layers = [block.layer for block in view.blocks]
    own = [vars(layer).get("forward") for layer in layers]  # accelerate's, which moves what the layer needs
    try:
        for layer in layers:
            layer.forward = note
        view.model.base_model(**inputs, use_cache=False)
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
    return calls


def check_length(config: Any, batch: Mapping[str, Tensor], what: str) -> None:
    """Raise InputError, naming `what`, where the batch has a row that is longer than the model's table of positions."""
    if (ids := batch.get("position_ids")) is not None:
        tokens = max(ids.flatten().tolist(), default=-1) + 1
    else:  # padding takes no position
        mask = batch.get("attention_mask")
        tokens = max((torch.ones_like(batch["input_ids"]) if mask is None else mask).sum(1).tolist(), default=0)
    check_positions(config, tokens, what)


def fingerprint(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """Short hash of everything in the data that a measurement depends on."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in (*INPUTS, "labels"):
            if name in batch:
                hash_tensor(digest, name, batch[name])
    return digest.hexdigest()[:16]


def hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Feed a tensor's name, type, shape and bytes to a hashlib digest."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
