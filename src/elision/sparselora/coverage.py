"""What SparseLoRA can make sparse: a model and its adapters are checked before anything is changed.

`check_model` and, before every sparse forward, `check_adapters` refuse by name; `idle` says why a forward has nothing
to train.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from elision import blocks
from elision.errors import InputError
from elision.sparselora.adapters import DORA, active, variants
from elision.sparselora.plan import SparsityPlan


def idle(model: nn.Module) -> str | None:
    """Why the LoRA adapters of `model` add nothing to this forward; None: they do."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any(layer.merged for layer in layers):
        return "adapters merged"
    if any(layer.disable_adapters for layer in layers):
        return "adapters disabled"
    if not any(active(layer) for layer in layers):
        return "no active adapter"
    return None


def active_names(model: nn.Module) -> set[str]:
    """Names of the LoRA adapters that are active somewhere in `model`."""
    return {name for module in model.modules() if isinstance(module, LoraLayer) for name in active(module)}


def check_whole(view: blocks.Decoder) -> None:
    """Raise InputError where DeepSpeed or FSDP1 has taken the weights apart, which put them together for modules called
    whole, and for AdaLoRA, which calls the model past its hooks. Asked before every training forward: trainers wrap
    late.
    """
    weight = getattr(view.blocks[0].q.base, "weight", None)  # quantised kinds have others
    if hasattr(weight, "ds_id"):
        raise InputError(
            "weights of the model are partitioned by DeepSpeed ZeRO-3, which SparseLoRA does not cover: use ZeRO-2 or "
            "FSDP2"
        )
    for module in view.model.modules():
        if isinstance(module, FullyShardedDataParallel):
            raise InputError(
                "weights of the model are flattened by FSDP1, which SparseLoRA does not cover: use FSDP2, "
                "fsdp_version=2 in accelerate"
            )
        if isinstance(module, AdaLoraLayer):
            raise InputError("model has an AdaLoRA adapter: SparseLoRA covers LoRA and DoRA, use LoraConfig")


def check_dense(view: blocks.Decoder) -> None:
    """Raise InputError where `sparsify` or `lossless` has been here already, also under a plan that masks nothing."""
    ours = f"{__package__}.apply"  # whose hooks tell a handle, without importing it: it imports this
    if any(getattr(hook, "__module__", "") == ours for hook in view.model._forward_pre_hooks.values()):
        raise InputError("model is sparse already: remove() its first handle")


def check_model(view: blocks.Decoder, plan: SparsityPlan) -> None:
    """Raise InputError where the model is not one that the method can make sparse as it stands."""
    check_whole(view)
    check_dense(view)
    layers = [module for module in view.model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise InputError("model has no LoRA adapter to train: add one with peft.get_peft_model before sparsify")
    if reason := idle(view.model):
        raise InputError(f"model has {reason}, so there is nothing to train: enable or unmerge its LoRA adapter first")
    if not any(p.requires_grad for layer in layers for n, p in layer.named_parameters() if "lora_" in n):
        name = layers[0].active_adapters[0]
        raise InputError(f"adapter '{name}' is not trainable: load it with is_trainable=True before sparsify")
    for block in view.blocks:
        if plan.rotary_pairs and plan.qk[block.index] > 0 and block.rotary_dim != block.head_dim:
            raise InputError(
                f"rotary_pairs is set, but {block.rotary_dim} of {block.head_dim} dimensions of a head rotate in "
                f"{view.config.model_type}: make the plan with rotary_pairs=False"
            )
        for name, projection in block.projections.items():
            if plan.sparsity(block.index, name) > 0:
                where, base = f"{projection.attribute} of layer {block.index}", projection.base
                _check_base(where, base)
                if base.weight.is_meta:
                    raise InputError(f"{where} is offloaded, not a plain nn.Linear: load the model on one device")
    check_adapters(view, plan)


def check_bases(view: blocks.Decoder) -> None:
    """Raise InputError where a plan could prune a projection whose base the method does not cover."""
    for block in view.blocks:
        for projection in block.projections.values():
            _check_base(f"{projection.attribute} of layer {block.index}", projection.base)


def check_adapters(view: blocks.Decoder, plan: SparsityPlan) -> None:
    """Raise InputError where a pruned projection has an adapter that the method does not cover. Asked before every
    sparse forward: adapters come and go.
    """
    for block in view.blocks:
        for name, projection in block.projections.items():
            if plan.sparsity(block.index, name) > 0:
                _check_adapter(f"{projection.attribute} of layer {block.index}", projection)


def _check_adapter(where: str, projection: blocks.Projection) -> None:
    module: Any = projection.module
    while isinstance(module, BaseTunerLayer):
        if not isinstance(module, LoraLayer):
            raise InputError(f"{where} has a {type(module).__name__} adapter: SparseLoRA covers LoRA, use LoraConfig")
        if isinstance(module, ParamWrapper):  # its product is the base's own, of a weight with the adapter in it
            raise InputError(
                f"{where} has its adapter from target_parameters, which would be pruned with the base: name it in "
                "target_modules of LoraConfig"
            )
        for name, kind in variants(module).items():
            if kind != DORA:
                raise InputError(f"{where} has adapter '{name}' of kind {kind}: SparseLoRA covers LoRA and DoRA")
            if getattr(module.lora_dropout[name], "p", 0.0):
                raise InputError(
                    f"{where} has adapter '{name}' with DoRA and lora_dropout, where PEFT takes a second base product "
                    "that cannot be masked: set lora_dropout=0"
                )
        module = module.base_layer


def _check_base(where: str, base: nn.Module) -> None:
    kind = blocks.quantised(base)
    if kind in ("nf4", "fp4", "int8", "int4") or (type(base) is nn.Linear and kind is None):
        return
    raise InputError(
        f"{where} is {kind or type(base).__name__}, not a plain nn.Linear: load the model unquantised, in "
        "bitsandbytes' 4 bits or with torchao's int8 or int4 weights"
    )
