"""The fast step: the loss of a whole decoder over rows (rows.py), equal to the masked-dense reference.

The stack's forward is written out once more, for families that share Llama's block: embeddings of the rows that count,
per block norm + QKV, attention, O + residual, norm + MLP + residual (linear.py, mlp.py), then final norm, head and loss
at the rows that bear it (head.py). All parts that carry a model's own ideas are the model's own modules and functions:
embeddings, rotary angles, q/k norms, attention function, final norm, activation.

What it does not cover it names (obstacles.py), and the caller takes the reference instead. Nothing is remembered
between steps but the weights' layout, so what changes meanwhile is seen by the next forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from elision.blocks import Block, Decoder
from elision.sparselora.adapters import stacked
from elision.sparselora.attend import attend, rotate, window_mask
from elision.sparselora.choices import BlockChoices, SparseBatch
from elision.sparselora.head import head_loss
from elision.sparselora.layout import BlockWeights, Layout, stacked_bias
from elision.sparselora.linear import Choose, Norm, linear_residual, norm_linear
from elision.sparselora.mlp import GatedMLP, mlp_residual
from elision.sparselora.obstacles import call_obstacle, hooked, model_obstacle
from elision.sparselora.rows import Elisions, Rows


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
    """The fast step of one model. `own` are the ids of hooks that are this library's."""

    def __init__(self, view: Decoder, choices: list[BlockChoices], elisions: Elisions, own: set[int]) -> None:
        self.view = view
        self.choices = choices
        self.elisions = elisions.effective()
        self.own = own
        self.layout = Layout(view.blocks)

    def obstacle(self, call: dict[str, Any] | None = None, labels: Tensor | None = None) -> str | None:
        """Why the model as it is now, or this call of it, takes the reference; None: it does not."""
        return model_obstacle(self.view, self.own) or (
            call_obstacle(call, labels) if call is not None and labels is not None else None
        )

    def remove(self) -> None:
        """Put the weights back."""
        self.layout.remove()

    def forward(self, step: Step) -> CausalLMOutputWithPast:
        """What the causal LM puts out: the loss, or logits, or both."""
        step = step.to(self.view.blocks[0].q.base.weight.device)
        with torch.autocast(step.rows.order.device.type, enabled=False):
            return self._output(step, self._stack(step))

    def hidden(self, step: Step) -> BaseModelOutputWithPast:
        """What the stack of blocks puts out, (batch, sequence, hidden): zeros where no row was computed to its end."""
        step = step.to(self.view.blocks[0].q.base.weight.device)
        assert self.view.final_norm is not None
        with torch.autocast(step.rows.order.device.type, enabled=False):
            states = step.spread(self.view.final_norm(self._stack(step)))
            return BaseModelOutputWithPast(last_hidden_state=states)  # type: ignore[arg-type]

    def _stack(self, step: Step) -> Tensor:
        """The rows behind the last block, all of them or those that bear the loss."""
        view, batch = self.view, step.batch
        self.layout.refresh()
        rows, weight = step.rows, view.blocks[0].q.base.weight
        h = self._embed(step, rows).to(weight.dtype)
        if not h.requires_grad and _reentrant(view.blocks):
            h.requires_grad_()  # it computes gradients only where an input asks for one
        cos, sin = self._angles(step, rows, h)
        last = len(view.blocks) - 1 if step.elisions.last_block else -1
        if batch is not None and rows.sparse > rows.total - rows.bearing:
            last = -1  # the ablation with sparse outputs, where every row has a say in the last block's channels
        for block, weights in zip(view.blocks, self.layout.weights, strict=True):
            assert weights is not None
            asked = rows.bearing if block.index == last else rows.total
            run = partial(self._block, block, weights, rows=rows, asked=asked, angles=(cos, sin), batch=batch)
            h = run(h) if (checkpoint := _checkpoint(block)) is None else checkpoint(run, h)
        return h

    def _embed(self, step: Step, rows: Rows) -> Tensor:
        view, call = self.view, step.call
        if call.get("inputs_embeds") is not None:
            h = call["inputs_embeds"].flatten(0, 1).index_select(0, rows.order)
        else:
            h = view.embeddings(call["input_ids"].flatten().index_select(0, rows.order)[None])[0]
            if step.elisions.inputs and not any(p.requires_grad for p in view.embeddings.parameters()):
                h = h.detach()  # enable_input_require_grads asks for a gradient that nothing reads
        multiplier = getattr(view.config, "embedding_multiplier", 1.0)
        return h if multiplier == 1.0 else h * multiplier

    def _angles(self, step: Step, rows: Rows, h: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T, rotary_dim) of each row, by the model's own module on the positions of the batch."""
        sequence, positions = step.shape[1], step.call.get("position_ids")
        if positions is None:
            positions = torch.arange(sequence, device=h.device)[None]
        stack: Any = self.view.model.get_decoder()
        place = rows.order if len(positions) > 1 else rows.order % sequence
        cos, sin = (angle.flatten(0, 1).index_select(0, place) for angle in stack.rotary_emb(h, position_ids=positions))
        return cos.to(h.dtype), sin.to(h.dtype)

    def _block(
        self,
        block: Block,
        weights: BlockWeights,
        h: Tensor,
        rows: Rows,
        asked: int,
        angles: tuple[Tensor, Tensor],
        batch: SparseBatch | None,
    ) -> Tensor:
        """Output of the last `asked` rows of a block, all of them or dense ones; the others give keys and values."""
        choices, width, dimension = self.choices[block.index], block.heads * block.head_dim, block.head_dim
        sparse = rows.sparse
        still = sparse if asked == rows.total else 0  # sparse rows among those asked
        norm = _norm(block.attention_norm)
        bias = stacked_bias([block.q, block.k, block.v])
        mine = h if asked == rows.total else h[rows.total - asked :]

        def project(x: Tensor, names: tuple[str, ...], low: int, high: int, count: int) -> Tensor:
            part = slice(low, high)
            adapters = stacked([block.q, block.k, block.v], h.dtype, low, high)
            chosen = _choose(choices, batch, names)
            own = None if bias is None else bias[part]
            return norm_linear(x, norm, weights.qkv[part], own, adapters, count, chosen)

        if asked == rows.total:
            y = project(h, ("q", "k", "v"), 0, len(weights.qkv), sparse)
            query, key_value = y[:, :width], y[:, width:]
        else:
            key_value = project(h, ("k", "v"), width, len(weights.qkv), sparse)
            query = project(mine, ("q",), 0, width, still)
        q = query.view(asked, block.heads, dimension)
        k, v = key_value.view(rows.total, 2 * block.kv_heads, dimension).chunk(2, dim=1)
        q = q if block.q_norm is None else block.q_norm(q)
        k = k if block.k_norm is None else block.k_norm(k)
        cos, sin = angles
        q = rotate(q, cos[rows.total - asked :], sin[rows.total - asked :])
        z = attend(block.attention, q, rotate(k, cos, sin), v, rows, window_mask(rows, block.sliding_window))
        kept = batch.kept.get((block.index, "o")) if batch is not None else None
        out = linear_residual(
            mine, z.flatten(1), weights.o, block.o.bias, stacked([block.o], h.dtype),
            block.residual_multiplier, still, kept,
        )  # fmt: skip
        assert block.gate is not None
        mlp = GatedMLP(
            _norm(block.mlp_norm),
            weights.gate_up,
            stacked_bias([block.gate, block.up]),
            weights.down,
            block.down.bias,
            block.activation,
            block.residual_multiplier,
        )
        gate_up, down = stacked([block.gate, block.up], h.dtype), stacked([block.down], h.dtype)
        return mlp_residual(out, mlp, gate_up, down, still, _choose(choices, batch, ("up",)))

    def _output(self, step: Step, h: Tensor) -> CausalLMOutputWithPast:
        view, labels, items = self.view, step.call.get("labels"), step.call.get("num_items_in_batch")
        rows = step.rows
        if not step.elisions.logits:
            logits = step.spread(view.logits(h))
            if labels is None:
                return CausalLMOutputWithPast(logits=logits)
            loss = view.model.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], num_items_in_batch=items
            )
            return CausalLMOutputWithPast(loss=loss, logits=logits)
        h, head = h[len(h) - rows.bearing :], view.lm_head
        if type(head) is nn.Linear and "forward" not in vars(head) and not (head.weight.requires_grad or hooked(head)):
            assert view.final_norm is not None
            x = view.final_norm(h)
            total = head_loss(x, head.weight.detach(), head.bias, rows.targets, view.logits_scaling)
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


