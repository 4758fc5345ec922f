"""SVD factors of a model's pruned projections: made once, kept in a file, checked against the weights.

Two kinds (estimator.py): "svd" needs the weights alone, "whitened" calibration data as well. Two files stand side by
side: NAME.safetensors with "layers.3.q.b" (out, rank) and "layers.3.q.a" (rank, in) in single precision, and NAME.json,
which says what they belong to: format version, kind, rank, a fingerprint of the weights, and the hash of the tensor
file, so that a truncated or exchanged file is refused and not trained with.

The fingerprint hashes evenly spaced entries of every projection, rounded to bfloat16: reading all weights of a large
model would take longer than it is worth, and loading one checkpoint in another precision must not change it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elision import blocks, files
from elision.errors import InputError
from elision.evaluate import evaluating
from elision.layerwise import hash_tensor
from elision.sparselora import estimator, tokens
from elision.sparselora.plan import SparsityPlan
from elision.streaming import resident

VERSION = 1
SCORED = ("q", "k", "v", "gate", "up")  # the projections whose products are estimated

Kind = Literal["svd", "whitened"]

_SAMPLE = 4096  # entries of each projection that the fingerprint reads


@dataclass(frozen=True)
class Factors:
    """(B, A) of the sketch (maths: The estimator) by "layers.INDEX.NAME", NAME one of q, k, v, gate, up."""

    rank: int
    fingerprint: str
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    kind: Kind = "svd"

    @classmethod
    def compute(cls, model: nn.Module, rank: int = 8, plan: SparsityPlan | None = None) -> Self:
        """Decompose the projections of `model` that `plan` prunes; None: every projection that a plan could.

        Raises:
            InputError: the model is of no supported family.
        """
        view = blocks.decoder(model)
        pairs = {}
        for block in view.blocks:
            with resident(block.layer):
                for name, projection in block.projections.items():
                    if name in SCORED and (plan is None or estimated(plan, block.index, name)):
                        pairs[f"layers.{block.index}.{name}"] = estimator.truncated_svd(projection.matrix, rank)
        return cls(rank, fingerprint(view), pairs)

    @classmethod
    def whitened(
        cls,
        model: nn.Module,
        batches: Iterable[Mapping[str, Tensor]],
        rank: int = 8,
        plan: SparsityPlan | None = None,
    ) -> Self:
        """Like `compute`, closest to the projections on inputs like those of the context tokens of `batches`.

        Needs room for two (hidden, hidden) matrices a layer, in single precision.

        Args:
            model: run forward over the data as it is, in eval mode.
            batches: dicts with input_ids and labels (batch, sequence), optionally attention_mask and position_ids.
            rank: see `compute`; likewise `plan`.
            plan: see there.

        Raises:
            InputError: as `compute`; also a batch without labels or with a list where a tensor belongs, or no context
                token in any of them.
        """
        view = blocks.decoder(model)
        wanted = {
            (block.index, name)
            for block in view.blocks
            for name in block.projections
            if name in SCORED and (plan is None or estimated(plan, block.index, name))
        }
        moments = _moments(view, batches, wanted)
        pairs = {}
        for block in view.blocks:
            for name, projection in block.projections.items():
                if (block.index, name) in wanted:
                    moment = moments[block.index, name in ("gate", "up")]
                    pairs[f"layers.{block.index}.{name}"] = estimator.whitened_svd(projection.matrix, moment, rank)
        return cls(rank, fingerprint(view), pairs, "whitened")

    @property
    def digest(self) -> str:
        """Hash of all that a step depends on."""
        digest = hashlib.sha256(json.dumps([self.kind, self.rank]).encode())
        self.hash_pairs(digest)
        return digest.hexdigest()

    def hash_pairs(self, digest: Any) -> None:
        """Feed every pair to a hashlib digest."""
        for name, (b, a) in sorted(self.pairs.items()):
            hash_tensor(digest, f"{name}.b", b)
            hash_tensor(digest, f"{name}.a", a)

    def check(self, view: blocks.Decoder, plan: SparsityPlan) -> None:
        """Raise InputError where these are not the factors of this model, or not those that `plan` asks for."""
        wanted = "whitened" if plan.selection == "whitened" else "svd"
        if self.kind != wanted:
            raise InputError(
                f"factors are of kind {self.kind}, selection {plan.selection} needs {wanted}: make them with "
                + ("Factors.whitened(model, batches)" if wanted == "whitened" else "Factors.compute(model)")
            )
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
        """Write NAME.safetensors and NAME.json beside it; `path` is either, or NAME. Returns the path of the tensors.

        Raises:
            InputError: NAME.json is there and no card of factors.
        """
        check_free(path)
        path = _tensor_path(path)
        tensors = {
            f"{key}.{side}": t.contiguous().cpu()
            for key, p in self.pairs.items()
            for side, t in zip("ba", p, strict=True)
        }
        files.write(path, lambda temporary: save_file(tensors, temporary))
        card = {"version": VERSION, "kind": self.kind, "rank": self.rank}
        card |= {"weights": self.fingerprint, "sha256": _hash_file(path)}
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
        if missing := [name for name in ("kind", "rank", "weights", "sha256") if name not in card]:
            raise InputError(f"factors {path.with_suffix('.json')} lacks {', '.join(missing)}: compute them again")
        if card["kind"] not in get_args(Kind):
            raise InputError(f"factors {path.with_suffix('.json')} are of kind {card['kind']!r}: compute them again")
        if not path.is_file():
            raise InputError(f"factors {path} is not a file: compute them again")
        if _hash_file(path) != card["sha256"]:
            raise InputError(f"factors {path} do not match their JSON, truncated or exchanged: compute them again")
        tensors = load_file(path)
        keys = {name.rsplit(".", 1)[0] for name in tensors}
        pairs = {key: (tensors[f"{key}.b"], tensors[f"{key}.a"]) for key in keys}
        return cls(card["rank"], card["weights"], pairs, card["kind"])


def check_used(factors: Factors | None, plan: SparsityPlan) -> None:
    """Raise InputError where `factors` are given to a plan that prunes and selects without any."""
    if factors is not None and any((*plan.ffn, *plan.qk, *plan.vo)):
        raise InputError(f"factors are given, which selection {plan.selection!r} does not use: leave them out")


def estimated(plan: SparsityPlan, layer: int, name: str) -> bool:
    """Whether the plan scores projection `name` of `layer` through factors."""
    return plan.selection in get_args(Kind) and name in SCORED and plan.sparsity(layer, name) > 0


@torch.no_grad()
def _moments(
    view: blocks.Decoder, batches: Iterable[Mapping[str, Tensor]], wanted: set[tuple[int, str]]
) -> dict[tuple[int, bool], Tensor]:
    """E x x' (inputs, inputs) over context tokens, by layer and whether x is the input of the MLP or of attention."""
    sums: dict[tuple[int, bool], Tensor] = {}
    rows = torch.empty(0, dtype=torch.bool)
    count = 0

    def add(key: tuple[int, bool], module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0][rows.reshape(args[0].shape[:-1]).to(args[0].device)]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        moment = x.T @ x
        sums[key] = sums[key] + moment if key in sums else moment

    with _watched(view, wanted, add):
        for number, batch in enumerate(batches):
            batch = tokens.read(batch, f"batch {number}")
            if "labels" not in batch:
                raise InputError("a batch has no labels, which tell context from output: give batches with labels")
            given = {name: batch[name].cpu() for name in ("attention_mask", "position_ids") if name in batch}
            rows = tokens.classify(batch["labels"].cpu(), **given).kept
            count += int(rows.sum())
            inputs = {name: value.to(view.model.device) for name, value in batch.items() if name != "labels"}
            view.model.base_model(**inputs, use_cache=False)
    if not count:
        raise InputError("the batches have no context token before an output token: give prompts with answers")
    return {key: total / count for key, total in sums.items()}


