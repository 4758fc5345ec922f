"""What a LoRA step costs in floating-point operations, dense and under a plan.

A product of (T, in) with (in, out) counts 2 T in out. Counted are the products of a forward and a backward; norms,
activations, softmax, gathers and the optimizer are not, as in torch's own counter, with which this agrees.

    base       forward, and the gradient of the input; weights are frozen, so there is no gradient of theirs
    adapters   both factors, with both their gradients; DoRA's norm of the full weight, forward alone: it is a constant
    attention  Q K' and P V: two products a head forward, four backward (a kernel that recomputes Q K' does one more)
    estimator  the scores of the plan's selection
    head       logits of the positions that are asked for, forward and backward

A gradient is counted where one flows: nothing below the first adapter has any. Context rows of a pruned projection
count the kept channels only, all other rows count in full. Attention is counted in full; its causal half, what a
causal kernel computes, is the other figure (`Cost.total(causal=True)`).

Not counted is what gradient checkpointing computes again: whether it is on is often told only by the trainer, later.
That is a forward of the blocks without the head, with the channels that were chosen before, and so sparser than the
step as a whole: over dense LoRA that checkpoints too, operations allow a few percent more speedup than is told.

The paper's percentages (maths: The paper's settings) count the base products, sparse steps and dense first steps
together, and no attention, adapters or estimator; its 512-token figures with 25% output tokens, with and without the
head, are met by `relative(..., count=("base", "head"))` and `relative(..., count=("base",))`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from elision import blocks
from elision.errors import InputError
from elision.sparselora import select
from elision.sparselora.adapters import active, dora
from elision.sparselora.choices import tokens_read
from elision.sparselora.factors import SCORED, estimated
from elision.sparselora.plan import PART_OF, SparsityPlan
from elision.sparselora.rows import grouped
from elision.sparselora.tokens import TokenKinds


@dataclass(frozen=True)
class Shape:
    """Sizes that the products of a decoder depend on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool = True

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Sizes of `model`, a transformers causal LM or a PEFT model around one."""
        view = blocks.decoder(model)
        block = view.blocks[0]
        return cls(
            layers=len(view.blocks),
            hidden=block.hidden_size,
            intermediate=block.intermediate_size,
            heads=block.heads,
            kv_heads=block.kv_heads,
            head_dim=block.head_dim,
            vocabulary=view.config.vocab_size,
            gated=block.gate is not None,
        )

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of every projection of a block."""
        query, kv, wide = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate
        sizes = {"q": (self.hidden, query), "k": (self.hidden, kv), "v": (self.hidden, kv), "o": (query, self.hidden)}
        gate = {"gate": (self.hidden, wide)} if self.gated else {}
        return {**sizes, **gate, "up": (self.hidden, wide), "down": (wide, self.hidden)}


@dataclass(frozen=True)
class Adapter:
    """One LoRA pair of a layer: `projections` are those that its outputs serve, several where they are fused."""

    projections: tuple[str, ...]
    rank: int
    inputs: int
    outputs: int
    dora: bool = False

    def norm(self, fast_path: bool) -> float:
        """Operations of a norm of the adapted weight: by its factors (narrow.py) or, as PEFT does, with B A made."""
        if not self.dora:
            return 0.0
        if fast_path:
            return 2.0 * self.rank * (self.inputs * self.outputs + self.rank * (self.inputs + self.outputs))
        return 2.0 * self.rank * self.inputs * (self.inputs + self.outputs)  # of an identity of the inputs


