"""SVD factors of a model's pruned projections: made once, kept in a file, checked against the weights.

Two files stand side by side: NAME.safetensors with "layers.3.q.b" (out, rank) and "layers.3.q.a" (rank, in) in single
precision, and NAME.json, which says what they belong to: format version, rank, a fingerprint of the weights, and the
hash of the tensor file, so that a truncated or exchanged file is refused and not trained with.

The fingerprint hashes evenly spaced entries of every projection, rounded to bfloat16: reading all weights of a large
model would take longer than it is worth, and loading one checkpoint in another precision must not change it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elision import blocks, files
from elision.errors import InputError
from elision.sparselora import estimator
from elision.sparselora.plan import SparsityPlan

VERSION = 1
SCORED = ("q", "k", "v", "gate", "up")  # the projections whose products are estimated

_SAMPLE = 4096  # entries of each projection that the fingerprint reads


@dataclass(frozen=True)
class Factors:
    """(B, A) of METHODS 1.2 by "layers.INDEX.NAME", NAME one of q, k, v, gate, up."""

    rank: int
    fingerprint: str
    pairs: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def compute(cls, model: nn.Module, rank: int = 8, plan: SparsityPlan | None = None) -> Self:
        """Decompose the projections of `model` that `plan` prunes; None: every projection that a plan could.

        Raises:
            InputError: the model is of no supported family, or its weights are quantised.
        """
        view = blocks.decoder(model)
        pairs = {}
        for block in view.blocks:
            for name, projection in block.projections.items():
                if name in SCORED and (plan is None or estimated(plan, block.index, name)):
                    pairs[f"layers.{block.index}.{name}"] = estimator.truncated_svd(projection.weight, rank)
        return cls(rank, fingerprint(view), pairs)

    def check(self, view: blocks.Decoder, plan: SparsityPlan) -> None:
        """Raise InputError where these are not the factors of this model, or not those that `plan` asks for."""
        if self.rank != plan.rank:
            raise InputError(
                f"factors have rank {self.rank}, the plan rank {plan.rank}: compute them with rank={plan.rank}"
            )
        if self.fingerprint != fingerprint(view):
            raise InputError("factors were made from other weights than this model's: compute them anew from it")
        for block in view.blocks:
            for name in block.projections:
                key = f"layers.{block.index}.{name}"
                if estimated(plan, block.index, name) and key not in self.pairs:
                    raise InputError(f"factors lack {key}, which the plan prunes: compute them for this plan")

    def save(self, path: str | Path) -> Path:
        """Write NAME.safetensors (`path`) and NAME.json beside it; returns the path of the tensors."""
        path = _tensor_path(path)
        tensors = {
            f"{key}.{side}": t.contiguous().cpu()
            for key, p in self.pairs.items()
            for side, t in zip("ba", p, strict=True)
        }
        files.write(path, lambda temporary: save_file(tensors, temporary))
        card = {"version": VERSION, "rank": self.rank, "weights": self.fingerprint, "sha256": _hash_file(path)}
        files.write_json(path.with_suffix(".json"), card)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; `path` names either file.

        Raises:
            InputError: a missing, truncated or exchanged file, or another version.
        """
        path = _tensor_path(path)
        card = files.read_json(path.with_suffix(".json"), "factors")
        if not isinstance(card, dict) or card.get("version") != VERSION:
            raise InputError(f"factors {path.with_suffix('.json')} are not of version {VERSION}: compute them again")
        if missing := [name for name in ("rank", "weights", "sha256") if name not in card]:
            raise InputError(f"factors {path.with_suffix('.json')} lacks {', '.join(missing)}: compute them again")
        if not path.is_file():
            raise InputError(f"factors {path} is not a file: compute them again")
        if _hash_file(path) != card["sha256"]:
            raise InputError(f"factors {path} do not match their JSON, truncated or exchanged: compute them again")
        tensors = load_file(path)
        keys = {name.rsplit(".", 1)[0] for name in tensors}
        return cls(card["rank"], card["weights"], {key: (tensors[f"{key}.b"], tensors[f"{key}.a"]) for key in keys})


def estimated(plan: SparsityPlan, layer: int, name: str) -> bool:
    """Whether the plan scores projection `name` of `layer` through factors."""
    wanted = {"svd": SCORED, "no-ffn": ("q", "k", "v")}.get(plan.selection, ())
    return name in wanted and plan.sparsity(layer, name) > 0


def fingerprint(view: blocks.Decoder) -> str:
    """Hash of a sample of the weights that factors are made from."""
    digest = hashlib.sha256()
    for block in view.blocks:
        for name, projection in block.projections.items():
            if name in SCORED:
                weight = projection.weight.detach()
                digest.update(json.dumps([block.index, name, *weight.shape]).encode())
                entries = weight.reshape(-1)[:: max(1, weight.numel() // _SAMPLE)]
                digest.update(entries.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _tensor_path(path: str | Path) -> Path:
    return Path(path).with_suffix(".safetensors")


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
