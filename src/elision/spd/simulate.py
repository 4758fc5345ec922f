"""What N tensor-parallel ranks would compute, in one process: the oracle of every runtime, the engine of calibration.

The input of a block is the same on all ranks and attention heads do not mix, so attention runs once, for all heads,
in the model's own module: its masks, rotation, head norms and key/value cache stay Hugging Face's, and `generate`
works. Only the output projection is set aside, so that the heads' output A comes out unprojected; each rank's columns
of it then go through block.py's algebra in turn, and the ranks' shares are added up in rank order.

A plan is applied by giving each treated block's decoder layer and output projection a `forward` of their own; all
other blocks are not touched, so an empty plan changes nothing, bit for bit. Parameters are read where they are at
every call: nothing is copied, state-dict keys stay, and training through a simulated block trains the model's own
weights. Residual dropout (OPT, Phi-3), which serving does not have, is left out of dropped blocks in training mode.

The price of simplicity: N ranks take N times the norm and a loop of N small matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from elision.blocks import Block, Decoder, check_ranks, decoder, refusal
from elision.errors import InputError
from elision.facts import ModelFacts
from elision.spd.block import (
    LocalBlock,
    add_residual,
    attention_share,
    mlp_share,
    shard,
    span,
    spd_output,
    spd_share,
)
from elision.spd.corrections import Correction, correction_of
from elision.spd.int8 import all_reduce
from elision.spd.plan import SyncPlan
from elision.streaming import execution_devices, is_streamed


def simulate(model: nn.Module, plan: SyncPlan) -> Simulation:
    """Make `model` compute what `plan.ranks` ranks would, in place, until the returned handle is removed.

        with simulate(model, plan):
            model.generate(...)

    Raises:
        InputError: SPD's maths does not cover the model, the plan does not fit it, the model is simulated already,
            a planned block's weights cannot be split here (quantised, offloaded, or with an unmerged adapter), or
            the model lacks a correction or the healed weights that the plan names.
    """
    view = covered(model, plan.ranks)
    plan.check(facts(view))
    check_carried(view, plan)
    blocks, int8, skipped = (
        [view.blocks[index] for index in chosen] for chosen in (plan.dropped, plan.int8, plan.skipped)
    )
    for block in view.blocks:  # all of them: beside the plan of another simulation this would compute a third one
        check_unsimulated(block)
    for block in [*blocks, *int8, *skipped]:
        check_plain(block)
    corrections = {
        index: correction_of(view.blocks[index], plan.ranks, kind) for index, kind in plan.corrections.items()
    }
    return Simulation(blocks, plan.ranks, corrections, int8=int8, skipped=skipped)


class Simulation:
    """Handle of a running simulation, also a context manager; removing it restores the model bit for bit."""

    def __init__(
        self,
        blocks: Sequence[Block],
        ranks: int,
        corrections: Mapping[int, Correction] | None = None,
        *,
        int8: Sequence[Block] = (),
        skipped: Sequence[Block] = (),
    ) -> None:
        """Give `blocks`, `int8` and `skipped` the forward of their treatment; users call `simulate`, which checks."""
        self._replaced: list[nn.Module] = []
        for block in blocks:
            correction = (corrections or {}).get(block.index)
            self._replace(block.layer, partial(spd_layer, block, ranks, correction))
            self._replace(block.o.base, _identity)
        for block in int8:
            self._replace(block.layer, partial(int8_layer, block, ranks))
            self._replace(block.o.base, _identity)
        for block in skipped:
            self._replace(block.layer, partial(skipped_layer, block, ranks))

    def _replace(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        module.forward = forward
        self._replaced.append(module)

    def remove(self) -> None:
        """Give the modules back their own forward. Safe to call twice."""
        while self._replaced:
            del self._replaced.pop().forward

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def covered(model: nn.Module, ranks: int) -> Decoder:
    """View `model`, after making sure that SPD's maths covers it and that `ranks` ranks can share it.

    Raises:
        InputError: one of the two is not so.
    """
    view = decoder(model)
    if reason := refusal(view.model.config, "spd"):
        raise InputError(reason)
    check_ranks(view.config, ranks)
    return view


def facts(view: Decoder) -> ModelFacts:
    """The geometry of a model that a plan records and is checked against."""
    return ModelFacts.seen(view)


def carry(view: Decoder, plan: SyncPlan) -> None:
    """Note in the model's config, as in that of a checkpoint, what `plan` says was done to its weights."""
    if plan.healed or plan.heads:
        view.model.config.spd_plan = plan.to_dict()
    else:
        vars(view.model.config).pop("spd_plan", None)
    guard(view)


