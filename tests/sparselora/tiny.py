"""Tiny PEFT LoRA models of the real classes, in float64, and batches with three kinds of tokens."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from elision.sparselora import SparsityPlan

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 40}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "llama-mha": {**SIZES, "intermediate_size": 40, "attention_bias": True, "mlp_bias": True},
    "mistral": {**GATED, "head_dim": 12, "sliding_window": 6},
    "qwen2": {**GATED, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {**GATED, "head_dim": 12},
    "gemma": {**GATED, "head_dim": 12},
    "gemma2": {**GATED, "head_dim": 12, "sliding_window": 6},
    "gemma3_text": {**GATED, "head_dim": 12, "sliding_window": 6},
    "phi3": GATED,
    "olmo2": GATED,
    "granite": {**GATED, "residual_multiplier": 0.6, "logits_scaling": 2.0, "attention_bias": True},
    "opt": {**SIZES, "ffn_dim": 40, "word_embed_proj_dim": 32, "dropout": 0.0},
}
FAMILIES = list(CONFIGS)
ALL = r".*\.(q_proj|k_proj|v_proj|o_proj|out_proj|qkv_proj|gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2)"
ATTENTION = r".*\.(q_proj|k_proj|v_proj|o_proj|out_proj|qkv_proj)"


def base(family: str = "llama", dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A model of `family` whose every weight and bias is away from its initial zero or one."""
    config = CONFIG_MAPPING[family.partition("-")[0]](**{**CONFIGS[family], **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.to(dtype)


def peft_model(model: nn.Module, config: LoraConfig) -> Any:
    """peft.get_peft_model, less the deprecation that PEFT 0.21 meets in transformers 5.23."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


def lora(family: str = "llama", targets: str = ALL, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """`base` with LoRA of rank 3 on `targets`, both factors random, in train mode."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    model = peft_model(base(family, dtype, **overrides), config).to(dtype)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.2)  # equal in every dtype
    return model.train()


def plan(model: nn.Module, sparsity: float = 0.5, **settings: Any) -> SparsityPlan:
    """Uniform, chosen by the oracle, sparse from the first step unless told otherwise."""
    return SparsityPlan.uniform(model, sparsity, **{"selection": "oracle", "dense_steps": 0.0, **settings})


def batch(
    prompts: tuple[int, ...] = (5, 3), answers: tuple[int, ...] = (3, 2), left: bool = False
) -> dict[str, Tensor]:
    """Rows of a prompt and an answer of random tokens, padded on the right or left; the answers carry the labels."""
    length = max(p + a for p, a in zip(prompts, answers, strict=True))
    generator = torch.Generator().manual_seed(5)
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.randint(3, VOCABULARY, (prompt + answer,), generator=generator)
        labels = torch.cat([torch.full((prompt,), -100), ids[prompt:]])
        pad = length - len(ids)
        where = (pad, 0) if left else (0, pad)
        rows.append(
            {
                "input_ids": nn.functional.pad(ids, where),
                "attention_mask": nn.functional.pad(torch.ones_like(ids), where),
                "labels": nn.functional.pad(labels, where, value=-100),
            }
        )
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the adapters, taken away from the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert found
    return found


class InDouble(TorchFunctionMode):
    """Norms, softmax, rotations and the loss too: transformers takes them to single precision in a double model."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float and args[0].dtype in (torch.float64, torch.int64):
            return args[0].double()
        if func is Tensor.to and args[0].dtype == torch.float64:
            args = (args[0], *(torch.float64 if a is torch.float32 else a for a in args[1:]))
            kwargs = {name: torch.float64 if a is torch.float32 else a for name, a in kwargs.items()}
        if func is nn.functional.softmax and args[0].dtype == torch.float64:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def loss_of(model: Any, **inputs: Any) -> Tensor:
    """Loss of one forward, in double precision throughout where the model is."""
    with InDouble():
        return model(**inputs, use_cache=False).loss


def loss_and_gradients(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward and backward."""
    loss = loss_of(model, **inputs)
    loss.backward()
    return loss.detach(), gradients(model)


def checkpoint(model: Any, reentrant: bool) -> None:
    """Switch gradient checkpointing on, under the name that this transformers has for it."""
    inner = model.get_base_model()
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def close(
    one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]], tolerance: float = 1e-12
) -> bool:
    """Whether two results of `loss_and_gradients` agree, each gradient relative to its largest entry."""
    assert one[1].keys() == other[1].keys()
    return bool((one[0] - other[0]).abs() <= tolerance * one[0].abs()) and all(
        bool((g - other[1][name]).abs().max() <= tolerance * g.abs().max().clamp_min(1e-3))
        for name, g in one[1].items()
    )


def bits(module: nn.Module) -> dict[str, bytes]:
    """The state dict, byte by byte."""
    return {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in module.state_dict().items()
    }