@dataclass(frozen=True)
class Workload:
    """One batch: `lengths` of its sequences as computed, how many of their tokens are sparse, and how many logits.

    `fast_path`: attention computes every sequence at the length of the longest in its grid (rows.py), and DoRA's norm
    is that of narrow.py; otherwise each sequence is computed at its own length, and the norm as PEFT has it.
    `last_block`: the last block leaves out everything but keys and values at positions that bear no loss.
    """

    lengths: tuple[int, ...]
    context: int
    logits: int
    fast_path: bool = False
    last_block: bool = False

    @classmethod
    def of(cls, kinds: TokenKinds, *, padded: bool, segment: Tensor | None = None) -> Self:
        """Of a batch. `padded`: as Hugging Face computes it, padding, elided tokens and all logits included; otherwise
        only the tokens, and the logits, that the loss depends on. `segment` (batch, sequence), as `tokens.segments`
        numbers them, tells packed sequences apart, which attend to themselves alone; None: one sequence a row.
        """
        batch, sequence = kinds.context.shape
        context = int(kinds.kept.sum())
        if padded:
            return cls((sequence,) * batch, context, batch * sequence)
        computed = ((kinds.context | kinds.dense) & ~kinds.elided).long()
        lengths = computed.sum(dim=1)
        if segment is not None:
            lengths = torch.zeros_like(computed).scatter_add_(1, segment, computed).flatten()
            lengths = lengths[lengths > 0]
        return cls(tuple(lengths.tolist()), context, int(kinds.loss_bearing.sum()))

    @classmethod
    def fast(cls, kinds: TokenKinds, segment: Tensor | None = None) -> Self:
        """Of the same batch as the fast path computes it, with all that is lossless left out."""
        work = cls.of(kinds, padded=False, segment=segment)
        return replace(work, fast_path=True, last_block=True)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def attended(self) -> tuple[int, ...]:
        """Lengths of the sequences in attention, those of one grid together."""
        if not self.fast_path:
            return self.lengths
        lengths = [length for length in self.lengths if length > 0]
        return tuple(lengths[group[0]] for group in grouped(lengths) for _ in group)


@dataclass(frozen=True)
class Cost:
    """Operations of one forward and backward."""

    base: float = 0.0
    adapters: float = 0.0
    attention: float = 0.0
    estimator: float = 0.0
    head: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    def total(self, *, head: bool = True, causal: bool = False) -> float:
        """All of it; without the output head, or with attention at its causal half, on request."""
        spared = (0.0 if head else self.head) + (self.attention / 2 if causal else 0.0)
        return sum(getattr(self, item.name) for item in fields(self)) - spared


def adapters_of(model: nn.Module) -> tuple[tuple[Adapter, ...], ...]:
    """The active LoRA adapters of every layer of `model`.

    Raises:
        InputError: the model is of no supported family.
    """
    layers = []
    for block in blocks.decoder(model).blocks:
        served: dict[int, list[str]] = {}
        modules: dict[int, Any] = {}
        for name, projection in block.projections.items():
            if isinstance(projection.module, LoraLayer):
                modules[id(projection.module)] = projection.module
                served.setdefault(id(projection.module), []).append(name)
        layers.append(
            tuple(
                Adapter(
                    tuple(served[key]), module.r[name], module.in_features, module.out_features, name in dora(module)
                )
                for key, module in modules.items()
                for name in active(module)
            )
        )
    return tuple(layers)


def uniform_adapters(
    shape: Shape, rank: int, projections: Iterable[str] = ("q", "k", "v", "o")
) -> tuple[tuple[Adapter, ...], ...]:
    """LoRA of one rank on the same projections of every layer."""
    layer = tuple(Adapter((name,), rank, *shape.projections[name]) for name in projections)
    return (layer,) * shape.layers


def step(
    shape: Shape,
    work: Workload,
    adapters: Sequence[Sequence[Adapter]],
    plan: SparsityPlan | None = None,
    *,
    input_gradient: bool = False,
) -> Cost:
    """Cost of one forward and backward of LoRA fine-tuning.

    Args:
        shape: sizes of the model.
        work: rows of the batch.
        adapters: of every layer, as `adapters_of` or `uniform_adapters` give them.
        plan: what context tokens leave out; None: the dense step.
        input_gradient: whether the first block's input needs a gradient (trained embeddings, or
            enable_input_require_grads, which reentrant checkpointing needs).

    Raises:
        InputError: adapters or plan are of another number of layers.
    """
    if len(adapters) != shape.layers:
        raise InputError(f"adapters of {len(adapters)} layers for a model of {shape.layers}: give one tuple per layer")
    if plan is not None and plan.model.layers != shape.layers:
        raise InputError(f"plan has {plan.model.layers} layers, the model {shape.layers}: make a plan for this model")
    flows, total = input_gradient, Cost()
    for layer, own in enumerate(adapters):
        cost, flows = layer_step(shape, work, own, plan, layer, flows, last=layer == shape.layers - 1)
        total += cost
    return total + Cost(head=2.0 * work.logits * shape.hidden * shape.vocabulary * (2 if flows else 1))


