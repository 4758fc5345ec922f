"""A few dense steps before measuring what a model can spare, taken back afterwards.

A model that has learned nothing yet cannot tell what its fine-tuning will need: its loss on the answers is that of not
knowing their form, and layers that will carry facts from prompt to answer look idle. Plans measured there cost most of
what was to be learned, plans measured after a few dozen steps next to nothing (docs/lab-notes.md). After a whole
fine-tuning they are worse again: what one solution leaves idle, another run's may want.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elision import blocks, files
from elision.errors import InputError
from elision.layerwise import fingerprint, hash_tensor
from elision.progress import progress
from elision.sparselora import sweep
from elision.sparselora.apply import lossless

WARMUP = 4  # steps, of a rate that is constant from there on


def check(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], learning_rate: float) -> None:
    """Raise InputError where nothing can be rehearsed."""
    if not 0 < learning_rate < 1:
        raise InputError(f"learning_rate {learning_rate} is not between 0 and 1: 3e-4 is usual")
    if batches and not any(p.requires_grad for p in model.parameters()):
        raise InputError("model has nothing to train: add a LoRA adapter with peft.get_peft_model, or rehearse nothing")
    if batches:
        lossless(model).remove()  # what it refuses


@contextmanager
def rehearsed(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    learning_rate: float,
    state: str | Path | None = None,
    quiet: bool = False,
) -> Iterator[None]:
    """`model` with its adapter trained densely, a step for each batch; behind the `with` block it is as it was.

    AdamW, gradients clipped to 1, no decay of the rate: what a fine-tuning does at its start. `state` names a file
    (safetensors) that keeps the trained adapter, so that a killed calibration does not train again.

    Raises:
        InputError: a loss that is not finite, or a state file that is not whole.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad} if batches else {}
    before = {name: p.detach().clone() for name, p in trained.items()}
    modes = [(module, module.training) for module in model.modules()]
    key = _key(model, batches, before, learning_rate) if batches else ""
    try:
        if batches and not _recalled(trained, state, key):
            _train(model, list(trained.values()), batches, learning_rate, quiet)
            if state is not None:
                learned = {name: p.detach().cpu().contiguous() for name, p in trained.items()}
                files.write(state, lambda path: save_file(learned, path, metadata={"key": key}))
        _set(modes)
        yield
    finally:
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(before[name])
        _set(modes)


def _set(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode


def _train(
    model: Any,
    parameters: list[nn.Parameter],
    batches: Sequence[Mapping[str, Tensor]],
    learning_rate: float,
    quiet: bool,
) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    gradients = [(p, p.grad) for p in parameters]  # the caller's, not to be learned from here
    optimizer.zero_grad(set_to_none=True)
    model.train()
    try:
        with torch.random.fork_rng(), lossless(model), progress("Rehearsing", len(batches), quiet) as advance:
            torch.manual_seed(0)  # of dropout
            for step, batch in enumerate(batches):
                loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
                if not bool(torch.isfinite(loss)):
                    raise InputError(f"the loss of rehearsed step {step} is not finite: give a smaller learning rate")
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / WARMUP)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                advance(1)
    finally:
        for p, gradient in gradients:
            p.grad = gradient


def _key(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], adapter: Mapping[str, Tensor], learning_rate: float
) -> str:
    """Names what is learned by everything that it depends on."""
    settings = [fingerprint(batches), sweep.weights_of(blocks.decoder(model), model), learning_rate]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(adapter.items()):
        hash_tensor(digest, name, tensor)
    return digest.hexdigest()[:16]


def _recalled(trained: Mapping[str, nn.Parameter], state: str | Path | None, key: str) -> bool:
    """Whether `state` has what these very steps learned; then it is in place."""
    if state is None or not Path(state).exists():
        return False
    try:
        with safe_open(state, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return False
        learned = load_file(state)
    except SafetensorError as error:
        raise InputError(f"state file {state} is not whole ({error}): delete it") from error
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(learned[name])
    return True