def guard(view: Decoder) -> None:
    """Let no save but ours write weights that only their plan makes whole: transformers' names no plan's class."""
    model: Any = view.model
    if made_for(view) is None:
        vars(model).pop("save_pretrained", None)
    else:
        model.save_pretrained = _refuse_to_save


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise InputError(
        "model has weights healed or regrouped for a plan, and its own save_pretrained would write them as an "
        "original's: save it with elision.spd.save(model, plan, path)"
    )


def made_for(view: Decoder) -> SyncPlan | None:
    """The plan that the model's weights were healed or regrouped for; None: they are the original's."""
    carried = getattr(view.model.config, "spd_plan", None)
    plan = None if carried is None else SyncPlan.from_dict(carried, "spd_plan of the model's config")
    return plan if plan is not None and (plan.healed or plan.heads) else None


def healed_beside(view: Decoder) -> dict[int, str]:
    """The corrections, by block, beside which the model's weights were healed: they are wrong without them."""
    made = made_for(view)
    return {} if made is None else {block: kind for block, kind in made.corrections.items() if block in made.healed}


def check_carried(view: Decoder, plan: SyncPlan) -> None:
    """Raise InputError unless what `plan` says was done to weights was done to this model's."""
    if not (plan.healed or plan.heads):
        return
    made = made_for(view)
    lacking = healed_beside(view).items() - plan.corrections.items()
    if made is None or _of_weights(made) != _of_weights(plan) or lacking:
        blocks = sorted({*plan.healed, *plan.heads})
        raise InputError(
            f"plan was carried out on blocks {blocks} of another model than this: give the model and the plan that "
            "elision.spd.heal, regroup or read returned together"
        )


def _of_weights(plan: SyncPlan) -> SyncPlan:
    """What of a plan weights are made for, corrections aside: a healed block may be given one afterwards."""
    return replace(plan, corrections={}, healing={}, model=None, calibration=None, verified=None)


def check_visited(view: Decoder) -> None:
    """Raise InputError unless every block can be split into ranks while it is visited, wherever its weights are.

    They may be streamed, or offloaded by accelerate where one device computes and holds the embeddings.
    """
    devices = execution_devices(view.model)
    if len(devices) > 1 or view.model.device.type == "meta":
        where = f"over {', '.join(sorted(devices))}" if len(devices) > 1 else "with its embeddings offloaded"
        raise InputError(
            f"model is dispatched by accelerate {where}: load it onto one device, or read it block by block with "
            "elision.spd.open_streamed (--stream)"
        )
    for block in view.blocks:
        check_plain(block, streamed=True)


def check_unsimulated(block: Block) -> None:
    """Raise InputError unless `block` has its own forward."""
    if any("forward" in vars(part) and not hasattr(part, "_hf_hook") for part in (block.layer, block.o.base)):
        raise InputError(
            f"block {block.index}'s forward is replaced already, by another simulation: remove that one first"
        )


def check_plain(block: Block, *, streamed: bool = False) -> None:
    """Raise InputError unless `block` can be split into ranks here: its own forward, plain weights, all present.

    `streamed`: weights may be absent where they are read when they are needed, by streaming.py or accelerate's hooks.
    """
    parts = (block.layer, block.o.base)
    if not streamed and any(hasattr(part, "_hf_hook") for part in parts):
        raise InputError(
            f"block {block.index} is dispatched by accelerate, over several devices or to disk: load the model onto "
            "one device, or read it block by block with elision.spd.open_streamed (--stream)"
        )
    check_unsimulated(block)
    if is_streamed(block.layer) and not streamed:
        raise InputError(
            f"block {block.index} is read from disk when it is visited, and this needs all blocks at once: load the "
            "model whole (calibrate and heal do without, but for the method integrated)"
        )
    for name, projection in block.projections.items():
        where = f"block {block.index}'s {name} projection"
        if projection.module is not projection.base:
            raise InputError(f"{where} carries an adapter: merge it first, with model.merge_and_unload()")
        if projection.weight.is_meta and not (is_streamed(block.layer) or hasattr(projection.module, "_hf_hook")):
            raise InputError(f"{where} is offloaded: load the model without a device_map, or read it block by block")


