"""A checkpoint with a plan: exact, whole or absent, and refused by what would run it wrongly."""

from __future__ import annotations

import copy
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from elision import InputError, spd
from elision.blocks import decoder, describe, load_config
from elision.families import WEIGHTS
from elision.loading import load_model, load_tokenizer
from elision.spd import Calibration, SyncPlan, artifact, corrections
from elision.spd.simulate import carry, facts
from tests.spd.tiny import bits, corrected, tiny, token_ids

ZERO_SHOT = SyncPlan(ranks=3, dropped=(0, 2))
KINDS = {0: "constant", 1: "gain", 2: "local_o"}
CORRECTED = SyncPlan(ranks=3, dropped=(0, 1, 2), corrections=KINDS)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(token_ids()).logits


def everything(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", ["llama", "opt", "granite"])
@pytest.mark.parametrize("plan", [ZERO_SHOT, CORRECTED], ids=["zero-shot", "corrected"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_round_trip_is_exact(family, plan, dtype, tmp_path):
    model = corrected(family, 3, dict(plan.corrections), dtype=dtype)
    dense = logits(model)
    with spd.simulate(model, plan):
        simulated = logits(model)
        spd.save(model, plan, tmp_path / "out")  # under simulation as well as not
    before = bits(model), [set(vars(module)) for module in model.modules()], model.config.to_dict()
    spd.save(model, plan, tmp_path / "again")
    assert (bits(model), [set(vars(module)) for module in model.modules()], model.config.to_dict()) == before
    assert everything(tmp_path / "again") == everything(tmp_path / "out")

    treated = spd.read(tmp_path / "out")
    assert treated.plan == plan and treated.plan.corrections == plan.corrections
    assert type(treated.model) is type(model) and bits(treated.model) == bits(model)
    assert torch.equal(logits(treated.model), dense)
    with treated.simulate():
        assert torch.equal(logits(treated.model), simulated)
    assert torch.equal(logits(spd.load(tmp_path / "out")), simulated)
    treated.save_pretrained(tmp_path / "second")
    assert everything(tmp_path / "second") == everything(tmp_path / "out")


def test_the_config_says_what_it_takes_to_run_it(tmp_path):
    model = tiny("llama")
    spd.save(model, ZERO_SHOT, tmp_path / "zero-shot")
    config = json.loads((tmp_path / "zero-shot" / "config.json").read_text())
    assert config["architectures"] == ["SPDLlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["spd_plan"] == {"version": 1, "ranks": 3, "dropped": [0, 2]}
    assert not {"quantization_config", "tp_plan"} & set(config)
    assert AutoConfig.from_pretrained(tmp_path / "zero-shot").spd_plan == config["spd_plan"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "zero-shot")  # these are the original weights
    assert type(plain) is LlamaForCausalLM and torch.equal(logits(plain), logits(model))


def test_a_fine_tuned_copy_of_a_zero_shot_checkpoint_runs_under_its_plan(tmp_path):
    spd.save(tiny("llama"), ZERO_SHOT, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.lm_head.weight.data *= 1.1
    model.save_pretrained(tmp_path / "tuned")
    with spd.simulate(model, ZERO_SHOT):
        assert torch.equal(logits(spd.load(tmp_path / "tuned")), logits(model))


def test_a_place_may_be_in_the_home_directory_or_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = corrected("llama", 3, KINDS)
    place = spd.save(model, CORRECTED, tmp_path / "out")
    assert spd.read_plan("~/out") == CORRECTED and bits(spd.read("~/out").model) == bits(model)
    asked = []
    monkeypatch.setattr(artifact, "load_config", lambda path: load_config(place))
    monkeypatch.setattr(artifact, "snapshot_download", lambda name, **given: asked.append((name, given)) or str(place))
    assert spd.read_plan("org/name") == CORRECTED and asked == []
    assert bits(spd.read("org/name").model) == bits(model) and asked == [("org/name", WEIGHTS)]


@pytest.mark.parametrize("plan", [CORRECTED, SyncPlan(3, (0, 2), healed=(2,))], ids=["corrected", "healed"])
def test_treated_weights_do_not_load_without_their_plan(plan, tmp_path):
    model = corrected("llama", 3, KINDS)
    carry(decoder(model), plan)
    spd.save(model, plan, tmp_path / "out")
    with pytest.raises(ValueError, match="model type `spd_llama`"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config = load_config(tmp_path / "out")
    assert config.model_type == "llama" and SyncPlan.from_dict(config.spd_plan) == plan
    assert describe(config).layers == 3


def test_corrections_are_ordinary_tensors_and_those_of_no_plan_stay_out(tmp_path):
    names = {
        f"model.layers.{block}.spd_correction.{name}"
        for block, tensors in {0: ["constant"], 1: ["constant", "gain"], 2: ["constant", "local_o"]}.items()
        for name in tensors
    }
    model = corrected("llama", 3, KINDS)
    assert {name for name in model.state_dict() if "spd_correction" in name} == names
    spd.save(model, SyncPlan(3, (0, 1), corrections={1: "gain"}), tmp_path / "out")
    with artifact.safe_open(tmp_path / "out" / "model.safetensors", "pt") as tensors:
        saved = {name for name in tensors.keys() if "spd_correction" in name}  # noqa: SIM118
    assert saved == {name for name in names if ".1." in name}


def test_shards_and_tokenizer_and_generation_settings_come_back(tmp_path, monkeypatch):
    model = corrected("llama", 3, KINDS)
    model.generation_config.max_new_tokens = 7
    save_pretrained = type(model).save_pretrained
    monkeypatch.setattr(type(model), "save_pretrained", lambda *a, **k: save_pretrained(*a, **k, max_shard_size="20KB"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")))
    spd.save(model, CORRECTED, tmp_path / "out", tokenizer)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    again = spd.read(tmp_path / "out").model
    assert bits(again) == bits(model) and again.generation_config.max_new_tokens == 7
    assert spd.read(tmp_path / "out", dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == {"a": 0, "b": 1}


def test_the_card_has_plan_data_command_and_results(tmp_path):
    model = tiny("llama")
    measured = Calibration("0123456789abcdef", (0.1, 0.2, 0.3), (0, 2, 1), (9.0, 9.1, 9.25, 12.0), {"elision": "0.1.0"})
    plan = SyncPlan(3, (0, 2), {2: "constant"}, (0,), model=facts(decoder(model)), calibration=measured)
    corrections.attach(decoder(model).blocks[2], "constant", 3)
    checked = spd.Verified("fedcba9876543210", 1234, dense=9.0, zero_shot=9.4, planned=9.1, kl=0.0123, predicted=0.02)
    plan = replace(plan, verified=checked)
    carry(decoder(model), plan)
    spd.save(model, plan, tmp_path / "out", command="elision spd heal model", results={"Healed on": "a.txt"})
    text = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "| Tensor-parallel ranks | 3 |",
        "| Blocks without the sync after attention | 0, 2 |",
        "| … with healed weights | 0 |",
        "| … with a correction of the local MLP input (constant) | 2 |",
        "| Calibration data (fingerprint) | `0123456789abcdef` |",
        "| Perplexity on it, dropped as they are | 9.25 |",
        "| Healed on | a.txt |",
        "| Served by | no runtime: elision.spd.load computes it in one process |",
        "| Held-out data (fingerprint, tokens scored) | `fedcba9876543210`, 1,234 |",
        "| Perplexity on held-out data, as this checkpoint runs | 9.1 (+1.11%) |",
        "| Increase of perplexity that was predicted | +2.00% |",
        "| Recovered of what dropping lost | 75% |",
        "    elision spd heal model",
    ):
        assert f"\n{line}\n" in text
    assert (
        "Auto classes, and serving engines without elision, refuse the checkpoint" in text
        and "dropped as they are | " in text
    )
    assert spd.read_plan(tmp_path / "out") == plan


@pytest.fixture(scope="module")
def healed() -> spd.Treated:
    plan = SyncPlan(3, (0, 2), healing={0: "hg+b2b", 2: "b2b"})
    batches = [{"input_ids": token_ids(2, 9, seed)} for seed in range(3)]
    return spd.heal(tiny("llama"), plan, batches, recipe=spd.Recipe(epochs=1), quiet=True)


class TestAnotherModelThanTheHealedOne:
    """A plan that was carried out is of one model's weights, and the others do not run under it unnoticed."""

    @pytest.mark.parametrize(
        "use",
        [
            lambda model, plan, path: spd.simulate(model, plan),
            lambda model, plan, path: spd.save(model, plan, path),
            lambda model, plan, path: spd.save_adapter(model, plan, path),
            lambda model, plan, path: spd.correct(model, plan, [{"input_ids": token_ids()}], quiet=True),
        ],
        ids=["simulate", "save", "save_adapter", "correct"],
    )
    def test_another_model_or_plan_is_refused(self, use, healed, tmp_path):
        plan = SyncPlan.load(healed.plan.save(tmp_path / "plan.json"))
        others = [
            (tiny("llama"), plan),
            (tiny("llama"), replace(plan, healed=())),
            (healed.model, replace(plan, ranks=1)),
        ]
        for model, given in others:
            before = bits(model)
            with pytest.raises(InputError, match=r"was carried out on blocks .* of another model") as caught:
                use(model, given, tmp_path / "out")
            assert "\n" not in str(caught.value) and bits(model) == before and not (tmp_path / "out").exists()

    def test_nor_are_healed_weights_saved_as_the_originals(self, healed, tmp_path):
        with pytest.raises(InputError, match="model has weights healed for another plan"):
            spd.save(healed.model, SyncPlan(3, (0, 2)), tmp_path / "out")
        loaded = spd.load(healed.save_pretrained(tmp_path / "ours"))
        for model in (healed.model, copy.deepcopy(healed.model), loaded):
            with pytest.raises(InputError, match=r"save_pretrained would write them as .* with elision\.spd\.save"):
                model.save_pretrained(tmp_path / "plain")
        assert not (tmp_path / "plain").exists()
        type(healed.model).save_pretrained(healed.model, tmp_path / "plain")  # the config tells even so
        with pytest.raises(InputError, match="has weights made for the plan that it carries"):
            load_model(str(tmp_path / "plain"))

    def test_the_original_saves_as_it_did(self, tmp_path):
        plan = SyncPlan(3, (0, 2))
        model, regrouped = spd.regroup(tiny("llama"), plan, [{"input_ids": token_ids()}], quiet=True)
        with pytest.raises(InputError, match="healed or regrouped for a plan"):
            model.save_pretrained(tmp_path / "plain")
        spd.ungroup(model, regrouped)
        model.save_pretrained(tmp_path / "plain")
        spd.read(spd.save(model, plan, tmp_path / "ours")).model.save_pretrained(tmp_path / "again")

    def test_the_healed_one_runs_wherever_it_went(self, healed, tmp_path):
        plan = SyncPlan.load(healed.plan.save(tmp_path / "plan.json"))
        with spd.simulate(healed.model, plan):
            found = logits(healed.model)
        for model in (copy.deepcopy(healed.model), spd.read(healed.save_pretrained(tmp_path / "out")).model):
            with spd.simulate(model, plan):
                assert torch.equal(logits(model), found)
        spd.simulate(spd.read(tmp_path / "out", dtype=torch.float16).model, plan).remove()
        measured = replace(plan, verified=spd.Verified("0", 9, 2.0, 4.0, 3.0, 0.1, 0.5))
        spd.simulate(healed.model, measured).remove()  # what was measured does not matter


class TestWholeOrAbsent:
    def test_a_disk_that_fills_up_under_the_tokenizer_is_told(self, tmp_path):
        model, tokenizer = tiny("llama", dtype=torch.bfloat16), load_tokenizer("reference")
        limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # weights fit, the tokenizer does not
            with pytest.raises(OSError, match="File too large") as caught:
                spd.save(model, ZERO_SHOT, tmp_path / "out", tokenizer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "out"))
        assert not everything(tmp_path)

    def test_a_failure_while_writing_leaves_what_was_there(self, tmp_path, monkeypatch):
        model, out = tiny("llama"), tmp_path / "out"
        for there in (None, SyncPlan(3, (1,))):
            if there is not None:
                spd.save(model, there, out)
            before = everything(tmp_path)
            for name in ("card", "_move"):
                with monkeypatch.context() as patch:
                    patch.setattr(artifact, name, lambda *_: 1 / 0)
                    with pytest.raises(ZeroDivisionError):
                        spd.save(model, ZERO_SHOT, out)
                assert everything(tmp_path) == before
        spd.save(model, ZERO_SHOT, out)
        assert spd.read_plan(out) == ZERO_SHOT

    def test_killed_at_any_moment_it_leaves_no_half_and_a_rerun_is_whole(self, tmp_path):
        root = Path(__file__).parents[2]
        paths = [str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.spd.save_often", str(tmp_path / "out")]
        process = subprocess.Popen(command, env=environment)
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / "out").exists():
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.01)
            time.sleep(0.3)
            process.send_signal(signal.SIGKILL)
            process.wait(60)
        finally:
            process.kill()
        if (tmp_path / "out").exists():  # absent between two renames
            assert bits(spd.read(tmp_path / "out").model) == bits(tiny("llama"))
        spd.save(tiny("llama"), ZERO_SHOT, tmp_path / "out")
        assert bits(spd.read(tmp_path / "out").model) == bits(tiny("llama"))
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_replacement_that_fails_or_is_killed_between_two_renames_loses_nothing(self, tmp_path, monkeypatch):
        model, out, replace_ = tiny("llama"), tmp_path / "out", os.replace
        spd.save(model, ZERO_SHOT, out)
        before = everything(tmp_path)

        def fail(source, target):
            return 1 / 0 if str(source).endswith(".partial") else replace_(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(artifact.os, "replace", fail)
            with pytest.raises(ZeroDivisionError):
                spd.save(model, SyncPlan(3, (1,)), out)
        assert everything(tmp_path) == before

        out.rename(tmp_path / ".out.replaced")  # as a kill leaves it
        with pytest.raises(InputError, match=r"out was moved to .*\.out\.replaced by a save .*: save again"):
            spd.read(out)
        with monkeypatch.context() as patch:
            patch.setattr(artifact, "card", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                spd.save(model, SyncPlan(3, (1,)), out)
        assert everything(tmp_path) == before
        spd.save(model, SyncPlan(3, (1,)), out)
        assert spd.read_plan(out).dropped == (1,) and [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_generation_settings_do_not_keep_a_model_from_being_saved(self, tmp_path):
        model = tiny("llama")
        model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
        spd.save(model, ZERO_SHOT, tmp_path / "out")
        assert model.generation_config.temperature == 0.6
        assert spd.read(tmp_path / "out").model.generation_config.temperature == 0.6
        model.generation_config.early_stopping = "perhaps"  # nor could it be loaded
        spd.save(model, ZERO_SHOT, tmp_path / "out")
        found = spd.read(tmp_path / "out").model.generation_config
        assert found.eos_token_id == 2 and found.early_stopping != "perhaps"

    def test_links_stay_and_what_cannot_be_renamed_is_refused(self, tmp_path, monkeypatch):
        model = tiny("llama")
        (tmp_path / "disk" / "empty").mkdir(parents=True)
        (tmp_path / "link").symlink_to(tmp_path / "disk" / "empty")
        for plan in (ZERO_SHOT, SyncPlan(3, (1,)), ZERO_SHOT):
            assert spd.save(model, plan, tmp_path / "link") == tmp_path / "link"
            assert (tmp_path / "link").is_symlink() and spd.read_plan(tmp_path / "disk" / "empty") == plan
        assert {path.name for path in tmp_path.iterdir()} == {"disk", "link"}
        (tmp_path / "here" / "below").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "here" / "below")
        for path in (".", "..", tmp_path / "here"):
            with pytest.raises(InputError, match=r"is the current directory or above it .*: give a directory inside"):
                spd.save(model, ZERO_SHOT, path)
        monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
        with pytest.raises(InputError, match="disk is a mount point and cannot be replaced"):
            spd.save(model, ZERO_SHOT, tmp_path / "disk")
        spd.save(model, ZERO_SHOT, "new")
        assert spd.read_plan("new") == ZERO_SHOT

    def test_it_replaces_its_own_and_nothing_else(self, tmp_path):
        model = tiny("llama")
        spd.save(model, ZERO_SHOT, tmp_path / "out")
        spd.save(model, SyncPlan(3, (1,)), tmp_path / "out")
        assert spd.read_plan(tmp_path / "out").dropped == (1,)
        model.save_pretrained(tmp_path / "original")
        (tmp_path / "file").write_text("mine")
        (tmp_path / "empty").mkdir()
        spd.save(model, ZERO_SHOT, tmp_path / "empty")
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "fine-tuned")
        assert SyncPlan(3, (1,)) == spd.read_plan(tmp_path / "fine-tuned")
        for name in ("original", "fine-tuned", "file", "."):
            before = everything(tmp_path)
            with pytest.raises(
                InputError, match=r"exists and is not a checkpoint with a plan .*: give a new directory"
            ):
                spd.save(model, ZERO_SHOT, tmp_path / name)
            assert everything(tmp_path) == before

    @pytest.mark.parametrize("name", [".git/HEAD", "trainer_state.json", "eval.md"])
    def test_nor_what_is_beside_it(self, name, tmp_path):
        spd.save(tiny("llama"), ZERO_SHOT, tmp_path, load_tokenizer("reference"))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        before = everything(tmp_path)
        with pytest.raises(InputError, match=rf"holds {name.split('/')[0]}, which elision.spd.save did not write"):
            spd.save(tiny("llama"), ZERO_SHOT, tmp_path)
        assert everything(tmp_path) == before

    def test_one_save_at_a_time(self, tmp_path):
        class Slow:  # a tokenizer that takes its time, while another command saves there too
            def save_pretrained(self, directory):
                with pytest.raises(InputError, match="out is being written by another save: wait for it"):
                    spd.save(tiny("llama"), SyncPlan(3, (1,)), tmp_path / "out")
                spd.save(tiny("llama"), SyncPlan(3, (1,)), tmp_path / "other")

        spd.save(tiny("llama"), ZERO_SHOT, tmp_path / "out", Slow())
        assert spd.read(tmp_path / "out").plan == ZERO_SHOT
        assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


class TestRefusals:
    def test_a_model_of_which_tensors_are_offloaded(self, tmp_path):
        model = tiny("llama")
        model.model.norm.to("meta")
        with pytest.raises(InputError, match=r"model\.norm\.weight is offloaded, so it cannot be saved from here"):
            spd.save(model, ZERO_SHOT, tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_a_model_without_the_corrections_that_the_plan_names(self, tmp_path):
        model = tiny("llama")
        for act in (lambda: spd.save(model, CORRECTED, tmp_path / "out"), lambda: spd.simulate(model, CORRECTED)):
            with pytest.raises(InputError, match=r"corrects block 0 \(constant\), this model has no correction there"):
                act()
        model = corrected("llama", 3, KINDS)
        for plan in (SyncPlan(3, (0,), {0: "gain"}), SyncPlan(6, (0,), {0: "constant"})):
            with pytest.raises(InputError, match="correction there is constant for 3: give the model and the plan"):
                spd.simulate(model, plan)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("adapted", ["q_proj", "lm_head", "embed_tokens"])
    def test_an_adapter_that_is_not_merged(self, adapted, tmp_path):
        model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=[adapted]))
        with pytest.raises(InputError, match=rf"{adapted} carries an adapter: merge it first"):
            spd.save(model, ZERO_SHOT, tmp_path / "out")
        assert not list(tmp_path.iterdir())
        spd.save(model.merge_and_unload(), ZERO_SHOT, tmp_path / "out")
        assert spd.read(tmp_path / "out").plan == ZERO_SHOT

    def test_a_plan_for_another_model(self, tmp_path):
        plan = SyncPlan(3, (1,), model=facts(decoder(tiny("opt"))))
        with pytest.raises(InputError, match="type opt, this model has type llama"):
            spd.save(tiny("llama"), plan, tmp_path / "out")

    def test_directories_that_are_no_checkpoint_with_a_plan(self, tmp_path):
        tiny("llama").save_pretrained(tmp_path / "plain")
        with pytest.raises(InputError, match=r"config.json carries no spd_plan: give a directory"):
            spd.load(tmp_path / "plain")
        with pytest.raises(InputError, match=r"model config .*config.json is not a file"):
            spd.load(tmp_path / "none")

    @pytest.mark.parametrize(
        ("match", "change"),
        [
            ("spd_plan in .*config.json: ranks 0 is not", {"spd_plan": {"version": 1, "ranks": 0, "dropped": []}}),
            (
                "architecture 'LlamaForCausalLM' is not one of ours",
                {
                    "architectures": ["LlamaForCausalLM"],
                    "spd_plan": {"version": 1, "ranks": 3, "dropped": [1], "healed": [1]},
                },
            ),
            ("architecture 'SPDLlamaTokenizer' is not", {"architectures": ["SPDLlamaTokenizer"]}),
            (
                "block 1's spd_correction.constant is missing, the plan needs",
                {"spd_plan": {"version": 1, "ranks": 3, "dropped": [1], "corrections": {"1": "constant"}}},
            ),
        ],
    )
    def test_a_config_that_was_tampered_with(self, match, change, tmp_path):
        spd.save(tiny("llama"), ZERO_SHOT, tmp_path / "out")
        config = tmp_path / "out" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
        with pytest.raises(InputError, match=match) as caught:
            spd.load(tmp_path / "out")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "read", [spd.read, spd.load, lambda path: load_model(str(path))], ids=["read", "load", "model"]
)
@pytest.mark.parametrize("damage", ["missing", "shape", "truncated", "absent"])
def test_weights_that_are_not_all_there_are_refused(read, damage, tmp_path):
    out = spd.save(tiny("llama"), ZERO_SHOT, tmp_path / "out")
    file, name = out / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    found = tensors.pop(name)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:2000])
    elif damage == "absent":
        file.unlink()
    else:
        save_file({**tensors, **({name: found[:4].clone()} if damage == "shape" else {})}, file, {"format": "pt"})
    with pytest.raises(InputError, match=rf"weights of model .*out (lack {name} as|cannot be read)") as caught:
        read(out)
    assert "\n" not in str(caught.value)


def test_a_tied_head_is_no_missing_tensor(tmp_path):
    model = tiny("llama", tie_word_embeddings=True)
    spd.save(model, ZERO_SHOT, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert bits(spd.read(tmp_path / "out").model) == bits(model)