def _checkpoint(block: Block) -> Callable[..., Tensor] | None:
    """What the layer runs its forward under where gradient checkpointing is on for it; nothing to save without grad."""
    layer: Any = block.layer
    on = getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()
    return layer._gradient_checkpointing_func if on else None


def _reentrant(blocks: tuple[Block, ...]) -> bool:
    """Whether some layer may be under reentrant checkpointing; other kinds say that they are not."""
    found = [checkpoint for block in blocks if (checkpoint := _checkpoint(block)) is not None]
    return any(getattr(checkpoint, "keywords", {}).get("use_reentrant") is not False for checkpoint in found)


def _choose(choices: BlockChoices, batch: SparseBatch | None, names: tuple[str, ...]) -> Choose | None:
    """What tells a map its kept channels, the outputs of the stacked projections `names`; None: it is dense."""
    plan, block, index = choices.plan, choices.block, choices.block.index
    if batch is None or all(plan.sparsity(index, name) == 0 for name in names):
        return None

    def choose(x: Tensor) -> Tensor:
        kept, start = [], 0
        if batch.kept.keys().isdisjoint((index, name) for name in names):
            x = x.to(torch.promote_types(x.dtype, torch.float32))  # once for all scores
        for name in names:
            size = block.projections[name].out_features
            sparse = plan.sparsity(index, name) > 0
            own = choices.kept_in(batch, name, lambda: x) if sparse else torch.arange(size, device=x.device)
            kept.append(own + start)
            start += size
        return kept[0] if len(kept) == 1 else torch.cat(kept)

    return choose


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)
