"""vLLM's models with planned blocks that run one all-reduce instead of two. Imported by vLLM alone, by lazy path.

A planned block is vLLM's own, with the class of its layer changed for a subclass that has an SPD forward, and with its
two row-parallel projections told not to reduce. The output projection is told to leave out its bias b as well, which
vLLM would add on rank 0 only; the down projection's c stays there, so that the sum over ranks has it once. With
Z_i' = MLP_i(norm(u_i)), c on rank 0 included, the block is block.py's:

    u_i = X + g_i P_i + b + m_i      output = X + all_reduce(P_i + Z_i') + b

vLLM's layers hand on a block's output as two terms, the last sub-layer's product and `residual`, which the next norm
adds up. Ours hands on the all-reduced sum and X, unchanged: both are the same bits on every rank.

A correction's constant and gain are parameters of the layer, of which each rank loads its own row. A local O M_i
lengthens the output projection: A_i [Wo_i; M_i] is one product, [P_i; A_i M_i], and an adapter on O reaches P_i alone,
as it does when it is merged. A block whose first sync is sent in int8 keeps its layer; its attention sums by int8.py.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elision.errors import InputError
from elision.spd.corrections import NAME as CORRECTION
from elision.spd.plan import SyncPlan
from elision.spd.runtimes.checkpoint import plan_of
from elision.spd.runtimes.ranks import int8_all_reduce as summed_in_int8
from elision.spd.runtimes.vllm import TESTED

try:
    from vllm.distributed import (  # pyright: ignore[reportMissingImports]
        get_tensor_model_parallel_rank,
        get_tp_group,
        tensor_model_parallel_all_reduce,
    )
    from vllm.model_executor.layers.linear import RowParallelLinear  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models.llama import (  # pyright: ignore[reportMissingImports]
        LlamaAttention,
        LlamaDecoderLayer,
        LlamaForCausalLM,
    )
    from vllm.model_executor.models.mistral import (  # pyright: ignore[reportMissingImports]
        MistralAttention,
        MistralDecoderLayer,
        MistralForCausalLM,
    )
    from vllm.model_executor.models.opt import (  # pyright: ignore[reportMissingImports]
        OPTAttention,
        OPTDecoderLayer,
        OPTForCausalLM,
    )
    from vllm.model_executor.models.phi3 import Phi3ForCausalLM  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models.qwen2 import (  # pyright: ignore[reportMissingImports]
        Qwen2Attention,
        Qwen2DecoderLayer,
        Qwen2ForCausalLM,
    )
    from vllm.model_executor.models.qwen3 import (  # pyright: ignore[reportMissingImports]
        Qwen3Attention,
        Qwen3DecoderLayer,
        Qwen3ForCausalLM,
    )
except ImportError as error:
    raise InputError(f"this vLLM cannot run a plan ({error}): use vLLM {TESTED}") from error


class Correction(nn.Module):
    """This rank's part of what corrects a block's MLP input, but for a local O; named as in the checkpoint."""

    def __init__(self, gain: bool, like: Tensor, hidden: int) -> None:
        super().__init__()
        self.constant = _own_row(like.new_zeros(hidden))
        self.gain = _own_row(like.new_ones(hidden)) if gain else None


def _own_row(tensor: Tensor) -> nn.Parameter:
    """A parameter of which the checkpoint has a row for each rank."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    rank = get_tensor_model_parallel_rank()

    def load(param: nn.Parameter, loaded_weight: Tensor) -> None:  # vLLM's reload_weights goes by these names
        param.data.copy_(loaded_weight[rank])

    parameter.weight_loader = load  # pyright: ignore[reportAttributeAccessIssue]
    return parameter


def _mlp_input(x: Tensor, product: Tensor, bias: Tensor | None, correction: Correction | None) -> tuple[Tensor, Tensor]:
    """P_i and u_i (tokens, hidden), from X and the product A_i Wo_i, which a local O has made longer by A_i M_i."""
    hidden = x.shape[-1]
    share, seen = product[..., :hidden], product[..., -hidden:]  # the same where there is no local O
    if correction is not None and correction.gain is not None:
        seen = seen * correction.gain
    seen = _plus(seen, bias)
    return share, x + (seen if correction is None else seen + correction.constant)


def _plus(total: Tensor, bias: Tensor | None) -> Tensor:
    return total if bias is None else total + bias


