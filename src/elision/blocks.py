"""What a decoder block is made of, for every supported family: the only file that knows module names.

Both methods need the same facts of a model: which linear maps make Q, K, V, O, gate, up and down, which norms stand
where, how heads share keys and values. `decoder(model)` answers with references to the model's own modules; nothing
is copied, renamed or patched, and a wrapper (PEFT, torch.compile, DDP) is looked through, never removed.

A family is a row of `FAMILIES`, keyed by the config's model_type: names only, no code. Two projections with one
attribute name are fused in that module, their rows one after the other in the order given (Phi-3's qkv_proj and
gate_up_proj), so a `Projection` is always "these rows of that linear map". Where norms sit decides whether SPD's
algebra holds; `NormPlacement` names the four ways in use. With r the residual multiplier, f attention or MLP:

    pre       x + r f(norm(x))           Llama and its kin, OPT
    sandwich  x + norm'(f(norm(x)))      Gemma 2 and 3
    output    x + norm'(f(x))            OLMo 2
    post      norm'(x + f(x))            OPT-350m, the original Transformer

The trade-off: a table must be told of each new family, where inspection of module names would guess. A guess that is
wrong trains silently wrong, so an unknown family is refused with one sentence; `UNCOVERED` says why for the known ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from elision.errors import InputError

Method = Literal["sparselora", "spd"]
NormPlacement = Literal["pre", "sandwich", "output", "post"]


@dataclass(frozen=True)
class Family:
    """One row of the table: the names under which a family keeps what a block is made of."""

    name: str
    qkv: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    o: str = "o_proj"
    gate_up: tuple[str | None, str] = ("gate_proj", "up_proj")  # gate None: a plain two-layer MLP
    down: str = "down_proj"
    mlp: str | None = "mlp"  # None: the decoder layer itself owns the MLP's projections
    activation: str = "act_fn"
    norms: NormPlacement = "pre"
    attention_norms: tuple[str | None, str | None] = ("input_layernorm", None)  # before, after
    mlp_norms: tuple[str | None, str | None] = ("post_attention_layernorm", None)
    qk_norms: bool = False
    rotary: bool = True
    window: Literal["none", "all", "by layer type"] = "none"  # which blocks config.sliding_window applies to
    spd: str | None = None  # why SPD's maths does not hold; None: it does


_NEEDS_SUM = "needs the attention output summed over all ranks before the MLP"
_SANDWICH = Family(
    "",
    norms="sandwich",
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    window="by layer type",
    spd=f"its sandwich norms put a norm on the attention output, which {_NEEDS_SUM}",
)
_GEMMA3 = replace(_SANDWICH, name="Gemma 3", qk_norms=True)

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", window="all"),
    "qwen2": Family("Qwen2", window="by layer type"),
    "qwen3": Family("Qwen3", qk_norms=True, window="by layer type"),
    "gemma": Family("Gemma"),
    "gemma2": replace(_SANDWICH, name="Gemma 2"),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,  # the multimodal wrapper: its text model is viewed
    "phi3": Family(
        "Phi-3",
        qkv=("qkv_proj", "qkv_proj", "qkv_proj"),
        gate_up=("gate_up_proj", "gate_up_proj"),
        activation="activation_fn",
        window="all",
    ),
    "olmo2": Family(
        "OLMo 2",
        norms="output",
        attention_norms=(None, "post_attention_layernorm"),
        mlp_norms=(None, "post_feedforward_layernorm"),
        qk_norms=True,
        spd=f"its post-norm on the attention output {_NEEDS_SUM}",
    ),
    "granite": Family("Granite"),
    "opt": Family(
        "OPT",
        o="out_proj",
        gate_up=(None, "fc1"),
        down="fc2",
        mlp=None,
        activation="activation_fn",
        attention_norms=("self_attn_layer_norm", None),
        mlp_norms=("final_layer_norm", None),
        rotary=False,
    ),
}

UNCOVERED: dict[str, str] = {}


@dataclass(frozen=True)
class Projection:
    """One linear map of a block: `owner.attribute`, or the rows `rows` of it where the family fuses projections."""

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
        weight = base.weight
        if not weight.is_floating_point() or weight.shape != (base.out_features, base.in_features):
            raise InputError(
                f"{self.attribute} is quantised ({type(base).__name__}, {weight.dtype}): "
                "its weight cannot be read as a matrix; load the model without quantisation"
            )
        return weight if self.rows is None else weight[self.rows]

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
    embeddings: nn.Module
    final_norm: nn.Module | None
    project_out: nn.Module | None  # between final norm and head, where embeddings are narrower (OPT-350m)
    lm_head: nn.Module  # what makes logits now: an nn.Linear, or a PEFT layer around it
    logits_scaling: float  # logits are divided by it (Granite)
    logits_softcap: float | None  # logits are c tanh(logits / c) (Gemma 2)
    tied: bool  # the output head shares the embeddings' weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) of the last block's output (..., hidden_size), as the model itself makes them."""
        for module in (self.final_norm, self.project_out, self.lm_head):
            hidden = hidden if module is None else module(hidden)
        if self.logits_scaling != 1.0:
            hidden = hidden / self.logits_scaling
        if self.logits_softcap is not None:
            hidden = torch.tanh(hidden / self.logits_softcap) * self.logits_softcap
        return hidden


