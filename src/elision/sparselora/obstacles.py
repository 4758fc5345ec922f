"""Why a forward takes the reference and not the fast path, in a few words each.

What the fast path does not cover it names: modules of a kind, hooks on modules that it would step over, trained
parameters that it computes no gradient for, arguments that change the output. All of it is looked up anew in every
forward, so what changes meanwhile is seen by the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.loss.loss_utils import ForCausalLMLoss

from elision.blocks import Block, Decoder, Projection, quantised
from elision.sparselora import tokens
from elision.sparselora.adapters import DORA, active, dropout, variants
from elision.sparselora.reference import MaskedLinear
from elision.sparselora.tokens import Given

_READ = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels", "num_items_in_batch"}
# What position_ids say too, for attention functions that read no masks: transformers' SDPA function ignores it.
_READ |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
_HARMLESS: dict[str, tuple] = {"use_cache": (False,), "return_dict": (True,), "logits_to_keep": (0,)}
_HARMLESS["fused_lm_head"] = (True,)  # TRL's own argument, for its own forward
_DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop", "dropout", "layerdrop")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def model_obstacle(model: nn.Module, view: Decoder, called: bool = False) -> str | None:
    """Why `model`, which `view` shows, takes the reference as it is now; None: it does not. `called`: in a call, so
    that the autocast that is on decides; before, it may yet come to suit 4-bit maps (`condition`).
    """
    config = view.config
    if view.model.config.model_type != config.model_type:
        return f"a {type(view.model).__name__}, which has more than text"
    if not type(view.model).__module__.startswith("transformers."):
        return f"{type(view.model).__name__} is not transformers' own"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention implementation {config._attn_implementation}"
    if view.model.loss_function is not ForCausalLMLoss:
        return "a loss function of its own"
    if any(getattr(config, name, 0.0) for name in _DROPOUTS):
        return "dropout in the model"
    if any(getattr(hook, "__name__", "").startswith("neftune") for hook in view.embeddings._forward_hooks.values()):
        return "NEFTune noise, whose size goes by the padded length"
    sharding = isinstance(view.embeddings, FSDPModule)
    if any(hooked(module, sharding) for module in view.embeddings.modules()):  # it would see rows, not the batch
        return "a hook on the embeddings"
    stack: Any = view.model.get_decoder()
    if hooked(stack):
        return f"a hook on {type(stack).__name__}"
    if isinstance(model, FSDPModule) and not all(isinstance(block.layer, FSDPModule) for block in view.blocks):
        return "FSDP2 without a unit for each layer"
    first: Any = view.blocks[0].q.base
    if not isinstance(getattr(first, "weight", None), Tensor):  # of a quantised kind, which packs it under another name
        return f"{type(first).__name__} at q in layer 0"
    dtype, device = row_dtype(view), first.weight.device
    products = product_dtype(view) if called else autocast_dtype(view) or dtype
    for block in view.blocks:
        if reason := _layer_obstacle(block, dtype, products, device):
            return f"{reason} in layer {block.index}"
        if _alive_at_zero(block.activation):
            return f"an activation that is not 0 at 0 in layer {block.index}"
    return None


@torch.no_grad()
def _alive_at_zero(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether a channel without base product is not 0 behind the activation, as mlp.py takes it to be."""
    state = next(activation.parameters(), None) if isinstance(activation, nn.Module) else None
    where = torch.empty(0, device="cpu") if state is None else state  # the CPU, where reading it waits for nothing
    return float(activation(where.new_zeros(1, 1))) != 0.0


def row_dtype(view: Decoder) -> torch.dtype:
    """That of the residual stream: of the weights, or of the embeddings where these are quantised."""
    base = view.blocks[0].q.base
    weight: Any = view.embeddings.weight if quantised(base) else base.weight
    return weight.dtype


def product_dtype(view: Decoder) -> torch.dtype:
    """That of the frozen products: of the rows, or autocast's, which leaves double precision alone."""
    dtype, device = row_dtype(view), view.blocks[0].q.base.weight.device.type
    lower = torch.is_autocast_enabled(device) and dtype != torch.float64
    return torch.get_autocast_dtype(device) if lower else dtype


def _four_bit(view: Decoder) -> torch.dtype | None:
    """That of the products of 4-bit maps, by the first of them; None: there is none."""
    for block in view.blocks:
        for projection in block.projections.values():
            if quantised(projection.base) in ("nf4", "fp4"):
                base: Any = projection.base
                return base.compute_dtype or row_dtype(view)
    return None


def autocast_dtype(view: Decoder) -> torch.dtype | None:
    """That of the autocast which training needs for 4-bit maps to compute as all others do; None: it needs none."""
    found = _four_bit(view)
    return found if found in (torch.bfloat16, torch.float16) and found != row_dtype(view) else None


