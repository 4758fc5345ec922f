"""What a decoder block is made of, for every supported family: references to the model's own modules.

Both methods need the same facts of a model: which linear maps make Q, K, V, O, gate, up and down, which norms stand
where, how heads share keys and values. `decoder(model)` answers for a model, `describe` for a config alone. Nothing
is copied, renamed or patched; a wrapper (PEFT, torch.compile, DDP) is looked through, never removed. Module names come
from the table in `families`; together the two are the only files that know any.

Families that fuse projections (Phi-3's qkv_proj and gate_up_proj) are the reason why a `Projection` is "these rows of
that linear map": its weight and bias are then slices, views that share memory with the module's parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from elision.errors import InputError
from elision.families import (
    FAMILIES,
    Family,
    Method,
    NormPlacement,
    allowed_ranks,
    attention_shape,
    check_ranks,
    family_of,
    intermediate_size,
    load_config,
    model_path,
    norm_names,
    refusal,
    rotary_dim,
    sliding_window,
    treatment,
)
from elision.quantisation import matrix, quantised

__all__ = [
    "FAMILIES",
    "Block",
    "BlockFacts",
    "Decoder",
    "Description",
    "Family",
    "Method",
    "NormPlacement",
    "Projection",
    "ProjectionFacts",
    "allowed_ranks",
    "check_ranks",
    "decoder",
    "describe",
    "load_config",
    "matrix",
    "model_path",
    "quantised",
    "refusal",
]


_MATRIX = {torch.float64, torch.float32, torch.bfloat16, torch.float16}  # what a quantised weight is not stored in


@dataclass(frozen=True)
class Projection:
    """One linear map of a block: `owner.attribute`, or the rows `rows` of it where the family fuses projections.

    The model's own product, adapters included, is module(x), of which a fused projection is the features `rows`.
    """

    owner: nn.Module
    attribute: str
    rows: slice | None  # None: the whole module

    @property
    def module(self) -> nn.Module:
        """What sits there now: the linear map, or a PEFT layer around it."""
        return getattr(self.owner, self.attribute)

    @property
    def slot(self) -> tuple[nn.Module, str]:
        """(owner, attribute) that holds `base`: this projection's own, or the innermost PEFT layer's."""
        owner, attribute = self.owner, self.attribute
        while hasattr(inner := getattr(owner, attribute), "base_layer"):
            owner, attribute = inner, "base_layer"
        return owner, attribute

    @property
    def base(self) -> nn.Linear:
        """The frozen linear map beneath any PEFT wrapper; where projections are fused, the whole of it."""
        owner, attribute = self.slot
        return getattr(owner, attribute)

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features), the rows of this projection: a view of the base's parameter.

        Raises:
            InputError: the base is quantised, so its parameter is not the matrix.
        """
        base = self.base
        weight = getattr(base, "weight", None)
        if weight is None or weight.dtype not in _MATRIX or weight.shape != (base.out_features, base.in_features):
            raise InputError(
                f"{self.attribute} is quantised ({type(base).__name__}), so its weight cannot be read as a matrix: "
                "load the model without quantisation"
            )
        return weight if self.rows is None else weight[self.rows]

    @property
    def matrix(self) -> Tensor:
        """(out_features, in_features): `weight`, or what a quantised base stands for, dequantised anew."""
        whole = matrix(self.base)
        return whole if self.rows is None else whole[self.rows]

    @property
    def bias(self) -> Tensor | None:
        """(out_features,), the rows of this projection: a view; None where there is no bias."""
        bias = self.base.bias
        return bias if bias is None or self.rows is None else bias[self.rows]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Width of this projection's output (of its rows, where projections are fused)."""
        return self.base.out_features if self.rows is None else self.rows.stop - self.rows.start


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
    norms: NormPlacement
    attention_norm: nn.Module | None  # the norm before attention, None where the family has none there
    mlp_norm: nn.Module | None  # the norm before the MLP
    attention_post_norm: nn.Module | None  # the norm after attention; `norms` says on which side of the residual
    mlp_post_norm: nn.Module | None
    q_norm: nn.Module | None  # per head (head_dim) in Qwen3 and Gemma 3, over all heads in OLMo 2
    k_norm: nn.Module | None
    activation: Callable[[Tensor], Tensor]
    heads: int
    kv_heads: int
    head_dim: int  # not always hidden_size / heads
    rotary_dim: int  # leading dimensions of a head that rotate: d pairs with d + rotary_dim / 2; 0: no rotation
    hidden_size: int
    intermediate_size: int
    residual_multiplier: float  # 1.0 but for Granite
    sliding_window: int | None

    @property
    def projections(self) -> dict[str, Projection]:
        """Projections by name, in the order q, k, v, o, gate, up, down; gate only where there is one."""
        named = {name: getattr(self, name) for name in ("q", "k", "v", "o", "gate", "up", "down")}
        return {name: projection for name, projection in named.items() if projection is not None}


