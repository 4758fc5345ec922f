"""Commands start their own ranks: results, refusals, lost ranks, and text equal to the simulation's."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from elision import reference_model
from elision.cli import app
from elision.errors import InputError
from elision.evaluate import answers
from elision.loading import load_model, load_tokenizer
from elision.spd import SyncPlan, simulate
from elision.spd.runtimes import latency, ranks, tasks
from elision.spd.runtimes import transformers as runtime
from elision.spd.runtimes.latency import Workload
from elision.spd.runtimes.launch import launch
from elision.spd.runtimes.ranks import RankLostError
from tests.spd import launched
from tests.spd.served import checkpoint
from tests.spd.tiny import VOCABULARY

SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_ranks_compute_together_and_rank_0_answers():
    before = signal.getsignal(signal.SIGTERM), logging.root.manager.disable, dict(os.environ)
    assert launch(2, launched.add_up, "well") == [3.0]
    assert (signal.getsignal(signal.SIGTERM), logging.root.manager.disable, dict(os.environ)) == before


@pytest.mark.parametrize(
    ("how", "kind", "sentence"),
    [
        ("refused", InputError, "value 7 is odd: give an even one"),
        ("failed", RankLostError, "rank 1 stopped with MemoryError: no room; the others were ended"),
        ("failed late", RankLostError, "rank 1 stopped with MemoryError: no room; the others were ended"),
    ],
)
def test_what_goes_wrong_in_a_rank_is_raised_here(how, kind, sentence):
    with pytest.raises(kind) as raised:
        launch(2, launched.add_up, how)
    assert str(raised.value) == sentence


def test_a_rank_killed_in_mid_generation_ends_the_others_and_is_named(tmp_path):
    place = checkpoint(tmp_path / "model", "llama", SyncPlan(2, (0, 1, 2)), **SIZES)
    start = time.monotonic()
    with pytest.raises(RankLostError, match="rank 1 was killed by SIGKILL; the other ranks were ended"):
        launch(2, launched.die, place)
    assert time.monotonic() - start < 120  # mostly loading; the others are ended within the launcher's first look


def test_a_healed_checkpoint_raises_no_false_alarm(tmp_path, caplog, monkeypatch):
    place = checkpoint(tmp_path / "model", "llama", SyncPlan(2, (0,), healed=(0,)), **SIZES)
    load_tokenizer("reference").save_pretrained(place)
    words = ["spd", "generate", place, "--prompt", ""]  # is refused once the tokenizer is there
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING)
    assert "holds no token" in CliRunner().invoke(app, words).stderr
    load_tokenizer(str(place))  # as other commands do
    assert "model of type" not in caplog.text
    AutoTokenizer.from_pretrained(place)
    assert "You are using a model of type `spd_llama`" in caplog.text
    other = CliRunner().invoke(app, [*map(str, words), "--ranks", "4"])
    said = f"error: --ranks 4 is given, but {place} carries a plan for 2 ranks and serves only under it: leave it out\n"
    assert (other.exit_code, other.stderr) == (2, said)


def test_prompts_outside_the_vocabulary_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("elision.spd.runtimes.launch.launch", None)
    place = checkpoint(tmp_path / "model", "llama", SyncPlan(2, (0,)), **SIZES)
    tokenizer = load_tokenizer("reference")
    tokenizer.save_pretrained(place)
    token = max(tokenizer.encode("def main("))
    found = CliRunner().invoke(app, ["spd", "generate", place, "--prompt", "def main("])
    assert found.exit_code == 2 and found.stderr.startswith("error: the prompts have token ")
    assert token >= VOCABULARY and f"the model's vocabulary has {VOCABULARY}: tokenize with" in found.stderr
    one = checkpoint(tmp_path / "one", "llama", SyncPlan(1))
    with pytest.raises(InputError, match=f"the inputs have token {token}, the model's vocabulary has {VOCABULARY}"):
        runtime.generate(runtime.load(one), torch.tensor([[token]]), max_new_tokens=1)


def test_prompts_are_padded_where_the_tokenizer_names_no_token_for_that(tmp_path, monkeypatch):
    place = tmp_path / "model"
    shutil.copytree(reference_model.PATH, place)
    settings = json.loads((place / "tokenizer_config.json").read_text())
    kept = {name: value for name, value in settings.items() if name not in ("pad_token", "eos_token")}
    (place / "tokenizer_config.json").write_text(json.dumps(kept))
    seen = []
    answered = torch.ones(2, 9, dtype=torch.int64)
    monkeypatch.setattr("elision.spd.runtimes.launch.launch", lambda *given: seen.append(given[4]) or answered)
    words = ["--prompt", "def main(", "--prompt", "def", "--ranks", "2"]
    result = CliRunner().invoke(app, ["spd", "generate", str(place), *words])
    assert result.exit_code == 0, result.stderr
    assert seen[0]["attention_mask"].sum(1).tolist() == [len(load_tokenizer(place).encode(p)) for p in words[1:4:2]]
    model, tokenizer = load_model(str(place))
    whole = answers(model, load_tokenizer("reference"), ["def main(", "def"], 4)
    assert answers(model, tokenizer, ["def main(", "def"], 4) == whole


def test_a_process_of_torchrun_is_a_rank_and_starts_no_other(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some run")
    assert launch(2, int, "7") == 7


def test_fewer_gpus_than_ranks_are_refused_before_a_rank_is_started(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sentence = "4 ranks need a GPU each, this machine has 2: use torchrun on machines that have as many"
    with pytest.raises(InputError, match=sentence):
        launch(4, launched.add_up, "well")


def test_a_directory_of_temporary_files_that_no_socket_fits_in_is_named(tmp_path):
    long = tmp_path / ("d" * 90)
    long.mkdir()
    found = run("spd", "probe", "--turns", "3", TMPDIR=str(long))
    assert found.returncode == 2
    sentence = f"TMPDIR {long} is too long for the sockets that ranks are started through: set it to a short directory"
    assert found.stderr == f"error: {sentence} such as /tmp\n"


def test_bench_times_every_variant_in_turns(tmp_path):
    place = checkpoint(tmp_path / "model", "llama", SyncPlan(2, (1,)), **SIZES)
    work = [Workload(1, 8, 2), Workload(2, 8)]
    rows = launch(2, tasks.bench, place, SyncPlan(2, (1,)), work, 2, "auto")
    variants = ["all syncs", "plan", "all dropped", "all in int8"]
    assert [(row["workload"], row["variant"]) for row in rows] == [(w.name, v) for w in work for v in variants]
    for row in rows:
        assert row["ms"] > 0 and row["all_reduce_ms"] > 0
        assert (row["ideal_ms"] is None) == (row["variant"] == "all in int8")
    one, three = (rows[0]["ms"] - row["ideal_ms"] for row in rows[1:3])
    assert three == pytest.approx(3 * one)


def test_variants_take_turns_forwards_and_backwards_and_the_first_turn_is_to_warm_up():
    order = []

    def variant(name):
        return lambda workload: order.append(name) or [float(len(order))]

    work = Workload(1, 8)
    found = latency.compare({name: variant(name) for name in "abc"}, [work], turns=2)
    assert "".join(order) == "abc" + "cba" + "abc"
    assert found == {work.name: {"a": [6.0, 7.0], "b": [5.0, 8.0], "c": [4.0, 9.0]}}


def test_bench_gives_slow_ranks_the_time_that_is_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr("elision.spd.runtimes.launch.launch", lambda *given: seen.append(given))
    assert CliRunner().invoke(app, ["spd", "bench", "reference", "--ranks", "2", "--timeout", "45"]).exit_code == 0
    assert seen[0][:2] == (2, tasks.bench) and seen[0][-1] == 45.0
    monkeypatch.setattr(tasks, "_quiet", lambda: None)
    monkeypatch.setattr(tasks.runtime, "load", lambda *_, **options: seen.append(options["timeout"]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tasks.bench(*seen[0][2:])
    assert seen[-1] == 45.0


def test_nccl_keeps_its_own_time_limit(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_set_pg_timeout", lambda *given: seen.append(given))
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        ranks.limit(10.0)
    assert len(seen) == 1


def test_bench_times_a_plan_that_only_skips_attention_and_names_no_ideal(tmp_path):
    plan = SyncPlan(2, skipped=(1,))
    place = checkpoint(tmp_path / "model", "llama", plan, **SIZES)
    rows = launch(2, tasks.bench, place, plan, [Workload(1, 8)], 1, "auto")
    ideal = {row["variant"]: row["ideal_ms"] for row in rows}
    assert list(ideal) == ["all syncs", "plan", "all dropped", "all in int8"]
    assert ideal["plan"] is None and ideal["all syncs"] is not None


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user starts it, with environment variables."""
    code = "from elision.cli import main; main()"
    command, environment = [sys.executable, "-c", code, *words], {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_the_generate_command_gives_the_simulations_text(tmp_path):
    plan = SyncPlan(2, (0, 1), int8=(3,))
    model, tokenizer = load_model("reference")
    prompt = "def main("
    with torch.no_grad(), simulate(model, plan):
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    plan.save(tmp_path / "plan.json")
    words = ("spd", "generate", "reference", "--plan", str(tmp_path / "plan.json"), "--prompt", prompt)
    result = run(*words, "--new-tokens", "12", "--dtype", "float32", "--timeout", "60", "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Generating") == 1  # the bar of the first rank
    shown = json.loads(result.stdout)
    assert shown["texts"] == [tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)]
    assert (shown["ranks"], shown["dropped"]) == (2, [0, 1])


