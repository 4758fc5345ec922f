"""The paper's plans, as data (maths: The paper's settings), and the predictors that its authors publish.

presets.json holds, for four models, the runs of layers (first, last, sparsity) of every plan of the table there; Q, K,
V and O share theirs. They were made for SVD factors of rank 8, which is what they say.

A published predictor is a directory with config.json (base_model, predictor_rank, and per mode the sparsity of every
"model.layers.3.mlp" and "model.layers.3.self_attn") and model.safetensors with, for each pruned projection W (out, in),
"model.layers.3.mlp.gate_proj.w1" (in, rank) and ".w2" (rank, out): X w1 w2 stands for X W', so A = w1' and B = w2'. It
says nothing of the weights that it was made from but their name, so the factors are held against the model: of a
truncated SVD B A, the inner product with W is ||B A||^2, and of factors of other weights next to nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elision import files
from elision.errors import InputError
from elision.facts import ModelFacts
from elision.sparselora.plan import SparsityPlan

if TYPE_CHECKING:
    from torch import nn

    from elision.sparselora.factors import Factors

_DATA = Path(__file__).with_name("presets.json")
_ATTRIBUTES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
_ATTRIBUTES |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj"}
_OWN = (0.5, 1.5)  # <W, B A> / ||B A||^2 of factors that belong to W, fine-tuning since then allowed


def names() -> tuple[str, ...]:
    """What `preset` knows: "llama3-8b/math10k" and the like."""
    return tuple(_read()["plans"])


def preset(name: str) -> SparsityPlan:
    """The paper's plan for a model and data set.

    Raises:
        InputError: no preset of that name.
    """
    data = _read()
    if name not in data["plans"]:
        raise InputError(f"preset {name!r} is not known: use one of {', '.join(data['plans'])}")
    facts, plan = ModelFacts(**data["models"][name.split("/")[0]]), data["plans"][name]

    def sparsities(runs: list[list[float]]) -> tuple[float, ...]:
        return tuple(next((s for a, b, s in runs if a <= layer <= b), 0.0) for layer in range(facts.layers))

    attention = sparsities(plan["qkvo"])
    return SparsityPlan(
        facts, sparsities(plan["ffn"]), attention, attention, selection="svd", dense_steps=plan["dense_steps"]
    )


def predictor_mode(path: str | Path, mode: str | None = None) -> str:
    """The mode that a published predictor is to be loaded in: `mode`, or the only one that it has.

    Raises:
        InputError: no such mode, several and none named, or no predictor.
    """
    if not (Path(path) / "config.json").is_file():
        raise InputError(f"predictor {path} holds no config.json: give the directory of a published predictor")
    modes = _modes(files.read_json(Path(path) / "config.json", "predictor"), Path(path))
    if mode is None and len(modes) == 1:
        return next(iter(modes))
    if mode is None:
        raise InputError(f"predictor {path} has modes {', '.join(modes)}: say which one")
    if mode not in modes:
        raise InputError(f"mode {mode!r} is not in predictor {path}: use one of {', '.join(modes)}")
    return mode


def load_predictor(path: str | Path, model: nn.Module, mode: str | None = None) -> tuple[SparsityPlan, Factors]:
    """The plan and factors of a published predictor for `model`.

    Args:
        path: its directory.
        model: the base model that it names, or a PEFT model around it.
        mode: one of the modes of its config, "o1" or "o2"; None: the only one.

    Raises:
        InputError: a file that is missing or of another layout, an unknown mode, or factors of another model.
    """
    from elision import blocks
    from elision.sparselora import factors as factoring

    path, mode = Path(path), predictor_mode(path, mode)
    config = files.read_json(path / "config.json", "predictor")
    sparsity = _layer_sparsity(_modes(config, path), mode, path)
    view, facts = blocks.decoder(model), ModelFacts.of(model)
    ffn, attention = (
        tuple(sparsity.get((layer, place), 0.0) for layer in range(facts.layers)) for place in ("mlp", "self_attn")
    )
    if outside := sorted(layer for layer, _ in sparsity if layer >= facts.layers):
        raise InputError(f"predictor {path} has layer {outside[0]}, the model {facts.layers}: give the model it is for")
    plan = SparsityPlan(facts, ffn, attention, attention, selection="svd", rank=config["predictor_rank"])
    tensors = _tensors(path / "model.safetensors")
    pairs = {}
    for block in view.blocks:
        for name, projection in block.projections.items():
            if not factoring.estimated(plan, block.index, name):
                continue
            key = f"model.layers.{block.index}.{_ATTRIBUTES[name]}"
            if missing := [f"{key}.{side}" for side in ("w1", "w2") if f"{key}.{side}" not in tensors]:
                raise InputError(f"predictor {path} lacks {missing[0]}, which mode {mode} prunes: download it again")
            weight = projection.matrix.detach().float()
            b, a = tensors[f"{key}.w2"].T.float().contiguous(), tensors[f"{key}.w1"].T.float().contiguous()
            if b.shape != (len(weight), plan.rank) or a.shape != (plan.rank, weight.shape[1]):
                shapes = f"{tuple(a.T.shape)} and {tuple(b.T.shape)}"
                raise InputError(
                    f"predictor {path} has {key} of shapes {shapes}, which do not fit {tuple(weight.shape)}"
                )
            inner = ((weight.cpu() @ a.T) * b).sum() / ((b.T @ b) * (a @ a.T)).sum()
            if not _OWN[0] < float(inner) < _OWN[1]:
                raise InputError(
                    f"predictor {path} was made from other weights than this model's ({key}): it names "
                    f"{config.get('base_model')!r}"
                )
            pairs[f"layers.{block.index}.{name}"] = (b, a)
    return plan, factoring.Factors(plan.rank, factoring.fingerprint(view), pairs)


def _modes(config: Any, path: Path) -> Mapping[str, Any]:
    modes = config.get("modes") if isinstance(config, Mapping) else None
    rank = config.get("predictor_rank") if isinstance(config, Mapping) else None
    if not isinstance(modes, Mapping) or not modes or rank is None:
        raise InputError(
            f"predictor {path} has no modes and predictor_rank in its config.json: it is of another layout"
        )
    if type(rank) is not int or rank < 1:
        raise InputError(_wrong(path, "predictor_rank", rank, "a whole number from 1"))
    return modes


def _layer_sparsity(modes: Mapping[str, Any], mode: str, path: Path) -> dict[tuple[int, str], float]:
    """Sparsity by layer and "mlp" or "self_attn"."""
    found, field = {}, f"modes.{mode}.layer_sparsity"
    own = modes[mode].get("layer_sparsity") if isinstance(modes[mode], Mapping) else None
    if not isinstance(own, Mapping):
        raise InputError(f"predictor {path} has no {field} in its config.json: it is of another layout")
    for name, value in own.items():
        place = re.fullmatch(r"model\.layers\.(\d+)\.(mlp|self_attn)", name)
        if place is None:
            raise InputError(f"predictor {path} has sparsity for {name!r}: only mlp and self_attn of layers are known")
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise InputError(_wrong(path, f"{field}.{name}", value, "a number in [0, 1)"))
        found[int(place[1]), place[2]] = float(value)
    return found


def _wrong(path: Path, field: str, value: Any, wanted: str) -> str:
    return f"predictor {path} has {field} {value!r} in its config.json, not {wanted}: download it again"


def _tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"predictor {path} is not a file: download it again")
    try:
        return load_file(path)
    except Exception as error:  # safetensors' own error class is not public
        raise InputError(f"predictor {path} cannot be read ({error}): download it again") from None


def _read() -> dict[str, Any]:
    return json.loads(_DATA.read_text(encoding="utf-8"))