@dataclass(frozen=True)
class Decoder:
    """View of a causal language model, seen through PEFT wrappers."""

    model: PreTrainedModel  # the transformers model itself, without PEFT's wrapper
    config: PretrainedConfig  # its text config
    family: Family
    blocks: tuple[Block, ...]
    logits_scaling: float  # logits are divided by it (Granite)
    logits_softcap: float | None  # logits are c tanh(logits / c) (Gemma 2)
    tied: bool  # the output head shares the embeddings' weight

    @property
    def embeddings(self) -> nn.Module:
        """What makes hidden states of tokens now: adapters and trained copies come and go around it."""
        return self.model.get_input_embeddings()

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm between the last block and the head now."""
        return getattr(self.model.get_decoder(), self.family.final_norm)

    @property
    def project_out(self) -> nn.Module | None:
        """What stands between final norm and head where embeddings are narrower (OPT-350m)."""
        return getattr(self.model.get_decoder(), "project_out", None)

    @property
    def lm_head(self) -> nn.Module:
        """What makes logits now: an nn.Linear, or a PEFT layer around it."""
        head: Any = self.model.get_output_embeddings()
        return head

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) of the last block's output (..., hidden_size), as the model itself makes them."""
        for module in (self.final_norm, self.project_out, self.lm_head):
            hidden = hidden if module is None else module(hidden)
        if self.logits_scaling != 1.0:
            hidden = hidden / self.logits_scaling
        if self.logits_softcap is not None:
            hidden = torch.tanh(hidden / self.logits_softcap) * self.logits_softcap
        return hidden


def decoder(model: nn.Module) -> Decoder:
    """View `model` (a transformers causal LM or a PEFT model around one).

    Raises:
        InputError: the model is not a transformers causal LM of a supported family.
    """
    inner = _unwrap(model)
    family = family_of(inner.config)
    lm_head = inner.get_output_embeddings()
    if lm_head is None:
        raise InputError(f"{type(inner).__name__} has no language-model head: load it with AutoModelForCausalLM")
    config = inner.config.get_text_config()
    stack: Any = inner.get_decoder()
    return Decoder(
        model=inner,
        config=config,
        family=family,
        blocks=tuple(_block(family, config, index, layer) for index, layer in enumerate(stack.layers)),
        logits_scaling=float(getattr(config, "logits_scaling", 1.0)),
        logits_softcap=getattr(config, "final_logit_softcapping", None),
        tied=_bare(lm_head).weight is _bare(inner.get_input_embeddings()).weight,
    )


def _unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's, torch.compile's and DDP's wrappers."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        elif isinstance(inner, nn.Module) and hasattr(inner, "module"):  # DistributedDataParallel
            inner = inner.module
        else:
            raise InputError(
                f"{type(model).__name__} is not a transformers causal language model: load one with "
                "AutoModelForCausalLM.from_pretrained"
            )
    return inner


def _bare(module: nn.Module) -> nn.Module:
    """`module` without PEFT's layers: LoRA keeps it in base_layer, modules_to_save in original_module."""
    while (inner := getattr(module, "base_layer", getattr(module, "original_module", None))) is not None:
        module = inner
    return module


def _rows(owner: nn.Module, names: tuple[str | None, ...], sizes: tuple[int, ...]) -> list[Projection | None]:
    """One projection a name; equal names share a fused module, rows in the order of the names."""
    if len(set(names)) == len(names):
        return [None if name is None else Projection(owner, name, None) for name in names]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [Projection(owner, str(n), slice(end - size, end)) for n, size, end in zip(names, sizes, ends, strict=True)]


