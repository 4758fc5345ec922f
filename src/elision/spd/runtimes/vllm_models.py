"""vLLM's models with planned blocks that run one all-reduce instead of two. Imported by vLLM alone, by lazy path.

A planned block is vLLM's own, with the class of its layer changed for a subclass that has an SPD forward, and with its
two row-parallel projections told not to reduce. vLLM adds the bias of such a projection on rank 0 only, so that the
sum over ranks has it once. P_i' and Z_i' below are those products, bias b and c on rank 0 included:

    u_i = X + P_i' (+ b where i > 0)      Z_i' = MLP_i(norm(u_i))      output = X + all_reduce(P_i' + Z_i')

vLLM's layers hand on a block's output as two terms, the last sub-layer's product and `residual`, which the next norm
adds up. Ours hands on the all-reduced sum and X, unchanged: both are the same bits on every rank.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from vllm.distributed import (  # pyright: ignore[reportMissingImports]
    get_tensor_model_parallel_rank,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM  # pyright: ignore[reportMissingImports]
from vllm.model_executor.models.mistral import (  # pyright: ignore[reportMissingImports]
    MistralDecoderLayer,
    MistralForCausalLM,
)
from vllm.model_executor.models.opt import OPTDecoderLayer, OPTForCausalLM  # pyright: ignore[reportMissingImports]
from vllm.model_executor.models.phi3 import Phi3ForCausalLM  # pyright: ignore[reportMissingImports]
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM  # pyright: ignore[reportMissingImports]
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM  # pyright: ignore[reportMissingImports]

from elision.errors import InputError
from elision.spd.runtimes.checkpoint import plan_of
from elision.spd.runtimes.vllm import TESTED


def _missing_bias(share: torch.Tensor, projection: Any, missing: bool) -> torch.Tensor:
    """The rank's attention share with the output projection's bias, which vLLM adds on rank 0 alone."""
    if not missing:
        return share
    return share + getattr(projection, "base_layer", projection).bias  # vLLM's LoRA layer keeps the module inside


class _LlamaSPD:
    """The SPD forward of Llama and its kin."""

    adds_bias: bool  # whether this rank's product lacks the output projection's bias

    def forward(
        self: Any, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None, **extra: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            x, normed = hidden_states, self.input_layernorm(hidden_states)
        else:
            normed, x = self.input_layernorm(hidden_states, residual)
        share = self.self_attn(positions=positions, hidden_states=normed)
        u = x + _missing_bias(share, self.self_attn.o_proj, self.adds_bias)
        return tensor_model_parallel_all_reduce(share + self.mlp(self.post_attention_layernorm(u))), x


class SPDLlamaDecoderLayer(_LlamaSPD, LlamaDecoderLayer):
    """A planned block of Llama, or of Phi-3."""


class SPDMistralDecoderLayer(_LlamaSPD, MistralDecoderLayer):
    """A planned block of Mistral."""


class SPDQwen2DecoderLayer(_LlamaSPD, Qwen2DecoderLayer):
    """A planned block of Qwen2."""


class SPDQwen3DecoderLayer(_LlamaSPD, Qwen3DecoderLayer):
    """A planned block of Qwen3."""


class SPDOPTDecoderLayer(OPTDecoderLayer):
    """A planned block of OPT, whose layers hand on one sum."""

    adds_bias: bool

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        share = self.self_attn(hidden_states=self.self_attn_layer_norm(hidden_states))
        u = hidden_states + _missing_bias(share, self.self_attn.out_proj, self.adds_bias)
        inner, _ = self.fc1(self.final_layer_norm(u))
        product, _ = self.fc2(self.activation_fn(inner))
        return hidden_states + tensor_model_parallel_all_reduce(share + product)


# vLLM's layer, ours, the arguments of its forward, and where its two row-parallel projections are.
_LLAMA = (("positions", "hidden_states", "residual"), ("self_attn", "o_proj"), ("mlp", "down_proj"))
_LAYERS: dict[type, tuple[type, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    LlamaDecoderLayer: (SPDLlamaDecoderLayer, *_LLAMA),
    MistralDecoderLayer: (SPDMistralDecoderLayer, *_LLAMA),
    Qwen2DecoderLayer: (SPDQwen2DecoderLayer, *_LLAMA),
    Qwen3DecoderLayer: (SPDQwen3DecoderLayer, *_LLAMA),
    OPTDecoderLayer: (SPDOPTDecoderLayer, ("hidden_states",), ("self_attn", "out_proj"), ("fc2",)),
}


class _DropsSyncs:
    """A vLLM model that, once built, drops the first sync of the blocks that its config's plan names."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **options: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)  # pyright: ignore[reportCallIssue]
        config = vllm_config.model_config.hf_config
        model: Any = self
        layers = model.model.decoder.layers if hasattr(model.model, "decoder") else model.model.layers
        for index in plan_of(config).dropped:
            _drop_sync(layers[index], index)


def _drop_sync(layer: nn.Module, index: int) -> None:
    """Turn one layer into a planned block, in place.

    Raises:
        InputError: the layer is not built as in the versions of vLLM that this was tested with.
    """
    kind = type(layer)
    _check(kind in _LAYERS, index, f"its class is {kind.__name__}")
    spd_kind, arguments, *places = _LAYERS[kind]
    found = tuple(inspect.signature(kind.forward).parameters)[1:]
    _check(found[: len(arguments)] == arguments, index, f"its forward takes {', '.join(found)}")
    _check("forward" not in vars(layer), index, "its forward has been replaced, as weight offloading does")
    _check(getattr(layer, "ada_rms_norm_t_cond", None) is None, index, "it scales its norm by a condition")
    projections = []
    for place in places:
        projection: Any = layer
        for name in place:
            projection = getattr(projection, name, None)
        where = ".".join(place)
        _check(getattr(projection, "reduce_results", None) is True, index, f"its {where} is not a reducing linear map")
        _check(not projection.skip_bias_add, index, f"its {where} hands its bias on")
        projections.append(projection)
    for projection in projections:
        projection.reduce_results = False
    layer.__class__ = spd_kind
    # A flag, not the bias: assigning a parameter here would register it a second time.
    layer.adds_bias = projections[0].bias is not None and get_tensor_model_parallel_rank() > 0  # pyright: ignore


def _check(fits: bool, index: int, what: str) -> None:
    if not fits:
        raise InputError(f"block {index} of this vLLM model cannot drop its sync, {what}: use vLLM {TESTED}")


class SPDLlamaForCausalLM(_DropsSyncs, LlamaForCausalLM):
    """Llama with dropped syncs."""


class SPDMistralForCausalLM(_DropsSyncs, MistralForCausalLM):
    """Mistral with dropped syncs."""


class SPDQwen2ForCausalLM(_DropsSyncs, Qwen2ForCausalLM):
    """Qwen2 with dropped syncs."""


class SPDQwen3ForCausalLM(_DropsSyncs, Qwen3ForCausalLM):
    """Qwen3 with dropped syncs."""


class SPDPhi3ForCausalLM(_DropsSyncs, Phi3ForCausalLM):
    """Phi-3 with dropped syncs."""


class SPDOPTForCausalLM(_DropsSyncs, OPTForCausalLM):
    """OPT with dropped syncs."""
