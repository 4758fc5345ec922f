"""vLLM engines with real workers for tiny checkpoints, and what the one-process simulation says of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elision.spd import SyncPlan, save, simulate
from tests.spd.tiny import VOCABULARY, tiny

RANKS = 2
LAYERS = 3
NEW = 8  # tokens generated
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM's attention has on CPUs
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
OPT = {"hidden_size": 128, "num_attention_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 128}
ONLY: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": False},  # vLLM has no sliding window in some layers of it only
    "qwen3": {"attention_bias": False},  # vLLM has no bias on its output projection
}


class Answer(NamedTuple):
    """What was generated after one prompt, and the log-probabilities (tokens, vocabulary) it was chosen from."""

    tokens: list[int]
    log_probabilities: Tensor


def model_of(family: str) -> Any:
    """A tiny model in float32, with sizes that vLLM's kernels take; the same at every call."""
    return tiny(family, dtype=torch.float32, **(OPT if family == "opt" else {**SIZES, **ONLY.get(family, {})}))


def checkpoint(place: Path, family: str, plan: SyncPlan | None) -> str:
    """Write the tiny model, with `plan` if there is one."""
    if plan is None:
        model_of(family).save_pretrained(place)
    else:
        save(model_of(family), plan, place)
    return str(place)


def prompts(number: int = 4, seed: int = 3) -> list[list[int]]:
    """Prompts of 3 to 24 random tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 25, (number,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@contextmanager
def engine(place: str, **options: Any) -> Iterator[Any]:
    """A running vLLM with two workers, in float32."""
    from vllm import LLM

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


def count_all_reduces(worker: Any) -> None:
    """In a worker: count from now on how often its tensor-parallel group is summed over."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    group.counted, inner = 0, group._all_reduce_out_place

    def counting(tensor: Tensor) -> Tensor:
        group.counted += 1
        return inner(tensor)

    group._all_reduce_out_place = counting


def counted(worker: Any) -> int:
    """In a worker: how often it was summed over."""
    from vllm.distributed import get_tp_group

    return get_tp_group().counted
