"""Train the embedded model: `python -m elision.reference_model.train`.

Llama architecture, 7.5 M parameters, trained in bf16 (fp32 master weights) on the standard library's sources, loss on
every token, and on word problems, loss on the solution alone; Muon for the matrices inside the blocks, AdamW for the
rest. Every micro-batch is a function of (seed, step, number), so a killed run resumes to what it would have been, and
the work divides over processes without changing the data. On CPU small operators do not scale over threads, so the
work is divided over processes of one thread; always over as many, whatever the number of cores, because the order in
which gradients are added changes their rounding, and after some hundred steps the model (docs/lab-notes.md).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from elision import files
from elision.errors import InputError
from elision.reference_model.corpus import library_hash, library_texts
from elision.word_problems import FAMILIES, problem, problems

RECIPE: dict[str, Any] = {
    "seed": 0,
    # Pages of problems by steps: short ones teach whose number it is, long ones to find it among many
    # (docs/lab-notes.md).
    "phases": [
        {"until": 400, "distractors": [0, 3], "rows": [24, 104]},
        {"until": 600, "distractors": [0, 6], "rows": [18, 136]},
        {"until": 800, "distractors": [0, 10], "rows": [12, 176]},
    ],
    "micro_batches": {"problems": 8, "library": 4},  # per step, over all processes
    "processes": 4,  # on CPU
    "library_rows": [4, 384],  # rows, tokens
    "learning_rate": {"muon": 4e-3, "adamw": 2e-3},  # matrices inside the blocks; embeddings and norms
    "momentum": 0.95,
    "betas": [0.9, 0.95],
    "weight_decay": 0.1,
    "warmup_steps": 60,
    "decay_steps": 200,
    "clip": 1.0,
    "vocabulary": 2048,
    # of the library that the published weights were trained on: CPython 3.11.7
    "library_sha256": "2470e29c6bef528a0d36744736ebcf2bacbd54742ada770426cb8c012abdf858",
    "library_python": "3.11.7",
}
CONFIG: dict[str, Any] = {
    "vocab_size": RECIPE["vocabulary"],
    "hidden_size": 256,
    "intermediate_size": 416,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, learned from the library and the training problems."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=RECIPE["vocabulary"],
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = [f"{p.prompt} {p.solution}" for p in problems(tuple(FAMILIES), "train", 6000, RECIPE["seed"])]
    tokenizer.train_from_iterator([*texts, *sample], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )


def problem_batch(tokenizer: PreTrainedTokenizerFast, step: int, number: int) -> tuple[Tensor, Tensor]:
    """(rows, tokens) input ids and labels of one micro-batch of training problems; -100 outside the solution."""
    phase = next(phase for phase in RECIPE["phases"] if step < phase["until"])
    rows, length = phase["rows"]
    ids = torch.full((rows, length), CONFIG["pad_token_id"])
    labels = torch.full((rows, length), -100)
    first = (step * RECIPE["micro_batches"]["problems"] + number) * rows
    for row in range(rows):
        p = problem(tuple(FAMILIES), "train", first + row, RECIPE["seed"], tuple(phase["distractors"]))
        prompt = tokenizer.encode(p.prompt)
        solution = [*tokenizer.encode(f" {p.solution}"), CONFIG["eos_token_id"]]
        end = min(len(prompt) + len(solution), length)
        ids[row, :end] = torch.tensor([*prompt, *solution][:end])
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
    return ids, labels


def library_batch(tokens: Tensor, step: int, number: int) -> tuple[Tensor, Tensor]:
    """(rows, tokens) windows of the library at random places; every token is a label."""
    rows, length = RECIPE["library_rows"]
    generator = torch.Generator().manual_seed((RECIPE["seed"] * 1_000_003 + step) * 64 + number)
    starts = torch.randint(len(tokens) - length, (rows,), generator=generator)
    ids = torch.stack([tokens[start : start + length] for start in starts.tolist()])
    return ids, ids


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention as three batched products, which on CPU beats the fused kernel's backward at these lengths."""
    batch, heads, length, dim = query.shape
    causal = torch.full((1, length, length), -math.inf, dtype=query.dtype, device=query.device).triu(1)
    flat = [x.reshape(batch * heads, length, dim) for x in (query, key, value)]
    scores = torch.baddbmm(causal, flat[0], flat[1].transpose(1, 2), alpha=kwargs["scaling"])
    out = torch.bmm(torch.softmax(scores, -1), flat[2])
    return out.view(batch, heads, length, dim).transpose(1, 2).contiguous(), None


