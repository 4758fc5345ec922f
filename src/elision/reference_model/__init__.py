"""The embedded model: small, real, and trained by this repository's own script (train.py; its card is README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["PATH", "load"]

PATH = Path(__file__).parent


def load(dtype: torch.dtype | None = None) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Model and tokenizer; the weights are stored in bf16 and come as `dtype`, float32 by default."""
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    model = LlamaForCausalLM.from_pretrained(PATH, dtype=dtype or torch.float32)
    return model, PreTrainedTokenizerFast.from_pretrained(PATH)
