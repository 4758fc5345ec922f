"""A view of a block is true when the block can be computed from it alone.

`forward` below is attention and MLP written out once, for all families, from nothing but a Block. It is held against
each family's own decoder layer, in float64, on small instances of the real classes with every parameter random.
Norms and softmax run in float32 inside transformers; that, and not float64, sets the tolerance.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig

from elision import blocks, families
from elision.blocks import Block, Decoder, Projection
from elision.errors import InputError

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = {**SMALL, "intermediate_size": 44, "num_key_value_heads": 2}
WINDOW = {"sliding_window": 4, "max_position_embeddings": 64}
PER_LAYER = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
OPT = {**SMALL, "ffn_dim": 44, "max_position_embeddings": 64, "dropout": 0.0}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**GATED, "head_dim": 12, "attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("LlamaConfig", {**GATED, "num_key_value_heads": None, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**GATED, **WINDOW, "head_dim": 6}),
    "qwen2": ("Qwen2Config", {**GATED, **WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {**GATED, "head_dim": 16}),
    "gemma": ("GemmaConfig", {**GATED, "num_key_value_heads": 1, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**GATED, **WINDOW, **PER_LAYER, "head_dim": 16, "query_pre_attn_scalar": 20}),
    "gemma3": ("Gemma3TextConfig", {**GATED, **WINDOW, **PER_LAYER, "head_dim": 16, "query_pre_attn_scalar": 20}),
    "phi3": ("Phi3Config", {**GATED, **WINDOW, "pad_token_id": 0, "partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2Config", {**GATED, "attention_bias": True}),
    "granite": (
        "GraniteConfig",
        {
            **GATED,
            "attention_bias": True,
            "mlp_bias": True,
            "residual_multiplier": 0.3,
            "embedding_multiplier": 5.0,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
        },
    ),
    "opt": ("OPTConfig", OPT),
    "opt-plain": ("OPTConfig", {**OPT, "enable_bias": False, "activation_function": "gelu"}),
    "opt-350m": ("OPTConfig", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 20}),
}
FUSED = {"qkv_proj", "gate_up_proj"}


def config_of(case: str) -> PretrainedConfig:
    name, values = CONFIGS[case]
    return getattr(transformers, name)(**values)


def model_of(case: str) -> nn.Module:
    model = AutoModelForCausalLM.from_config(config_of(case), attn_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at zero and norms at one: a wrong one would not show
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=list(CONFIGS))
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def tokens() -> Tensor:
    return torch.randint(3, 61, (2, 9))


@dataclasses.dataclass
class Seen:
    """What one forward of the whole model showed: each layer's arguments and output, and the logits."""

    inputs: list[tuple[Tensor, dict[str, Any]]]
    outputs: list[Tensor]
    logits: Tensor


