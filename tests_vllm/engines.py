"""vLLM engines with real workers for tiny checkpoints, and what the one-process simulation says of them."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from elision.blocks import decoder
from elision.spd import SyncPlan, save, simulate
from tests.spd.tiny import VOCABULARY, corrected

RANKS = 2
LAYERS = 5
NEW = 8  # tokens generated
# Every kind of block but int8's: dropped as it is, corrected in three ways, and one with both syncs.
MIXED = SyncPlan(RANKS, (0, 1, 2, 3), corrections={1: "constant", 2: "gain", 3: "local_o"})
SIZES: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM's attention has on CPUs
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
OPT = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "ffn_dim": 96,
    "word_embed_proj_dim": 128,
}
ONLY: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": False},  # vLLM has no sliding window in some layers of it only
    "qwen3": {"attention_bias": False},  # vLLM has no bias on its output projection
}


class Answer(NamedTuple):
    """What was generated after one prompt, and the log-probabilities (tokens, vocabulary) it was chosen from."""

    tokens: list[int]
    log_probabilities: Tensor


def model_of(family: str, plan: SyncPlan | None = None) -> Any:
    """A tiny model in float32, with sizes that vLLM's kernels take and the plan's corrections; always the same.

    Its queries and keys are halved: attention is so sharp else that rounding alone moves log-probabilities by 6e-5.
    """
    sizes = OPT if family == "opt" else {**SIZES, **ONLY.get(family, {})}
    model = corrected(family, RANKS, dict(plan.corrections) if plan else {}, dtype=torch.float32, **sizes)
    for block in decoder(model).blocks:
        for projection in (block.q, block.k):
            projection.weight.data *= 0.5
    return model


def checkpoint(place: Path, family: str, plan: SyncPlan | None) -> str:
    """Write the tiny model, with `plan` if there is one."""
    if plan is None:
        model_of(family).save_pretrained(place)
    else:
        save(model_of(family, plan), plan, place)
    return str(place)


def prompts(number: int = 4, seed: int = 3) -> list[list[int]]:
    """Prompts of 3 to 24 random tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 25, (number,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@contextmanager
def engine(place: str, **options: Any) -> Iterator[Any]:
    """A running vLLM with two workers, in float32.

    Its scheduler is in this process and its workers are forked from it: each would import vLLM anew otherwise, which
    takes longer than all else here. The server's processes are as vLLM starts them.
    """
    from vllm import LLM
    from vllm.v1.executor import multiproc_executor

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setattr(multiproc_executor, "get_mp_context", partial(multiprocessing.get_context, "fork"))
        llm = LLM(
            model=place,
            tensor_parallel_size=RANKS,
            dtype="float32",
            distributed_executor_backend="mp",
            skip_tokenizer_init=True,
            max_model_len=64,
            max_num_seqs=8,
            max_logprobs=-1,
            **{"enforce_eager": True, **options},
        )
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


def answers(llm: Any, questions: Sequence[Sequence[int]], **options: Any) -> list[Answer]:
    """What vLLM generates greedily after each of the questions."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=-1, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": list(q)} for q in questions], sampling, use_tqdm=False, **options)
    return [
        Answer(
            list(output.outputs[0].token_ids),
            torch.tensor([[row[token].logprob for token in range(VOCABULARY)] for row in output.outputs[0].logprobs]),
        )
        for output in outputs
    ]


@torch.no_grad()
def simulated(model: Any, plan: SyncPlan, questions: Sequence[Sequence[int]]) -> list[Answer]:
    """What the one-process simulation generates greedily after each of the questions."""
    found = []
    with simulate(model, plan):
        for question in questions:
            ids = torch.tensor([question])
            for _ in range(NEW):
                log_probabilities = model(ids).logits.log_softmax(-1)[0]
                ids = torch.cat([ids, log_probabilities[-1:].argmax(-1, keepdim=True)], dim=1)
            found.append(Answer(ids[0, len(question) :].tolist(), log_probabilities[len(question) - 1 :]))
    return found


def difference(some: Sequence[Answer], others: Sequence[Answer]) -> float:
    """The largest difference between two log-probabilities."""
    pairs = zip(some, others, strict=True)
    return max((a.log_probabilities - b.log_probabilities).abs().max().item() for a, b in pairs)


def syncs(llm: Any) -> list[dict[str, int]]:
    """How often each worker sums over ranks in one forward pass of three tokens, by operator."""
    from vllm import SamplingParams

    llm.collective_rpc(_start_counting)
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": [5, 6, 7]}], one, use_tqdm=False)
    return llm.collective_rpc(_counted)


def _start_counting(worker: Any) -> None:
    worker.counting = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    worker.counting.start()


def _counted(worker: Any) -> dict[str, int]:
    worker.counting.stop()
    names = [event.name for event in worker.counting.events()]
    return {name: names.count(name) for name in ("_C::shm_allreduce", "elision::int8_all_reduce")}


RANK, SCALING = 4, 2.0  # of the adapter


def adapter(place: Path, model: Any, seed: int) -> str:
    """Write a random LoRA adapter of all projections as PEFT does, and merge it into `model`."""
    place.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors, names = {}, set()
    for name, module in model.named_modules():
        if ".layers." in name and isinstance(module, torch.nn.Linear):
            a = 0.1 * torch.randn(RANK, module.in_features, generator=generator)
            b = 0.1 * torch.randn(module.out_features, RANK, generator=generator)
            tensors |= {f"base_model.model.{name}.lora_{part}.weight": t for part, t in (("A", a), ("B", b))}
            names.add(name.rpartition(".")[2])
            module.weight.data += SCALING * b @ a
    save_file(tensors, place / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": SCALING * RANK, "bias": "none"}
    (place / "adapter_config.json").write_text(json.dumps({**config, "target_modules": sorted(names)}))
    return str(place)
