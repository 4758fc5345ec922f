"""Plans served by real gloo processes with transformers' tensor parallelism agree with the one-process simulation."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from elision.errors import InputError
from elision.families import WEIGHTS
from elision.spd import SyncPlan, simulate
from elision.spd.runtimes import transformers as runtime
from elision.spd.runtimes.checkpoint import corrections_of
from tests.spd import served
from tests.spd.served import Case, checkpoint, greedy, log_probabilities, model_of
from tests.spd.tiny import CONFIGS, FAMILIES, tiny, token_ids

ALL = (0, 1, 2)
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 39}  # shards of 20 and 19 channels
WIDE = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
OPT = {"num_attention_heads": 4}
EXACT = {"dtype": torch.float64}  # int8 turns a difference in the last bit into a whole step, if seldom
CORRECTED = SyncPlan(2, ALL, corrections={0: "constant", 1: "gain", 2: "local_o"})
CASES: dict[int, list[Case]] = {
    2: [(family, OPT if family == "opt" else SIZES, SyncPlan(2, (0, 2))) for family in FAMILIES if family != "phi3"]
    + [
        ("phi3", {**SIZES, "intermediate_size": 40}, SyncPlan(2, ALL, corrections={1: "local_o"})),
        ("llama", SIZES, SyncPlan(2, ALL, corrections={0: "constant", 1: "gain", 2: "local_o"}, healed=(0,))),
        ("llama", SIZES, SyncPlan(2)),
        ("opt", OPT, SyncPlan(2, ALL, corrections={2: "local_o"})),
        ("llama", {**SIZES, **EXACT}, SyncPlan(2, (1,), corrections={1: "gain"}, int8=(0, 2))),
        ("granite", {**SIZES, **EXACT}, SyncPlan(2, int8=ALL)),
        ("phi3", {**SIZES, "intermediate_size": 40, **EXACT}, SyncPlan(2, (0,), int8=(2,), skipped=(1,))),
        ("granite", SIZES, SyncPlan(2, skipped=(0, 2))),
        ("opt", OPT, SyncPlan(2, (2,), skipped=(0,))),
    ],
    4: [
        ("llama", WIDE, SyncPlan(4, ALL, corrections={0: "gain"})),
        ("qwen2", WIDE, SyncPlan(4, (1,))),
        ("opt", OPT, SyncPlan(4, (0, 1))),
        ("phi3", WIDE, SyncPlan(4, (2,))),
        ("opt", {**OPT, "hidden_size": 20, "word_embed_proj_dim": 20, **EXACT}, SyncPlan(4, (1,), int8=(0, 2))),
    ],
}


UP, Q = "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"


def without(source: str, place: Path, name: str, instead: torch.Tensor | None = None) -> str:
    """A copy of a checkpoint that lacks one tensor, or has another in its stead."""
    shutil.copytree(source, place)
    tensors = load_file(place / "model.safetensors")
    tensors.pop(name)
    save_file(tensors | ({} if instead is None else {name: instead}), place / "model.safetensors", {"format": "pt"})
    return str(place)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All that real processes have to do here, in one run of 2 ranks and one of 4: starting them is what takes time."""
    room = tmp_path_factory.mktemp("served")

    def make(name: str, family: str, plan: SyncPlan, **sizes: Any) -> str:
        return checkpoint(room / name, family, plan, **sizes)

    def cases(ranks: int) -> served.Task:
        made = [make(f"{ranks}-{i}", family, plan, **sizes) for i, (family, sizes, plan) in enumerate(CASES[ranks])]
        return served.serve, (made,)

    empty, full = make("empty", "llama", SyncPlan(2), **SIZES), make("full", "llama", SyncPlan(2, ALL), **SIZES)
    full_corrected = make("corrected", "llama", CORRECTED, **SIZES)
    four = make("four", "llama", SyncPlan(4, ALL), **WIDE)
    query = load_file(Path(full) / "model.safetensors")[Q]
    others = {
        "settings": make("settings", "llama", SyncPlan(2, ALL), **SIZES, rms_norm_eps=1e-3),
        "weights": without(full, room / "weights", Q, query + 0.01),  # a fine-tuned one, say
    }
    two: dict[str, served.Task] = {
        "serve": cases(2),
        "toggle": (served.toggle, (empty, SyncPlan(2, ALL))),
        "sample": (served.sample, (full,)),
        "plans": (served.refused, ([full, empty],)),
        **{name: (served.refused, ([full, other],)) for name, other in others.items()},
        "missing": (served.refused, ([full, str(room / "nowhere")],)),
        "number": (served.refused, ([four, four],)),
        "lacking": (served.refused, ([full, without(full, room / "lacking", UP)],)),
        "kind": (served.otherwise_corrected, (full_corrected, replace(CORRECTED, corrections={1: "constant"}))),
        "asked": (served.asked, (full,)),
        "adapted": (served.adapted, (empty,)),
        "late": (served.late, (full,)),
        "cast": (served.serve, ([full_corrected], torch.bfloat16)),
        "lose": (served.lose, (full, 1, "failed")),
    }
    return {
        2: served.spawn(2, room / "run2", two),
        4: served.spawn(4, room / "run4", {"serve": cases(4), "lose": (served.lose, (four, 1, "killed"))}, killed=(1,)),
    }


