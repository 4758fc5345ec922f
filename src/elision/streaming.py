"""Models larger than memory: each block's weights stay in safetensors files until the block is visited.

`open_streamed` builds a model without memory for its blocks. `resident(layer)` reads a block's weights for the time of
a visit and gives the memory back; a plain forward does so by itself, block by block. So a walk that visits each block
once for all that is to go through it (layerwise.py) needs one block's weights, the embeddings, the head and its own
activations, and reads the checkpoint once. The next block's bytes are announced to the operating system, which fetches
them meanwhile into memory that it may take back. Files are read, not mapped, so that the process's own memory is what
it looks like.

A visitor that changes the weights of a block writes them to a file of its own and says so with `relocate`: the
checkpoint stays what it was, later visits read that file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from elision.blocks import decoder, load_config, model_path, refusal
from elision.errors import InputError
from elision.families import WEIGHTS, check_original

STREAM = "_elision_stream"  # a streamed layer's attribute, the reader of its weights

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Place(NamedTuple):
    """Where one tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int  # bytes

    def read(self) -> Tensor:
        """The tensor there, in memory of its own."""
        raw = torch.empty(self.size, dtype=torch.uint8)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            view, done = raw.numpy(), 0
            while done < self.size:
                got = file.readinto(view[done:].data)
                if not got:
                    raise InputError(f"{self.file} is truncated: fetch or save it again")
                done += got
        return raw.view(self.dtype).view(self.shape)

    def announce(self) -> None:
        """Tell the operating system that it will be read soon."""
        if hasattr(os, "posix_fadvise"):  # no Linux: reading works without
            with suppress(OSError), open(self.file, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), self.start, self.size, os.POSIX_FADV_WILLNEED)


