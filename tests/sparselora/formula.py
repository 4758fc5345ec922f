"""SparseLoRA on a Llama block once more, from the maths alone: one token and one channel at a time.

Nothing of the library is used, so that both would have to be wrong in the same way. `fault` names a deliberate
mistake (most are the public implementation's): a test that cannot tell it from the contract proves nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

FAULTS = (
    "the last prompt token is context",
    "output tokens are sparse",
    "context after the last output votes",
    "scores are means",
    "adapters count in the scores",
    "a pruned query has no bias",
    "a pruned FFN channel keeps its bias",
    "O's columns are kv channels",
    "Q's rows are those of the first group",
    "the adapter of down misses pruned channels",
    "adapters are pruned",
)


@dataclass
class Token:
    """One real token: `x` is its residual stream."""

    row: int
    place: int
    label: int
    x: Tensor
    sparse: bool = False


class Formula:
    """Loss of one batch. Sparsities are by part, the same in every layer."""

    def __init__(self, model: nn.Module, sparsity: dict[str, float], fault: str = "") -> None:
        assert fault in ("", *FAULTS)
        inner: Any = model.get_base_model()  # type: ignore[operator]
        self.config = inner.config
        self.tensors = {name.replace(".base_layer", ""): p for name, p in inner.named_parameters()}
        self.scale = next(iter(model.peft_config.values())).lora_alpha / next(iter(model.peft_config.values())).r  # type: ignore[operator,union-attr]
        self.sparsity, self.fault = sparsity, fault
        self.heads, self.kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        self.head_dim = self.config.hidden_size // self.heads

    def loss(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = []
        for row in range(len(input_ids)):
            for place, t in enumerate(attention_mask[row].nonzero().flatten().tolist()):
                embedded = self.tensors["model.embed_tokens.weight"][input_ids[row, t]]
                tokens.append(Token(row, place, int(labels[row, t]), embedded))
        rows = [[token for token in tokens if token.row == row] for row in range(len(input_ids))]
        for row in rows:
            bearing = [i for i in range(len(row) - 1) if row[i + 1].label != -100]
            for i, token in enumerate(row):
                if self.fault == "the last prompt token is context":
                    output = token.label != -100
                else:
                    output = token.label != -100 or i in bearing
                if self.fault == "output tokens are sparse":
                    output = False
                after = not bearing or i > bearing[-1]
                if self.fault == "context after the last output votes":
                    after = False
                token.sparse = not output and not after
        for layer in range(self.config.num_hidden_layers):
            self.layer(f"model.layers.{layer}.", tokens, rows)
        losses = []
        for row in rows:
            for token, following in pairwise(row):
                if following.label != -100:
                    logits = self.tensors["lm_head.weight"] @ self.norm("model.norm", token.x)
                    losses.append(torch.logsumexp(logits, 0) - logits[following.label])
        return torch.stack(losses).mean()

    def layer(self, at: str, tokens: list[Token], rows: list[list[Token]]) -> None:
        inputs = {id(token): self.norm(at + "input_layernorm", token.x) for token in tokens}
        voters = [inputs[id(token)] for token in tokens if token.sparse]
        q, k, v, o = (f"{at}self_attn.{name}_proj" for name in "qkvo")
        kept_k = self.best("qk", self.qk_scores(q, k, voters))
        kept_v = self.best("vo", [self.size([self.base(v, x, c) for x in voters]) for c in range(self.width(v))])
        kept_q, kept_o = self.queries(kept_k), self.queries(kept_v)
        if self.fault == "Q's rows are those of the first group":
            groups = self.heads // self.kv_heads
            kept_q = {c for c in kept_q if c // self.head_dim % groups == 0}
        if self.fault == "O's columns are kv channels":
            kept_o = kept_v
        made = {}
        for token in tokens:
            x = inputs[id(token)]
            biased = self.fault != "a pruned query has no bias"
            made[id(token)] = (
                self.rotate(self.outputs(q, x, kept_q if token.sparse else None, biased), self.heads, token.place),
                self.rotate(self.outputs(k, x, kept_k if token.sparse else None), self.kv_heads, token.place),
                self.outputs(v, x, kept_v if token.sparse else None).view(self.kv_heads, -1),
            )
        for row in rows:
            mixed = [self.attend(i, [made[id(token)] for token in row]) for i in range(len(row))]
            for token, z in zip(row, mixed, strict=True):
                token.x = token.x + self.inputs(o, z, kept_o if token.sparse else None)
        self.feed_forward(at, tokens)

    def feed_forward(self, at: str, tokens: list[Token]) -> None:
        inputs = {id(token): self.norm(at + "post_attention_layernorm", token.x) for token in tokens}
        voters = [inputs[id(token)] for token in tokens if token.sparse]
        gate, up, down = (f"{at}mlp.{name}_proj" for name in ("gate", "up", "down"))
        scores = [
            self.size([self.silu(self.base(gate, x, c)) * self.base(up, x, c) for x in voters])
            for c in range(self.width(up))
        ]
        kept = self.best("ffn", scores)
        biased = self.fault == "a pruned FFN channel keeps its bias"
        for token in tokens:
            x, own = inputs[id(token)], kept if token.sparse else None
            hidden = self.silu(self.outputs(gate, x, own, biased)) * self.outputs(up, x, own, biased)
            token.x = token.x + self.inputs(down, hidden, own)

    # One linear map.

    def base(self, name: str, x: Tensor, channel: int) -> Tensor:
        """One output channel of the frozen product."""
        y = self.tensors[name + ".weight"][channel] @ x
        if self.fault == "adapters count in the scores":
            y = y + self.adapter(name, x)[channel]
        return y if name + ".bias" not in self.tensors else y + self.tensors[name + ".bias"][channel]

    def outputs(self, name: str, x: Tensor, kept: set[int] | None, biased: bool | None = None) -> Tensor:
        """A map pruned by its rows, with its adapter. By default a pruned Q, K, V keeps its bias."""
        weight, bias, values = self.tensors[name + ".weight"], self.tensors.get(name + ".bias"), []
        for c in range(len(weight)):
            pruned = kept is not None and c not in kept
            y = torch.zeros((), dtype=x.dtype) if pruned else weight[c] @ x
            if bias is not None and (not pruned or biased is not False):
                y = y + bias[c]
            values.append(y)
        y, delta = torch.stack(values), self.adapter(name, x)
        if self.fault == "adapters are pruned" and kept is not None:
            delta = torch.stack([delta[c] * (c in kept) for c in range(len(weight))])
        return y + delta

    def inputs(self, name: str, x: Tensor, kept: set[int] | None) -> Tensor:
        """A map pruned by its columns, with its adapter, which sees every input."""
        weight, bias = self.tensors[name + ".weight"], self.tensors.get(name + ".bias")
        y = torch.zeros(len(weight), dtype=x.dtype)
        for i in range(len(x)):
            if kept is None or i in kept:
                y = y + weight[:, i] * x[i]
        seen = x
        if (
            self.fault == "the adapter of down misses pruned channels"
            and name.endswith("down_proj")
            and kept is not None
        ):
            seen = torch.stack([x[i] * (i in kept) for i in range(len(x))])
        return (y if bias is None else y + bias) + self.adapter(name, seen)

    def adapter(self, name: str, x: Tensor) -> Tensor:
        if name + ".lora_A.default.weight" not in self.tensors:
            return torch.zeros(len(self.tensors[name + ".weight"]), dtype=x.dtype)
        a, b = (self.tensors[f"{name}.lora_{side}.default.weight"] for side in "AB")
        return self.scale * (b @ (a @ x))

    def width(self, name: str) -> int:
        return len(self.tensors[name + ".weight"])

    # Choosing.

    def size(self, values: list[Tensor]) -> float:
        numbers = [value.item() for value in values]
        if self.fault == "scores are means":
            return abs(sum(numbers) / len(numbers))
        return math.sqrt(sum(number**2 for number in numbers))

    def qk_scores(self, q: str, k: str, voters: list[Tensor]) -> list[float]:
        groups, scores = self.heads // self.kv_heads, []
        for c in range(self.width(k)):
            head, d = divmod(c, self.head_dim)
            members = [(head * groups + g) * self.head_dim + d for g in range(groups)]
            norms = [self.size([self.base(q, x, m) for x in voters]) for m in members]
            combined = math.sqrt(sum(norm**2 for norm in norms) / groups)
            scores.append(combined * self.size([self.base(k, x, c) for x in voters]))
        return scores

    def best(self, part: str, scores: list[float]) -> set[int]:
        n = min(max(math.floor((1 - self.sparsity[part]) * len(scores) + 0.5), 1), len(scores))
        return set(sorted(range(len(scores)), key=lambda c: (-scores[c], c))[:n])

    def queries(self, kept: set[int]) -> set[int]:
        groups = self.heads // self.kv_heads
        pairs = [divmod(c, self.head_dim) for c in kept]
        return {(head * groups + g) * self.head_dim + d for head, d in pairs for g in range(groups)}

    # The rest of a Llama block.

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self.tensors[name + ".weight"] * x / torch.sqrt((x * x).mean() + self.config.rms_norm_eps)

    @staticmethod
    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def rotate(self, x: Tensor, heads: int, place: int) -> Tensor:
        first, second = x.view(heads, 2, -1).unbind(1)
        powers = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        angle = place * (1.0 / self.config.rope_parameters["rope_theta"] ** powers).to(x.dtype)  # kept in single
        turned = [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
        return torch.cat(turned, dim=1)  # (heads, head_dim)

    def attend(self, i: int, row: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        groups, heads = self.heads // self.kv_heads, []
        for h in range(self.heads):
            query, kv = row[i][0][h], h // groups
            logits = torch.stack([query @ row[j][1][kv] / math.sqrt(self.head_dim) for j in range(i + 1)])
            weights = torch.softmax(logits, 0)
            heads.append(sum((weights[j] * row[j][2][kv] for j in range(i + 1)), torch.zeros_like(query)))
        return torch.cat(heads)
