"""Serve a plan with transformers' own tensor parallelism, one process a rank, started by torchrun.

    torchrun --nproc-per-node 2 serve.py        # model = load("model-spd"); generate(model, ids, max_new_tokens=64)

transformers shards the weights as it reads them and puts a parallel style on every projection. Ours differs from its
row-parallel style in one thing: on a module that carries a mark it hands out the rank's partial product, without
bias and without sync. `drop_syncs` marks both row-parallel projections of each planned block and gives the block's
layer a forward of block.py's form, with the only all-reduce in it:

    P_i = attention(norm(X))    u_i = X + r (P_i + b)    Z_i = MLP(norm(u_i))    X + r (all_reduce(P_i + Z_i) + b + c)

Every rank adds the same numbers to the same all-reduced sum, so all ranks go on with the same bits. transformers plans
styles for all layers alike, which is why the style covers every block and the marks say where it acts. OPT, which
has no plan of its own there, gets one. Phi-3's is changed: transformers gathers its fused gate and up projections on
every rank, where each rank must see the product of its own input; they are split instead.

What is not supported is refused by name: fewer key/value heads than ranks, which transformers does not replicate,
and an intermediate size that it would split other than the plan's simulation did.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, RowwiseParallel

from elision.blocks import Block, decoder, load_config, model_path
from elision.errors import InputError
from elision.families import attention_shape, family_of, intermediate_size
from elision.spd.block import add_residual, shard
from elision.spd.plan import SyncPlan
from elision.spd.runtimes import ranks
from elision.spd.runtimes.checkpoint import check_fits, plan_of

TIMEOUT = 10.0  # seconds that a rank waits for another within one all-reduce
STYLE, SPLIT_STYLE = "elision_rowwise", "elision_rowwise_split_input"  # the second one's input is whole on every rank
_MARK = "_elision_partial"
_LIMIT = "_elision_timeout"


class PartialRowwise(RowwiseParallel):
    """transformers' row-parallel style, but without sync and bias on a module that is marked."""

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        """A marked module multiplies plain tensors, so that its partial product is one."""
        return hasattr(module, _MARK) or super().should_use_local_tensors(module)

    def transform_output_post_forward(self, module: nn.Module, output: Tensor, mesh: Any) -> Tensor:
        """The rank's partial product of a marked module, the sum over ranks with bias of any other."""
        return output if hasattr(module, _MARK) else super().transform_output_post_forward(module, output, mesh)


def load(
    source: str | Path,
    plan: SyncPlan | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    timeout: float = TIMEOUT,
) -> PreTrainedModel:
    """Load this rank's share of a checkpoint, for inference, with its planned syncs dropped. Every rank calls this.

    Args:
        source: a checkpoint's directory or Hugging Face id, or "reference".
        plan: used where the checkpoint carries none, or instead of an untreated checkpoint's own.
        dtype: of the weights; "auto" keeps the checkpoint's.
        timeout: seconds that a rank waits for another within one all-reduce of the loaded model.

    Raises:
        InputError: no plan, or one that does not fit the model, the number of processes or the other ranks' plans.
    """
    error: InputError | None = None
    config: Any = None
    try:
        config, plan = _read(source, plan)
    except InputError as caught:  # the other ranks must hear of it: they wait for this one
        error = caught
    ranks.join()
    plan = _agreed(plan, error)
    ranks.check_number(plan.ranks)
    model = _load_parallel(source, config, plan.ranks, dtype)
    ranks.limit(timeout, *_groups(model))
    setattr(model, _LIMIT, timeout)
    drop_syncs(model, plan)
    return model


def generate(model: PreTrainedModel, inputs: Tensor | Mapping[str, Tensor], **options: Any) -> Tensor:
    """`model.generate` on all ranks alike: rank 0's inputs and options are everyone's, and samples are drawn alike.

    Args:
        model: what `load` returned.
        inputs: token ids (batch, sequence), or what a tokenizer returns.
        options: what transformers' generate takes.

    Returns:
        Token ids (batch, sequence), the same on every rank.

    Raises:
        RankLostError: another rank died or failed meanwhile.
    """
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    with ranks.naming_the_lost(getattr(model, _LIMIT)):
        if dist.is_initialized():
            seed = int(torch.randint(2**62, ()))
            given, options, seed = ranks.from_first((given, options, seed))
            torch.manual_seed(seed)
        run: Any = model.generate
        return run(**{name: value.to(model.device) for name, value in given.items()}, **options)


class DroppedSyncs:
    """Handle of dropped syncs, also a context manager; removing it restores transformers' own tensor parallelism."""

    def __init__(self, marked: list[nn.Module], layers: list[nn.Module]) -> None:
        self._marked, self._layers = marked, layers

    def remove(self) -> None:
        """Give every block its first sync back. Safe to call twice."""
        while self._marked:
            delattr(self._marked.pop(), _MARK)
        while self._layers:
            del self._layers.pop().forward

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def drop_syncs(model: PreTrainedModel, plan: SyncPlan) -> DroppedSyncs:
    """Leave out the planned blocks' first sync in a model that `load` read, until the returned handle is removed.

    Raises:
        InputError: the plan does not fit the model or its number of ranks, or a block's sync is dropped already.
    """
    check_fits(model.config, plan)
    size = getattr(model, "_tp_size", None) or 1
    if size != plan.ranks:
        raise InputError(f"plan is for {plan.ranks} ranks, the model is shared by {size}: calibrate for {size} ranks")
    view = decoder(model)
    handle = DroppedSyncs([], [])
    if size == 1:  # one rank has all heads: nothing is lost and nothing to leave out
        return handle
    blocks = [view.blocks[index] for index in plan.dropped]
    for block in blocks:
        if "forward" in vars(block.layer):
            raise InputError(f"block {block.index}'s forward is replaced already: remove what did it first")
    group = _groups(model)[0]
    for block in blocks:
        for projection in (block.o, block.down):
            setattr(projection.module, _MARK, True)
            handle._marked.append(projection.module)
        block.layer.forward = partial(_spd_layer, block, _bias(block.o), _bias(block.down), group)
        handle._layers.append(block.layer)
    return handle