def refusal(config: PretrainedConfig, method: Method) -> str | None:
    """One sentence saying why `method`'s maths does not cover this model, or None where it does."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return _unsupported(config.model_type)
    config = config.get_text_config()
    reason = family.spd or _opt_refusal(config) if method == "spd" else None
    return None if reason is None else f"SPD does not cover {family.name} ({config.model_type}): {reason}"


def _opt_refusal(config: PretrainedConfig) -> str | None:
    if not getattr(config, "do_layer_norm_before", True):
        return f"do_layer_norm_before is false (as in OPT-350m), and a norm after the residual {_NEEDS_SUM}"
    width = getattr(config, "word_embed_proj_dim", config.hidden_size)
    if width != config.hidden_size:
        return f"word_embed_proj_dim {width} is not hidden_size {config.hidden_size} (as in OPT-350m)"
    return None


def _unsupported(model_type: str) -> str:
    reason = UNCOVERED.get(model_type, "its blocks are not known here")
    return f"model_type '{model_type}' is not supported, {reason}: use one of {', '.join(sorted(FAMILIES))}"


def attention_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """(heads, kv_heads, head_dim) of every block."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def allowed_ranks(config: PretrainedConfig) -> tuple[int, ...]:
    """Every number of tensor-parallel ranks that divides this model's attention (METHODS 2.1), ascending from 1.

    The intermediate size sets no limit: where N does not divide it, shards differ by at most one unit.
    """
    heads, kv_heads, _ = attention_shape(config.get_text_config())
    return tuple(n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0))


def check_ranks(config: PretrainedConfig, ranks: int) -> None:
    """Raise InputError with the reason where `ranks` tensor-parallel ranks cannot share this model's heads."""
    allowed = allowed_ranks(config)
    if ranks in allowed:
        return
    heads, kv_heads, _ = attention_shape(config.get_text_config())
    if ranks < 1:
        reason = "a positive number is needed"
    elif heads % ranks:
        reason = f"they do not divide the {heads} attention heads"
    else:
        reason = f"they neither divide the {kv_heads} key/value heads nor are a multiple of them"
    raise InputError(f"ranks={ranks} cannot shard this model, {reason}: use one of {', '.join(map(str, allowed))}")


def decoder(model: nn.Module) -> Decoder:
    """View `model` (a transformers causal LM or a PEFT model around one).

    Raises:
        InputError: the model is not a transformers causal LM of a supported family.
    """
    inner = _unwrap(model)
    family = FAMILIES.get(inner.config.model_type)
    if family is None:
        raise InputError(_unsupported(inner.config.model_type))
    lm_head = inner.get_output_embeddings()
    if lm_head is None:
        raise InputError(f"{type(inner).__name__} has no language-model head: load it with AutoModelForCausalLM")
    config = inner.config.get_text_config()
    stack: Any = inner.get_decoder()
    embeddings = inner.get_input_embeddings()
    return Decoder(
        model=inner,
        config=config,
        family=family,
        blocks=tuple(_block(family, config, index, layer) for index, layer in enumerate(stack.layers)),
        embeddings=embeddings,
        final_norm=getattr(stack, "norm", getattr(stack, "final_layer_norm", None)),
        project_out=getattr(stack, "project_out", None),
        lm_head=lm_head,
        logits_scaling=float(getattr(config, "logits_scaling", 1.0)),
        logits_softcap=getattr(config, "final_logit_softcapping", None),
        tied=_bare(lm_head).weight is _bare(embeddings).weight,
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
    while inner := getattr(module, "base_layer", getattr(module, "original_module", None)):
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
    intermediate = getattr(config, "intermediate_size", None) or config.ffn_dim
    attention: Any = layer.self_attn
    mlp: Any = layer if family.mlp is None else getattr(layer, family.mlp)
    q, k, v = _rows(attention, family.qkv, (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim))
    gate, up = _rows(mlp, family.gate_up, (intermediate, intermediate))
    assert q is not None and k is not None and v is not None and up is not None
    placement, norms = family.norms, (*family.attention_norms, *family.mlp_norms)
    if not getattr(config, "do_layer_norm_before", True):  # OPT-350m keeps its norms' names but moves them
        placement, norms = "post", (norms[1], norms[0], norms[3], norms[2])
    attention_norm, attention_post_norm, mlp_norm, mlp_post_norm = (
        None if name is None else getattr(layer, name) for name in norms
    )
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
        attention_norm=attention_norm,
        mlp_norm=mlp_norm,
        attention_post_norm=attention_post_norm,
        mlp_post_norm=mlp_post_norm,
        q_norm=attention.q_norm if family.qk_norms else None,
        k_norm=attention.k_norm if family.qk_norms else None,
        activation=getattr(mlp, family.activation),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=_rotary_dim(family, config, head_dim),
        hidden_size=config.hidden_size,
        intermediate_size=intermediate,
        residual_multiplier=float(getattr(config, "residual_multiplier", 1.0)),
        sliding_window=_window(family, config, index),
    )


def _rotary_dim(family: Family, config: PretrainedConfig, head_dim: int) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    return int(head_dim * rope.get("partial_rotary_factor", 1.0)) if family.rotary else 0


def _window(family: Family, config: PretrainedConfig, index: int) -> int | None:
    if family.window == "none" or (
        family.window == "by layer type" and config.layer_types[index] != "sliding_attention"
    ):
        return None
    return config.sliding_window
