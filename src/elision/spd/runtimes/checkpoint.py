"""What a served checkpoint says about itself: the plan in its config, and whether that can be run here.

A checkpoint with a plan (spd/artifact.py) is an ordinary one whose config.json carries `spd_plan` and names our
architectures, "SPD" before the family's own class name, so that an engine that does not know them refuses instead of
serving the dense model.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig

from elision.errors import InputError
from elision.families import TREATED, WEIGHTS, attention_shape, check_ranks, intermediate_size, model_path, refusal
from elision.spd.corrections import NAME
from elision.spd.plan import ModelFacts, SyncPlan

# What of a plan the runtimes carry out; a plan that says more is refused, whatever it is.
KNOWN = {"version", "ranks", "dropped", "healed", "corrections", "int8", "skipped", "model", "calibration"}
RECORDS = {"heads", "healing", "verified"}  # what was done to the weights, is still to do, was measured: no arithmetic


# Settings that say where a config is from, or what is compared apart from it, but nothing of what is computed.
ORIGINS = {"_name_or_path", "architectures", "dtype", "spd_plan", "torch_dtype", "transformers_version"}
SAMPLED = 4  # rows of a matrix, from its first on, that stand for all


def plan_of(config: PretrainedConfig, where: str = "the model's config") -> SyncPlan:
    """The plan that `config` carries, checked against the model that it describes.

    Raises:
        InputError: it carries none, or one that is broken, for another model, or asks for what is not served.
    """
    carried = getattr(config, "spd_plan", None)
    if carried is None:
        raise InputError(f"{where} carries no spd_plan: write the checkpoint with elision.spd.save, or give a plan")
    plan = SyncPlan.from_dict(carried, f"spd_plan of {where}")
    check_fits(config, plan)
    return plan


def family_config(config: PretrainedConfig) -> PretrainedConfig:
    """`config` under its family's model_type, which that of a treated checkpoint names behind a prefix."""
    family = config.model_type.removeprefix(TREATED)
    if family == config.model_type:
        return config
    return CONFIG_MAPPING[family].from_dict({**config.to_dict(), "model_type": family})


def check_fits(config: PretrainedConfig, plan: SyncPlan) -> None:
    """Pass where SPD's maths covers the model, `plan` was made for it, and its ranks can share and run it.

    Raises:
        InputError: one of them is not so.
    """
    config = family_config(config)
    if reason := refusal(config, "spd"):
        raise InputError(reason)
    check_ranks(config.get_text_config(), plan.ranks)
    plan.check(facts_of(config))
    if unknown := sorted(set(plan.to_dict()) - KNOWN - RECORDS):
        raise InputError(f"plan uses {unknown[0]}, which only the simulation runs: run it with elision.spd.load")


def facts_of(config: PretrainedConfig) -> ModelFacts:
    """The geometry of the model that `config` describes."""
    text = config.get_text_config()
    heads, kv_heads, head_dim = attention_shape(text)
    sizes = (text.num_hidden_layers, heads, kv_heads, head_dim, text.hidden_size, intermediate_size(text))
    return ModelFacts(text.model_type, *sizes)


def corrections_of(source: str | Path, plan: SyncPlan) -> dict[int, dict[str, Tensor]]:
    """The corrections that `plan` names, from the checkpoint's safetensors: block to name to tensor.

    `source` is a directory, a Hugging Face id or "reference".

    Raises:
        InputError: the checkpoint lacks one of them.
    """
    found: dict[int, dict[str, Tensor]] = {index: {} for index in plan.corrections}
    if not found:
        return {}
    directory = Path(model_path(source))
    if not directory.is_dir():  # a Hugging Face id, whose weights are fetched by now
        directory = Path(snapshot_download(model_path(source), **WEIGHTS))
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118, it is no mapping
                layer, _, name = key.partition(f".{NAME}.")
                if name and (index := int(layer.rpartition(".")[2])) in found:
                    found[index][name] = tensors.get_tensor(key)
    for index, kind in plan.corrections.items():
        for name in {"constant", kind} - set(found[index]):
            raise InputError(f"{source} lacks block {index}'s correction {name}, which its plan names: save it again")
    return found


def fingerprint(source: str | Path, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, str]:
    """What tells a model that is loaded by now from another of the same shape, by what it is of.

    Of the weights as they lie on disk, because a rank holds shards of its own: the same for all ranks there, and cheap.
    """
    settings = {name: value for name, value in config.to_dict().items() if name not in ORIGINS}
    directory = Path(model_path(source))
    if not directory.is_dir():
        directory = Path(snapshot_download(model_path(source), local_files_only=True))
    sums: dict[str, str] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118, it is no mapping
                part = tensors.get_slice(key)
                shape = part.get_shape()
                step = max(1, shape[0] // SAMPLED) if len(shape) > 1 else 1
                rows = [part[i : i + 1] for i in range(0, shape[0], step)] if len(shape) > 1 else [part[...]]
                digest = hashlib.sha256(f"{shape} {part.get_dtype()}".encode())
                for row in rows:
                    digest.update(row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
                sums[key] = digest.hexdigest()
    return {
        "config": json.dumps(settings, sort_keys=True, default=str),
        "weights": hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest(),
        "dtype": str(dtype),
    }