def loss_of(model: LlamaForCausalLM, body: Callable[..., Any], ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labels, logits computed where there are any."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state
        kept = labels[:, 1:] != -100
        logits = model.lm_head(hidden[:, :-1][kept])
    return nn.functional.cross_entropy(logits.float(), labels[:, 1:][kept])


def schedule(step: int) -> float:
    """Share of the peak learning rate: linear warmup, constant, linear decay to zero over the last steps."""
    rise = (step + 1) / RECIPE["warmup_steps"]
    fall = (RECIPE["phases"][-1]["until"] - step) / RECIPE["decay_steps"]
    return min(1.0, rise, fall)


def optimizers(model: LlamaForCausalLM) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings and norms."""
    inner = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name]
    embeddings = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers" not in name]
    norms = [p for p in model.parameters() if p.dim() == 1]
    rates, decay = RECIPE["learning_rate"], RECIPE["weight_decay"]
    muon = torch.optim.Muon(
        inner, rates["muon"], decay, RECIPE["momentum"], nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    groups = [{"params": embeddings, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}]
    return {"muon": muon, "adamw": torch.optim.AdamW(groups, lr=rates["adamw"], betas=tuple(RECIPE["betas"]))}


def train(rank: int, processes: int, out: str, stop_after: int, compiled: bool) -> None:
    """One process of the training; leaves `checkpoint.pt` and `log.jsonl` in `out`, resumes from the former."""
    torch.set_num_threads(1 if processes > 1 else torch.get_num_threads())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=processes)
    AttentionInterface.register("plain", plain_attention)
    torch.manual_seed(RECIPE["seed"])
    attention = "plain" if device == "cpu" else "sdpa"
    model: Any = LlamaForCausalLM._from_config(LlamaConfig(**CONFIG), attn_implementation=attention)
    model.to(device)
    stepped = optimizers(model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    library = torch.load(f"{out}/library.pt")
    first = 0
    checkpoint = Path(out) / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        for name, optimizer in stepped.items():
            optimizer.load_state_dict(state[name])
        first = state["step"]
    body: Callable[..., Any] = torch.compile(model.model, dynamic=False) if compiled else model.model
    steps = RECIPE["phases"][-1]["until"]
    end = min(steps, first + stop_after) if stop_after else steps
    counts = RECIPE["micro_batches"]
    total = counts["problems"] + counts["library"]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=rank > 0) as progress:
        task = progress.add_task("training", total=end, completed=first)
        for step in range(first, end):
            started = time.perf_counter()
            for name, optimizer in stepped.items():
                for group in optimizer.param_groups:
                    group["lr"] = RECIPE["learning_rate"][name] * schedule(step)
            losses = torch.zeros(2)
            for number in range(rank, total, processes):
                is_problem = number < counts["problems"]
                if is_problem:
                    ids, labels = problem_batch(tokenizer, step, number)
                else:
                    ids, labels = library_batch(library, step, number)
                loss = loss_of(model, body, ids.to(device), labels.to(device))
                (loss / total).backward()
                losses[0 if is_problem else 1] += loss.item()
            if processes > 1:
                flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None] + [losses])
                dist.all_reduce(flat)
                offset = 0
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
                        offset += p.numel()
                losses = flat[offset:]
            nn.utils.clip_grad_norm_(model.parameters(), RECIPE["clip"])
            for optimizer in stepped.values():
                optimizer.step()
                optimizer.zero_grad()
            if rank == 0:
                row = {
                    "step": step,
                    "problems": round(losses[0].item() / counts["problems"], 4),
                    "library": round(losses[1].item() / counts["library"], 4),
                    "seconds": round(time.perf_counter() - started, 3),
                }
                with open(f"{out}/log.jsonl", "a") as log:
                    log.write(json.dumps(row) + "\n")
                progress.update(task, completed=step + 1, description=f"loss {row['problems']} {row['library']}")
                if (step + 1) % 50 == 0 or step + 1 == end:
                    state = {name: optimizer.state_dict() for name, optimizer in stepped.items()}
                    state |= {"model": model.state_dict(), "step": step + 1}
                    files.write(checkpoint, lambda path, state=state: torch.save(state, path))
    if rank == 0 and end == steps:
        exported = model.to(torch.bfloat16)
        exported.config.architectures = ["LlamaForCausalLM"]
        exported.save_pretrained(f"{out}/model")
        tokenizer.save_pretrained(f"{out}/model")
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def main(
    out: Annotated[Path, typer.Option(help="Working directory; a rerun there resumes.")] = Path("runs/reference_model"),
    stop_after: Annotated[int, typer.Option(help="Stop after this many more steps; 0: go to the end.")] = 0,
    compiled: Annotated[bool, typer.Option(help="Compile the model; needs a C++ compiler on CPU.")] = True,
    any_library: Annotated[bool, typer.Option(help="Train although this Python's library is another one.")] = False,
) -> None:
    """Train the embedded model from the standard library and generated word problems.

    On a GPU in one process, on CPU in four of one thread: 45 minutes on 4 cores.
    """
    if library_hash() != RECIPE["library_sha256"] and not any_library:
        raise InputError(
            f"this Python's standard library is not that of Python {RECIPE['library_python']}, which the published "
            "weights were trained on: run under that version, or pass --any-library for a model within about 1% of it"
        )
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "library.pt").exists():
        texts = library_texts("train")
        tokenizer = build_tokenizer(texts)
        tokenizer.save_pretrained(out)
        ids = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
        files.write(out / "library.pt", lambda path: torch.save(torch.tensor(ids), path))
    (out / "rendezvous").unlink(missing_ok=True)
    processes = 1 if torch.cuda.is_available() else RECIPE["processes"]
    if processes == 1:
        train(0, 1, str(out), stop_after, compiled)
    else:
        spawn(train, (processes, str(out), stop_after, compiled), nprocs=processes)


if __name__ == "__main__":
    # Freed blocks stay with the process: returning them to the system costs CPU training a page fault per tensor.
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "8000000000")
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "4000000000")
    typer.run(main)
