"""Models larger than memory: a decoder layer is read from the checkpoint when its turn comes, and let go after it.

`load_streamed` builds the model with everything but its layers in memory. A layer is read, from the checkpoint's own
safetensors files, by a hook before its forward, or by `resident(layer)` around other uses; the layer before it goes
back to the meta device then. So at most one is in memory, whatever walks over the model: a measurement that visits each
layer once a batch (layerwise.py) reads the checkpoint once a batch, a plain forward once a forward.

For measuring only: a model without memory of its own cannot be trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elision.errors import InputError
from elision.families import load_config, model_path, refusal


def load_streamed(source: str, dtype: str = "bfloat16") -> tuple[Any, Any]:
    """(model, tokenizer) of a directory, a downloaded Hugging Face id or "reference"; layers stay on disk.

    Raises:
        InputError: no such model, an unsupported family, no safetensors files, or one that lacks a weight.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from elision.blocks import decoder

    config = load_config(source)
    if reason := refusal(config, "sparselora"):
        raise InputError(reason)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"model {source} is quantised: stream the unquantised one, or load this whole")
    checkpoint = _Checkpoint(source, getattr(torch, dtype))
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=checkpoint.dtype)
    layers = {id(block.layer): block.layer for block in decoder(model).blocks}
    names = {id(module): name for name, module in model.named_modules()}
    inside = tuple(f"{names[key]}." for key in layers)
    for name, parameter in list(model.named_parameters()):
        if not name.startswith(inside) and (name in checkpoint.files or not config.tie_word_embeddings):
            _put(model, name, checkpoint.read(name), parameter)
    model.tie_weights()
    shelf: list[_Reader] = []
    for key, layer in layers.items():
        layer.register_forward_pre_hook(_Reader(layer, names[key], checkpoint, shelf))
    return model.eval(), AutoTokenizer.from_pretrained(model_path(source))


@contextmanager
def resident(layer: nn.Module) -> Iterator[None]:
    """`layer` with its weights in memory; does nothing where the model is not streamed."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, _Reader):
            hook(layer, ())
    yield


def streamed(layer: nn.Module) -> bool:
    """Whether the weights of `layer` are read from disk when needed."""
    return any(isinstance(hook, _Reader) for hook in layer._forward_pre_hooks.values())


class _Reader:
    """Brings one layer in, and sends the one before away. `shelf` holds the reader whose layer is in memory."""

    def __init__(self, layer: nn.Module, name: str, checkpoint: _Checkpoint, shelf: list[_Reader]) -> None:
        self.layer, self.name, self.checkpoint, self.shelf = layer, name, checkpoint, shelf

    def __call__(self, layer: nn.Module, args: Any) -> None:
        if self.shelf == [self]:
            return
        while self.shelf:
            self.shelf.pop().let_go()
        for name, parameter in list(self.layer.named_parameters()):
            _put(self.layer, name, self.checkpoint.read(f"{self.name}.{name}"), parameter)
        self.shelf.append(self)

    def let_go(self) -> None:
        for name, parameter in list(self.layer.named_parameters()):
            _put(self.layer, name, torch.empty_like(parameter, device="meta"), parameter)


class _Checkpoint:
    """The safetensors files of a model: which file holds which weight."""

    def __init__(self, source: str, dtype: torch.dtype) -> None:
        from safetensors import safe_open
        from transformers.utils.hub import cached_file

        self.source, self.dtype = source, dtype
        self.files: dict[str, Path] = {}
        directory = Path(model_path(source))
        index = directory / "model.safetensors.index.json"
        if not directory.is_dir():
            found = cached_file(
                str(directory), "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False
            )
            index = Path(found or directory).parent / "model.safetensors.index.json"
        if index.is_file():
            held = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self.files = {name: index.parent / file for name, file in held.items()}
        elif (single := index.with_name("model.safetensors")).is_file():
            with safe_open(single, "pt") as file:
                self.files = dict.fromkeys(file.keys(), single)
        else:
            raise InputError(f"model {source} has no safetensors files on this machine: download it, or save it anew")

    def read(self, name: str) -> Tensor:
        from safetensors import safe_open

        if name not in self.files:
            raise InputError(f"weights of model {self.source} lack {name}: load the model whole, without streaming")
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name).to(self.dtype)


def _put(module: nn.Module, name: str, value: Tensor, old: nn.Parameter) -> None:
    """Make `value` the parameter `name` (dotted) of `module`, which must have its shape."""
    if value.shape != old.shape:
        raise InputError(
            f"weight {name} has shape {tuple(value.shape)}, not {tuple(old.shape)}: the config is another's"
        )
    *path, last = name.split(".")
    holder = module.get_submodule(".".join(path))
    holder._parameters[last] = nn.Parameter(value, requires_grad=old.requires_grad)