def layer_step(
    shape: Shape,
    work: Workload,
    own: Sequence[Adapter],
    plan: SparsityPlan | None,
    layer: int,
    flows: bool,
    *,
    last: bool = False,
) -> tuple[Cost, bool]:
    """Cost of one layer with adapters `own`, and whether the residual stream behind it needs a gradient.

    `flows` says so of the stream before it. `last`: whether it is the last one, where `work.last_block` applies.
    """
    adapted = {name for pair in own for name in pair.projections}
    needs = {"q": flows, "k": flows, "v": flows}  # by projection: whether its input needs a gradient
    made = {name: flows or name in adapted for name in needs}  # whether its output does
    needs["o"] = any(made.values())
    pairs = sum(2.0 * length * length * shape.heads * shape.head_dim for length in work.attended)
    attention = pairs * (2 + made["q"] + made["k"] + (made["q"] or made["k"]) + made["v"])
    flows = flows or needs["o"] or "o" in adapted
    needs |= {"gate": flows, "up": flows}
    needs["down"] = flows or not adapted.isdisjoint({"gate", "up"})
    flows = needs["down"] or "down" in adapted
    asked = last and work.last_block  # then only rows that bear the loss are there but for keys and values

    def rows(name: str) -> tuple[float, float]:
        """Rows that go through projection `name`, and how many of them are sparse."""
        return (work.logits, 0.0) if asked and name not in ("k", "v") else (work.tokens, work.context)

    base = adapter = estimator = 0.0
    for name, (inputs, outputs) in shape.projections.items():
        sparsity = 0.0 if plan is None else plan.sparsity(layer, name)
        share = _kept_share(shape, plan, name, sparsity) if plan is not None and sparsity > 0 else 1.0
        total, sparse = rows(name)
        base += 2.0 * (total - sparse + sparse * share) * inputs * outputs * (2 if needs[name] else 1)
        if plan is not None and sparsity > 0 and not (asked and PART_OF[name] == "ffn"):
            estimator += _scoring(plan, layer, name, work.context, inputs, outputs)
    for pair in own:
        through = pair.inputs * (3 if needs[pair.projections[0]] else 2) + pair.outputs * 3
        total = max(rows(name)[0] for name in pair.projections)
        adapter += 2.0 * total * pair.rank * through + pair.norm(work.fast_path)
    return Cost(base, adapter, attention, estimator), flows


def relative(
    shape: Shape,
    work: Workload,
    adapters: Sequence[Sequence[Adapter]],
    plan: SparsityPlan,
    *,
    count: Sequence[str] = ("base", "adapters", "attention", "estimator", "head"),
) -> float:
    """Operations of a whole run under `plan`, its dense first steps included, over those of the dense run.

    `count` names the fields of Cost that are counted.
    """
    dense, sparse = step(shape, work, adapters), step(shape, work, adapters, plan)
    ratio = sum(getattr(sparse, item) for item in count) / sum(getattr(dense, item) for item in count)
    return plan.dense_steps + (1.0 - plan.dense_steps) * ratio


def _kept_share(shape: Shape, plan: SparsityPlan, name: str, sparsity: float) -> float:
    """Share of a pruned projection's channels that context tokens compute; the same for both sides of a head group."""
    part = PART_OF[name]
    if part == "ffn":
        kept = 0 if plan.selection == "no-ffn" else select.keep_count(shape.intermediate, sparsity)
        return kept / shape.intermediate
    channels = shape.kv_heads * shape.head_dim
    return select.keep_count(channels, sparsity, even=part == "qk" and plan.rotary_pairs) / channels


def _scoring(plan: SparsityPlan, layer: int, name: str, context: int, inputs: int, outputs: int) -> float:
    """Operations that score projection `name`: the product itself, its factors, or nothing."""
    limit = tokens_read(plan, PART_OF[name])
    read = context if limit is None or not context else -(-context // -(-context // limit))  # estimator.sample
    if plan.selection == "no-ffn" and PART_OF[name] == "ffn":
        return 0.0
    if plan.selection in ("oracle", "sampled", "no-ffn"):
        return 2.0 * read * inputs * outputs if name in SCORED else 0.0
    if not estimated(plan, layer, name):
        return 0.0
    rank = min(plan.rank, inputs, outputs)
    if name in ("gate", "up"):
        return 2.0 * read * rank * (inputs + outputs)
    return (
        2.0 * context * rank * (inputs + rank) + 2.0 * outputs * rank * rank
    )  # the Gram matrix, then a form a channel