def check_unadapted(block: Block) -> None:
    """Raise InputError where an adapter was put on a projection whose weight a plan's forward reads past its module.

    Asked at every forward: adapters come and go. Those on Q, K and V act, for attention is the model's own.
    """
    for name in ("o", "gate", "up", "down"):
        projection = getattr(block, name)
        if projection is not None and not isinstance(projection.module, nn.Linear):
            raise InputError(
                f"block {block.index}'s {name} projection carries an adapter, which a plan's forward would pass over: "
                "merge it before the plan is applied, or take it off"
            )


def local_block(block: Block, rank: int, ranks: int, correction: Correction | None = None) -> LocalBlock:
    """The part of `block` that `rank` of `ranks` holds: views of the model's own parameters, nothing copied."""
    own = shard(rank, ranks, block.heads, block.kv_heads, block.intermediate_size)
    channels = span(own.channels)
    assert block.mlp_norm is not None  # a family without it is refused

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[channels]

    own_heads = span(own.heads, block.head_dim)
    corrected = {} if correction is None else correction.local(rank, own_heads)
    return LocalBlock(
        o=block.o.weight[:, own_heads],
        up=block.up.weight[channels],
        down=block.down.weight[:, channels],
        norm=block.mlp_norm,
        activation=block.activation,
        gate=block.gate and rows(block.gate.weight),
        up_bias=rows(block.up.bias),
        gate_bias=block.gate and rows(block.gate.bias),
        o_bias=block.o.bias,
        down_bias=block.down.bias,
        residual_multiplier=block.residual_multiplier,
        **corrected,
    )


def spd_layer(block: Block, ranks: int, correction: Correction | None, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The decoder layer's forward with its first sync dropped: (batch, sequence, hidden) to the same.

    The attention module's output projection must hand its input through. `kwargs` are what the model gives the layer
    (mask, positions, cache); they go to the attention module unread.
    """
    check_unadapted(block)
    heads = head_outputs(block, hidden_states, kwargs)
    local = [local_block(block, rank, ranks, correction) for rank in range(ranks)]
    own_heads = heads.tensor_split(ranks, dim=-1)
    total = reduce(torch.add, (spd_share(hidden_states, *own) for own in zip(own_heads, local, strict=True)))
    return spd_output(hidden_states, total, local[0])


def int8_layer(block: Block, ranks: int, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The decoder layer's forward with both syncs, the first in int8; as `spd_layer` otherwise."""
    check_unadapted(block)
    heads = head_outputs(block, hidden_states, kwargs)
    local = [local_block(block, rank, ranks) for rank in range(ranks)]
    r = block.residual_multiplier
    shares = [attention_share(own, part) for own, part in zip(heads.tensor_split(ranks, dim=-1), local, strict=True)]
    u = add_residual(hidden_states, all_reduce(shares), r, block.o.bias)
    return add_residual(u, reduce(torch.add, (mlp_share(u, part) for part in local)), r, block.down.bias)


def skipped_layer(block: Block, ranks: int, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The decoder layer's forward without attention and its sync: X + r (MLP(norm(X)) + c); as `spd_layer` otherwise.

    A key/value cache is still told how many tokens went by, because the model asks its first block for that.
    """
    check_unadapted(block)
    cache = kwargs.get("past_key_values")
    if cache is not None:
        batch, tokens = hidden_states.shape[:2]
        nothing = hidden_states.new_zeros(batch, block.kv_heads, tokens, block.head_dim)  # static ones have this shape
        cache.update(nothing, nothing, block.index)
    local = [local_block(block, rank, ranks) for rank in range(ranks)]
    total = reduce(torch.add, (mlp_share(hidden_states, part) for part in local))
    return add_residual(hidden_states, total, block.residual_multiplier, block.down.bias)


def head_outputs(block: Block, hidden_states: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """A, all heads' attention output before O (batch, sequence, heads * head_dim), while `block` is simulated."""
    assert block.attention_norm is not None and "forward" in vars(block.o.base)
    return block.attention(hidden_states=block.attention_norm(hidden_states), **kwargs)[0]


def _identity(input: Tensor) -> Tensor:
    return input
