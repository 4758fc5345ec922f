"""The fast step: the loss of a whole decoder over rows (rows.py), equal to the masked-dense reference.

The stack's forward is written out once more, for the blocks that blocks.py describes: embeddings of the rows that
count, per block norm + QKV, attention, O + residual, norm + MLP + residual (linear.py, mlp.py), then final norm, head
and loss at the rows that bear it (head.py). Norms stand where the family has them: before a part, behind it or both.
All parts that carry a model's own ideas are the model's own modules and functions: embeddings and positions, rotary
angles, q/k norms, attention function, norms behind a part, final norm, activation.

Under autocast the frozen products, the adapters' and attention's are taken in its dtype; residual stream, norms and
rotation keep that of the rows, as in the model's own forward. Where FSDP2 shards whole layers, a block is computed
inside its layer's own call, whose hooks gather the weights around it in forward and have them ready in backward.

What it does not cover it names (obstacles.py), and the caller takes the reference instead. Nothing is remembered
between steps but the weights' layout, so what changes meanwhile is seen by the next forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from elision.blocks import Block, Decoder
from elision.sparselora.adapters import Masks, draw, stacked
from elision.sparselora.attend import attend, rotate
from elision.sparselora.choices import BlockChoices, SparseBatch
from elision.sparselora.head import head_loss
from elision.sparselora.layout import BlockWeights, Layout, stacked_bias
from elision.sparselora.linear import Choose, linear_residual, norm_linear
from elision.sparselora.mlp import MLP, mlp_residual
from elision.sparselora.norms import Norm
from elision.sparselora.obstacles import call_obstacle, hooked, model_obstacle, product_dtype, row_dtype
from elision.sparselora.rows import Elisions, Rows, sent
from elision.sparselora.tokens import Given


@dataclass(frozen=True)
class Step:
    """One forward: `batch` has the channels chosen so far (None: all dense); the call's labels may be missing where
    the loss is computed elsewhere.
    """

    call: dict[str, Any]
    rows: Rows
    batch: SparseBatch | None
    elisions: Elisions
    shape: tuple[int, int]  # (batch, sequence)

    def to(self, device: torch.device) -> Step:
        return replace(self, rows=self.rows.to(device))

    def spread(self, found: Tensor) -> Tensor:
        """(batch, sequence, channels) with the last len(found) rows at their places, and zeros elsewhere."""
        batch, sequence = self.shape
        places = self.rows.order[self.rows.total - len(found) :]
        return found.new_zeros(batch * sequence, found.shape[1]).index_copy(0, places, found).view(batch, sequence, -1)


class Fast:
    """The fast step of `model`, which `view` shows."""

    def __init__(self, model: nn.Module, view: Decoder, choices: list[BlockChoices], elisions: Elisions) -> None:
        self.model = model
        self.view = view
        self.choices = choices
        self.elisions = elisions.effective()
        self.layout = Layout(view.blocks)

    def obstacle(self, call: dict[str, Any] | None = None, given: Given | None = None) -> str | None:
        """Why the model as it is now, or this call of it, takes the reference; None: it does not."""
        if call is None or given is None:
            return model_obstacle(self.model, self.view)
        return model_obstacle(self.model, self.view, called=True) or call_obstacle(call, given, self.view)

    def remove(self) -> None:
        """Put the weights back."""
        self.layout.remove()

    def forward(self, step: Step) -> CausalLMOutputWithPast:
        """What the causal LM puts out: the loss, or logits, or both."""
        step = step.to(self.view.blocks[0].q.base.weight.device)
        return self._output(step, self._stack(step))

    def hidden(self, step: Step) -> BaseModelOutputWithPast:
        """What the stack of blocks puts out, (batch, sequence, hidden): zeros where no row was computed to its end."""
        step = step.to(self.view.blocks[0].q.base.weight.device)
        states = step.spread(self._final(self._stack(step)))
        return BaseModelOutputWithPast(last_hidden_state=states)  # type: ignore[arg-type]

    def _stack(self, step: Step) -> Tensor:
        """The rows behind the last block, all of them or those that bear the loss."""
        view, batch, rows = self.view, step.batch, step.rows
        h = self._embed(step, rows).to(row_dtype(view))
        lower = _lower(view)
        self.layout.refresh()
        if not h.requires_grad and _reentrant(view.blocks):
            h.requires_grad_()  # it computes gradients only where an input asks for one
        angles = self._angles(step, rows, h)
        last = len(view.blocks) - 1 if step.elisions.last_block else -1
        if batch is not None and rows.sparse > rows.total - rows.bearing:
            last = -1  # the ablation with sparse outputs, where every row has a say in the last block's channels
        with torch.autocast(h.device.type, enabled=False):  # whose casts a _Pass makes itself
            for block, weights, choices in zip(view.blocks, self.layout.weights, self.choices, strict=True):
                asked = rows.bearing if block.index == last else rows.total
                masks = draw(block, step.shape, rows.order)
                run = _Pass(block, view, weights, choices, batch, rows, asked, masks, angles[block.index], lower)
                h = run(h) if (checkpoint := checkpointing(block)) is None else checkpoint(run, h)
        return h

    def _embed(self, step: Step, rows: Rows) -> Tensor:
        view, call = self.view, step.call
        stack: Any = view.model.get_decoder()
        if call.get("inputs_embeds") is not None:
            h = call["inputs_embeds"].flatten(0, 1).index_select(0, rows.order)
        else:
            h = view.embeddings(call["input_ids"].flatten().index_select(0, rows.order)[None])
            if step.elisions.inputs and h.is_leaf:  # nothing below is trained,
                h = h.detach()  # but enable_input_require_grads asks for a gradient that nothing reads
            h = h[0]
        if getattr(stack, "project_in", None) is not None:
            h = stack.project_in(h)
        if hasattr(stack, "embed_positions"):  # learned positions count the tokens that the mask lets through
            positions, mask = call.get("position_ids"), call.get("attention_mask")
            if positions is None:
                mask = torch.ones(step.shape, dtype=torch.long, device=h.device) if mask is None else mask
                positions = (mask.cumsum(dim=1) * mask - 1).long()
            positions = sent(positions.expand(step.shape).flatten(), h.device).index_select(0, rows.order)
            h = h + stack.embed_positions(mask, 0, position_ids=positions[None])[0]
        multiplier = getattr(view.config, "embedding_multiplier", 1.0)
        return h if multiplier == 1.0 else h * multiplier

    def _angles(self, step: Step, rows: Rows, h: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        """Of every block: cosines and sines (T, rotary_dim) of each row, by the model's own module on the positions of
        the batch. A module that knows types of layers (Gemma 3) is asked for each.
        """
        view, stack = self.view, cast(Any, self.view.model.get_decoder())
        if not view.family.rotary:
            return [None] * len(view.blocks)
        sequence, positions = step.shape[1], step.call.get("position_ids")
        if positions is None:
            positions = torch.arange(sequence, device=h.device)[None]
        positions = sent(positions, h.device)
        place = rows.order if len(positions) > 1 else rows.order % sequence
        by_type = hasattr(stack.rotary_emb, "layer_types")
        types = view.config.layer_types if by_type else [None] * len(view.blocks)
        found: dict[str | None, tuple[Tensor, Tensor]] = {}
        for kind in dict.fromkeys(types):
            pair = stack.rotary_emb(h, positions, kind) if by_type else stack.rotary_emb(h, position_ids=positions)
            cos, sin = (angle.flatten(0, 1).index_select(0, place).to(h.dtype) for angle in pair)
            found[kind] = cos, sin
        return [found[kind] for kind in types]

    def _final(self, h: Tensor) -> Tensor:
        for module in (self.view.final_norm, self.view.project_out):
            h = h if module is None else module(h)
        return h

    def _output(self, step: Step, h: Tensor) -> CausalLMOutputWithPast:
        view, labels, items = self.view, step.call.get("labels"), step.call.get("num_items_in_batch")
        rows, head = step.rows, cast(Any, view.lm_head)
        if not step.elisions.logits:
            logits = step.spread(view.logits(h))
            if labels is None:
                return CausalLMOutputWithPast(logits=logits)
            loss = view.model.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], num_items_in_batch=items
            )
            return CausalLMOutputWithPast(loss=loss, logits=logits)
        h = h[len(h) - rows.bearing :]
        sharded = isinstance(view.lm_head, FSDPModule)
        plain = nn.Linear in (type(head), *(type(head).__bases__ if sharded else ())) and "forward" not in vars(head)
        if plain and not (head.weight.requires_grad or hooked(head, sharding=sharded)):

            def loss_of(h: Tensor) -> Tensor:
                dtype = _lower(view) or h.dtype
                weight, bias = head.weight.detach().to(dtype), None if head.bias is None else head.bias.to(dtype)
                return head_loss(h.to(dtype), weight, bias, rows.targets, view.logits_scaling, view.logits_softcap)

            h = self._final(h)
            total = _called(head, loss_of, h) if sharded else loss_of(h)
            count = rows.bearing if items is None else items.to(h.device) if isinstance(items, Tensor) else items
            return CausalLMOutputWithPast(loss=total / count)
        logits = view.logits(h)
        loss = view.model.loss_function(
            logits=logits,
            labels=None,
            vocab_size=logits.shape[-1],
            num_items_in_batch=items,
            shift_labels=rows.targets,
        )
        return CausalLMOutputWithPast(loss=loss)


def _lower(view: Decoder) -> torch.dtype | None:
    """The dtype that autocast takes the frozen products in; None: there is none, and it is that of the rows."""
    return product_dtype(view) if torch.is_autocast_enabled(view.blocks[0].q.base.weight.device.type) else None


def _called(module: nn.Module, run: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """`run` as the module's own call: its hooks run around it. Not module(h), where layers checkpoint once more."""
    module.forward = run
    try:
        return nn.Module.__call__(module, h)
    finally:
        del module.forward


