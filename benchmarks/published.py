"""The operations of the published SparseLoRA code, in our own plain words, to be timed beside ours.

What is known of that code decides what is here: boolean masks part context from output tokens around every pruned
projection, Q, K, V and O gather and scatter under no_grad (so context tokens get no gradient through them: faster than
the method's own gradient, and wrong), channels are gathered as columns where the weight has them there, estimates are
(T, D) tensors, the FFN's score is taken of the mean over the sequence, and two `.item()` a layer wait for a count.
It is a cost model that runs, not a way to train; `applied(model, plan, labels, factors)` undoes itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elision import blocks
from elision.sparselora import Factors, SparsityPlan
from elision.sparselora.plan import PART_OF


class _Attention(nn.Module):
    """Stands for the base of q, k, v or o: kept channels for context tokens, all for the others."""

    def __init__(self, base: nn.Linear, role: str, state: dict[str, Any], factor: tuple[Tensor, Tensor], keep: int):
        super().__init__()
        self.base, self.role, self.state, self.factor, self.keep = base, role, state, factor, keep

    def forward(self, x: Tensor) -> Tensor:
        context, weight = self.state["context"], self.base.weight
        with torch.no_grad():
            rows = x[context]
            if self.role == "o":
                kept = self.state["v"]  # of the kv channels, as they are: wrong under grouped queries
                sparse = rows[:, kept] @ weight[:, kept].T
            else:
                b, a = self.factor
                scores = (rows @ a.T @ b.T).norm(dim=0)
                kept = self.state[self.role] = scores.topk(min(self.keep, len(scores))).indices
                sparse = rows.new_zeros(len(rows), len(weight))
                sparse[:, kept] = rows @ weight[kept].T
        out = x.new_zeros(*x.shape[:-1], len(weight))
        out[context] = sparse
        out[~context] = F.linear(x[~context], weight)
        return out


class _Mlp(nn.Module):
    """Stands for a gated MLP without adapters: kept channels for context tokens, all for the others."""

    def __init__(self, mlp: Any, state: dict[str, Any], gate: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor], n: int):
        super().__init__()
        self.mlp, self.state, self.factors, self.keep = mlp, state, (gate, up), n

    def forward(self, x: Tensor) -> Tensor:
        context, mlp = self.state["context"], self.mlp
        rows, rest = x[context], x[~context]
        with torch.no_grad():
            count = context.sum().item()
            gate, up = (rows @ a.T @ b.T for b, a in self.factors)
            kept = (mlp.act_fn(gate) * up).mean(dim=0).abs().topk(self.keep).indices
            assert count == len(rows) and kept.max().item() < len(mlp.up_proj.weight)
        hidden = mlp.act_fn(rows @ mlp.gate_proj.weight[kept].T) * (rows @ mlp.up_proj.weight[kept].T)
        out = torch.zeros_like(x)
        out[context] = hidden @ mlp.down_proj.weight[:, kept].T
        out[~context] = mlp(rest)
        return out


@contextmanager
def applied(model: nn.Module, plan: SparsityPlan, context: Tensor, factors: Factors) -> Iterator[None]:
    """`model`, a PEFT model of Llama blocks with adapters on attention alone, with those operations; `context`
    (batch, sequence) is True at the tokens to compute sparsely.
    """
    undo: list[tuple[Any, str, nn.Module]] = []
    try:
        for block in blocks.decoder(model).blocks:
            state: dict[str, Any] = {"context": context}
            pairs: dict[str, Any] = {}
            for name in ("q", "k", "v", "gate", "up"):
                if found := factors.pairs.get(f"layers.{block.index}.{name}"):
                    pairs[name] = tuple(factor.to(block.q.base.weight) for factor in found)
            for name, projection in block.projections.items():
                if PART_OF[name] == "ffn" or plan.sparsity(block.index, name) == 0:
                    continue
                holder, attribute = projection.slot
                base = getattr(holder, attribute)
                keep = round((1 - plan.sparsity(block.index, name)) * base.out_features)
                undo.append((holder, attribute, base))
                setattr(holder, attribute, _Attention(base, name, state, pairs.get(name, pairs["v"]), keep))
            if plan.sparsity(block.index, "up") > 0:
                layer: Any = block.layer
                keep = max(1, round((1 - plan.sparsity(block.index, "up")) * block.intermediate_size))
                undo.append((layer, "mlp", layer.mlp))
                layer.mlp = _Mlp(layer.mlp, state, pairs["gate"], pairs["up"], keep)
        yield
    finally:
        for holder, attribute, module in reversed(undo):
            setattr(holder, attribute, module)