def places(file: Path) -> dict[str, Place]:
    """Every tensor that a safetensors file's header lists: its length (8 bytes, little endian), then JSON.

    Raises:
        InputError: it is no such file, or holds tensors that are not floating point.
    """
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return {
            name: Place(
                file,
                _DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
    except (OSError, ValueError, MemoryError, OverflowError):
        raise InputError(f"{file} is no safetensors file, or a truncated one: fetch or save it again") from None
    except KeyError as error:
        raise InputError(f"{file} holds tensors of type {error}: load the model without streaming") from None


class Stream:
    """One layer's weights: on the meta device, or in memory while somebody uses them."""

    def __init__(self, places: Mapping[str, Place], dtype: torch.dtype, device: str | torch.device) -> None:
        self.places, self.device = places, device
        self.dtype: torch.dtype | None = dtype  # None: each as it lies there
        self.users = 0
        self.following: Stream | None = None

    def enter(self, layer: nn.Module) -> None:
        """Give the layer its weights, if it is the first to ask."""
        self.users += 1
        if self.users > 1:
            return
        for name, place in self.places.items():
            _assign(layer, name, place.read().to(self.device, self.dtype))
        for place in self.following.places.values() if self.following else ():
            place.announce()

    def leave(self, layer: nn.Module) -> None:
        """Take them away, if nobody else needs them."""
        self.users -= 1
        if not self.users:
            for name, place in self.places.items():
                _assign(layer, name, torch.empty(place.shape, dtype=self.dtype or place.dtype, device="meta"))

    def attach(self, layer: nn.Module) -> None:
        """Serve the layer from now on."""
        vars(layer)[STREAM] = self
        layer.register_forward_pre_hook(self._before)
        layer.register_forward_hook(self._after, always_call=True)

    # A forward that stands in for the layer's own, to note what it is given or to simulate, knows what it needs.
    def _before(self, layer: nn.Module, *_: Any) -> None:
        if "forward" not in vars(layer):
            self.enter(layer)

    def _after(self, layer: nn.Module, *_: Any) -> None:
        if "forward" not in vars(layer):
            self.leave(layer)


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def is_streamed(layer: nn.Module) -> bool:
    """Whether the layer's weights are read from a file when they are needed."""
    return STREAM in vars(layer)


@contextmanager
def resident(layer: nn.Module) -> Iterator[None]:
    """The layer's weights are in memory inside; afterwards they are not, where the model is streamed or offloaded."""
    stream: Stream | None = vars(layer).get(STREAM)
    if stream is None:
        with undispatched(layer.modules()):
            yield
        return
    try:
        stream.enter(layer)
        yield
    finally:
        stream.leave(layer)


@contextmanager
def undispatched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, modules that accelerate dispatched have their weights and a forward of their own, as others have."""
    hooked: list[Any] = [module for module in modules if "_hf_hook" in vars(module)]
    forwards = [vars(module).pop("forward") for module in hooked]
    try:
        for module in hooked:
            module._hf_hook.pre_forward(module)
        yield
    finally:
        for module, forward in zip(hooked, forwards, strict=True):
            module._hf_hook.post_forward(module, None)
            module.forward = forward


def execution_devices(model: nn.Module) -> set[str]:
    """The devices on which accelerate, if it dispatched the model, lets its modules compute."""
    hooks: list[Any] = [module._hf_hook for module in model.modules() if "_hf_hook" in vars(module)]
    each = [part for hook in hooks for part in getattr(hook, "hooks", [hook])]
    return {str(part.execution_device) for part in each if getattr(part, "execution_device", None) is not None}


def relocate(layer: nn.Module, file: Path) -> None:
    """From now on a streamed layer's weights are what `file`, safetensors of all its parameters, holds."""
    stream: Stream = vars(layer)[STREAM]
    stream.places, stream.dtype = places(file), None


def open_streamed(
    source: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """A causal LM whose blocks' weights are read when they are visited.

    Args:
        source: a directory with safetensors, a Hugging Face id or "reference".
        dtype: of the weights in memory; the checkpoint's own by default.
        device: where blocks compute and the embeddings and the head stay.

    Raises:
        InputError: no such model, a family that is not supported, tensors that are missing, truncated, quantised or of
            another shape than the model's.
    """
    from accelerate import init_empty_weights  # not at import: a serving process may not have accelerate

    config = load_config(source)
    if reason := refusal(config, "sparselora"):  # the wider of the two methods: what it cannot view, neither can
        raise InputError(reason)
    check_original(config, source)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"model {source} is quantised: stream the unquantised one, or load this whole")
    found = _checkpoint(model_path(source))
    with init_empty_weights():  # buffers are real: rotations have some
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
    with suppress(OSError):  # none: what the model's config says of generation
        model.generation_config = GenerationConfig.from_pretrained(model_path(source))
    view = decoder(model.eval())
    names = {module: name for name, module in model.named_modules()}
    own: dict[str, Place] = {}
    shared = set(model.all_tied_weights_keys)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in shared:
            continue
        place = found.get(name) or found.get(name.removeprefix(f"{model.base_model_prefix}."))  # as older ones have it
        if place is None:
            raise InputError(f"model {source} holds no tensor {name}: save it again, with save_pretrained")
        if place.shape != tuple(parameter.shape):
            raise InputError(
                f"model {source}: {name} has shape {place.shape}, the config makes it {tuple(parameter.shape)}: "
                "give a checkpoint that is whole"
            )
        own[name] = place
    before: Stream | None = None
    for block in view.blocks:
        prefix = f"{names[block.layer]}."
        inside = {key.removeprefix(prefix): own.pop(key) for key in list(own) if key.startswith(prefix)}
        stream = Stream(inside, model.dtype, device)
        stream.attach(block.layer)
        if before is not None:
            before.following = stream
        before = stream
    for key, place in own.items():
        _assign(model, key, place.read().to(device, model.dtype))
    model.tie_weights()
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
    return model


def _checkpoint(source: str) -> dict[str, Place]:
    """Every tensor of a directory's safetensors, or of a Hugging Face id's, which are fetched if need be."""
    directory = Path(source)
    if not directory.is_dir():
        directory = Path(snapshot_download(source, **WEIGHTS))
    found: dict[str, Place] = {}
    for file in sorted(directory.glob("*.safetensors")):
        if not file.name.startswith("consolidated"):
            found |= places(file)
    if not found:
        raise InputError(f"{directory} holds no safetensors: save the model with save_pretrained")
    return found