def checkpointing(block: Block) -> Callable[..., Tensor] | None:
    """What the layer runs its forward under where gradient checkpointing is on for it; nothing to save without grad."""
    layer: Any = block.layer
    on = getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()
    return layer._gradient_checkpointing_func if on else None


def _reentrant(blocks: tuple[Block, ...]) -> bool:
    """Whether some layer may be under reentrant checkpointing; other kinds say that they are not."""
    found = [checkpoint for block in blocks if (checkpoint := checkpointing(block)) is not None]
    return any(getattr(checkpoint, "keywords", {}).get("use_reentrant") is not False for checkpoint in found)


@dataclass
class _Pass:
    """One block in one forward: the last `asked` rows go through it, all of them or dense ones; the others give keys
    and values.
    """

    block: Block
    view: Decoder
    weights: BlockWeights
    choices: BlockChoices
    batch: SparseBatch | None
    rows: Rows
    asked: int
    masks: Masks
    angles: tuple[Tensor, Tensor] | None  # of every row; None: no rotation
    lower: torch.dtype | None  # of the products; None: that of the stream

    def __call__(self, h: Tensor) -> Tensor:
        """The residual stream (asked, hidden) behind the block, of h (T, hidden)."""
        sharded = isinstance(self.block.layer, FSDPModule)
        return _called(self.block.layer, self._computed, h) if sharded else self._computed(h)

    def _computed(self, h: Tensor) -> Tensor:
        dtype = h.dtype if self.lower is None else self.lower
        return self._mlp(self._attention(h, dtype), dtype)

    @property
    def __self__(self) -> nn.Module:
        """The layer whose forward this stands for: a host's own checkpointing asks a bound method for its module."""
        return self.block.layer

    @property
    def whole(self) -> bool:
        """Whether every row goes through the block."""
        return self.asked == self.rows.total

    @property
    def sparse(self) -> int:
        """Sparse rows among those that go through."""
        return self.rows.sparse if self.whole else 0

    @property
    def mine(self) -> slice:
        """The rows that go through."""
        return slice(self.rows.total - self.asked, None)

    def _attention(self, h: Tensor, dtype: torch.dtype) -> Tensor:
        block, rows, dimension = self.block, self.rows, self.block.head_dim
        width = block.heads * dimension
        norm, mine = _frozen(block.attention_norm, self.view, h.dtype), h if self.whole else h[self.mine]
        stack = [block.q, block.k, block.v]
        bias = stacked_bias(stack, dtype)
        end = sum(projection.out_features for projection in stack)

        def project(x: Tensor, names: tuple[str, ...], low: int, high: int, chosen: slice, sparse: int) -> Tensor:
            part = slice(low, high)
            adapters = stacked(stack, dtype, self.masks, chosen, low, high)
            own = None if bias is None else bias[part]
            choose = _choose(self.choices, self.batch, names)
            return norm_linear(x, norm, lambda: self.weights.qkv(dtype, part), own, adapters, sparse, choose)

        if self.whole:
            y = project(h, ("q", "k", "v"), 0, end, slice(None), rows.sparse)
            query, key, value = y.split([projection.out_features for projection in stack], dim=1)
        else:
            key, value = project(h, ("k", "v"), width, end, slice(None), rows.sparse).chunk(2, dim=1)
            query = project(mine, ("q",), 0, width, self.mine, 0)
        q, k = _heads(query, block.q_norm, dimension), _heads(key, block.k_norm, dimension)
        if self.angles is not None:
            cos, sin = self.angles
            q, k = rotate(q, cos[self.mine], sin[self.mine]), rotate(k, cos, sin)
        v, implementation = value.unflatten(1, (-1, dimension)), str(self.view.config._attn_implementation)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        z = attend(block.attention, q, k, v, rows, block.sliding_window, implementation).flatten(1)
        kept = self.batch.kept.get((block.index, "o")) if self.batch is not None else None
        adapters = stacked([block.o], dtype, self.masks, self.mine)
        added = block.norms in ("pre", "post")
        out = linear_residual(
            mine if added else None, z, lambda: self.weights.o(dtype), stacked_bias([block.o], dtype), adapters,
            block.residual_multiplier, self.sparse, kept,
        )  # fmt: skip
        return _after(mine, out, block.attention_post_norm, added)

    def _mlp(self, h: Tensor, dtype: torch.dtype) -> Tensor:
        block, added = self.block, self.block.norms in ("pre", "post")
        stack = [projection for projection in (block.gate, block.up) if projection is not None]
        mlp = MLP(
            _frozen(block.mlp_norm, self.view, h.dtype),
            lambda: self.weights.up(dtype),
            stacked_bias(stack, dtype),
            lambda: self.weights.down(dtype),
            stacked_bias([block.down], dtype),
            block.activation,
            block.intermediate_size,
            block.gate is not None,
            block.residual_multiplier,
            added,
        )
        up = stacked(stack, dtype, self.masks, self.mine)
        down = stacked([block.down], dtype, self.masks, self.mine)
        choose = _choose(self.choices, self.batch, ("up",))
        return _after(h, mlp_residual(h, mlp, up, down, self.sparse, choose), block.mlp_post_norm, added)