@pytest.mark.parametrize("ranks", CASES)
def test_ranks_agree_with_the_simulation(ranks, runs):
    for (family, sizes, plan), *seen in zip(CASES[ranks], *runs[ranks]["serve"], strict=True):
        model = model_of(family, plan, **sizes)
        with torch.no_grad():
            dense = log_probabilities(model)
            with simulate(model, plan):
                expected = log_probabilities(model)
                tokens = greedy(lambda batch, model=model, **options: model.generate(**batch, **options))
        for rank in seen:
            where = f"{family} {plan.to_dict()}"
            assert torch.equal(rank["log_probabilities"], seen[0]["log_probabilities"]), where
            assert (rank["log_probabilities"] - expected).abs().max() < 5e-6, where
            assert torch.equal(rank["tokens"], tokens), where
            spared = len(plan.dropped) + len(plan.int8) + len(plan.skipped)
            assert rank["syncs"] == 2 * model.config.num_hidden_layers - spared, where
            assert rank["int8"] == len(plan.int8), where
        if plan.int8:
            with torch.no_grad(), simulate(model, SyncPlan(ranks, plan.dropped, corrections=plan.corrections)):
                assert (expected - log_probabilities(model)).abs().max() > 1e-4, where
        if plan.dropped:
            assert (expected - dense).abs().max() > 1e-3, family
        if plan.corrections:
            with torch.no_grad(), simulate(model, SyncPlan(ranks, plan.dropped)):
                assert (expected - log_probabilities(model)).abs().max() > 1e-3, family


def test_corrections_take_the_type_that_the_weights_are_loaded_in(runs):
    model = model_of("llama", CORRECTED, **SIZES).to(torch.bfloat16)
    with torch.no_grad(), simulate(model, CORRECTED):
        expected = log_probabilities(model)
    for (rank,) in runs[2]["cast"]:
        assert (rank["log_probabilities"] - expected).abs().mean() < 0.05  # ranks round their shares before the sum


def test_a_correction_of_another_kind_than_the_plan_names_is_refused(runs):
    assert set(runs[2]["kind"]) == {
        "plan corrects block 1 by constant for 2 ranks, the checkpoint by gain for 2: use the plan that it carries"
    }


def test_an_adapter_on_what_a_plan_reads_itself_is_refused(runs):
    sentence = "block 0's up projection carries an adapter, which a plan's forward would pass over: "
    for seen in runs[2]["adapted"]:
        assert [found.startswith(sentence) for found in seen] == [True, True]


def test_an_empty_plan_is_transformers_own_parallelism_and_a_dropped_one_can_be_removed(runs):
    for seen in runs[2]["toggle"]:
        assert torch.equal(seen["empty"], seen["own"])
        assert seen["empty code"] == seen["own code"]
        assert torch.equal(seen["removed"], seen["empty"])
        assert (seen["dropped"] - seen["empty"]).abs().max() > 1e-3
        assert seen["twice"] == "block 0's forward is replaced already: remove what did it first"
        assert "elision" not in seen["config"]  # transformers must be able to read a saved config without us


def test_ranks_sample_the_same_tokens_from_rank_0s_prompt(runs):
    first, second = runs[2]["sample"]
    assert torch.equal(first, second)
    assert torch.equal(first[:, : token_ids().shape[1]], token_ids(seed=0))