def _block(family: Family, config: PretrainedConfig, index: int, layer: Any) -> Block:
    heads, kv_heads, head_dim = attention_shape(config)
    inner = intermediate_size(config)
    attention: Any = layer.self_attn
    mlp: Any = layer if family.mlp is None else getattr(layer, family.mlp)
    q, k, v = _rows(attention, family.qkv, (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim))
    gate, up = _rows(mlp, family.gate_up, (inner, inner))
    assert q is not None and k is not None and v is not None and up is not None
    placement, *names = norm_names(family, config)
    attention_norms, mlp_norms = ([None if n is None else getattr(layer, n) for n in pair] for pair in names)
    return Block(
        index=index,
        layer=layer,
        attention=attention,
        mlp=mlp,
        q=q,
        k=k,
        v=v,
        o=Projection(attention, family.o, None),
        gate=gate,
        up=up,
        down=Projection(mlp, family.down, None),
        norms=placement,
        attention_norm=attention_norms[0],
        mlp_norm=mlp_norms[0],
        attention_post_norm=attention_norms[1],
        mlp_post_norm=mlp_norms[1],
        q_norm=attention.q_norm if family.qk_norms else None,
        k_norm=attention.k_norm if family.qk_norms else None,
        activation=getattr(mlp, family.activation[0]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim(family, config),
        hidden_size=config.hidden_size,
        intermediate_size=inner,
        residual_multiplier=float(getattr(config, "residual_multiplier", 1.0)),
        sliding_window=sliding_window(family, config, index),
    )


@dataclass(frozen=True)
class ProjectionFacts:
    """Shape of one projection."""

    module: str  # the attribute it sits at; projections of one block that share it are fused
    out_features: int
    in_features: int
    bias: bool
    parameters: int  # weight and bias


@dataclass(frozen=True)
class BlockFacts:
    """What a run of like blocks is made of."""

    blocks: tuple[int, ...]
    sliding_window: int | None
    parameters: int  # of one block, norms included
    projections: dict[str, ProjectionFacts]

    @property
    def span(self) -> str:
        """The block numbers for people: "0-4, 6-10, 12"."""
        starts = [b for b in self.blocks if b - 1 not in self.blocks]
        ends = [b for b in self.blocks if b + 1 not in self.blocks]
        return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


@dataclass(frozen=True)
class Description:
    """What a model is made of, adapters and quantisation aside; `dataclasses.asdict` makes it JSON."""

    model_type: str
    family: str
    parameters: int  # shared weights counted once
    layers: int
    vocabulary: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    activation: str
    norm: str  # "RMSNorm" or "LayerNorm"
    norms: NormPlacement
    qk_norms: bool
    tied: bool
    residual_multiplier: float
    sparselora: str | None  # why the method does not cover this model; None: it does
    spd: str | None
    ranks: tuple[int, ...]  # numbers of tensor-parallel ranks that can share its heads
    blocks: tuple[BlockFacts, ...]  # like blocks together, in the order of their first


def describe(model: nn.Module | PretrainedConfig) -> Description:
    """Say what a model is made of, from its config alone: shapes are read off an instance without memory.

    Raises:
        InputError: the family is unknown or uncovered, or no model can be built from the config.
    """
    config = model if isinstance(model, PretrainedConfig) else _unwrap(model).config
    family_of(config)
    try:
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config.get_text_config(), attn_implementation="eager")
    except Exception as error:  # a model class may raise anything on a value that it did not foresee
        reason = " ".join(str(error).split())
        raise InputError(
            f"no {config.model_type} model can be built from this config ({reason}): correct it"
        ) from error
    view = decoder(shell)
    if not view.blocks:
        raise InputError(f"num_hidden_layers={view.config.num_hidden_layers} makes a model without blocks: correct it")
    block = view.blocks[0]
    alike: dict[tuple, list[int]] = {}
    for each in view.blocks:
        alike.setdefault(_facts(each), []).append(each.index)
    return Description(
        model_type=config.model_type,
        family=view.family.name,
        parameters=_count(shell),
        layers=len(view.blocks),
        vocabulary=view.config.vocab_size,
        hidden_size=block.hidden_size,
        intermediate_size=block.intermediate_size,
        heads=block.heads,
        kv_heads=block.kv_heads,
        head_dim=block.head_dim,
        rotary_dim=block.rotary_dim,
        activation=getattr(view.config, view.family.activation[1]),
        norm="RMSNorm" if "RMSNorm" in type(block.mlp_norm or block.mlp_post_norm).__name__ else "LayerNorm",
        norms=block.norms,
        qk_norms=view.family.qk_norms,
        tied=view.tied,
        residual_multiplier=block.residual_multiplier,
        sparselora=refusal(config, "sparselora") or treatment(config),
        spd=refusal(config, "spd") or treatment(config),
        ranks=allowed_ranks(config),
        blocks=tuple(
            BlockFacts(tuple(indices), window, parameters, dict(projections))
            for (window, parameters, projections), indices in alike.items()
        ),
    )


def _facts(block: Block) -> tuple[int | None, int, tuple[tuple[str, ProjectionFacts], ...]]:
    """What tells one block from another: window, parameters, projections."""
    projections = []
    for name, p in block.projections.items():
        parameters = p.out_features * (p.in_features + (p.bias is not None))
        projections.append(
            (name, ProjectionFacts(p.attribute, p.out_features, p.in_features, p.bias is not None, parameters))
        )
    return block.sliding_window, _count(block.layer), tuple(projections)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
