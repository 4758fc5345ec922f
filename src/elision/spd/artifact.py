"""A checkpoint that carries its plan, and cannot be run without it unnoticed.

`save` writes what `save_pretrained` writes, the corrections as further tensors in the safetensors, and a config.json
that says three more things:

    spd_plan        the plan, as SyncPlan.to_dict() gives it
    architectures   SPD<Original>ForCausalLM: a serving engine that does not know our runtime refuses the name
    model_type      the family's own where the weights are those of the original (a zero-shot plan), so that plain
                    from_pretrained gives the original model; spd_<family> where blocks were healed or corrected,
                    because their weights are wrong without the plan: transformers' Auto classes refuse that name

`read` gives model and plan back bit for bit, `load` applies the plan too. A directory is written under a temporary
name and then renamed: there is a whole checkpoint at the path, or whatever was there before. Only a kill between two
renames leaves nothing there: what was there before is then beside it as .<name>.replaced, which `read` says and the
next `save` brings back. A streamed model's is written block by block, a safetensors file each.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from elision import files
from elision.blocks import Decoder, decoder
from elision.errors import InputError
from elision.families import TREATED, WEIGHTS, load_config, model_path
from elision.loading import load_whole
from elision.spd.card import card
from elision.spd.corrections import NAME, attach, correction_of, fill
from elision.spd.lowrank import NAME as LOWRANK
from elision.spd.plan import SyncPlan
from elision.spd.serving import in_words, served_by
from elision.spd.simulate import Simulation, check_carried, covered, facts, guard, made_for, simulate
from elision.streaming import is_streamed, places, resident

PREFIX = "SPD"  # of the architecture's name
WRITTEN = (  # what a checkpoint of ours consists of, tokenizers' files too
    "README.md config.json generation_config.json model*.safetensors model.safetensors.index.json tokenizer*.json "
    "special_tokens_map.json added_tokens.json vocab.* merges.txt *.model chat_template.* additional_chat_templates"
).split()


class Treated(NamedTuple):
    """A model and the plan that its weights and corrections were made for."""

    model: PreTrainedModel
    plan: SyncPlan

    def simulate(self) -> Simulation:
        """Make the model compute what the plan's ranks would; the handle undoes it."""
        return simulate(self.model, self.plan)

    def save_pretrained(self, path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
        """Write a checkpoint directory that carries the plan; `save` with its defaults."""
        return save(self.model, self.plan, path, tokenizer)


def save(
    model: nn.Module,
    plan: SyncPlan,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    command: str | None = None,
    results: Mapping[str, str] | None = None,
) -> Path:
    """Write `model` with its plan as a checkpoint directory, whole or not at all.

    Args:
        model: the model that `plan` is for, with the corrections that the plan names. It is left as it is, and may be
            under simulation.
        plan: goes into config.json, and into the model card in words.
        path: directory to write. One that is there is replaced if `save` wrote it.
        tokenizer: written beside the model, so that the directory is complete.
        command: what the user typed to make it, for the card.
        results: further lines of the card's table, such as the recovery that was measured.

    Raises:
        InputError: the plan is not for the model or its weights, the model carries an unmerged adapter, or `path` holds
            something that `save` did not write.
    """
    view = covered(model, plan.ranks)
    plan.check(facts(view))
    check_carried(view, plan)
    if made_for(view) is not None and not (plan.healed or plan.heads):
        raise InputError("model has weights healed for another plan than this: save it with the plan that came with it")
    for name, module in view.model.named_modules():
        if hasattr(module, "base_layer") or hasattr(module, "original_module"):  # PEFT's
            raise InputError(f"{name} carries an adapter: merge it first, with model.merge_and_unload()")
    for index, kind in plan.corrections.items():
        correction_of(view.blocks[index], plan.ranks, kind)
    check_replaceable(path)
    place = Path(path).resolve()  # a link stays, what it leads to is written
    with _alone(place) as temporary:
        _recover(place)
        with files.disk_errors(place):
            _write(view.model, plan, temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        told = {"Served by": in_words(served_by(facts(view), plan)), **(results or {})}
        files.write_text(temporary / "README.md", card(plan, type(view.model).__name__, command, told))
        _move(temporary, place)
    return Path(path)


@contextmanager
def _alone(place: Path) -> Iterator[Path]:
    """An empty directory beside `place` for one save at a time, gone in the end; a killed save's is taken over.

    Raises:
        InputError: another save is writing `place`.
    """
    temporary = place.with_name(f".{place.name}.partial")
    temporary.mkdir(parents=True, exist_ok=True)
    lock = _locked(temporary, place)
    try:
        for left in temporary.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(temporary: Path, place: Path) -> int | None:
    """A lock on a directory until it is closed, which its process' end does too; None where the system has none."""
    if sys.platform == "win32":
        return None
    import fcntl

    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise InputError(f"{place} is being written by another save: wait for it, or give another place") from None
    except OSError:  # some file systems of a network have no locks
        pass
    return lock


def check_replaceable(path: str | Path) -> None:
    """Raise InputError unless a checkpoint can be written at `path` and nothing is lost by that."""
    path = Path(path)
    place = path.resolve()
    if Path.cwd().is_relative_to(place) or os.path.ismount(place):  # a directory is replaced by renaming it
        what = "a mount point" if os.path.ismount(place) else "the current directory or above it"
        raise InputError(f"{path} is {what} and cannot be replaced: give a directory inside of it")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    config = path / "config.json"
    values = files.read_json(config, "model config") if config.is_file() else None
    names = values.get("architectures") if isinstance(values, dict) and "spd_plan" in values else None
    if not names or not str(names[0]).startswith(PREFIX):  # a fine-tuned copy of ours has the plan, under its own name
        raise InputError(
            f"{path} exists and is not a checkpoint with a plan that elision.spd.save wrote: give a new directory"
        )
    for entry in sorted(path.iterdir()):
        if not any(fnmatch(entry.name, pattern) for pattern in WRITTEN):
            raise InputError(
                f"{path} holds {entry.name}, which elision.spd.save did not write and would delete: move it away, or "
                "give a new directory"
            )


def _write(model: PreTrainedModel, plan: SyncPlan, directory: Path) -> None:
    """Weights first, the config that makes them loadable last."""
    before = {name: getattr(model.config, name, None) for name in ("architectures", "dtype")}
    state = {name: tensor for name, tensor in model.state_dict().items() if _belongs(name, plan)}
    view = decoder(model)
    streamed = is_streamed(view.blocks[0].layer)
    if not streamed and (absent := [name for name, tensor in state.items() if tensor.is_meta]):
        raise InputError(
            f"{absent[0]} is offloaded, so it cannot be saved from here: load the model without device_map"
        )
    generation = getattr(model, "generation_config", None)
    try:
        if generation is not None:
            model.generation_config = GenerationConfig()
        type(model).save_pretrained(  # a healed model's own refuses
            model, directory, state_dict={name: tensor for name, tensor in state.items() if not tensor.is_meta}
        )
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)
        if generation is not None:
            model.generation_config = generation
    if generation is not None:
        _savable(generation, model).to_json_file(directory / "generation_config.json")
    if streamed:
        _write_blocks(view, plan, directory)
    config = directory / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.unlink()
    values["architectures"] = [f"{PREFIX}{type(model).__name__}"]
    values["model_type"] = values["model_type"] if plan.original_weights else TREATED + values["model_type"]
    values["spd_plan"] = plan.to_dict()
    files.write_json(config, dict(sorted(values.items())))


def _savable(generation: GenerationConfig, model: PreTrainedModel) -> GenerationConfig:
    """The generation config as it is, settings without effect too, for which transformers refuses to save a model.

    One that no generation would take, and that could not be loaded either, gives way to what the model's config says.
    """
    try:
        generation.validate()
    except ValueError:
        return GenerationConfig.from_model_config(model.config)
    return generation


def _write_blocks(view: Decoder, plan: SyncPlan, directory: Path) -> None:
    """A streamed model's blocks, a file each beside what `directory` holds: one of them is in memory at a time."""
    names = {module: name for name, module in view.model.named_modules()}
    count = len(view.blocks) + 1
    file = directory / f"model-00001-of-{count:05}.safetensors"
    (directory / "model.safetensors").rename(file)
    held = places(file)
    for number, block in enumerate(view.blocks, 2):
        file = directory / f"model-{number:05}-of-{count:05}.safetensors"
        with resident(block.layer):
            state = {f"{names[block.layer]}.{name}": tensor for name, tensor in block.layer.state_dict().items()}
            tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items() if _belongs(name, plan)}
            save_file(tensors, file, {"format": "pt"})
        held |= places(file)
    size = sum(place.size for place in held.values())
    index = {"metadata": {"total_size": size}, "weight_map": {name: held[name].file.name for name in sorted(held)}}
    files.write_json(directory / "model.safetensors.index.json", index)