def test_lists_are_taken_and_what_cannot_be_sent_is_refused_by_name_on_every_rank(runs):
    for seen in runs[2]["asked"]:
        assert torch.equal(seen["lists"], seen["tensor"]) and torch.equal(seen["row"], seen["tensor"][:1])
        assert seen["ragged"].startswith("input_ids of the inputs is no table of numbers")
        assert seen["lambda"].startswith("option prefix_allowed_tokens_fn cannot be sent to the other ranks")


def test_a_rank_that_is_late_for_a_request_is_waited_for(runs):
    first, second = runs[2]["late"]
    assert torch.equal(first, second)


def test_ranks_with_different_or_broken_plans_refuse_to_start(runs):
    assert set(runs[2]["plans"]) == {
        "rank 1 has another plan than rank 0 (2 ranks, dropped []; 2 ranks, dropped [0, 1, 2]): "
        "give every rank the same checkpoint"
    }
    first, second = runs[2]["missing"]
    assert "nowhere" in second
    assert first == f"rank 1: {second}"
    assert set(runs[2]["number"]) == {
        "plan is for 4 ranks, this run has 2: start it with torchrun --nproc-per-node 4, "
        "or calibrate a plan for the ranks that you have"
    }


def test_ranks_with_different_models_refuse_to_start(runs):
    for name, what in (("settings", "config"), ("weights", "weights")):
        assert set(runs[2][name]) == {
            f"rank 1 has another model than rank 0 (their {what} differ): give every rank the same checkpoint"
        }


@pytest.mark.parametrize(
    ("ranks", "why"),
    [(4, "died or hangs"), (2, "stopped with MemoryError: out of memory for the fun of it")],
)
def test_a_lost_rank_ends_the_others_and_is_named(ranks, why, runs):
    for rank, seen in enumerate(runs[ranks]["lose"]):
        if rank == 1:
            assert seen is None or seen["error"].startswith("MemoryError")
            continue
        assert (
            seen["error"] == f"RankLostError: rank 1 {why}; rank {rank} cannot go on without it: start all ranks again"
        )
        assert seen["seconds"] < 30


def test_one_rank_needs_no_others(tmp_path):
    place = checkpoint(tmp_path / "model", "llama", SyncPlan(1, ALL))
    with torch.no_grad():
        served_here = log_probabilities(runtime.load(place))
        assert torch.equal(served_here, log_probabilities(tiny("llama", dtype=torch.float32)))
        skipping = SyncPlan(1, skipped=(0,))
        model = model_of("llama", skipping)
        with simulate(model, skipping):
            expected = log_probabilities(model)
        model = runtime.load(place, skipping)
        assert (log_probabilities(model) - expected).abs().max() < 5e-6
        assert (served_here - expected).abs().max() > 1e-3


def test_a_second_plan_is_refused_whatever_its_blocks(tmp_path):
    model = runtime.load(checkpoint(tmp_path / "model", "llama", SyncPlan(1)))
    refused = pytest.raises(InputError, match="block 0's forward is replaced already: remove what did it first")
    with runtime.drop_syncs(model, SyncPlan(1, skipped=(0,))), refused:
        runtime.drop_syncs(model, SyncPlan(1, skipped=(2,)))
    runtime.drop_syncs(model, SyncPlan(1, skipped=(2,))).remove()


def test_a_healed_checkpoint_loads_with_its_own_plan_alone(tmp_path):
    place = checkpoint(tmp_path / "model", "llama", SyncPlan(1, (1,), healed=(1,)))
    assert type(runtime.load(place)).__name__ == "LlamaForCausalLM"
    with pytest.raises(ValueError, match="spd_llama"):  # plain transformers cannot take it for a dense model
        AutoModelForCausalLM.from_pretrained(place)
    with pytest.raises(InputError, match="healed for another plan than the one given: leave the plan out"):
        runtime.load(place, SyncPlan(1, (2,)))