def watch(view: Decoder, model: nn.Module) -> Seen:
    """Run the model on random tokens and record what enters and leaves every block."""
    inputs: list[tuple[Tensor, dict[str, Any]]] = []
    outputs: list[Tensor] = []

    def record(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        inputs.append((args[0] if args else kwargs["hidden_states"], kwargs))
        outputs.append(output)

    hooks = [block.layer.register_forward_hook(record, with_kwargs=True) for block in view.blocks]
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens(), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return Seen(inputs, outputs, logits)


def base_product(projection: Projection, x: Tensor) -> Tensor:
    return F.linear(x, projection.weight, projection.bias)


def adapted_product(projection: Projection, x: Tensor) -> Tensor:
    """With adapters, through whatever sits there now."""
    y = projection.module(x)
    return y if projection.rows is None else y[..., projection.rows]


def rotate(x: Tensor, rotary_dim: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dimension d against d + rotary_dim / 2, leave the rest. x: (batch, heads, time, head_dim)."""
    half = rotary_dim // 2
    angles_cos, angles_sin = cos[:, None, :, :half], sin[:, None, :, :half]
    first, second, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    turned = (first * angles_cos - second * angles_sin, second * angles_cos + first * angles_sin, rest)
    return torch.cat(turned, dim=-1)


Product = Callable[[Projection, Tensor], Tensor]


def attend(block: Block, x: Tensor, arguments: dict[str, Any], product: Product) -> Tensor:
    """Causal grouped-query attention, from the view and the layer's rotary angles."""
    time = x.shape[1]
    q, k, v = (product(projection, x) for projection in (block.q, block.k, block.v))
    per_head = block.q_norm is not None and block.q_norm.weight.numel() == block.head_dim
    if block.q_norm is not None and block.k_norm is not None and not per_head:
        q, k = block.q_norm(q), block.k_norm(k)
    q, k, v = (t.unflatten(-1, (-1, block.head_dim)).transpose(1, 2) for t in (q, k, v))
    assert q.shape[1] == block.heads and k.shape[1] == v.shape[1] == block.kv_heads
    if block.q_norm is not None and block.k_norm is not None and per_head:
        q, k = block.q_norm(q), block.k_norm(k)
    if block.rotary_dim:
        cos, sin = arguments["position_embeddings"]
        q, k = rotate(q, block.rotary_dim, cos, sin), rotate(k, block.rotary_dim, cos, sin)
    groups = block.heads // block.kv_heads  # query head h reads kv head h // groups
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * block.attention.scaling
    if (cap := getattr(block.attention, "attn_logit_softcapping", None)) is not None:
        scores = cap * torch.tanh(scores / cap)
    distance = torch.arange(time)[:, None] - torch.arange(time)
    window = time if block.sliding_window is None else block.sliding_window
    scores = scores.masked_fill((distance < 0) | (distance >= window), float("-inf"))
    return product(block.o, (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def feed_forward(block: Block, x: Tensor, product: Product) -> Tensor:
    up = product(block.up, x)
    inner = block.activation(up) if block.gate is None else block.activation(product(block.gate, x)) * up
    return product(block.down, inner)


def forward(block: Block, x: Tensor, arguments: dict[str, Any], product: Product = base_product) -> Tensor:
    """The decoder layer's output, from the view alone: NormPlacement's four formulas."""

    def part(x: Tensor, before: nn.Module | None, f: Callable[[Tensor], Tensor], after: nn.Module | None) -> Tensor:
        y = f(x if before is None else before(x))
        if block.norms == "post":
            assert before is None and after is not None
            return after(x + y)
        return x + block.residual_multiplier * (y if after is None else after(y))

    x = part(x, block.attention_norm, lambda t: attend(block, t, arguments, product), block.attention_post_norm)
    return part(x, block.mlp_norm, lambda t: feed_forward(block, t, product), block.mlp_post_norm)


@torch.no_grad()
def error(block: Block, seen: Seen, product: Product = base_product) -> float:
    """Largest deviation of `forward` from the layer's own output, over the latter's typical size."""
    x, arguments = seen.inputs[block.index]
    truth = seen.outputs[block.index]
    return float((forward(block, x, arguments, product) - truth).abs().max() / truth.std())


TOLERANCE = 1e-5  # float32 inside norms and softmax: seen up to 9e-7; a false view is off by 0.2 and more


def test_a_block_can_be_computed_from_its_view(case: str) -> None:
    model = model_of(case)
    view = blocks.decoder(model)
    seen = watch(view, model)
    assert [block.index for block in view.blocks] == [0, 1, 2]
    for block in view.blocks:
        assert error(block, seen) < TOLERANCE


def test_logits_are_the_models_own(case: str) -> None:
    model = model_of(case)
    view = blocks.decoder(model)
    seen = watch(view, model)
    with torch.no_grad():
        torch.testing.assert_close(view.logits(seen.outputs[-1]), seen.logits, rtol=0, atol=0)


def test_a_projection_is_its_modules_output(case: str) -> None:
    """Weight and bias give the module's product in float64, and share memory with its parameters."""
    model = model_of(case)
    parameters = {id(p): p for p in model.parameters()}
    for block in blocks.decoder(model).blocks:
        for name, projection in block.projections.items():
            assert id(projection.base.weight) in parameters
            assert projection.weight.shape == (projection.out_features, projection.in_features), name
            x = torch.randn(5, projection.in_features, dtype=torch.float64)
            with torch.no_grad():
                torch.testing.assert_close(base_product(projection, x), adapted_product(projection, x))
                projection.weight[0, 0] += 1.0  # a view: the module sees the change
                torch.testing.assert_close(base_product(projection, x), adapted_product(projection, x))
        fused = {name for name, projection in block.projections.items() if projection.rows is not None}
        assert fused == ({"q", "k", "v", "gate", "up"} if case == "phi3" else set())


def exchange(first: str, second: str) -> Callable[[Block], Block]:
    return lambda block: dataclasses.replace(block, **{first: getattr(block, second), second: getattr(block, first)})


def change(**values: Any) -> Callable[[Block], Block]:
    return lambda block: dataclasses.replace(block, **values)


def reverse_rows(name: str) -> Callable[[Block], Block]:
    """The rows of one projection, taken from a copy of its module that has them in reverse."""

    def lie(block: Block) -> Block:
        projection: Projection = getattr(block, name)
        owner = nn.Module()
        owner.linear = nn.Linear(projection.in_features, projection.out_features, bias=projection.bias is not None)
        owner.linear.weight = nn.Parameter(projection.weight.flip(0))
        if projection.bias is not None:
            owner.linear.bias = nn.Parameter(projection.bias.flip(0))
        return dataclasses.replace(block, **{name: Projection(owner, "linear", None)})

    return lie


LIES: list[tuple[str, str, Callable[[Block], Block]]] = [
    *((case, f"rows of {name}", reverse_rows(name)) for case in ("llama", "phi3") for name in ("q", "v", "up", "down")),
    ("opt", "rows of k", reverse_rows("k")),
    ("phi3", "k and v", exchange("k", "v")),
    ("llama", "k and v", exchange("k", "v")),
    ("llama", "gate and up", exchange("gate", "up")),
    ("phi3", "gate and up", exchange("gate", "up")),
    ("phi3", "a quarter of a head rotates, not half", change(rotary_dim=2)),
    ("qwen3", "nothing rotates", change(rotary_dim=0)),
    ("gemma", "SiLU for GELU", change(activation=F.silu)),
    ("opt", "GELU for ReLU", change(activation=F.gelu)),
    ("mistral", "no window", change(sliding_window=None)),
    ("mistral", "a window too short by one", change(sliding_window=3)),
    ("qwen3", "no q norm, no k norm", change(q_norm=None, k_norm=None)),
    ("qwen3", "q norm and k norm", exchange("q_norm", "k_norm")),
    ("granite", "no residual multiplier", change(residual_multiplier=1.0)),
    ("gemma2", "norms before attention and MLP", exchange("attention_norm", "mlp_norm")),
    ("gemma2", "norms before and after attention", exchange("attention_norm", "attention_post_norm")),
    ("olmo2", "norms after attention and MLP", exchange("attention_post_norm", "mlp_post_norm")),
    ("opt-350m", "norm on the output in place of after the residual", change(norms="output")),
    ("llama", "a block for its neighbour", change(index=2)),
]


@pytest.mark.parametrize(("family", "lie"), [pytest.param(c, f, id=f"{c}: {what}") for c, what, f in LIES])
def test_a_false_view_is_found_out(family: str, lie: Callable[[Block], Block]) -> None:
    model = model_of(family)
    view = blocks.decoder(model)
    seen = watch(view, model)
    assert error(view.blocks[0], seen) < TOLERANCE
    assert error(lie(view.blocks[0]), seen) > 1000 * TOLERANCE


ADAPTED = {
    "QKVO": ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj"],
    "all-linear": "all-linear",
}


def adapt(model: nn.Module, target_modules: list[str] | str, **options: Any) -> nn.Module:
    """The model with LoRA adapters whose B is not zero."""
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=target_modules, **options)).double().eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return adapted


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers its old way
@pytest.mark.parametrize("targets", list(ADAPTED))
def test_adapters_are_looked_through(case: str, targets: str) -> None:
    model = model_of(case)
    plain = blocks.decoder(model)
    weights = [[p.base.weight for p in block.projections.values()] for block in plain.blocks]
    adapted = adapt(model, ADAPTED[targets])
    view = blocks.decoder(adapted)
    assert view.model is model and view.tied == plain.tied
    seen = watch(view, adapted)
    for block, before in zip(view.blocks, weights, strict=True):
        assert [id(p.base.weight) for p in block.projections.values()] == [id(w) for w in before]
        wrapped = {name for name, p in block.projections.items() if p.module is not p.base}
        assert wrapped == ({"q", "k", "v", "o"} if targets == "QKVO" else set(block.projections))
        assert all(type(p.base) is nn.Linear for p in block.projections.values())
        assert error(block, seen, adapted_product) < TOLERANCE
        assert error(block, seen) > 1000 * TOLERANCE  # the base alone lacks the adapters


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_base_may_be_replaced_in_its_slot() -> None:
    """A subclass of nn.Linear that shares the weight sits beneath LoRA or in the model's own place."""

    class Shared(nn.Linear):
        pass

    model = model_of("llama")
    adapted = adapt(model, ["q_proj"])
    block = blocks.decoder(adapted).blocks[1]
    for projection, owner in ((block.q, block.q.module), (block.up, block.mlp)):
        base = projection.base
        shared = Shared(base.in_features, base.out_features, device="meta")
        shared.weight, shared.bias = base.weight, base.bias
        place, name = projection.slot
        assert place is owner
        setattr(place, name, shared)
        assert projection.base is shared and projection.weight is base.weight
    assert blocks.decoder(adapted).blocks[1].q.module is not blocks.decoder(adapted).blocks[1].q.base


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head", "embed_tokens"]}])
def test_adapters_beside_the_blocks_are_looked_through(options: dict[str, list[str]]) -> None:
    """A trained copy of the head; an adapter on the head and one on the embeddings."""
    model = model_of("llama")
    adapted = adapt(model, **{"target_modules": ["q_proj"], **options})
    view = blocks.decoder(adapted)
    assert not view.tied and view.lm_head is model.lm_head and not isinstance(view.lm_head, nn.Linear)
    seen = watch(view, adapted)
    with torch.no_grad():
        torch.testing.assert_close(view.logits(seen.outputs[-1]), seen.logits, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch.compile's own imports
def test_other_wrappers_are_looked_through() -> None:
    class Wrapper(nn.Module):  # as DistributedDataParallel does
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = model_of("llama")
    assert blocks.decoder(Wrapper(model)).model is model
    assert blocks.decoder(torch.compile(model)).model is model  # type: ignore[arg-type]


def test_gemma3_with_vision_is_viewed_as_its_text_model() -> None:
    text = config_of("gemma3").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    view = blocks.decoder(model)
    seen = watch(view, model)
    for block in view.blocks:
        assert error(block, seen) < TOLERANCE
    with torch.no_grad():
        torch.testing.assert_close(view.logits(seen.outputs[-1]), seen.logits, rtol=0, atol=0)
    assert blocks.describe(config).parameters == blocks.describe(config_of("gemma3")).parameters


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "llama-mha", "opt", "opt-350m"])
def test_tied_weights_are_seen(family: str) -> None:
    view = blocks.decoder(model_of(family))
    assert view.tied
    assert view.embeddings.weight is view.lm_head.weight
    assert not blocks.decoder(model_of("llama")).tied


def test_shapes_are_the_configs() -> None:
    facts = {}
    for case in CONFIGS:
        block = blocks.decoder(model_of(case)).blocks[0]
        facts[case] = (block.heads, block.kv_heads, block.head_dim, block.rotary_dim, block.intermediate_size)
        assert block.hidden_size == 32
    assert facts["llama"] == (4, 2, 12, 12, 44)
    assert facts["llama-mha"] == (4, 4, 8, 8, 44)
    assert facts["gemma"] == (4, 1, 16, 16, 44)
    assert facts["phi3"] == (4, 2, 8, 4, 44)
    assert facts["opt"] == (4, 4, 8, 0, 44)


class Packed(nn.Linear):
    """As bitsandbytes keeps four-bit weights: two to a byte, in one column."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        size = linear.in_features * linear.out_features // 2
        self.weight = nn.Parameter(torch.zeros(size, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_quantised_weight_is_refused_by_name_and_the_rest_of_the_view_works(family: str) -> None:
    model = model_of(family)
    for block in blocks.decoder(model).blocks:
        for projection in block.projections.values():
            place, name = projection.slot
            setattr(place, name, Packed(projection.base))
    block = blocks.decoder(model).blocks[0]
    assert block.v.out_features == 2 * block.head_dim and block.v.in_features == 32
    assert isinstance(block.v.base, Packed)
    with pytest.raises(InputError, match=r"^(v_proj|qkv_proj) is quantised \(Packed\).*load the model without"):
        _ = block.v.weight


# What each method covers


def test_spd_and_sparselora_cover_what_their_maths_covers() -> None:
    refused = {case for case in CONFIGS if blocks.refusal(config_of(case), "spd") is not None}
    assert refused == {"gemma2", "gemma3", "olmo2", "opt-350m"}
    assert not [case for case in CONFIGS if blocks.refusal(config_of(case), "sparselora") is not None]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.Gemma2Config(), "this Gemma 2 model: its sandwich norms"),
        (transformers.Gemma3TextConfig(), "this Gemma 3 model: its sandwich norms"),
        (transformers.Olmo2Config(), "this OLMo 2 model: its post-norm"),
        (transformers.OPTConfig(do_layer_norm_before=False), "this OPT model: do_layer_norm_before is false"),
        (transformers.OPTConfig(word_embed_proj_dim=512), "word_embed_proj_dim 512 differs from hidden_size 768"),
    ],
)
def test_spd_refuses_by_name(config: PretrainedConfig, reason: str) -> None:
    sentence = blocks.refusal(config, "spd")
    assert sentence is not None and "\n" not in sentence
    assert sentence.startswith("SPD does not cover this ") and reason in sentence
    assert sentence.endswith("it covers Gemma, Granite, Llama, Mistral, OPT, Phi-3, Qwen2, Qwen3")


@pytest.mark.parametrize("method", ["sparselora", "spd"])
@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mixtral", "mixture of experts"),
        ("qwen2_moe", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
        ("gpt_neox", "attention and MLP in parallel"),
        ("falcon", "attention and MLP in parallel"),
        ("cohere", "attention and MLP in parallel"),
        ("phi", "attention and MLP in parallel"),
        ("mamba", "recurrence"),
        ("gpt2", "Conv1D"),
        ("vit", "its blocks are not described here"),
    ],
)
def test_an_uncovered_family_gets_one_sentence(model_type: str, reason: str, method: families.Method) -> None:
    config = transformers.AutoConfig.for_model(model_type)
    sentence = blocks.refusal(config, method)
    assert sentence is not None and "\n" not in sentence
    assert sentence.startswith(f"model_type '{model_type}' is not supported: ") and reason in sentence
    assert "use one of gemma, gemma2, " in sentence and sentence.endswith("qwen3")
    with pytest.raises(InputError) as raised:
        blocks.describe(config)
    assert str(raised.value) == sentence


def test_a_model_of_an_uncovered_family_is_refused() -> None:
    small = {**GATED, "num_local_experts": 2, "num_experts_per_tok": 1}
    mixtral = AutoModelForCausalLM.from_config(transformers.MixtralConfig(**small))
    with pytest.raises(InputError, match=r"^model_type 'mixtral' is not supported: it is a mixture of experts"):
        blocks.decoder(mixtral)


def test_what_is_no_language_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"^Linear is not a transformers causal language model: load one with"):
        blocks.decoder(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"^LlamaModel has no language-model head: load it with AutoModelForCausalLM"):
        blocks.decoder(transformers.LlamaModel(config_of("llama")))


def test_bidirectional_attention_is_refused() -> None:
    config = transformers.GemmaConfig(use_bidirectional_attention=True)
    for method in ("sparselora", "spd"):
        assert "use_bidirectional_attention is set" in str(blocks.refusal(config, method))


def test_the_tables_agree() -> None:
    assert not set(families.FAMILIES) & set(families.UNCOVERED)
    known = set(transformers.CONFIG_MAPPING)
    assert set(families.FAMILIES) <= known
    assert {getattr(transformers, name).model_type for name, _ in CONFIGS.values()} | {"gemma3"} == set(
        families.FAMILIES
    )


# Ranks


def shape(heads: int, kv_heads: int) -> PretrainedConfig:
    return transformers.LlamaConfig(hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads)


def test_allowed_ranks() -> None:
    assert blocks.allowed_ranks(shape(8, 8)) == (1, 2, 4, 8)
    assert blocks.allowed_ranks(shape(8, 2)) == (1, 2, 4, 8)  # more ranks than kv heads: replicated
    assert blocks.allowed_ranks(shape(12, 4)) == (1, 2, 4, 12)
    assert blocks.allowed_ranks(shape(14, 2)) == (1, 2, 14)
    assert blocks.allowed_ranks(transformers.OPTConfig()) == (1, 2, 3, 4, 6, 12)


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [
        (0, "at least one is needed"),
        (-2, "at least one is needed"),
        (5, "they do not divide its 12 attention heads"),
        (24, "they do not divide its 12 attention heads"),
        (3, "they neither divide its 4 key/value heads nor are a multiple of them"),
        (6, "they neither divide its 4 key/value heads nor are a multiple of them"),
    ],
)
def test_ranks_that_cannot_share_the_heads_are_refused(ranks: int, reason: str) -> None:
    with pytest.raises(InputError) as raised:
        blocks.check_ranks(shape(12, 4), ranks)
    assert str(raised.value) == f"ranks={ranks} cannot share this model, {reason}: use one of 1, 2, 4, 12"
    for allowed in (1, 2, 4, 12):
        blocks.check_ranks(shape(12, 4), allowed)


# Descriptions and configs


def test_a_description_counts_what_the_model_holds(case: str) -> None:
    model = model_of(case)
    facts = blocks.describe(config_of(case))
    assert facts == blocks.describe(model)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    view = blocks.decoder(model)
    assert sorted(i for row in facts.blocks for i in row.blocks) == list(range(facts.layers))
    for row in facts.blocks:
        for index in row.blocks:
            block = view.blocks[index]
            assert row.parameters == sum(p.numel() for p in block.layer.parameters())
            assert row.sliding_window == block.sliding_window
            assert list(row.projections) == list(block.projections)
            for name, shape in row.projections.items():
                weight, bias = block.projections[name].weight, block.projections[name].bias
                assert (shape.out_features, shape.in_features) == tuple(weight.shape)
                assert shape.bias == (bias is not None)
                assert shape.parameters == weight.numel() + (0 if bias is None else bias.numel())
    fused = {shape.module for row in facts.blocks for shape in row.projections.values()} & FUSED
    assert fused == (FUSED if case == "phi3" else set())
    assert json.loads(json.dumps(dataclasses.asdict(facts)))["layers"] == 3


def test_like_blocks_stand_in_one_row() -> None:
    rows = blocks.describe(config_of("gemma3")).blocks
    assert [(row.span, row.sliding_window) for row in rows] == [("0, 2", 4), ("1", None)]
    rows = blocks.describe(config_of("qwen2")).blocks
    assert [(row.span, row.sliding_window) for row in rows] == [("0", None), ("1-2", 4)]
    assert [row.span for row in blocks.describe(config_of("llama")).blocks] == ["0-2"]


def test_a_description_names_the_familys_marks() -> None:
    granite, opt, gemma = (blocks.describe(config_of(case)) for case in ("granite", "opt-350m", "gemma2"))
    assert (granite.family, granite.residual_multiplier, granite.norm, granite.norms) == (
        "Granite",
        0.3,
        "RMSNorm",
        "pre",
    )
    assert (opt.norm, opt.norms, opt.activation, opt.tied) == ("LayerNorm", "post", "relu", True)
    assert (gemma.norms, gemma.activation, gemma.head_dim) == ("sandwich", "gelu_pytorch_tanh", 16)
    assert gemma.sparselora is None and gemma.spd is not None and "sandwich" in gemma.spd


def test_a_large_model_is_described_without_its_memory() -> None:
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = transformers.LlamaConfig(**shape, num_key_value_heads=8, vocab_size=128256)
    assert blocks.describe(config).parameters == 70_553_706_496  # Llama 3 70B, 141 GB in bf16


def test_a_config_no_model_can_be_built_from_is_refused() -> None:
    config = config_of("llama")
    config.hidden_act = "swoosh"
    with pytest.raises(InputError, match=r"^no llama model can be built from this config .*swoosh.*: correct it$"):
        blocks.describe(config)
    with pytest.raises(InputError, match=r"^num_hidden_layers=0 makes a model without blocks"):
        blocks.describe(transformers.LlamaConfig(**{**GATED, "num_hidden_layers": 0}))


def test_a_saved_config_is_loaded(case: str, tmp_path: Path) -> None:
    config_of(case).save_pretrained(tmp_path)
    loaded = blocks.load_config(tmp_path)
    assert blocks.describe(loaded) == blocks.describe(config_of(case))


def test_reference_is_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_of("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(families, "REFERENCE", tmp_path)
    assert blocks.load_config("reference").hidden_size == 32
    assert blocks.model_path("reference") == str(tmp_path) and blocks.model_path("some/model") == "some/model"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"^model config .*config\.json is not a file: give the path"),
        ("{not json", r"^model config .*config\.json is not JSON"),
        ("[]", r"config\.json names no model_type: give the directory of a transformers checkpoint$"),
        ('{"hidden_size": 8}', r"config\.json names no model_type"),
        ('{"model_type": "nope"}', r"config\.json: model_type 'nope' is not supported: .*; use one of gemma, .*qwen3$"),
        ('{"model_type": "llama", "hidden_size": "wide"}', r"config\.json is not a valid llama config \(.*hidden_size"),
        ('{"model_type": "llama", "hidden_size": 30}', r"config\.json is not a valid llama config \(.*hidden size"),
    ],
)
def test_a_broken_config_is_refused_in_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as raised:
        blocks.load_config(tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("source", ["./nowhere", "no/such/directory", "", "nobody/nothing", "nothing"])
def test_a_model_that_is_not_there_is_refused_in_one_line(source: str) -> None:
    with pytest.raises(InputError, match=f"^model '{source}' is not a directory") as raised:
        blocks.load_config(source)
    assert "\n" not in str(raised.value) and "give a model's directory" in str(raised.value)


def test_an_adapters_directory_is_sent_to_its_base(tmp_path: Path) -> None:
    LoraConfig(base_model_name_or_path="some/base").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is a PEFT adapter, not a model: give the base model that .*adapter_config"):
        blocks.load_config(tmp_path)


def test_an_id_is_refused_soon_where_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    class ConnectError(Exception):
        """As the hub client's."""

    class Session:
        def head(self, *_: Any, **__: Any) -> None:
            raise ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(families, "is_offline_mode", lambda: False)
    monkeypatch.setattr(families, "get_session", Session)
    monkeypatch.setattr(families.PretrainedConfig, "get_config_dict", lambda *_: pytest.fail("went to the hub"))
    match = (
        "^model 'no/such' is not a directory nor in the local cache, and the hub cannot be reached .*not known.: give"
    )
    with pytest.raises(InputError, match=match):
        blocks.load_config("no/such")
