"""Small models of other architectures to measure SPD on: `python benchmarks/second_models.py opt|qwen2`.

A bar that holds on one model may be a property of that model. So two more are trained, on the embedded model's corpus
and with its tokenizer: an OPT (LayerNorm, biases everywhere, two-layer MLP, learned positions) and a Qwen2 (grouped
queries, biases on Q, K and V). About 6 M parameters and some 15 minutes of one core each; they are not published.

The batch of a step is a function of the step, so a killed run goes on to what it would have been. The last line is
JSON; the model, with its tokenizer, is in `OUT/NAME/model`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import AttentionInterface, OPTConfig, OPTForCausalLM, Qwen2Config, Qwen2ForCausalLM

from elision import evaluate, files, reference_model
from elision.data import text_batches
from elision.progress import progress
from elision.reference_model.corpus import library_texts

COMMON = {"num_hidden_layers": 12, "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": None}
# N = 2, 4 and 8 divide query heads, key/value heads and MLP channels of both.
CONFIGS: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": 192, "ffn_dim": 768, "num_attention_heads": 8, "word_embed_proj_dim": 192, "dropout": 0.0},
    "qwen2": {
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "use_sliding_window": False,
    },
}
STEPS, ROWS, LENGTH = 900, 8, 192
PEAK, WARMUP, BETAS, DECAY, CLIP = 2e-3, 60, (0.9, 0.95), 0.1, 1.0


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention of whole rows, as batched products: faster on CPU than the fused kernel at these lengths."""
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1).to(query.dtype) for x in (key, value))
    flat = [x.reshape(batch * heads, length, dim) for x in (query, key, value)]
    causal = torch.full((1, length, length), -math.inf).triu(1)
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2)) * kwargs["scaling"]
    out = torch.bmm(torch.softmax(scores + causal.to(scores.dtype), -1), flat[2])
    return out.view(batch, heads, length, dim).transpose(1, 2).contiguous(), None


def build(name: str, tokenizer: Any) -> Any:
    """The untrained model."""
    AttentionInterface.register("plain", plain_attention)
    torch.manual_seed(0)
    values = COMMON | CONFIGS[name] | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    values |= {"eos_token_id": tokenizer.eos_token_id, "attn_implementation": "plain"}
    return OPTForCausalLM(OPTConfig(**values)) if name == "opt" else Qwen2ForCausalLM(Qwen2Config(**values))


def rows(tokens: Tensor, step: int) -> Tensor:
    """(ROWS, LENGTH) windows of the corpus at random places."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(tokens) - LENGTH, (ROWS,), generator=generator)
    return torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])


def learning_rate(step: int) -> float:
    """Linear warmup, then linear to zero."""
    return PEAK * min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP))


def main(
    name: Annotated[str, typer.Argument(help="opt or qwen2.")],
    out: Annotated[Path, typer.Option(help="Working directory; a rerun there resumes.")] = Path("runs/second_models"),
) -> None:
    """Train one of the two."""
    if name not in CONFIGS:
        raise typer.BadParameter(f"{name!r} is neither opt nor qwen2")
    _, tokenizer = reference_model.load()
    checkpoint, first = out / name / "checkpoint.pt", 0
    (tokens,) = text_batches(tokenizer, library_texts("train"), 1, rows=1 << 40)
    corpus = tokens["input_ids"].flatten()
    model = build(name, tokenizer)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    groups = [{"params": matrices}, {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=BETAS, weight_decay=DECAY)
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    with progress(f"Training {name}", STEPS, False) as advance:
        advance(first)
        for step in range(first, STEPS):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            ids = rows(corpus, step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            advance(1)
            if (step + 1) % 50 == 0:
                print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                files.write(checkpoint, lambda path, state=state: torch.save(state, path))
    model.eval().set_attn_implementation("sdpa")
    model.save_pretrained(out / name / "model")
    tokenizer.save_pretrained(out / name / "model")
    held_out = text_batches(tokenizer, library_texts("test"), LENGTH, ROWS, limit=64)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"model": name, "parameters": parameters, "perplexity": evaluate.perplexity(model, held_out)}))


if __name__ == "__main__":
    typer.run(main)
