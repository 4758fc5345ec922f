"""What a decoder block is made of, for every supported family: the only file that knows module names.

SKELETON: the interface below is the contract that the other rooms are written against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

Method = Literal["sparselora", "spd"]


@dataclass(frozen=True)
class Projection:
    """One linear map of a block: `owner.attribute`, or the rows `rows` of it where the family fuses projections."""

    owner: nn.Module
    attribute: str
    rows: slice | None  # None: the whole module

    @property
    def module(self) -> nn.Module: ...  # what sits there now; a PEFT layer where adapters were added
    @property
    def base(self) -> nn.Linear: ...  # the frozen linear map beneath any PEFT wrapper
    @property
    def weight(self) -> Tensor: ...  # (out, in), the rows of this projection, a view
    @property
    def bias(self) -> Tensor | None: ...  # (out,)
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...


@dataclass(frozen=True)
class Block:
    """View of one decoder layer; holds references to its modules, copies nothing."""

    index: int
    layer: nn.Module  # the decoder layer, whose forward takes hidden states (batch, sequence, hidden)
    attention: nn.Module
    mlp: nn.Module  # the module that owns down_proj (OPT: the layer itself)
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    gate: Projection | None  # None: a plain two-layer MLP (OPT)
    up: Projection
    down: Projection
    attention_norm: nn.Module | None  # the norm before attention, None where the family has none there
    mlp_norm: nn.Module | None  # the norm before the MLP
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    activation: Callable[[Tensor], Tensor]
    heads: int
    kv_heads: int
    head_dim: int  # not always hidden_size / heads
    hidden_size: int
    intermediate_size: int
    residual_multiplier: float  # 1.0 but for Granite
    sliding_window: int | None


@dataclass(frozen=True)
class Decoder:
    """View of a causal language model, seen through PEFT wrappers."""

    model: PreTrainedModel  # the transformers model itself, without PEFT's wrapper
    config: PretrainedConfig  # its text config
    blocks: tuple[Block, ...]
    embeddings: nn.Module
    final_norm: nn.Module | None
    lm_head: nn.Linear
    tied: bool  # the output head shares the embeddings' weight


def decoder(model: nn.Module) -> Decoder:
    """View `model` (a transformers causal LM or a PEFT model around one). Raises InputError for an unknown family."""
    ...


def refusal(config: PretrainedConfig, method: Method) -> str | None:
    """One sentence saying why `method`'s maths does not cover this model, or None where it does."""
    ...