def _heads(x: Tensor, norm: Any, dimension: int) -> Tensor:
    """(T, heads, dimension), normed head by head or, where the norm is as wide as all heads, together."""
    if norm is not None and norm.weight.numel() == x.shape[1] != dimension:
        return norm(x).unflatten(1, (-1, dimension))
    x = x.unflatten(1, (-1, dimension))
    return x if norm is None else norm(x)


def _after(h: Tensor, out: Tensor, norm: nn.Module | None, added: bool) -> Tensor:
    """The stream behind a part whose output is `out`: with the stream in it already, or still to be `added` to."""
    out = out if norm is None else norm(out)
    return out if added else h + out


def _frozen(module: Any, view: Decoder, dtype: torch.dtype) -> Norm | None:
    """A norm module of the model for rows of `dtype`, as linear.py computes it."""
    if module is None:
        return None
    wide = torch.promote_types(dtype, torch.float32)
    if isinstance(module, nn.LayerNorm):
        weight, bias = (None if t is None else t.detach().to(wide) for t in (module.weight, module.bias))
        return Norm(weight, module.eps, bias, centred=True)
    weight = module.weight.detach()
    if view.family.unit_offset:
        return Norm(1.0 + weight.to(wide), module.eps)
    return Norm(weight, module.variance_epsilon)


def _choose(choices: BlockChoices, batch: SparseBatch | None, names: tuple[str, ...]) -> Choose | None:
    """What tells a map its kept channels, the outputs of the stacked projections `names`; None: it is dense."""
    plan, block, index = choices.plan, choices.block, choices.block.index
    if batch is None or all(plan.sparsity(index, name) == 0 for name in names):
        return None

    def choose(x: Tensor) -> Tensor:
        kept, start = [], 0
        if plan.selection in ("svd", "whitened"):
            x = x.to(torch.promote_types(x.dtype, torch.float32))  # once for all scores
        for name in names:
            size = block.projections[name].out_features
            sparse = plan.sparsity(index, name) > 0
            own = choices.kept_in(batch, name, lambda: x) if sparse else torch.arange(size, device=x.device)
            kept.append(own + start)
            start += size
        return kept[0] if len(kept) == 1 else torch.cat(kept)

    return choose
