"""calibrate, presets and bench as a user types them, on a model of two layers."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations import integration_utils
from typer.testing import CliRunner

from elision import reference_model, report
from elision.cli import app
from elision.cli.plans import spread
from elision.sparselora import SparsityPlan
from tests.sparselora import tiny
from tests.sparselora.test_presets import publish


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(reference_model.PATH)
    tiny.base("llama", torch.float32, vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = [{"prompt": f"Anna has {n} apples and buys 3 more. How many?", "completion": f"{n + 3}"} for n in range(6)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in ("sparselora", *arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_calibrate_then_train_by_the_plan(model: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "plan.json", model / "data.json"
    budget = ("--flops", 0.99, "--selection", "weights", "--dense-steps", 0.0, "--batch", 3)
    code, said, error = run("calibrate", model, "--data", data, "--out", out, *budget)
    assert code == 0 and "expect at most 1." in said and f"plan: {out}" in said
    assert error.count("all rows of the data are measured, so the rehearsal is of the same ones") == 1
    found = SparsityPlan.load(out).calibration
    assert found is not None and found.flops["full"] <= 0.99
    assert out.with_name("plan.json.journal").exists()
    assert found.rehearsed == 32 and out.with_name("plan.json.journal.safetensors").exists()
    bare, streamed = tmp_path / "bare.json", tmp_path / "streamed.json"
    run("calibrate", model, "--data", data, "--out", bare, *budget, "--rehearse", 0)
    run("calibrate", model, "--data", data, "--out", streamed, *budget, "--stream")
    assert streamed.read_bytes() == bare.read_bytes() != out.read_bytes()
    code, _, error = run("train", model, "--data", data, "--out", tmp_path / "paper", "--epochs", 4)
    assert code == 0 and "SparseLoRA, sampled selection: ffn 99% in 0; qk dense; vo dense; " in error
    code, said, _ = run("train", model, "--data", data, "--out", tmp_path / "adapter", "--plan", out, "--epochs", 4)
    assert code == 0 and "expect at most 1." in said
    again = tmp_path / "again.json"
    code, said, _ = run("calibrate", model, "--data", data, "--out", again, *budget, "--adapter", tmp_path / "adapter")
    assert code == 0 and SparsityPlan.load(again).calibration != found


def test_rows_are_taken_evenly_from_all_of_the_data() -> None:
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, 8) == [0, 1, 2] and spread(0, 8) == []
    gaps = {after - before for before, after in zip(spread(63, 32), [*spread(63, 32)[1:], 63], strict=True)}
    assert gaps == {1, 2}


def test_presets_and_bench(model: Path) -> None:
    code, said, _ = run("presets", "--json")
    assert code == 0 and json.loads(said)["llama3-8b/math10k"]["ffn"][3] == 0.99
    code, said, _ = run("presets")
    assert "ffn 99% in 3-30" in said
    code, said, _ = run("bench", model, "--data", model / "data.json", "--sparsity", 0.5, "--turns", 1, "--json")
    values = json.loads(said)
    variants = [row["variant"] for row in values["rows"]]
    assert code == 0 and variants == ["LoRA", "dense + lossless", "sparse + lossless"]
    assert {row["shape"] for row in values["rows"]} == {f"{model}, batch 6"}  # no more rows are there
    ideals = [row["ideal"] for row in values["rows"]]
    assert ideals[0] == 1 < ideals[1] < ideals[2] and all(row["step_ms"] > 0 for row in values["rows"])
    (model / "bench.json").write_text(said)
    assert "milliseconds" in report.write(model / "bench.json", model / "page").read_text()


def test_a_published_predictor_is_a_plan(model: Path, tmp_path: Path) -> None:
    predictor = publish(AutoModelForCausalLM.from_pretrained(model), tmp_path / "predictor")
    common = (model, "--data", model / "data.json", "--plan", predictor)
    code, said, _ = run("bench", *common, "--mode", "o2", "--turns", 1, "--json")
    assert code == 0 and len(json.loads(said)["rows"]) == 3
    code, said, error = run("train", *common, "--mode", "o1", "--out", tmp_path / "adapter", "--epochs", 4)
    assert code == 0 and "ffn 90% in 1; qk dense; vo dense" in said
    assert "SparseLoRA, svd selection: ffn 90% in 1; " in error and (tmp_path / "adapter").is_dir()
    code, _, error = run("bench", *common)
    assert code == 2 and f"error: predictor {predictor} has modes o1, o2: say which one" in error
    code, _, error = run("bench", *common, "--mode", "o3")
    assert code == 2 and "mode 'o3' is not in predictor" in error
    code, _, error = run("bench", *common[:-1], model, "--mode", "o1")
    assert code == 2 and f"predictor {model} has no modes and predictor_rank in its config.json" in error
    code, _, error = run("bench", *common[:-1], tmp_path / "adapter", "--mode", "o1")
    assert code == 2 and "adapter holds no config.json: give the directory of a published predictor" in error


def test_a_plan_of_whitened_factors_brings_them_along(model: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "plan.json", model / "data.json"
    budget = ("--flops", 0.99, "--selection", "whitened", "--dense-steps", 0.0)
    code, _, error = run("calibrate", model, "--data", data, "--out", out, *budget)
    assert code == 0, error
    assert SparsityPlan.load(out).selection == "whitened"
    code, _, error = run("train", model, "--data", data, "--out", tmp_path / "adapter", "--plan", out, "--epochs", 2)
    assert code == 0 and "SparseLoRA, whitened selection" in error
    (tmp_path / "plan.factors.json").unlink()
    code, _, error = run("train", model, "--data", data, "--out", tmp_path / "again", "--plan", out)
    assert code == 2 and "plan.factors.json is not a file" in error
    out.rename(tmp_path / "plan.factors.json")
    code, _, error = run("calibrate", model, "--data", data, "--out", out, *budget)
    assert code == 2 and "plan.factors.json, which is none of theirs" in error and not out.exists()


@pytest.mark.parametrize("selection", ["svd", "whitened"])
def test_a_dry_run_makes_the_factors_of_one_layer_and_keeps_none(selection: str, model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    words = ("--data", model / "data.json", "--out", tmp_path / "plan.json", "--selection", selection, "--rehearse", 0)
    code, said, error = run("calibrate", model, *words, "--dry-run", "--json")
    assert code == 0 and json.loads(said)["seconds"] > 0, error
    assert sorted(tmp_path.rglob("*")) == before


def scalars(folder: Path) -> set[str]:
    """Names of the numbers in tensorboard's files: records of length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: set[str] = set()
    for path in folder.glob("events.*"):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found |= {value.tag for value in Event.FromString(data[12 : 12 + size]).summary.value}
            data = data[16 + size :]
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboardX")
def test_training_reports_through_trainers_integrations(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Board(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append((args.run_name, sorted(logs)))

    learn = ("train", model, "--data", model / "data.json", "--sparsity", 0, "--out", tmp_path / "adapter")
    code, _, error = run(*learn, "--report-to", "trackio")
    assert code == 2 and "report-to trackio is not installed: pip install trackio" in error
    code, _, error = run(*learn, "--report-to", "fax")
    assert code == 2 and "report-to 'fax' is not known: use tensorboard, wandb, trackio" in error
    installed = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "wandb" or installed(name))
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Board)
    code, _, _ = run(*learn, "--report-to", "tensorboard", "--report-to", "wandb", "--run", tmp_path / "run")
    assert code == 0 and ("adapter", ["epoch", "grad_norm", "learning_rate", "loss"]) in seen
    assert {"train/loss", "train/learning_rate"} <= scalars(tmp_path / "run" / "tensorboard")
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("calibrate", "--flops", 0.5, "--time", 0.5), "flops and time are both given"),
        (("calibrate", "--flops", 0.01), "flops=0.01 cannot be met"),
        (("calibrate", "--flops", 0.01, "--selection", "whitened"), "flops=0.01 cannot be met"),
        (("calibrate", "--time", 0.5, "--stream"), "--stream goes without"),
        (("calibrate", "--adapter", "absent"), "absent holds no adapter_config.json"),
        (("calibrate", "--adapter", "absent", "--rehearse", 4), "are both given: one of them is enough"),
        (("calibrate", "--rehearse", 4, "--stream"), "--stream goes without --adapter, --rehearse and --time"),
        (("calibrate", "--learning-rate", 30), "learning_rate 30.0 is not between 0 and 1"),
        (("calibrate", "--selection", "magic"), "selection 'magic' is not known"),
        (("calibrate", "--out", "."), "--out . is a directory: name the plan's file"),
        (("train", "--out", "."), "--out . cannot be replaced by the adapter's directory: name a new one in it"),
        (("bench", "--plan", "plan.json", "--sparsity", 0.5), "--plan and --sparsity are both given"),
        (("bench", "--plan", "llama3-8b/math10k"), "this model has layers 2"),
        (("bench", "--plan", "absent.json"), "absent.json is neither a file nor a preset"),
        (("bench", "--plan", "llama3-8b/math10k", "--mode", "o1"), "--mode o1 goes with --plan DIRECTORY"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: tuple[object, ...], message: str, model: Path, tmp_path: Path
) -> None:
    command, *options = arguments
    written = ["--out", tmp_path / "plan.json"] if command == "calibrate" and "--out" not in options else []
    before = sorted(tmp_path.rglob("*"))
    code, said, error = run(command, model, "--data", model / "data.json", *options, *written)
    assert code == 2 and said == ""
    (line,) = [line for line in error.splitlines() if line.strip()]
    assert line.startswith("error: ") and message in line
    assert sorted(tmp_path.rglob("*")) == before