@contextmanager
def _watched(view: blocks.Decoder, wanted: set[tuple[int, str]], add: Any) -> Iterator[None]:
    """Eval mode, and `add` called with the inputs of attention (v's) and of the MLP (up's) where they are wanted."""
    hooks = []
    try:
        for block in view.blocks:
            for mlp, projection in ((False, block.v), (True, block.up)):
                names = ("gate", "up") if mlp else ("q", "k", "v")
                if any((block.index, name) in wanted for name in names):
                    hook = partial(add, (block.index, mlp))
                    hooks.append(projection.module.register_forward_pre_hook(hook))
        with evaluating(view.model):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def fingerprint(view: blocks.Decoder) -> str:
    """Hash of a sample of the weights that factors are made from."""
    digest = hashlib.sha256()
    for block in view.blocks:
        with resident(block.layer):
            for name, projection in block.projections.items():
                if name in SCORED:
                    weight = projection.matrix.detach()
                    digest.update(json.dumps([block.index, name, *weight.shape]).encode())
                    entries = weight.reshape(-1)[:: max(1, weight.numel() // _SAMPLE)]
                    digest.update(entries.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def check_free(path: str | Path) -> None:
    """Raise InputError where `Factors.save(path)` would write over another JSON file, a plan's say."""
    card = _tensor_path(path).with_suffix(".json")
    if not card.exists():
        return
    try:
        found = files.read_json(card, "factors")
    except InputError:
        found = None
    if not isinstance(found, dict) or not {"weights", "sha256"} <= found.keys():
        raise InputError(f"factors {path} would be written over {card}, which is none of theirs: give another name")


def _tensor_path(path: str | Path) -> Path:
    """NAME.safetensors, of a name that may have dots."""
    path = Path(path)
    name = path.stem if path.suffix in (".safetensors", ".json") else path.name
    return path.with_name(f"{name}.safetensors")


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
