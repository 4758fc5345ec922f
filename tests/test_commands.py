"""The commands as a user types them: what they leave behind, and one line with exit code 2 where input is bad."""

from __future__ import annotations

import errno
import json
import math
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from elision import evaluate, files, reference_model, runs
from elision.cli import app
from elision.cli.spd_plan import _said
from elision.data import load_examples, text_batches
from elision.errors import InputError
from elision.families import load_config
from elision.loading import load_model, load_tokenizer
from elision.sparselora import SparsityPlan
from elision.spd import SyncPlan, load, load_adapter, read_plan, save
from elision.spd.plan import Verified
from tests.spd.tiny import tiny

TRAIN = ["sparselora", "train", "reference", "--sparsity", "0.5"]
CALIBRATE = ["spd", "calibrate", "reference", "--rows", "2", "--tokens", "32"]


SMALL = ["--rows", 2, "--tokens", 32]


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("def add(a, b):\n    return a + b\n" * 40)
    return path


def test_calibrate_then_eval_under_the_plan(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "plan.json"
    code, said, _ = run(*CALIBRATE, "--text", text, "--ranks", 4, "--ranks", 4, "--drop", 0.5, "--out", out)
    assert code == 0 and said.count("6 of 12 blocks") == 1
    assert len(SyncPlan.load(out).dropped) == 6
    scores = []
    for options in ([], ["--plan", out]):
        code, said, _ = run("eval", "reference", "--text", text, "--rows", 2, "--tokens", 32, "--json", *options)
        assert code == 0
        scores.append(json.loads(said)["perplexity"])
    found = SyncPlan.load(out).calibration
    assert found is not None
    assert scores[0] != scores[1]
    assert scores == pytest.approx([found.perplexities[0], found.perplexities[6]], rel=1e-4)


def test_every_text_is_read(tmp_path: Path, text: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Sometimes the wind blew from the sea. " * 40)
    given = (["--text", text], ["--text", other], ["--text", text, "--text", other])
    options = ["--rows", 2, "--tokens", 32, "--json"]
    first, second, both = (json.loads(run("eval", "reference", *each, *options)[1])["perplexity"] for each in given)
    assert min(first, second) < both < max(first, second)


def test_calibrate_then_heal_then_eval(tmp_path: Path, text: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "healed"
    fast = ["--method", "fisher", "--stream", "--tiers", "0,1", "--drop", 0.25, "--recovered", "b2b=0.7"]
    code, said, _ = run(*CALIBRATE, "--text", text, "--ranks", 2, "--ranks", 4, *fast, "--out", plan)
    assert (
        code == 0
        and said.count("3 of 12 blocks") == 2
        and said.count("before healing, ") == said.count(" expected after it: ") == 2
        and "points" not in said
    )
    assert said.count("served by vLLM and transformers") == 2
    assert {SyncPlan.load(tmp_path / f"plan-{n}.json").ranks for n in (2, 4)} == {2, 4}
    rest = ["--text", text, "--held-out", text, "--rows", 16, "--tokens", 16, "--epochs", 1, "--lr", 1e-5]
    low = ["--lora", 2, "--adapter", tmp_path / "low.safetensors", "--judging", 0.5, "--teacher-inputs"]
    planned = tmp_path / "plan-4.json"
    code, said, _ = run("spd", "heal", "reference", "--plan", planned, *rest, *low, "--stream", "--out", out, "--json")
    assert code == 0
    assert load(out).dtype == torch.bfloat16  # as the original's weights are stored
    told = json.loads(said)
    healed = SyncPlan.load(planned).healing
    assert told["healed"] == list(read_plan(out).healed) == sorted(healed) and len(healed) > 0
    card = (out / "README.md").read_text()
    assert "Perplexity on held-out data, as this checkpoint runs" in card
    typed = [*rest[:4], "--epochs", 1, "--lr", 1e-5, "--judging", 0.5, "--teacher-inputs", "--lora", 2]
    typed = ["--plan", planned, *typed[:2], "--out", out, *typed[2:], "--adapter", low[3], "--stream"]
    command = " ".join(map(str, ["elision spd heal reference", *typed, "--rows", 16, "--tokens", 16]))
    assert f"\n    {command}\n" in card and "| Healed on | 16 rows of 16 tokens of text.txt |" in card
    calibration = SyncPlan.load(planned).calibration
    assert calibration is not None and calibration.recovered is not None and calibration.recovered["b2b"] == 0.7
    assert load_adapter(reference_model.load(torch.bfloat16)[0], low[3]).plan == read_plan(out)
    assert not list(tmp_path.glob(".healed*"))
    again = [*CALIBRATE, "--text", text, "--ranks", 4, "--out", tmp_path / "again.json"]
    again[2] = out
    for options in ([], ["--stream"]):
        code, _, error = run(*again, *options)
        assert code == 2 and "has weights made for the plan that it carries" in error
    carried = read_plan(out).save(tmp_path / "carried.json")
    score = ["--text", text, "--rows", 2, "--tokens", 32]
    code, said, _ = run("eval", out, *score, "--against", out, "--json")
    found = json.loads(said)["scores"][0]
    batches = text_batches(load_tokenizer(str(out)), [text.read_text()], 32, 8, limit=2)
    loss = evaluate.loss(load(out, dtype=torch.float32), batches)
    served = pytest.approx(math.exp(loss), rel=1e-5)  # under the plan that it carries
    assert code == 0 and found["value"] == served and found["baseline"] == served
    code, _, error = run("eval", out, "--plan", planned, *score)
    assert code == 2 and "carries its plan: leave --plan and --adapter out, or give the original" in error
    code, _, error = run("eval", "reference", "--plan", carried, "--text", text, "--rows", 2, "--tokens", 32)
    assert code == 2 and "is of a healed checkpoint" in error
    code, _, error = run("spd", "heal", "reference", "--plan", planned, *rest, "--out", tmp_path)
    assert code == 2 and "exists and is not a checkpoint with a plan" in error


@pytest.mark.parametrize(
    ("predicted", "tokens", "words"),
    [
        (0.02, 1, "perplexity +2.00% on 1 held-out token where +2.00% was predicted"),
        (0.019999, 1000, "perplexity +2.00% on 1,000 held-out tokens where +2.00% was predicted"),
        (0.01, 9, "perplexity +2.00% on 9 held-out tokens where +1.00% was predicted (1.00 points more)"),
        (0.03, 9, "perplexity +2.00% on 9 held-out tokens where +3.00% was predicted (1.00 points less)"),
    ],
)
def test_a_plan_in_a_sentence(predicted: float, tokens: int, words: str) -> None:
    found = Verified("x", tokens, dense=10.0, zero_shot=10.2, planned=10.2, kl=0.0, predicted=predicted)
    said = _said(SyncPlan(2, (1,), int8=(0,), skipped=(2, 3), verified=found))
    assert said == f"1 block drops its first sync on 2 ranks, 1 sends it in int8, 2 skip attention, {words}"


TRIED = {  # what a dry run refuses as the command itself does
    "": "ranks [2] are not the 4 of the link",
    "--ranks 4": "ranks [2, 4] are not the 4 of the link",
    "--drop 0.5": "given with max_kl, drop or tiers",
    "--tiers 0,1": "given with max_kl, drop or tiers",
    "--alpha 1e-4": "--alpha is given beside --probe",
    "--beta 0": "--beta is given beside --probe",
}


def test_calibrate_for_a_link(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "plan.json"
    probe = tmp_path / "probe.json"
    arguments = [*CALIBRATE, "--text", text, "--ranks", 2, "--step-ms", 10, "--out", out]
    probe.write_text('{"ranks": 2, "alpha": 1e-7, "beta": 0}')
    code, said, _ = run(*arguments, "--probe", probe)
    assert code == 0 and said.startswith("do not bother: ") and not out.exists()
    code, said, _ = run(*arguments, "--alpha", 1e-4, "--beta", 1e-9, "--max-loss", 0.02, "--method", "fisher")
    assert code == 0 and "of 12 blocks drop their first sync on 2 ranks" in said
    probe.write_text('{"ranks": 4, "alpha": 1e-4, "beta": 0}')
    for options, words in TRIED.items():
        before = sorted(tmp_path.rglob("*"))
        code, said, error = run(*arguments, "--probe", probe, *options.split(), "--dry-run")
        assert code == 2 and said == "" and words in error and sorted(tmp_path.rglob("*")) == before
    code, _, error = run(*arguments, "--treatments", "dropped,none")
    assert code == 2 and error == "error: treatments name 'none': give some of dropped, int8, skipped\n"
    assert SyncPlan.load(out).verified is not None


def test_train_then_eval_with_the_adapter(tmp_path: Path, text: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Count to three:", "completion": "1 2 3"}\n' * 6)
    out = tmp_path / "adapter"
    code, said, _ = run(
        "sparselora", "train", "reference", "--data", data, "--out", out, "--sparsity", 0.5, "--batch", 2
    )
    assert code == 0 and "ffn 50% in 0-11" in said
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert not (tmp_path / "adapter.training").exists()
    code, said, _ = run("eval", "reference", "--text", text, "--adapter", out, "--rows", 2, "--tokens", 32)
    assert code == 0 and said.startswith("perplexity on text: ")
    scored = ["eval", "reference", "--text", text, "--adapter", out, "--rows", 2, "--tokens", 32, "--json"]
    scored += ["--run", tmp_path / "run"]
    code, said, _ = run(*scored, "--against", out)
    perplexity, kl, _ = json.loads(said)["scores"]
    assert code == 0 and perplexity["baseline"] == perplexity["value"] and kl["value"] == 0.0
    weights, before = load_file(out / "adapter_model.safetensors"), runs.contents({"against": str(out)})
    save_file({name: 2 * value for name, value in weights.items()}, out / "adapter_model.safetensors")
    assert runs.contents({"against": str(out)}) != before
    code, _, error = run(*scored, "--against", out)
    assert code == 2 and "was begun with what --adapter held then" in error


def bad(kind: str, folder: Path, text: Path) -> tuple[list[object], str]:
    """Arguments that cannot work, and what must be said of them."""
    plan = folder / "plan.json"
    calibrate = [*CALIBRATE, "--out", folder / "new.json"]
    train = ["sparselora", "train", "reference", "--out", folder / "new"]
    score = ["eval", "reference", "--text", text, "--tokens", 32]
    answers = folder / "answers.json"
    answers.write_text('[{"prompt": "a", "completion": "b"}]')
    if kind == "missing text":
        return [*calibrate, "--ranks", 2, "--text", folder / "absent.txt"], "absent.txt cannot be read"
    if kind == "empty text":
        (folder / "empty.txt").touch()
        return [*calibrate, "--ranks", 2, "--text", folder / "empty.txt"], "empty.txt is empty"
    if kind == "too little text":
        (folder / "short.txt").write_text("short")
        return [*calibrate, "--ranks", 2, "--text", folder / "short.txt"], "fewer than one row of 32"
    if kind == "ranks":
        return [*calibrate, "--ranks", 3, "--text", text], "use one of 1, 2, 4, 8"
    if kind == "limit":
        return [*calibrate, "--ranks", 2, "--text", text, "--drop", 1.5], "drop=1.5 is not a share"
    if kind == "two limits":
        return [*calibrate, "--ranks", 2, "--text", text, "--drop", 1, "--max-loss", 0.1], "give one limit"
    if kind == "tiers":
        return [*calibrate, "--ranks", 2, "--text", text, "--tiers", "much"], "tiers 'much' are not two numbers"
    if kind == "no probe":
        (folder / "probe.json").write_text("[]")
        link = ["--probe", folder / "probe.json", "--step-ms", 5]
        return [*calibrate, "--ranks", 2, "--text", text, *link], "has no ranks, alpha and beta"
    if kind == "half a link":
        return [*calibrate, "--ranks", 2, "--text", text, "--alpha", 1e-5, "--step-ms", 5], "give both, or --probe"
    if kind == "a plan to heal for another model":
        SyncPlan(2, (40,)).save(plan)
        return ["spd", "heal", "reference", "--plan", plan, "--text", text, "--out", folder / "new"], "40"
    if kind == "a plan without drops":
        SyncPlan(2).save(plan)
        heal = ["spd", "heal", "reference", "--plan", plan, "--text", text, "--out", folder / "new", "--tokens", 32]
        return heal, "plan drops no sync"
    if kind in RECIPES:
        SyncPlan(2, (1,)).save(plan)
        heal = ["spd", "heal", "reference", "--plan", plan, "--text", text, "--tokens", 32]
        return [*heal, "--out", folder / "new", *RECIPES[kind][0]], RECIPES[kind][1]
    if kind in WITHOUT:
        options, words = WITHOUT[kind]
        return [*calibrate, "--ranks", 2, "--text", text, *options, "--dry-run"], words
    if kind in UNSCORED:
        return [*score, *UNSCORED[kind][0]], UNSCORED[kind][1]
    if kind == "a prompt that is no UTF-8":
        return ["spd", "generate", "reference", "--ranks", 1, "--prompt", "a\udcff"], r"--prompt 'a\udcff' is not UTF-8"
    if kind == "recovered":
        return [*calibrate, "--ranks", 2, "--text", text, "--recovered", "b2b"], "'b2b' is no treatment with a share"
    if kind == "truncated weights":
        shutil.copytree(reference_model.PATH, folder / "model")
        with open(folder / "model" / "model.safetensors", "r+b") as file:
            file.truncate(100_000)
        calibrate[2] = folder / "model"
        return [*calibrate, "--ranks", 2, "--text", text], "model cannot be read"
    if kind == "plan of another model":
        SyncPlan(2, (40,)).save(plan)
        return [*score, "--plan", plan], "40"
    if kind in BEYOND:
        tokenizer = load_tokenizer("reference")
        tiny("opt", vocab_size=len(tokenizer)).save_pretrained(folder / "opt")
        tokenizer.save_pretrained(folder / "opt")
        beyond = {
            "rows": ["eval", folder / "opt", *score[2:-1], 65, "--run", folder / "run"],
            "a prompt": ["spd", "generate", folder / "opt", "--ranks", 2, "--prompt", "def", "--new-tokens", 64],
            "a timed prompt": ["spd", "bench", folder / "opt", "--ranks", 2, "--prompt-tokens", 65, "--new-tokens", 1],
            "pages": ["sparselora", "calibrate", folder / "opt", "--data", answers, "--flops", 0.5, "--out", plan],
            "problems": ["sparselora", "train", folder / "opt", "--data", answers, "--out", folder / "new"],
            "timed problems": ["sparselora", "bench", folder / "opt", "--data", answers],
        }
        answers.write_text(json.dumps([{"prompt": "a " * 90, "completion": "b"}]))
        return beyond[kind.removesuffix(BEYOND_IT)], "OPT model has 64 positions"
    if kind in UNKNOWN:
        load_tokenizer("reference").save_pretrained(folder / "model")
        tiny("llama").save_pretrained(folder / "model")
        unknown = {
            "problems": ["sparselora", "train", folder / "model", "--data", answers, "--out", folder / "new"],
            "timed problems": ["sparselora", "bench", folder / "model", "--data", answers],
            "problems to plan on": ["sparselora", "calibrate", folder / "model", "--data", answers, "--out", plan],
            "a prompt": ["spd", "generate", folder / "model", "--ranks", 1, "--prompt", "the prompt"],
        }
        answers.write_text(json.dumps([{"prompt": "the prompt", "completion": "b"}]))
        return unknown[kind.removesuffix(UNKNOWN_IT)], "the model's vocabulary has 97: tokenize with the model's own"
    if kind == "a baseline of another tokenizer":
        shutil.copytree(reference_model.PATH, folder / "model")
        values = json.loads((folder / "model" / "tokenizer.json").read_text())
        vocabulary = values["model"]["vocab"]
        first, second = list(vocabulary)[-2:]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        (folder / "model" / "tokenizer.json").write_text(json.dumps(values))
        return [*score, "--rows", 2, "--against", folder / "model"], "have different tokenizers"
    if kind == "a baseline of another vocabulary":
        tokenizer = load_tokenizer("reference")
        tiny("llama", vocab_size=len(tokenizer) + 8).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        return [*score, "--rows", 2, "--against", folder / "model"], "the baseline one of"
    if kind == "broken plan":
        plan.write_text('{"version": 1, "ran')
        return [*score, "--plan", plan], "plan.json is not JSON"
    if kind == "no adapter":
        return [*score, "--adapter", folder], "holds no adapter_config.json"
    if kind == "sparsity":
        return [*train, "--data", answers, "--sparsity", 1.0], "sparsity 1.0 of layer 0 is not in [0, 1)"
    if kind == "plan and sparsity":
        return [*train, "--data", answers, "--plan", plan, "--sparsity", 0.5], "--plan and --sparsity are both given"
    if kind == "missing plan":
        return [
            *train,
            "--data",
            answers,
            "--plan",
            plan,
        ], "plan.json is neither a file nor a preset: give a plan's path or"
    if kind == "plan of the other method":
        SyncPlan(2, (1,)).save(plan)
        return [*train, "--data", answers, "--plan", plan], "plan.json is of SPD, for serving"
    if kind == "sparsity plan to serve":
        SparsityPlan.default(reference_model.load()[0]).save(plan)
        return [*score, "--plan", plan], "plan.json is of SparseLoRA, for fine-tuning"
    if kind == "no place":
        return [*calibrate[:-1], text / "new.json", "--ranks", 2, "--text", text], "--out"
    if kind == "no place for the run":
        return [*score, "--run", text / "run"], "--run"
    if kind == "a page into a file":
        SyncPlan(2, (1,)).save(plan)
        return ["report", plan, "--out", text], "text.txt is a file: give a directory"
    if kind == "no epochs":
        return [*train, "--data", answers, "--epochs", 0], "--epochs 0 trains nothing"
    if kind == "a finished adapter":
        (folder / "new").mkdir()
        (folder / "new" / "adapter_config.json").write_text("{}")
        return [*train, "--data", answers], "new holds a finished adapter: delete it to train anew"
    if kind == "a broken line":
        broken = folder / "broken.jsonl"
        broken.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": \n')
        return [*train, "--data", broken], "broken.jsonl, line 3 is not JSON (Expecting value at column 12)"
    if kind == "turns of a chat":
        turns = '{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}'
        answers.write_text(f"[{turns}]")
        return [*train, "--data", answers], "row 1 holds a list or an object, not text"
    if kind in ADAPTERS:
        model = tiny(kind.split()[0], vocab_size=len(load_tokenizer("reference")))
        get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"])).save_pretrained(folder / "adapter")
        weights = folder / "adapter/adapter_model.safetensors"
        if kind == "llama adapter in part":
            save_file(dict(list(load_file(weights).items())[2:]), weights)
        elif kind == "llama adapter truncated":
            weights.write_bytes(weights.read_bytes()[:1000])
        elif kind == "llama adapter without weights":
            weights.unlink()
        load_tokenizer("reference").save_pretrained(folder / "model")
        tiny("llama", vocab_size=len(load_tokenizer("reference"))).save_pretrained(folder / "model")
        return ["eval", folder / "model", *score[2:], "--adapter", folder / "adapter"], ADAPTERS[kind]
    if kind == "a chat":
        answers.write_text('[{"messages": [{"role": "user", "content": "a"}]}]')
        return [*train, "--data", answers], "turns of a chat are not read"
    if kind == "sparsity plan of another model":
        values = SparsityPlan.uniform(reference_model.load()[0], 0.5).to_dict()
        values["model"]["hidden"] = 512
        plan.write_text(json.dumps(values))
        return [*train, "--data", answers, "--plan", plan], "hidden 512, this model has hidden 256"
    if kind in UNMET:
        few = ["sparselora", "calibrate", "reference", "--data", answers, "--out", plan, "--rehearse", 0, "--dry-run"]
        return [*few, *UNMET[kind][0]], UNMET[kind][1]
    if kind == "no answers":
        answers.write_text('[{"prompt": "a", "completion": ""}]')
        return [*train, "--data", answers, "--sparsity", 0.5], "row 1 has an empty prompt or answer"
    if kind == "every label -100":
        answers.write_text(json.dumps([{"prompt": "word " * 40, "completion": "b"}]))
        return [*train, "--data", answers, "--sparsity", 0.5, "--max-length", 8], "no row has an answer within 8 tokens"
    assert kind == "unknown family"
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "mamba"}')
    calibrate[2] = folder / "model"
    return [*calibrate, "--ranks", 2, "--text", text], "model_type 'mamba'"


RECIPES: dict[str, tuple[list[object], str]] = {  # every option of a recipe, each with a value that it cannot have
    "epochs": (["--epochs", 0], "epochs 0 is not a whole number of at least 1"),
    "rate": (["--lr", 0], "lr 0.0 is not a learning rate"),
    "judging": (["--judging", 1], "held_out 1.0 is not a share of the batches (--judging)"),
    "correction": (["--correction", "much"], "correction 'much' is not known: use one of constant, gain, local_o"),
    "lora": (["--lora", -1], "lora -1 is not a whole number"),
    "polish": (["--polish", -1], "polish -1 is not a whole number"),
    "rate of the polish": (["--polish-lr", "nan"], "polish_lr nan is not a learning rate"),
    "seed": (["--seed", -1], "seed -1 is not a whole number of at least 0"),
    "adapter in full": (["--adapter", "low.safetensors"], "holds low-rank healing: give --lora 8"),
    "one batch": (["--rows", 1], "data holds one batch: give at least two (more --rows, and text that fills them)"),
    "one batch on trial": (["--rows", 1, "--dry-run"], "data holds one batch: give at least two (more --rows,"),
    "polish on disk on trial": (["--stream", "--polish", 1, "--dry-run"], "polish 1 trains all healed blocks together"),
    "polish on disk": (["--stream", "--polish", 1], "polish 1 trains all healed blocks together"),
}
WITHOUT: dict[str, tuple[list[object], str]] = {  # options that would be ignored
    "tokens of a step without a link": (["--step-tokens", 8], "step-tokens is given without a link"),
    "what was recovered and nothing to heal": (["--recovered", "b2b=0.7"], "without --healing or --tiers"),
    "a name too long for what stands beside it": (["--out", "n" * 240], "cannot be written (nnn"),
    "treatments without a link": (["--treatments", "int8"], "treatments int8 are given without a workload"),
}
UNSCORED: dict[str, tuple[list[object], str]] = {
    "task files without a task": (["--include", "none"], "--include is given without --tasks"),
    "shots without a task": (["--shots", 2], "--shots is given without --tasks"),
    "problems at most of a text": (["--limit", 5], "--limit is given without --data or --tasks"),
    "no task files": (["--tasks", "elision_boolq", "--include", "none"], "--include none is no directory"),
}
KINDS = (
    "missing text, empty text, too little text, ranks, limit, two limits, tiers, no probe, half a link, "
    "a plan to heal for another model, a plan without drops, truncated weights, plan of another model, "
    "broken plan, no adapter, sparsity, plan and sparsity, missing plan, sparsity plan of another model, no answers, "
    "every label -100, unknown family, recovered, plan of the other method, sparsity plan to serve, no place, "
    "no place for the run, a page into a file, no epochs, a finished adapter, a broken line, a chat, turns of a chat, "
    "a prompt that is no UTF-8, a baseline of another tokenizer, a baseline of another vocabulary"
).split(", ")
UNMET = {
    "two budgets to try": (["--flops", 0.6, "--time", 0.5], "one budget"),
    "a budget to try that is none": (["--flops", "nan"], "flops=nan"),
    "a budget to try out of reach": (["--flops", 0.01], "flops=0.01 cannot be met"),
}
ADAPTERS = {
    "opt adapter": "does not fit the model, for which it lacks base_model.model.model.layers.0.self_attn.q_proj.lora_A",
    "llama adapter in part": "does not fit the model, for which it lacks base_model.model.model.layers.0",
    "llama adapter truncated": "adapter_model.safetensors cannot be read",
    "llama adapter without weights": "holds no adapter_model.safetensors",
}
BEYOND_IT = " beyond a table of positions"
BEYOND = [
    f"{what}{BEYOND_IT}" for what in ("rows", "a prompt", "a timed prompt", "pages", "problems", "timed problems")
]
UNKNOWN_IT = " outside the vocabulary"
UNKNOWN = [f"{what}{UNKNOWN_IT}" for what in ("problems", "timed problems", "problems to plan on", "a prompt")]


@pytest.mark.parametrize("kind", [*KINDS, *WITHOUT, *UNSCORED, *UNMET, *ADAPTERS, *BEYOND, *UNKNOWN, *RECIPES])
def test_bad_input_is_one_line_and_leaves_nothing(kind: str, tmp_path: Path, text: Path) -> None:
    arguments, message = bad(kind, tmp_path, text)
    before = sorted(tmp_path.rglob("*"))
    code, said, error = run(*arguments)
    assert code == 2 and said == ""
    (line,) = [line for line in error.splitlines() if line.strip()]
    assert line.startswith("error: ") and message in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "words", ["inspect NAME", "report NAME", "spd heal reference --plan NAME --text NAME --out NAME"]
)
def test_a_name_that_no_disk_takes_ends_in_one_line(words: str) -> None:
    code, said, error = run(*words.replace("NAME", "n" * 300).split())
    assert code == 2 and said == "" and error.count("\n") == 1 and "File name too long" in error


@pytest.mark.parametrize("text", ["1" * 5000, "[" * 20_000])
def test_numbers_and_depths_that_python_does_not_read_are_refused(text: str, tmp_path: Path) -> None:
    torn = tmp_path / "torn.jsonl"
    torn.write_text(text)
    reading = (["spd", "generate", "reference", "--prompt", "a", "--plan"], ["eval", "reference", "--data"])
    for words in (*reading, ["report"]):
        code, said, error = run(*words, torn)
        assert code == 2 and said == "" and error.count("\n") == 1 and "torn.jsonl" in error
    assert files.whole_lines(torn) == []
    with pytest.raises(InputError, match=r"torn\.json is not JSON \("):
        load_examples(torn.rename(tmp_path / "torn.json"))


def test_a_full_disk_ends_in_one_line(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(dir: Path, prefix: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(dir / prefix))

    monkeypatch.setattr("elision.files.tempfile.mkstemp", full)
    code, said, error = run(*CALIBRATE, "--text", text, "--ranks", 2, "--out", tmp_path / "plan.json")
    assert code == 2 and said == "" and not (tmp_path / "plan.json").exists()
    assert error.strip().splitlines()[-1].endswith("cannot be written: No space left on device")


def test_a_disk_that_fills_up_under_safetensors_ends_in_one_line(tmp_path: Path, text: Path) -> None:
    plan, out = SyncPlan(4, (1,)).save(tmp_path / "plan.json"), tmp_path / "healed"
    heal = ["spd", "heal", "reference", "--plan", plan, "--text", text, "--rows", 16, "--tokens", 8, "--out", out]
    heal += ["--dtype", "float32"]
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size, name in ((2**20, "healing"), (2**23, "healed")):  # a block's file fails; that of the checkpoint
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            code, said, error = run(*heal, "--epochs", 1)
            line = error.strip().splitlines()[-1]
            assert code == 2 and said == "" and not out.exists()
            assert line.startswith("error: ") and line.endswith("cannot be written: File too large") and name in line
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.glob("*.partial")) and run(*heal, "--epochs", 1)[0] == 0 and out.is_dir()


def test_a_disk_that_fills_up_under_a_checkpoint_of_training_ends_in_one_line_and_a_rerun_goes_on(
    tmp_path: Path, text: Path
) -> None:
    data, out = tmp_path / "pairs.jsonl", tmp_path / "adapter"
    data.write_text('{"prompt": "one and one is", "answer": " two"}\n' * 8)
    train = [*TRAIN, "--data", data, "--out", out, "--batch", 2, "--max-length", 16]
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size, why in ((2**20, "File too large"), (2**22, "Input/output error")):  # the adapter's file, AdamW's
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            code, _, error = run(*train)
            line = error.strip().splitlines()[-1]
            assert code == 2 and not out.exists()
            assert line == f"error: {tmp_path / 'adapter.training'} cannot be written: {why}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert run(*train)[0] == 0 and (out / "adapter_config.json").is_file()


def test_an_adapter_inside_of_the_checkpoint_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    plan, out = SyncPlan(4, (1,)).save(tmp_path / "plan.json"), tmp_path / "new"
    (tmp_path / "link").symlink_to(out)
    heal = ["spd", "heal", "no-model", "--plan", plan, "--text", tmp_path / "no-text", "--lora", 2, "--out", out]
    for adapter in (out, out / "low.safetensors", tmp_path / "link" / "deep" / "low.safetensors"):
        code, said, error = run(*heal, "--adapter", adapter)
        assert (code, said) == (2, "") and error.count("\n") == 1 and f"adapter {adapter} is inside of --out" in error
    for place in (out, out / "run"):
        code, said, error = run(*heal, "--run", place)
        assert (code, said) == (2, "") and error.count("\n") == 1 and f"run {place} is inside of --out" in error
    assert not out.exists()


def test_a_run_inside_of_the_adapter_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    out = tmp_path / "new"
    train = ["sparselora", "train", "no-model", "--data", tmp_path / "no-data", "--out", out]
    for place, whole in ((out, out), (out / "run", out), (tmp_path / "new.training/run", tmp_path / "new.training")):
        code, said, error = run(*train, "--run", place)
        assert (code, said) == (2, "") and error.count("\n") == 1 and f"run {place} is inside of {whole}, " in error
    assert not list(tmp_path.iterdir())
    assert "no-data is not a file" in run(*train, "--run", tmp_path / "new-run")[2]


@pytest.mark.parametrize("broken", ["all", "a token", "the baseline"])
def test_a_model_whose_predictions_are_no_numbers_is_refused_by_name(broken: str, tmp_path: Path, text: Path) -> None:
    tokenizer = load_tokenizer("reference")
    tokenizer.save_pretrained(tmp_path / "model")
    model = tiny("llama", vocab_size=len(tokenizer))
    token = tokenizer.encode(text.read_text())[0]
    weights = model.model.embed_tokens.weight.data[token] if broken == "a token" else model.model.norm.weight.data
    weights.fill_(math.nan)
    model.save_pretrained(tmp_path / "model")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "def", "answer": "add"}\n' * 2)
    for scored in (["--text", text, *SMALL], ["--data", pairs]) if broken != "a token" else (["--text", text, *SMALL],):
        models = ["reference", "--against", tmp_path / "model"] if broken == "the baseline" else [tmp_path / "model"]
        code, said, error = run("eval", *models, *scored, "--run", tmp_path / "run")
        what = "perplexity on text" if broken == "a token" else f"the loss of {tmp_path / 'model'}"
        assert (code, said) == (2, "") and f"error: {what} is nan: weights or an adapter diverged" in error
        assert not (tmp_path / "run").exists()


def test_a_directory_where_a_file_is_to_be_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    plan = SyncPlan(4, (1,)).save(tmp_path / "plan.json")
    heal = ["spd", "heal", "no-model", "--plan", plan, "--text", tmp_path / "no-text", "--lora", 2]
    for arguments in ([*heal, "--out", tmp_path / "new", "--adapter", tmp_path], ["spd", "probe", "--out", tmp_path]):
        code, said, error = run(*arguments)
        assert (code, said) == (2, "") and error.endswith(f" {tmp_path} is a directory: give the name of a file\n")
    with pytest.raises(InputError, match="is a directory"):
        SyncPlan(4).save(tmp_path)
    assert sorted(tmp_path.iterdir()) == [plan]


def test_a_hugging_face_id_is_scored_under_the_plan_that_it_carries(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model("reference")
    place = save(model, SyncPlan(4, tuple(range(12))), tmp_path / "model", tokenizer)
    config = load_config(place)
    monkeypatch.setattr("elision.families.load_config", lambda source: config)
    monkeypatch.setattr("huggingface_hub.snapshot_download", {"org/name": str(place)}.__getitem__)
    found = [run("eval", name, "--text", text, *SMALL, "--json") for name in ("org/name", place)]
    assert found[0][:2] == found[1][:2] and found[0][0] == 0


def test_a_home_directory_is_spelt_out(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(reference_model.PATH)
    (tmp_path / "eval.yaml").write_text(f"model: ~/model\ntext: {text}\nrows: 2\ntokens: 32\n")
    code, said, _ = run("eval", "--config", tmp_path / "eval.yaml", "--json")
    assert code == 0
    assert json.loads(said) == json.loads(run("eval", "reference", "--text", text, *SMALL, "--json")[1])


def test_a_plan_cannot_go_where_a_directory_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan-4.json").mkdir()
    several = ["--ranks", 2, "--ranks", 4]
    for ranks, out, named in (([], ".", "."), ([], tmp_path, tmp_path), (several, "plan.json", "plan-4.json")):
        options = ["--text", "no-text", *(ranks or ["--ranks", 4]), "--out", out]
        code, said, error = run("spd", "calibrate", "no-model", *options)
        assert (code, said) == (2, "") and error.count("\n") == 1 and f"out {named} is a directory" in error


def test_rows_that_do_not_fit_are_told_and_no_other_row_is_trained_on_more_often_for_them(tmp_path: Path) -> None:
    rows = [{"prompt": "a " * (100 if n % 2 == 0 else 3), "completion": "b"} for n in range(128)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([row | {"hint": "c"} for row in rows]))
    train = [*TRAIN, "--data", data, "--out", tmp_path / "adapter", "--max-length", 64, "--batch", 16, "--dry-run"]
    code, said, error = run(*train, "--json")
    assert code == 0 and json.loads(said)["steps"] == 4
    assert "64 of 128 rows are left out" in error and "0 lose the end" in error
    assert error.count("of a row's text prompt, completion is read, hint is not") == 1