@pytest.mark.parametrize(
    ("plan", "blocks"),
    [
        (SyncPlan(1, (0, 1), healed=(1,)), "[1]"),
        (SyncPlan(1, (0, 1), heads={0: (5, 4, 3, 2, 1, 0)}), "[0]"),
        (SyncPlan(1, (0, 1), corrections={1: "gain"}), "[1]"),
    ],
)
def test_a_plan_that_was_carried_out_on_other_weights_is_refused(plan, blocks, tmp_path):
    original = checkpoint(tmp_path / "original", "llama", SyncPlan(1, (0, 1)))
    with pytest.raises(InputError, match=r"of another model than .*: give the checkpoint that was saved") as refused:
        runtime.load(original, plan)
    assert f"blocks {blocks} of" in str(refused.value)
    if not plan.corrections:
        with pytest.raises(InputError, match="give the model and the plan that"):
            runtime.drop_syncs(runtime.load(original, drop=False), plan)
        place = checkpoint(tmp_path / "own", "llama", plan)
        runtime.load(place, replace(plan, healing={0: "correct"}))  # which says nothing of the weights


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, runs):
    place = checkpoint(tmp_path / "model", "llama", SyncPlan(1, (1,)))
    with pytest.raises(InputError, match=f"holds no tensor {UP}: save it again, with save_pretrained"):
        runtime.load(without(place, tmp_path / "lacking", UP))
    with pytest.raises(InputError, match=rf"{UP} has shape \(4, 4\), the config makes it \(40, 24\): give a"):
        runtime.load(without(place, tmp_path / "other", UP, torch.zeros(4, 4)))
    weights = Path(place) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cannot be read .*: fetch or save it again"):
        runtime.load(place)
    weights.unlink()
    with pytest.raises(InputError, match=r"cannot be read .*: fetch or save it again"):
        runtime.load(place)
    first, second = runs[2]["lacking"]  # the rank whose checkpoint is whole hears of the other's
    assert (
        second.endswith(f"holds no tensor {UP}: save it again, with save_pretrained") and first == f"rank 1: {second}"
    )


def test_corrections_of_a_hugging_face_id_are_found(tmp_path, monkeypatch):
    place = checkpoint(tmp_path / "model", "llama", CORRECTED, **SIZES)
    asked = []
    fetch = "elision.spd.runtimes.checkpoint.snapshot_download"
    monkeypatch.setattr(fetch, lambda name, **given: asked.append((name, given)) or place)
    found = corrections_of("org/name", CORRECTED)
    assert asked == [("org/name", WEIGHTS)]
    assert {index: set(tensors) for index, tensors in found.items()} == {
        0: {"constant"},
        1: {"constant", "gain"},
        2: {"constant", "local_o"},
    }


def test_tied_weights_are_not_missed(tmp_path):
    place = checkpoint(tmp_path / "model", "llama", SyncPlan(1, (1,)), tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(Path(place) / "model.safetensors")
    runtime.load(place)


@pytest.mark.parametrize(
    ("family", "sizes", "plan", "sentence"),
    [
        ("llama", {}, None, "carries no spd_plan: write the checkpoint with elision.spd.save, or give a plan"),
        ("llama", {}, SyncPlan(1, (7,)), "dropped block 7 does not exist: name blocks from 0 to 2"),
        ("llama", {}, SyncPlan(2), "ranks=2 cannot share this model, they neither divide its 3 key/value heads"),
        ("llama", {}, SyncPlan(6), "6 ranks cannot share 3 key/value heads in transformers, which holds each"),
        ("granite", {}, SyncPlan(6), "which holds each of them once: calibrate for a divisor of them"),
        ("llama", {**WIDE, "intermediate_size": 38}, SyncPlan(4), "size 38 over 4 ranks into shards"),
        ("llama", {"intermediate_size": 39}, SyncPlan(3), "this run has 1: start it with torchrun --nproc-per-node 3"),
        ("gemma2", {}, SyncPlan(1), "SPD does not cover this Gemma 2 model: its sandwich norms"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, SyncPlan(1), "is quantised, and ranks here"),
    ],
)
def test_what_cannot_be_served_is_refused_before_loading(family, sizes, plan, sentence, tmp_path):
    config = CONFIG_MAPPING[family](**{**CONFIGS.get(family, {}), **sizes})
    config.spd_plan = None if plan is None else plan.to_dict()
    config.save_pretrained(tmp_path)  # and no weights: whatever tries to read them fails
    with pytest.raises(InputError) as refused:
        runtime.load(tmp_path)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
