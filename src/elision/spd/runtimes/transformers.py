"""Serve a plan with transformers' own tensor parallelism, one process a rank, started by torchrun.

    torchrun --nproc-per-node 2 serve.py        # model = load("model-spd"); generate(model, ids, max_new_tokens=64)

transformers shards the weights as it reads them, gives every projection a forward that sums or gathers over the ranks
where its layout asks for it, and computes on each rank the attention of that rank's own heads. `drop_syncs` leaves all
of this alone but for planned blocks: there the output projection hands the heads through, and the layer's forward is
block.py's SPD block on the rank's own shards, with one all-reduce in all. A block whose first sync is sent in int8 is
block.py's plain one, likewise, with int8.py's two exchanges in place of the first all-reduce; one that skips attention
is its MLP and one all-reduce. Every rank adds the same numbers to the same sum, so all ranks go on with the same bits.

Two families need help. OPT has no parallel plan in transformers, so it gets one. Phi-3's is changed: transformers
gathers its fused gate and up projections on every rank, where each rank must see its own input's; they are split.

What is not supported is refused by name: fewer key/value heads than ranks, which transformers does not replicate,
and an intermediate size that it would split other than the plan's simulation did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from elision.blocks import Block, Projection, decoder, load_config, model_path
from elision.errors import InputError
from elision.evaluate import check_tokens
from elision.families import attention_shape, family_of, intermediate_size
from elision.spd.block import LocalBlock, add_residual, mlp_share, plain_block, shard, span, spd_block
from elision.spd.corrections import NAME as CORRECTION
from elision.spd.plan import SyncPlan
from elision.spd.runtimes import ranks
from elision.spd.runtimes.checkpoint import check_fits, corrections_of, facts_of, fingerprint, plan_of
from elision.spd.serving import served_by
from elision.spd.simulate import check_carried, check_unadapted, guard

TIMEOUT = 10.0  # seconds that a rank waits for another within one all-reduce
_LIMIT = "_elision_timeout"
_IDLE = "_elision_idle_group"
_CORRECTIONS = "_elision_corrections"


def load(
    source: str | Path,
    plan: SyncPlan | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    timeout: float = TIMEOUT,
    drop: bool = True,
) -> PreTrainedModel:
    """Load this rank's share of a checkpoint, for inference, with its planned syncs dropped. Every rank calls this.

    Args:
        source: a checkpoint's directory or Hugging Face id, or "reference".
        plan: used where the checkpoint carries none, or instead of an untreated checkpoint's own.
        dtype: of the weights; "auto" keeps the checkpoint's.
        timeout: seconds that a rank waits for another within one all-reduce of the loaded model, on CPUs.
        drop: whether the planned syncs are dropped now; `drop_syncs` does it later.

    Raises:
        InputError: no plan, or one that does not fit the model, the number of processes or the other ranks' plans;
            weights that are missing, truncated or of another shape than the config's, on this rank or another; or
            another rank has another model.
    """
    error: InputError | None = None
    held: dict[str, str] = {}
    config: Any = None
    try:
        config, plan = planned(source, plan)
    except InputError as caught:  # the other ranks must hear of it: they wait for this one
        error = caught
    ranks.join()
    ranks.limit(ranks.JOINING.total_seconds())  # an earlier load may have set another, which is too short for this one
    plan = _agreed(plan, error)
    ranks.check_number(plan.ranks)
    model: Any = None
    try:
        model = _load_parallel(source, config, plan.ranks, dtype)
        # Beside the weights, so that from_pretrained casts and moves none of them.
        corrections = {
            index: {name: tensor.to(model.device, model.dtype) for name, tensor in tensors.items()}
            for index, tensors in corrections_of(source, plan).items()
        }
        setattr(model, _CORRECTIONS, corrections)
        held = fingerprint(source, config, model.dtype)
    except InputError as caught:
        error = caught
    except (OSError, SafetensorError) as caught:
        what = " ".join(str(caught).split())[:200]
        error = InputError(f"weights of model {source} cannot be read ({what}): fetch or save it again")
    _agreed(plan, error, held)
    ranks.limit(timeout, *_groups(model))
    guard(decoder(model))
    setattr(model, _LIMIT, timeout)
    setattr(model, _IDLE, ranks.idle_group())
    if drop:
        drop_syncs(model, plan)
    return model


def generate(model: PreTrainedModel, inputs: Tensor | Mapping[str, Tensor], **options: Any) -> Tensor:
    """`model.generate` on all ranks alike: rank 0's inputs and options are everyone's, and samples are drawn alike.

    Ranks wait for each other at its beginning for as long as it takes, so that rank 0 may wait for a user.

    Args:
        model: what `load` returned.
        inputs: token ids (batch, sequence), or what a tokenizer returns, lists too.
        options: what transformers' generate takes and pickle can carry.

    Returns:
        Token ids (batch, sequence), the same on every rank.

    Raises:
        InputError: a token outside the vocabulary, which ranks with a part of the embeddings each take for zeros; rows
            of different lengths; an option that cannot be sent to the other ranks.
        RankLostError: another rank died or failed meanwhile. On GPUs, where ranks meet in NCCL, the launcher says so.
    """
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    with ranks.naming_the_lost(getattr(model, _LIMIT)):
        if dist.is_initialized():
            seed = int(torch.randint(2**62, ()))
            # Not under the limit of an all-reduce: rank 0 of a server comes here when somebody asks for something.
            kept = ranks.unsendable(options) if dist.get_rank() == 0 else None
            request = (given, {} if kept else options, seed, kept)
            given, options, seed, kept = ranks.from_first(request, getattr(model, _IDLE))
            if kept:  # the other ranks must hear of it: they wait for the request
                raise InputError(
                    f"option {kept} cannot be sent to the other ranks: give what pickle takes, such as a function of a "
                    "module"
                )
            torch.manual_seed(seed)
        given = {name: _tensor(name, value) for name, value in given.items()}
        check_tokens(model.config.get_text_config().vocab_size, given["input_ids"].flatten().tolist(), "the inputs")
        run: Any = model.generate
        return run(**{name: value.to(model.device) for name, value in given.items()}, **options)


def _tensor(name: str, value: Any) -> Tensor:
    """(batch, sequence) of what a tokenizer returns for `name`; a single row is a batch of one."""
    try:
        return torch.atleast_2d(torch.as_tensor(value))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} of the inputs is no table of numbers ({error}): have the tokenizer pad its rows (padding=True)"
        ) from None


class DroppedSyncs:
    """Handle of dropped syncs, also a context manager; removing it restores transformers' own tensor parallelism."""

    def __init__(self) -> None:
        self._replaced: list[tuple[nn.Module, Any]] = []

    def _replace(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        self._replaced.append((module, vars(module).get("forward")))  # transformers' own, or none
        module.forward = forward

    def remove(self) -> None:
        """Give every block its first sync back. Safe to call twice."""
        while self._replaced:
            module, forward = self._replaced.pop()
            del module.forward
            if forward is not None:
                module.forward = forward

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def drop_syncs(model: PreTrainedModel, plan: SyncPlan) -> DroppedSyncs:
    """Leave out the planned blocks' first sync in a model that `load` read, or their attention with it, or send it in
    int8, until the returned handle is removed.

    Raises:
        InputError: the plan does not fit the model or its number of ranks, was carried out on other weights, corrects a
            block for which the checkpoint has no correction or another kind, or a plan's syncs are dropped already.
    """
    check_fits(model.config, plan)
    check_carried(decoder(model), plan)
    size = getattr(model, "_tp_size", None) or 1
    if size != plan.ranks:
        raise InputError(f"plan is for {plan.ranks} ranks, the model is shared by {size}: calibrate for {size} ranks")
    handle = DroppedSyncs()
    if size == 1:  # one rank has all heads: no sync is lost, only attention that is skipped
        plan = SyncPlan(1, skipped=plan.skipped)
    view = decoder(model)
    corrections = getattr(model, _CORRECTIONS)
    if missing := sorted(set(plan.corrections) - set(corrections)):
        raise InputError(f"plan corrects block {missing[0]}, the checkpoint does not: use the plan that it carries")
    for index, wanted in plan.corrections.items():
        kind = next(iter(corrections[index].keys() - {"constant"}), "constant")
        if (kind, len(corrections[index]["constant"])) != (wanted, size):
            raise InputError(
                f"plan corrects block {index} by {wanted} for {size} ranks, the checkpoint by {kind} for "
                f"{len(corrections[index]['constant'])}: use the plan that it carries"
            )
    blocks = [view.blocks[index] for index in (*plan.dropped, *plan.int8, *plan.skipped)]
    for block in view.blocks:  # all of them: beside another plan's blocks these would serve a third plan
        if "forward" in vars(block.layer):
            raise InputError(f"block {block.index}'s forward is replaced already: remove what did it first")
    group = next(iter(_groups(model)), None)
    rank = 0 if group is None else dist.get_rank(group)

    def all_reduce(share: Tensor) -> Tensor:
        if group is not None:
            dist.all_reduce(share, group=group)
        return share

    int8_reduce = partial(ranks.int8_all_reduce, group=group)
    for block in blocks:
        own = span(shard(rank, size, block.heads, block.kv_heads, block.intermediate_size).heads, block.head_dim)
        correction = corrections[block.index] if block.index in plan.corrections else {}
        local = _local_block(block, rank, own, correction)
        if block.index in plan.skipped:
            kv_heads = block.kv_heads if block.q.rows is not None else block.kv_heads // size
            skip = partial(_skipped_layer, block, (kv_heads, block.head_dim), local, all_reduce)
            handle._replace(block.layer, skip)
            continue
        gathered = own if block.q.rows is not None else None  # fused: each rank has the heads of all
        step = spd_block if block.index in plan.dropped else partial(plain_block, first=int8_reduce)
        handle._replace(block.layer, partial(_layer, block, local, gathered, partial(step, all_reduce=all_reduce)))
        handle._replace(block.o.module, _identity)
    return handle


def _layer(
    block: Block,
    local: LocalBlock,
    own: slice | None,
    step: Callable[..., Tensor],
    hidden_states: Tensor,
    **kwargs: Any,
) -> Tensor:
    """The decoder layer's forward by block.py's `step`: (batch, sequence, hidden) to the same, equal on every rank."""
    check_unadapted(block)
    assert block.attention_norm is not None
    heads = block.attention(hidden_states=block.attention_norm(hidden_states), **kwargs)[0]
    return step(hidden_states, heads if own is None else heads[..., own], local)


def _skipped_layer(
    block: Block,
    keys: tuple[int, int],
    local: LocalBlock,
    all_reduce: Callable[[Tensor], Tensor],
    hidden_states: Tensor,
    **kwargs: Any,
) -> Tensor:
    """The decoder layer's forward without attention: X + r (MLP(norm(X)) + c), equal on every rank.

    A key/value cache is still told how many tokens went by, because the model asks its first block for that, in
    zeros of `keys` (heads, head_dim), for which a static one may have made room.
    """
    check_unadapted(block)
    if (cache := kwargs.get("past_key_values")) is not None:
        batch, tokens = hidden_states.shape[:2]
        nothing = hidden_states.new_zeros(batch, keys[0], tokens, keys[1])
        cache.update(nothing, nothing, block.index)
    total = all_reduce(mlp_share(hidden_states, local))
    return add_residual(hidden_states, total, local.residual_multiplier, local.down_bias)


def _identity(input: Tensor) -> Tensor:
    return input


def _local_block(block: Block, rank: int, own: slice, correction: Mapping[str, Tensor]) -> LocalBlock:
    """This rank's part of a block after its attention, as plain tensors that share memory with the shards."""
    gate, gate_bias = (None, None) if block.gate is None else _shard(block.gate, first=True)
    up, up_bias = _shard(block.up, first=False)
    (o, o_bias), (down, down_bias) = _shard(block.o), _shard(block.down)
    assert up is not None and o is not None and down is not None and block.mlp_norm is not None
    rows = {name: correction[name][rank] for name in ("constant", "gain") if name in correction}
    return LocalBlock(
        o=o,
        up=up,
        down=down,
        norm=block.mlp_norm,
        activation=block.activation,
        gate=gate,
        up_bias=up_bias,
        gate_bias=gate_bias,
        o_bias=o_bias,
        down_bias=down_bias,
        residual_multiplier=block.residual_multiplier,
        mlp_o=correction["local_o"][:, own] if "local_o" in correction else None,
        mlp_gain=rows.get("gain"),
        mlp_constant=rows.get("constant"),
    )


def _shard(projection: Projection, first: bool = True) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias that this rank holds; of a fused pair of projections, the first or second half of the rows."""
    module: Any = projection.module
    held: list[Any] = [t.to_local() if isinstance(t, DTensor) else t for t in (module.weight, module.bias)]
    if projection.rows is not None:
        held = [t if t is None else t.chunk(2)[0 if first else 1] for t in held]
    return held[0], held[1]


def _groups(model: PreTrainedModel) -> list[dist.ProcessGroup]:
    """The process group that the model's shards are summed over; none for one rank."""
    mesh: Any = model._device_mesh
    if mesh is None:
        return []
    return [mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")]


def planned(source: str | Path, plan: SyncPlan | None) -> tuple[PretrainedConfig, SyncPlan]:
    """The config of what `load` would load, and the plan that it would run, without reading a weight.

    Raises:
        InputError: as `load` does, the number and plans of the other ranks aside.
    """
    config = load_config(source)
    own = plan_of(config, str(source)) if plan is None or hasattr(config, "spd_plan") else None
    if plan is None:
        assert own is not None
        plan = own
    elif own is None or _computed(plan) != _computed(own):
        if own is not None and not own.original_weights:
            raise InputError(f"{source} was healed for another plan than the one given: leave the plan out")
        if not plan.original_weights:
            raise InputError(
                f"plan was carried out on blocks {sorted({*plan.corrections, *plan.healed, *plan.heads})} of another "
                f"model than {source}: give the checkpoint that was saved with it"
            )
    check_fits(config, plan)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{source} is quantised, and ranks here cannot share such weights: give the unquantised checkpoint"
        )
    heads, kv_heads, _ = attention_shape(config.get_text_config())
    intermediate = intermediate_size(config.get_text_config())
    if kv_heads % plan.ranks:
        other = "serve with vLLM, or " if "vLLM" in served_by(facts_of(config), plan) else ""
        raise InputError(
            f"{plan.ranks} ranks cannot share {kv_heads} key/value heads in transformers, which holds each of them "
            f"once: {other}calibrate for a divisor of them"
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


def _computed(plan: SyncPlan) -> SyncPlan:
    """`plan` less what changes no arithmetic: what is still to do and what was measured."""
    return replace(plan, healing={}, model=None, calibration=None, verified=None)


def _agreed(plan: SyncPlan | None, error: InputError | None, held: Mapping[str, str] | None = None) -> SyncPlan:
    """The plan of all ranks; raise on every rank what went wrong on any, or that their plans or what they hold differ.

    Halves of two models add up to numbers like any others, so nothing would tell later.
    """
    everyone = ranks.gather((plan, error and str(error), held or {}))
    if error is not None:
        raise error
    for rank, (_, message, _) in enumerate(everyone):
        if message is not None:
            raise InputError(f"rank {rank}: {message}")
    first, _, model = everyone[0]
    for rank, (other, _, own) in enumerate(everyone):
        if other != first:
            raise InputError(
                f"rank {rank} has another plan than rank 0 ({_words(other)}; {_words(first)}): "
                "give every rank the same checkpoint"
            )
        if different := [name for name, value in own.items() if value != model.get(name)]:
            raise InputError(
                f"rank {rank} has another model than rank 0 (their {' and '.join(different)} differ): give every rank "
                "the same checkpoint"
            )
    return first


def _words(plan: SyncPlan) -> str:
    return f"{plan.ranks} ranks, dropped {list(plan.dropped)}"


def _load_parallel(
    source: str | Path, config: PretrainedConfig, size: int, dtype: torch.dtype | str
) -> PreTrainedModel:
    """The model with this rank's shards of its weights, all syncs in place.

    Raises:
        InputError: the checkpoint lacks a tensor, or has one of another shape.
    """
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # A subclass for the time of loading, because only a class can say which tensors of a checkpoint are not its own.
    loader: Any = type(kind.__name__, (kind,), {"_keys_to_ignore_on_load_unexpected": [rf"\.{CORRECTION}\."]})
    parallel = DistributedConfig(tp_size=size, tp_plan=_styles(config))
    model, info = loader.from_pretrained(
        model_path(source),
        config=config,
        dtype=dtype,
        distributed_config=parallel,
        ignore_mismatched_sizes=True,  # refused below, where the sentence can name the tensor
        output_loading_info=True,
    )
    if absent := sorted(info["missing_keys"]):  # transformers makes them up, at random, with a warning; tied ones aside
        raise InputError(f"model {source} holds no tensor {absent[0]}: save it again, with save_pretrained")
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise InputError(
            f"model {source}: {name} has shape {tuple(found)}, the config makes it {tuple(wanted)}: give a checkpoint "
            "that is whole"
        )
    model.__class__ = kind
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
    styles[f"{layer}.self_attn.{family.o}"] = "rowwise_split_input" if fused else "rowwise"
    packed = len(set(family.gate_up)) == 1
    styles |= {f"{mlp}.{name}": "packed_colwise" if packed else "colwise" for name in family.gate_up if name}
    return styles | {f"{mlp}.{family.down}": "rowwise"}
