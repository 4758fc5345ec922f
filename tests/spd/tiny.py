"""Tiny models of the real classes, in float64, with every weight and bias away from its initial zero or one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from elision.blocks import decoder
from elision.spd.corrections import attach

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {**SIZES, "num_key_value_heads": 3, "intermediate_size": 40}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**GATED, "attention_bias": True, "mlp_bias": True},
    "mistral": {**GATED, "head_dim": 8, "sliding_window": 5},
    "qwen2": {**GATED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {**GATED, "head_dim": 8, "attention_bias": True},
    "gemma": {**GATED, "head_dim": 8},
    "phi3": GATED,
    "granite": {
        **GATED,
        "attention_bias": True,
        "mlp_bias": True,
        "residual_multiplier": 0.6,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "opt": {**SIZES, "ffn_dim": 40, "word_embed_proj_dim": 24, "dropout": 0.0},
}
FAMILIES = sorted(CONFIGS)


def tiny(family: str, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A model of `family` in eval mode: random weights large enough for every block to matter."""
    config = CONFIG_MAPPING[family](**{**CONFIGS[family], **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    assert isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin)
    return model.to(dtype).eval()


def corrected(family: str, ranks: int, kinds: dict[int, str], **overrides: Any) -> Any:
    """A tiny model with a random correction of its kind in each block that `kinds` names."""
    model = tiny(family, **overrides)
    generator = torch.Generator().manual_seed(3)
    for index, kind in kinds.items():
        correction = attach(decoder(model).blocks[index], kind, ranks)
        with torch.no_grad():
            for parameter in correction.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def token_ids(rows: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    """Random tokens (rows, length) without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: tuple[int, ...] = (5, 8), seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch of rows of different lengths, padded on the left."""
    ids = token_ids(len(lengths), max(lengths), seed)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    """The state dict, byte by byte."""
    return {name: tensor.view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in model.state_dict().items()}
