"""Which runtimes serve a plan: what each of them can share over the plan's ranks, by the facts of the model.

vLLM has a class of ours for some families, holds copies of key/value heads where there are more ranks, and runs blocks
that keep their attention. transformers takes every family that SPD covers, but splits key/value heads among the ranks,
and an intermediate size into chunks that must be the simulation's shards. What a geometry does not show is for
the runtimes to refuse: quantised weights, Qwen3 with attention biases in vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

from elision.facts import ModelFacts
from elision.spd.plan import SyncPlan

RUNTIMES = ("vLLM", "transformers")
VLLM = ("llama", "mistral", "qwen2", "qwen3", "phi3", "opt")  # the families of runtimes/vllm.py


def served_by(model: ModelFacts, plan: SyncPlan) -> tuple[str, ...]:
    """Those of RUNTIMES that serve `plan` for a model with these facts."""
    left = model.intermediate % plan.ranks
    able = (
        model.type in VLLM and not plan.skipped and not left,
        not model.kv_heads % plan.ranks and left in (0, plan.ranks - 1),
    )
    return tuple(name for name, serves in zip(RUNTIMES, able, strict=True) if serves)


def in_words(runtimes: Sequence[str]) -> str:
    """What `served_by` found, for people."""
    return " and ".join(runtimes) or "no runtime: elision.spd.load computes it in one process"
