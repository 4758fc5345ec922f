"""Every long command: the same files in its run directory, JSON for machines, a dry run that writes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

from elision import reference_model, report
from elision.blocks import decoder
from elision.cli import app
from elision.spd import SyncPlan
from elision.spd.simulate import facts
from tests.sparselora import tiny

FILES = {"config.yaml", "run.json", "log.txt", "metrics.jsonl", "results.json"}


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers, pairs to learn, text to read."""
    place = tmp_path_factory.mktemp("long")
    tokenizer = AutoTokenizer.from_pretrained(reference_model.PATH)
    tokenizer.save_pretrained(place / "model")
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    model = tiny.base("llama", torch.float32, **sizes)
    model.save_pretrained(place / "model")
    rows = [{"prompt": f"Anna has {n} apples and buys 3 more. How many?", "answer": f"{n + 3}"} for n in range(8)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 40)
    SyncPlan(2, (0, 1), model=facts(decoder(model))).save(place / "sync.json")
    return place


def commands(place: Path, out: Path) -> dict[str, list[object]]:
    """Each long command in little, without `--run`."""
    pairs, text = ["--data", place / "pairs.jsonl"], ["--text", place / "text.txt", "--rows", 16, "--tokens", 16]
    model = place / "model"
    learn = [*pairs, "--sparsity", 0.5, "--batch", 2]
    measure = [*pairs, "--flops", 0.99, "--selection", "weights", "--dense-steps", 0, "--out", out / "sparsity.json"]
    return {
        "sparselora train": ["sparselora", "train", model, *learn, "--out", out / "adapter"],
        "sparselora calibrate": ["sparselora", "calibrate", model, *measure],
        "sparselora bench": ["sparselora", "bench", model, *learn, "--turns", 1],
        "spd calibrate": ["spd", "calibrate", model, *text, "--ranks", 2, "--drop", 0.5, "--out", out / "plan.json"],
        "spd heal": [
            "spd",
            "heal",
            model,
            *text,
            "--plan",
            place / "sync.json",
            "--epochs",
            1,
            "--out",
            out / "healed",
        ],
        "eval": ["eval", model, *text],
        "spd bench": ["spd", "bench", model, "--ranks", 2, "--turns", 1, "--prompt-tokens", 4, "--new-tokens", 1],
        "spd generate": ["spd", "generate", model, "--ranks", 2, "--prompt", "def", "--new-tokens", 2],
        "spd probe": ["spd", "probe", "--turns", 3],
    }


LONG = list(commands(Path(), Path()))
DRY = [name for name in LONG if name in ("eval", "spd heal") or name.endswith(("train", "calibrate"))]


@pytest.mark.parametrize("name", LONG)
def test_what_a_run_directory_holds(name: str, place: Path, tmp_path: Path) -> None:
    kept = tmp_path / "run"
    code, said, _ = run(*commands(place, tmp_path)[name], "--run", kept, "--json")
    assert code == 0
    (line,) = said.splitlines()
    assert json.loads(line)
    assert {path.name for path in kept.iterdir()} == FILES
    config, about = yaml.safe_load((kept / "config.yaml").read_text()), json.loads((kept / "run.json").read_text())
    assert config == about["options"] and about["command"] == name and "torch" in about["versions"]
    assert [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
    assert (kept / "log.txt").read_text().splitlines()[-1].endswith(" done")
    page = report.write(kept)
    assert "Settings" in page.read_text()
    if name not in ("spd generate", "eval"):  # which measure nothing, or nothing against a baseline
        assert list((page.parent / "plots").glob("*.png"))


@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_tells_and_writes_nothing(name: str, place: Path, tmp_path: Path) -> None:
    words = [*commands(place, tmp_path)[name], "--run", tmp_path / "run", "--dry-run"]
    before = sorted(place.rglob("*"))
    code, said, _ = run(*words, "--json")
    assert code == 0
    found = json.loads(said)
    if name != "eval":
        assert found["seconds"] > 0 and found["time"].startswith("about ") and found["memory_mb"] > 0
        assert "gain" in found or name == "spd heal"  # which has no calibration to tell it
    assert not list(tmp_path.iterdir()) and sorted(place.rglob("*")) == before


def test_a_plan_edited_by_hand_is_estimated_without_a_gain(place: Path, tmp_path: Path) -> None:
    arguments = commands(place, tmp_path)
    assert run(*arguments["spd calibrate"])[0] == 0
    plan = SyncPlan.load(tmp_path / "plan.json")
    assert plan.calibration is not None
    words = [tmp_path / "plan.json" if word == place / "sync.json" else word for word in arguments["spd heal"]]
    for first, known in ((0, True), (1, False)):
        replace(plan, dropped=(plan.calibration.order[first],)).save(tmp_path / "plan.json")
        code, said, _ = run(*words, "--dry-run", "--json")
        assert code == 0 and ("gain" in json.loads(said)) == known


def every_command() -> list[tuple[tuple[str, ...], typer.core.TyperCommand]]:
    found, open_ = [], [((), typer.main.get_command(app))]
    for words, command in open_:
        inner = getattr(command, "commands", None)
        found += [(words, command)] if inner is None else []
        open_ += [((*words, name), each) for name, each in (inner or {}).items()]
    return found


def test_every_command_speaks_to_machines_and_every_long_one_keeps_a_run() -> None:
    names = {
        " ".join(words): {name for param in command.params for name in param.opts} for words, command in every_command()
    }
    assert {name for name, options in names.items() if "--json" not in options} == set()
    assert {name for name, options in names.items() if "--run" in options} == set(LONG)
    assert {name for name, options in names.items() if "--dry-run" in options} == set(DRY)
    assert set(names) - set(LONG) == {"demo", "inspect", "report", "sparselora presets"}  # the demo's run is its --out