def _belongs(name: str, plan: SyncPlan) -> bool:
    """Whether a tensor is saved: corrections if the plan names them, low-rank factors never, which are merged."""
    return _corrected(name) in {None, *plan.corrections} and LOWRANK not in name.split(".")


def _corrected(name: str) -> int | None:
    """The block that a tensor of this name corrects; None where it is no correction."""
    parts = name.split(".")
    return int(parts[parts.index(NAME) - 1]) if NAME in parts else None


def _move(temporary: Path, path: Path) -> None:
    """Put a finished directory in its place; a directory cannot be replaced in one step, so the old one goes first."""
    old = _replaced(path)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(temporary, path)
    except BaseException:
        _recover(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _replaced(path: Path) -> Path:
    """Where the checkpoint that was at `path` is while it is replaced."""
    return path.with_name(f".{path.name}.replaced")


def _recover(path: Path) -> None:
    """Bring back what was moved away from `path` by a replacement that did not come to its end."""
    if not path.exists() and _replaced(path).is_dir():
        os.replace(_replaced(path), path)


def read_plan(path: str | Path) -> SyncPlan:
    """The plan in the config.json of a checkpoint: a directory, "~" spelt out, or a Hugging Face id.

    Raises:
        InputError: there is no checkpoint, or its config carries no plan.
    """
    place = Path(model_path(path))
    whole = place.resolve()
    if not whole.exists() and _replaced(whole).is_dir():  # not moved back here: a save may be running
        raise InputError(f"{path} was moved to {_replaced(whole)} by a save that was killed or still runs: save again")
    place = place / "config.json"
    values = load_config(path).to_dict() if _is_id(path) else files.read_json(place, "model config")
    if not isinstance(values, dict) or "spd_plan" not in values:
        raise InputError(f"{place} carries no spd_plan: give a directory that elision.spd.save wrote")
    return SyncPlan.from_dict(values["spd_plan"], f"spd_plan in {place}")


def _is_id(path: str | Path) -> bool:
    """Whether `path` can only be a Hugging Face id: it looks like one, and no directory has that name."""
    name = model_path(path)
    return isinstance(path, str) and name.count("/") == 1 and name[0] not in "./" and not Path(name).exists()


def read(path: str | Path, *, dtype: torch.dtype | None = None) -> Treated:
    """Model and plan of a checkpoint directory, the plan not applied.

    Args:
        path: what `save` wrote, or a Hugging Face id of it.
        dtype: of the weights; the saved one by default, which gives them back bit for bit.

    Raises:
        InputError: no checkpoint with a plan is there, weights are missing or truncated, or its parts do not fit each
            other.
    """
    plan = read_plan(path)
    config = load_config(path)
    name = next(iter(config.architectures or ()), "")
    kind: Any = getattr(transformers, name.removeprefix(PREFIX), None)
    ours = name.startswith(PREFIX) or plan.original_weights  # fine-tuned, these have their own name again
    if not ours or not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
        raise InputError(f"{path}: architecture {name!r} is not one of ours: give a directory that save wrote")
    config.architectures = [kind.__name__]
    # A subclass for the time of loading, because only a class can say which tensors of a checkpoint are not its own.
    loader: Any = type(kind.__name__, (kind,), {"_keys_to_ignore_on_load_unexpected": [rf"\.{NAME}\."]})
    directory = Path(snapshot_download(str(path), **WEIGHTS) if _is_id(path) else model_path(path))
    model = load_whole(loader, directory, str(path), config=config, dtype="auto" if dtype is None else dtype)
    model.__class__ = kind
    view = covered(model, plan.ranks)
    guard(view)
    plan.check(facts(view))
    tensors = _correction_tensors(directory)
    for index, wanted in plan.corrections.items():
        fill(attach(view.blocks[index], wanted, plan.ranks), tensors.get(index, {}), f"{path}: block {index}'s {NAME}")
    return Treated(model, plan)


def load(path: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a checkpoint directory, computing what the plan's ranks would.

    Arguments and errors are those of `read`, whose result can apply the plan for a while and take it back.
    """
    treated = read(path, dtype=dtype)
    treated.simulate()
    return treated.model


def _correction_tensors(directory: Path) -> dict[int, dict[str, Tensor]]:
    """Every correction in the checkpoint's safetensors: block to parameter name to tensor."""
    found: dict[int, dict[str, Tensor]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no mapping
                if (block := _corrected(name)) is not None:
                    found.setdefault(block, {})[name.rpartition(".")[2]] = tensors.get_tensor(name)
    return found