def condition(view: Decoder) -> str | None:
    """What the fast path of 4-bit maps asks of autocast and does not find now; None: nothing."""
    found = _four_bit(view)
    if found is None or found == product_dtype(view):
        return None
    lower = autocast_dtype(view)
    return "without autocast" if lower is None else f"under autocast to {_name(lower)}"


def call_obstacle(call: dict[str, Any], given: Given, view: Decoder) -> str | None:
    """Why this call takes the reference; None: it does not. `given` tells its tokens apart."""
    for name, value in call.items():
        if name not in _READ and value is not None and not any(value is v for v in _HARMLESS.get(name, (False,))):
            return f"{name} in the call"
    labels, mask, positions = given.on_cpu
    target = labels[:, 1:] != tokens.IGNORED
    if mask is not None:
        real = mask != 0
        if bool((target & ~(real[:, 1:] & real[:, :-1])).any()):
            return "a target at or after a masked position"
    if positions is not None:
        segment = tokens.segments(labels, mask, positions)
        if not view.family.rotary and bool((segment > 0).any()):
            return "packed rows, which this family's attention does not tell apart"
        if bool((target & (segment[:, 1:] != segment[:, :-1])).any()):
            return "a target at the start of a packed sequence"
    return None


def _layer_obstacle(block: Block, dtype: torch.dtype, products: torch.dtype, device: torch.device) -> str | None:
    layer: Any = block.layer
    gathered = isinstance(block.layer, FSDPModule)  # whole while it is called, which the fast step does
    adapters: set[int] = set()
    for name, projection in block.projections.items():
        if reason := _projection_obstacle(projection, adapters):
            return f"{reason} at {name}"
        base: Any = projection.base
        if quantised(base) in ("nf4", "fp4"):
            if (base.compute_dtype or dtype) != products:
                return f"4-bit products in {_name(base.compute_dtype or dtype)} at {name}"
        elif base.weight.dtype != dtype:
            return f"{name} of another dtype than the embeddings"
        if isinstance(base.weight, DTensor) and not gathered:
            return f"a weight in shards at {name}"
        if base.weight.device != device:
            return f"{name} on another device than q of layer 0"
    waiting: list[Any] = [layer]
    while waiting:  # by hand: named_modules takes several times as long, in every forward
        module = waiting.pop()
        if module is None:
            continue
        if "forward" in module.__dict__:
            return f"a replaced forward of {_place(layer, module)}"
        if hooked(module, sharding=gathered and module is layer):
            return f"a hook on {_place(layer, module)}"
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad and id(parameter) not in adapters:
                return f"trained parameters of {_place(layer, module)}"
        waiting.extend(module._modules.values())
    return None


def _projection_obstacle(projection: Projection, adapters: set[int]) -> str | None:
    """Why this projection cannot be computed; None: it can, and its trained factors are added to `adapters`."""
    module: Any = projection.module
    if isinstance(module, AdaLoraLayer):
        return "an AdaLoRA adapter"
    if isinstance(module, LoraLayer):
        names, kinds = active(module), variants(module)
        dropping = [name for name in names if dropout(module, name)]
        if len(names) > 1 and (kinds or dropping):
            return f"{'dropout' if dropping else 'DoRA'} with adapters {', '.join(names)} at once"
        for name in names:
            if kinds.get(name, DORA) != DORA:
                return f"an adapter of kind {kinds[name]}"
            if kinds and dropping:
                return "dropout with DoRA"
            if module.lora_bias.get(name):
                return "a bias in an adapter"
            trained = [module.lora_A[name].weight, module.lora_B[name].weight]
            trained += [module.lora_magnitude_vector[name].weight] if kinds else []
            adapters.update(id(parameter) for parameter in trained)
        if getattr(module, "fan_in_fan_out", False):
            return "a transposed base"
        module = module.base_layer
    if type(module) is not nn.Linear and not isinstance(module, MaskedLinear) and quantised(module) is None:
        return f"{type(module).__name__}"
    return None


def hooked(module: Any, sharding: bool = False) -> bool:
    """Whether a hook waits for this module to be called, other than our own, those of enable_input_require_grads, which
    ask for a gradient that nothing reads, and those that transformers leaves behind where hidden states were once asked
    for, which do nothing unless they are asked for again; with `sharding`, other than FSDP2's.
    """
    harmless = (f"{__package__}.", "transformers.utils.output_capturing")
    harmless += ("torch.distributed.fsdp.",) if sharding else ()
    for kind in _HOOKS:
        for hook in module.__dict__[kind].values():
            made = getattr(hook, "func", hook)  # a partial is of functools
            asking = getattr(made, "__name__", "").startswith("make_inputs_require_grad")  # of any library
            if not asking and not (getattr(made, "__module__", None) or "").startswith(harmless):
                return True
    return False


def _place(layer: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in layer.named_modules() if found is module) or "the layer"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