class _LlamaSPD:
    """The SPD forward of Llama and its kin."""

    def forward(
        self: Any, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **extra: Any
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            x, normed = hidden_states, self.input_layernorm(hidden_states)
        else:
            normed, x = self.input_layernorm(hidden_states, residual)
        product = self.self_attn(positions=positions, hidden_states=normed)
        bias = self.self_attn.o_proj.bias
        share, u = _mlp_input(x, product, bias, self.spd_correction)
        total = tensor_model_parallel_all_reduce(share + self.mlp(self.post_attention_layernorm(u)))
        return _plus(total, bias), x


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

    def forward(self, hidden_states: Tensor) -> Tensor:
        product = self.self_attn(hidden_states=self.self_attn_layer_norm(hidden_states))
        bias = self.self_attn.out_proj.bias
        share, u = _mlp_input(hidden_states, product, bias, self.spd_correction)
        inner, _ = self.fc1(self.final_layer_norm(u))
        product, _ = self.fc2(self.activation_fn(inner))
        return hidden_states + _plus(tensor_model_parallel_all_reduce(share + product), bias)


class _Int8Sum:
    """Attention whose sum over ranks is int8.py's; its output projection neither reduces nor adds its bias."""

    output = "o_proj"

    def forward(self, **inputs: Any) -> Tensor:
        share = super().forward(**inputs)  # pyright: ignore[reportAttributeAccessIssue]
        return _plus(torch.ops.elision.int8_all_reduce(share), getattr(self, self.output).bias)


class Int8LlamaAttention(_Int8Sum, LlamaAttention):
    """Attention of Llama or Phi-3, summed in int8."""


class Int8MistralAttention(_Int8Sum, MistralAttention):
    """Attention of Mistral, summed in int8."""


class Int8Qwen2Attention(_Int8Sum, Qwen2Attention):
    """Attention of Qwen2, summed in int8."""


class Int8Qwen3Attention(_Int8Sum, Qwen3Attention):
    """Attention of Qwen3, summed in int8."""


class Int8OPTAttention(_Int8Sum, OPTAttention):
    """Attention of OPT, summed in int8."""

    output = "out_proj"


@torch.library.custom_op("elision::int8_all_reduce", mutates_args=(), schema="(Tensor share) -> Tensor")
def int8_all_reduce(share: Tensor) -> Tensor:
    """The sum of all ranks' `share` (tokens, hidden), sent in int8; one operator to torch.compile."""
    return summed_in_int8(share, get_tp_group().device_group)


@int8_all_reduce.register_fake
def _(share: Tensor) -> Tensor:
    return torch.empty_like(share)


# vLLM's class, ours, the arguments of its forward, and where its row-parallel projections are, O first.
_ARGUMENTS = ("positions", "hidden_states", "residual")
_PLACES = (("self_attn", "o_proj"), ("mlp", "down_proj"))
_Row = tuple[type, tuple[str, ...], tuple[tuple[str, ...], ...]]
_LAYERS: dict[type, _Row] = {
    LlamaDecoderLayer: (SPDLlamaDecoderLayer, _ARGUMENTS, _PLACES),
    MistralDecoderLayer: (SPDMistralDecoderLayer, _ARGUMENTS, _PLACES),
    Qwen2DecoderLayer: (SPDQwen2DecoderLayer, _ARGUMENTS, _PLACES),
    Qwen3DecoderLayer: (SPDQwen3DecoderLayer, _ARGUMENTS, _PLACES),
    OPTDecoderLayer: (SPDOPTDecoderLayer, ("hidden_states",), (("self_attn", "out_proj"), ("fc2",))),
}
_ATTENTIONS: dict[type, _Row] = {
    LlamaAttention: (Int8LlamaAttention, _ARGUMENTS[:2], (("o_proj",),)),
    MistralAttention: (Int8MistralAttention, _ARGUMENTS[:2], (("o_proj",),)),
    Qwen2Attention: (Int8Qwen2Attention, _ARGUMENTS[:2], (("o_proj",),)),
    Qwen3Attention: (Int8Qwen3Attention, _ARGUMENTS[:2], (("o_proj",),)),
    OPTAttention: (Int8OPTAttention, ("hidden_states",), (("out_proj",),)),
}
_O = re.compile(rf"(.*\blayers\.(\d+)\.)(self_attn\.(?:o|out)_proj\.weight|{CORRECTION}\.local_o)")


class _DropsSyncs:
    """A vLLM model that, once built, drops or quantises the first sync of the blocks that its config's plan names."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **options: Any) -> None:
        plan = plan_of(vllm_config.model_config.hf_config)
        check_agreed(plan)
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)  # pyright: ignore[reportCallIssue]
        model: Any = self
        layers = model.model.decoder.layers if hasattr(model.model, "decoder") else model.model.layers
        for index in plan.dropped:
            drop_sync(layers[index], index, plan.corrections.get(index))
        for index in plan.int8:
            _change(layers[index].self_attn, index, _ATTENTIONS)
        self._local_o = {index for index, kind in plan.corrections.items() if kind == "local_o"}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(_joined(weights, self._local_o))  # pyright: ignore[reportAttributeAccessIssue]


def check_agreed(plan: SyncPlan) -> None:
    """Pass where every rank has this plan, and there are as many as it is for.

    Raises:
        InputError: on every rank, naming one that differs.
    """
    group = get_tp_group()
    if group.world_size != plan.ranks:
        raise InputError(f"plan is for {plan.ranks} ranks, this vLLM has {group.world_size}: use {plan.ranks}")
    plans: list[Any] = [None] * group.world_size
    dist.all_gather_object(plans, plan.to_dict(), group=group.cpu_group)
    for rank, other in enumerate(plans):
        if other != plans[0]:
            raise InputError(
                f"rank {rank} has another plan than rank 0 (dropped {other['dropped']}; {plans[0]['dropped']}): "
                "give every rank the same checkpoint"
            )


def drop_sync(layer: Any, index: int, correction: str | None = None) -> None:
    """Turn one layer of vLLM's into a planned block, in place; `correction` is its kind.

    Raises:
        InputError: the layer is not built as in the versions of vLLM that this was tested with.
    """
    _check(getattr(layer, "ada_rms_norm_t_cond", None) is None, index, "it scales its norm by a condition")
    o = _change(layer, index, _LAYERS)
    layer.spd_correction = None
    if correction is not None:
        layer.spd_correction = Correction(correction == "gain", o.weight, o.output_size)
    if correction == "local_o":
        attention = layer.self_attn
        setattr(attention, "out_proj" if hasattr(attention, "out_proj") else "o_proj", _lengthened(o))


def _change(module: nn.Module, index: int, kinds: dict[type, _Row]) -> Any:
    """Give a module our class and stop its projections from reducing, and O from adding its bias; return O."""
    kind = type(module)
    _check(kind in kinds, index, f"its class is {kind.__name__}")
    own_kind, arguments, places = kinds[kind]
    found = tuple(inspect.signature(kind.forward).parameters)[1:]
    _check(found[: len(arguments)] == arguments, index, f"its forward takes {', '.join(found)}")
    _check("forward" not in vars(module), index, "its forward has been replaced, as weight offloading does")
    projections = []
    for place in places:
        projection: Any = module
        for name in place:
            projection = getattr(projection, name, None)
        where = ".".join(place)
        _check(getattr(projection, "reduce_results", None) is True, index, f"its {where} is not a reducing linear map")
        _check(not projection.skip_bias_add, index, f"its {where} hands its bias on")
        projections.append(projection)
    for projection in projections:
        projection.reduce_results = False
    projections[0].skip_bias_add = True  # handed on to an attention that ignores it; added after the sync
    module.__class__ = own_kind
    return projections[0]


def _check(fits: bool, index: int, what: str) -> None:
    if not fits:
        raise InputError(f"block {index} of this vLLM model cannot change its sync, {what}: use vLLM {TESTED}")


def _lengthened(o: Any) -> Any:
    """An output projection with a local O's rows below its own, to be loaded with both."""
    longer: Any = RowParallelLinear(
        o.input_size,
        2 * o.output_size,
        bias=False,
        skip_bias_add=True,
        params_dtype=o.params_dtype,
        reduce_results=False,
        prefix=o.prefix,
    )
    longer.bias = o.bias
    return longer


def _joined(weights: Iterable[tuple[str, Tensor]], blocks: set[int]) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors, in which these blocks' O and local O are one.

    Raises:
        InputError: one of the two is missing.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights:
        match = _O.fullmatch(name)
        if match is None or int(match[2]) not in blocks:
            yield name, tensor
            continue
        pair = waiting.setdefault(match[1], {})
        pair[match[3]] = tensor
        if len(pair) == 2:
            (_, local_o), (o_name, o) = sorted(waiting.pop(match[1]).items(), reverse=True)
            yield match[1] + o_name, torch.cat([o, local_o])
    for layer, pair in waiting.items():
        raise InputError(f"the checkpoint has only {next(iter(pair))} of {layer[:-1]}: save it again with its plan")


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
