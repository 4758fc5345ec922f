"""Models larger than memory: each block's weights stay in the checkpoint's safetensors until the block is visited.

Calibration walks through the blocks in order, so it needs one block's weights at a time, the embeddings, the head and
the activations of the batch at hand. `open_streamed` builds the model without memory for its blocks' weights;
`resident(block)` reads them for the time of a visit and gives the memory back. The next block's bytes are announced
to the operating system, which fetches them meanwhile into memory that it may take back. Files are read, not mapped,
so that the process's own memory is what it looks like.

The trade-off: every batch reads the whole checkpoint once per pass. Larger batches read less often.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from elision.blocks import Block, decoder, load_config, model_path
from elision.errors import InputError
from elision.families import check_original

STREAM = "_elision_stream"  # a streamed layer's attribute, the reader of its weights

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Place(NamedTuple):
    """Where one tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int  # bytes


class Checkpoint:
    """The tensors of a directory's safetensors, by name, each read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.places: dict[str, Place] = {}
        for file in sorted(directory.glob("*.safetensors")):
            self.places |= _places(file)
        if not self.places:
            raise InputError(f"{directory} holds no safetensors: save the model with save_pretrained")

    def find(self, name: str, base: str) -> Place:
        """The place of parameter `name`, which an older checkpoint may hold without the model's prefix `base`."""
        for spelling in (name, name.removeprefix(f"{base}.")):
            if spelling in self.places:
                return self.places[spelling]
        raise InputError(f"{self.directory} holds no tensor {name}: save the model again, with save_pretrained")

    def read(self, place: Place) -> Tensor:
        """The tensor there, in memory of its own."""
        raw = torch.empty(place.size, dtype=torch.uint8)
        with open(place.file, "rb", buffering=0) as file:
            file.seek(place.start)
            view, done = raw.numpy(), 0
            while done < place.size:
                got = file.readinto(view[done:].data)
                if not got:
                    raise InputError(f"{place.file} is truncated: fetch or save it again")
                done += got
        return raw.view(place.dtype).view(place.shape)

    def announce(self, places: Sequence[Place]) -> None:
        """Tell the operating system that these will be read soon."""
        if not hasattr(os, "posix_fadvise"):  # no Linux: reading works without
            return
        for place in places:
            with suppress(OSError), open(place.file, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), place.start, place.size, os.POSIX_FADV_WILLNEED)


def _places(file: Path) -> dict[str, Place]:
    """Every tensor that a safetensors file's header lists: its length (8 bytes, little endian), then JSON."""
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
    """One layer's weights: on the meta device, or read from the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, places: dict[str, Place], dtype: torch.dtype, device: Any) -> None:
        self.checkpoint, self.places, self.dtype, self.device = checkpoint, places, dtype, device
        self.following: Stream | None = None

    def load(self, layer: nn.Module) -> None:
        """Give the layer its weights."""
        for name, place in self.places.items():
            _assign(layer, name, self.checkpoint.read(place).to(self.device, self.dtype))
        if self.following is not None:
            self.checkpoint.announce(list(self.following.places.values()))

    def release(self, layer: nn.Module) -> None:
        """Take them away."""
        for name, place in self.places.items():
            _assign(layer, name, torch.empty(place.shape, dtype=self.dtype, device="meta"))


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def is_streamed(block: Block) -> bool:
    """Whether `block`'s weights are read from a checkpoint when they are needed."""
    return STREAM in vars(block.layer)


@contextmanager
def resident(block: Block) -> Iterator[None]:
    """`block`'s weights are in memory inside; afterwards they are not, where the model is streamed."""
    stream = vars(block.layer).get(STREAM)
    if stream is None or not next(block.layer.parameters()).is_meta:
        yield
        return
    try:
        stream.load(block.layer)
        yield
    finally:
        stream.release(block.layer)


def open_streamed(
    source: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """A causal LM whose blocks' weights are read when `sensitivity`, `curve`, `scores` or `calibrate` visit them.

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
    check_original(config, source)
    name = model_path(source)
    directory = Path(name).expanduser()
    if not directory.is_dir():
        directory = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    checkpoint = Checkpoint(directory)
    with init_empty_weights():  # buffers are real: rotations have some
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
    view = decoder(model.eval())
    names = {module: name for name, module in model.named_modules()}
    places: dict[str, Place] = {}
    shared = set(model.all_tied_weights_keys)
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter_name in shared:
            continue
        place = checkpoint.find(parameter_name, model.base_model_prefix)
        if place.shape != tuple(parameter.shape):
            raise InputError(
                f"{directory}: {parameter_name} has shape {place.shape}, the config makes it {tuple(parameter.shape)}: "
                "give a checkpoint that is whole"
            )
        places[parameter_name] = place
    before: Stream | None = None
    for block in view.blocks:
        prefix = f"{names[block.layer]}."
        own = {key.removeprefix(prefix): places.pop(key) for key in list(places) if key.startswith(prefix)}
        stream = Stream(checkpoint, own, model.dtype, device)
        vars(block.layer)[STREAM] = stream
        if before is not None:
            before.following = stream
        before = stream
    for key, place in places.items():
        _assign(model, key, checkpoint.read(place).to(device, model.dtype))
    model.tie_weights()
    for buffer_name, buffer in list(model.named_buffers()):
        owner, _, leaf = buffer_name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
    return model