def test_one_rank_shows_the_bar_of_a_bench():
    small = ("--turns", "1", "--prompt-tokens", "4", "--new-tokens", "1")
    result = run("spd", "bench", "reference", "--ranks", "2", *small, "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Timing ") == 1


def test_the_probe_command_fits_a_link(tmp_path):
    out = tmp_path / "link.json"
    result = CliRunner().invoke(app, ["spd", "probe", "--turns", "3", "--out", str(out), "--json"])
    found = json.loads(result.stdout)
    assert found == json.loads(out.read_text())
    assert found["ranks"] == 2 and found["alpha"] >= 0 and found["beta"] >= 0
    assert len(found["all_reduces"]) == 7


def test_a_rank_that_torchrun_started_alone_has_nothing_to_probe(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some run")
    result = CliRunner().invoke(app, ["spd", "probe"])
    assert result.exit_code == 2
    assert result.stderr == "error: one rank has no links to measure: start two or more\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["generate", "reference", "--prompt", "x"], "reference carries no plan: give --plan FILE, or --ranks N"),
        (["bench", "reference", "--ranks", "3"], "ranks=3 cannot share this model"),
        (["bench", "reference", "--ranks", "1"], "1 rank has no syncs to time: give --ranks 2 or more"),
        (["generate", "reference", "--ranks", "2", "--prompt", ""], "--prompt '' holds no token: give text"),
        (["generate", "reference", "--ranks", "2", "--prompt", "x", "--prompt", ""], "--prompt '' holds no token"),
        (["bench", "nowhere", "--ranks", "2"], "model 'nowhere' is not a directory"),
        (["bench", "reference", "--ranks", "2", "--plan", "p.json"], "--ranks 2 is given beside --plan"),
        (["generate", "reference", "--ranks", "2", "--prompt", "x", "--dtype", "int3"], "dtype 'int3' is not known"),
    ],
)
def test_bad_input_is_refused_before_a_rank_is_started(words, sentence, monkeypatch):
    monkeypatch.setattr("elision.spd.runtimes.launch.launch", None)
    result = CliRunner().invoke(app, ["spd", *words])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and sentence in line
