"""A treatment as a file of its own, a few megabytes beside a base that stays untouched.

`save_adapter` writes what low-rank healing and corrections added to a model, with the plan in the file's metadata;
`load_adapter` gives it to the base again, which then computes bit for bit what the healed model does. The file is
safetensors, tensors by block:

    3.a.self_attn-q_proj, 3.b.self_attn-q_proj, 3.base       the factors (lowrank.py)
    3.vector.input_layernorm.weight                          vectors of a healed block, as they are after healing
    3.correction.constant, 3.base                            its correction, if the plan names one

Factors and corrections hold for the weights that they were trained beside or fitted to, heads regrouped where the plan
says so. `base` is those weights' hash; another base, a fine-tuned one say, is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from elision import files
from elision.blocks import Block, Decoder
from elision.errors import InputError
from elision.spd.artifact import Treated
from elision.spd.corrections import NAME as CORRECTION
from elision.spd.corrections import attach, correction_of, detach, fill
from elision.spd.lowrank import LowRank, attach_lowrank, detach_lowrank, fingerprint, lowrank_of, vectors
from elision.spd.plan import SyncPlan
from elision.spd.regroup import inverse, permute
from elision.spd.simulate import carry, check_carried, check_plain, covered, facts, made_for
from elision.streaming import resident


def save_adapter(model: nn.Module, plan: SyncPlan, path: str | Path) -> Path:
    """Write what low-rank healing and corrections added to `model`, atomically.

    Args:
        model: what `heal` with a recipe of low rank, or `correct`, returned.
        plan: the plan that came with it.
        path: file to write, such as healing.safetensors.

    Raises:
        InputError: the plan is not for the model, or healed a block without low-rank factors.
    """
    view = covered(model, plan.ranks)
    plan.check(facts(view))
    check_carried(view, plan)
    tensors: dict[str, Tensor] = {}
    for index in plan.healed:
        block = view.blocks[index]
        lowrank = lowrank_of(block)
        if lowrank is None:
            raise InputError(
                f"block {index} has no low-rank factors, for it was healed in full or comes from a checkpoint, where "
                "they are merged: save the whole model, or heal with Recipe(lora=8) for an adapter"
            )
        with resident(block.layer):
            tensors |= {f"{index}.{name}": tensor for name, tensor in lowrank.state_dict().items()}
            tensors |= {f"{index}.vector.{name}": tensor for name, tensor in vectors(block.layer).items()}
    for index, kind in plan.corrections.items():
        correction = correction_of(view.blocks[index], plan.ranks, kind)
        with resident(view.blocks[index].layer):
            tensors.setdefault(f"{index}.base", fingerprint(view.blocks[index].layer))
            tensors |= {f"{index}.correction.{name}": tensor for name, tensor in correction.named_parameters()}
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"spd_plan": json.dumps(plan.to_dict())}
    return files.write(path, lambda temporary: save_file(stored, temporary, metadata))


def load_adapter(model: nn.Module, path: str | Path) -> Treated:
    """Give the base `model` what `save_adapter` wrote, in place: the healed model and its plan.

    Raises:
        InputError: no such file, not an adapter, one for another model, or the model is treated already; it is left as
            it was.
    """
    plan, tensors = _read(Path(path))
    view = covered(model, plan.ranks)
    plan.check(facts(view))
    _check_untreated(view, path)
    for block in view.blocks:
        check_plain(block)
    for index, order in plan.heads.items():
        permute(view.blocks[index], order)
    try:
        for index in sorted({*plan.healed, *plan.corrections}):
            _attach(view.blocks[index], plan, tensors, f"adapter {path}")
    except InputError:
        _undo(view, plan)
        raise
    for index in plan.healed:
        block = view.blocks[index]
        lowrank = lowrank_of(block)
        assert lowrank is not None
        lowrank.merge(block.layer)
        with torch.no_grad():
            for name, parameter in vectors(block.layer).items():
                parameter.copy_(tensors[f"{index}.vector.{name}"])
    carry(view, plan)
    return Treated(view.model, plan)


def _check_untreated(view: Decoder, path: str | Path) -> None:
    """Raise InputError unless the model is a base: factors that are merged twice go unnoticed otherwise."""
    treated = [b.index for b in view.blocks if lowrank_of(b) is not None or hasattr(b.layer, CORRECTION)]
    if treated or made_for(view) is not None:
        where = f" (blocks {treated})" if treated else ""
        raise InputError(
            f"model is healed or corrected already{where}: load adapter {path} on the base it was made for"
        )


def _read(path: Path) -> tuple[SyncPlan, dict[str, Tensor]]:
    """The plan and the tensors of the file."""
    if not path.is_file():
        raise InputError(f"adapter {path} is not a file: give what elision.spd.save_adapter wrote")
    try:
        with safe_open(path, "pt") as file:
            carried = (file.metadata() or {}).get("spd_plan")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except SafetensorError as error:
        raise InputError(f"adapter {path} is not safetensors ({error}): write it with save_adapter") from None
    if carried is None:
        raise InputError(f"adapter {path} carries no spd_plan: give what elision.spd.save_adapter wrote")
    return SyncPlan.from_dict(json.loads(carried), f"spd_plan of {path}"), tensors


def _attach(block: Block, plan: SyncPlan, tensors: dict[str, Tensor], where: str) -> None:
    """Give one block its factors and its correction, filled; its own weights stay."""
    index = block.index
    if index in plan.healed:
        rank = next((len(t) for name, t in tensors.items() if name.startswith(f"{index}.a.")), 0)
        lowrank = attach_lowrank(block, rank, 0)
        own = {name: tensors.get(f"{index}.{name}") for name in lowrank.state_dict()}
        own |= {f"vector.{name}": tensors.get(f"{index}.vector.{name}") for name in vectors(block.layer)}
        shapes = {**lowrank.state_dict(), **{f"vector.{n}": p for n, p in vectors(block.layer).items()}}
        for name, tensor in own.items():
            if tensor is None or tensor.shape != shapes[name].shape:
                raise InputError(f"{where} lacks {index}.{name} as the model needs it: it is for another model")
        _fill(lowrank, {name: tensor for name, tensor in own.items() if tensor is not None})
    base = tensors.get(f"{index}.base")
    if base is None:
        raise InputError(f"{where} does not say for which weights block {index} is: write it again with save_adapter")
    if not torch.equal(base, fingerprint(block.layer)):
        raise InputError(f"{where} was made for other weights in block {index}: give the base that was treated")
    if index in plan.corrections:
        own = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{index}.correction.")}
        fill(attach(block, plan.corrections[index], plan.ranks), own, f"{where}, block {index}")


@torch.no_grad()
def _fill(lowrank: LowRank, tensors: dict[str, Tensor]) -> None:
    for name, tensor in lowrank.state_dict().items():
        tensor.copy_(tensors[name])


def _undo(view: Decoder, plan: SyncPlan) -> None:
    for index, order in plan.heads.items():
        permute(view.blocks[index], inverse(order))
    for index in plan.healed:
        detach_lowrank(view.blocks[index])
    for index in plan.corrections:
        detach(view.blocks[index])