def _spd_layer(
    block: Block,
    o_bias: Tensor | None,
    down_bias: Tensor | None,
    group: dist.ProcessGroup,
    hidden_states: Tensor,
    **kwargs: Any,
) -> Tensor:
    """The decoder layer's forward with one sync: (batch, sequence, hidden) to the same, equal on every rank."""
    assert block.attention_norm is not None and block.mlp_norm is not None
    share = block.attention(hidden_states=block.attention_norm(hidden_states), **kwargs)[0]
    u = add_residual(hidden_states, share, block.residual_multiplier, o_bias)
    total = share + _mlp(block, block.mlp_norm(u))
    dist.all_reduce(total, group=group)
    return add_residual(hidden_states, total, block.residual_multiplier, o_bias, down_bias)


def _mlp(block: Block, h: Tensor) -> Tensor:
    """The MLP's partial product; OPT's is no module of its own."""
    if block.mlp is not block.layer:
        return block.mlp(h)
    return block.down.module(block.activation(block.up.module(h)))


def _bias(projection: Any) -> Tensor | None:
    bias = projection.module.bias
    return bias.to_local() if isinstance(bias, DTensor) else bias


def _groups(model: PreTrainedModel) -> list[dist.ProcessGroup]:
    """The process group that the model's shards are summed over; none for one rank."""
    mesh: Any = model._device_mesh
    if mesh is None:
        return []
    return [mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")]


def _read(source: str | Path, plan: SyncPlan | None) -> tuple[PretrainedConfig, SyncPlan]:
    config = load_config(source)
    if plan is None:
        plan = plan_of(config, str(source))
    elif hasattr(config, "spd_plan") and plan != (own := plan_of(config, str(source))) and not own.original_weights:
        raise InputError(f"{source} was healed for another plan than the one given: leave the plan out")
    check_fits(config, plan)
    heads, kv_heads, _ = attention_shape(config.get_text_config())
    intermediate = intermediate_size(config.get_text_config())
    if kv_heads % plan.ranks:
        raise InputError(
            f"{plan.ranks} ranks cannot share {kv_heads} key/value heads in transformers, which holds each of them "
            "once: serve with vLLM, or calibrate for a divisor of them"
        )
    widest = -(-intermediate // plan.ranks)
    for rank in range(plan.ranks):
        own = shard(rank, plan.ranks, heads, kv_heads, intermediate).channels
        if len(own) != min(widest, max(0, intermediate - rank * widest)):
            raise InputError(
                f"transformers splits intermediate size {intermediate} over {plan.ranks} ranks into shards that "
                "differ by more than one: calibrate for a number of ranks that divides it"
            )
    return config, plan


def _agreed(plan: SyncPlan | None, error: InputError | None) -> SyncPlan:
    """The plan of all ranks; raise on every rank what went wrong on any, or that their plans differ."""
    everyone = ranks.gather((plan, error and str(error)))
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(everyone):
        if message is not None:
            raise InputError(f"rank {rank}: {message}")
    first = everyone[0][0]
    for rank, (other, _) in enumerate(everyone):
        if other != first:
            raise InputError(
                f"rank {rank} has another plan than rank 0 ({_words(other)}; {_words(first)}): "
                "give every rank the same checkpoint"
            )
    return first


def _words(plan: SyncPlan) -> str:
    return f"{plan.ranks} ranks, dropped {list(plan.dropped)}"


def _load_parallel(
    source: str | Path, config: PretrainedConfig, size: int, dtype: torch.dtype | str
) -> PreTrainedModel:
    """The model with this rank's shards of its weights, all syncs in place."""
    styles: Any = ALL_PARALLEL_STYLES
    styles.register(STYLE, PartialRowwise())
    styles.register(SPLIT_STYLE, PartialRowwise(input_layouts=Replicate()))
    parallel = DistributedConfig(tp_size=size, tp_plan=_styles(config))
    model = AutoModelForCausalLM.from_pretrained(
        model_path(source), config=config, dtype=dtype, distributed_config=parallel
    )
    parallel.tp_plan = None  # a style of ours must not reach a saved config
    if config.model_type == "opt":  # its attention counts heads by an attribute
        for block in decoder(model).blocks:
            attention: Any = block.attention
            attention.num_heads //= size
    return model.requires_grad_(False)


def _styles(config: PretrainedConfig) -> dict[str, str]:
    """The parallel style of each of a block's projections, by its wildcard name."""
    family = family_of(config)
    layer = "model.decoder.layers.*" if config.model_type == "opt" else "model.layers.*"
    mlp = layer if family.mlp is None else f"{layer}.{family.mlp}"
    fused = len(set(family.qkv)) == 1
    styles = {f"{layer}.self_attn.{name}": "colwise_gather_output" if fused else "colwise" for name in family.qkv}
    styles[f"{layer}.self_attn.{family.o}"] = SPLIT_STYLE if fused else STYLE
    packed = len(set(family.gate_up)) == 1
    styles |= {f"{mlp}.{name}": "packed_colwise" if packed else "colwise" for name in family.gate_up if name}
    return styles | {f"{mlp}.{family.down}": STYLE}
