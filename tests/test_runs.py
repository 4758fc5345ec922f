"""A run's directory: whole, comparable, resumable, and never another run's."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from elision import runs
from elision.cli.common import Commands, DryRun, Json, Model, RunDirectory, run_directory, show
from elision.errors import InputError
from elision.report import sources

OPTIONS = {"model": "reference", "ranks": 4, "text": ["a.txt", "b.txt"]}


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    with runs.opened(tmp_path / "run", "spd calibrate", OPTIONS) as run:
        run.log("12 rows")
        run.metric(step=1, loss=2.5)
        run.metric(step=2, loss=1.5)
        run.finish(training=[{"name": "LoRA"}])
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == OPTIONS
    kept = json.loads((run.path / "run.json").read_text())
    assert kept["command"] == "spd calibrate" and kept["options"] == OPTIONS and "torch" in kept["versions"]
    lines = (run.path / "log.txt").read_text().splitlines()
    assert [line[20:] for line in lines] == ["start", "12 rows", "done"]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    assert run.metrics() == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}]
    results = json.loads((run.path / "results.json").read_text())
    assert results["title"] == "elision spd calibrate" and results["training"] == [{"name": "LoRA"}]
    assert results["settings"]["text"] == "a.txt, b.txt"


def test_an_interrupted_run_resumes_to_the_same_files(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with runs.opened(whole, "x", {}) as run:
        for step in (1, 2, 3):
            run.metric(step=step, loss=step / 2)
    with pytest.raises(KeyboardInterrupt), runs.opened(cut, "x", {}) as run:
        run.metric(step=1, loss=0.5)
        run.metric(step=2, loss=9.0)  # lost with the checkpoint before it, measured again below
        raise KeyboardInterrupt
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # torn by a kill
    with runs.opened(cut, "x", {}) as run:
        run.metric(step=2, loss=1.0)
        run.metric(step=3, loss=1.5)
    assert runs.Run(cut, {}).metrics() == runs.Run(whole, {}).metrics()
    assert (cut / "run.json").read_bytes() == (whole / "run.json").read_bytes()
    assert "ended by KeyboardInterrupt" in (cut / "log.txt").read_text()


@pytest.mark.parametrize("left", [(), (".run.json.a1b2",), ("run.json",), ("run.json", ".config.yaml.a1b2")])
def test_a_run_that_was_killed_while_it_began_is_taken_up(tmp_path: Path, left: tuple[str, ...]) -> None:
    place, whole = tmp_path / "run", tmp_path / "whole"
    with runs.opened(whole, "x", {"seed": 1}):
        pass
    place.mkdir()
    for name in left:
        shutil.copy(whole / "run.json", place / name)
    with runs.opened(place, "x", {"seed": 1}):
        pass
    for name in ("config.yaml", "run.json"):
        assert (place / name).read_bytes() == (whole / name).read_bytes()


def test_json_has_no_number_that_is_none(tmp_path: Path) -> None:
    with runs.opened(tmp_path / "run", "x", {}) as run:
        run.metric(step=1, loss=math.nan)
        run.finish(training=[{"name": "LoRA", "losses": [(1, math.nan), (2, math.inf)]}])
    assert run.metrics() == [{"step": 1, "loss": None}]
    text = (run.path / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["training"][0]["losses"] == [[1, None], [2, None]]
    (shown,) = sources.load(run.path).training
    assert [step for step, loss in shown.losses if math.isnan(loss)] == [1, 2]


def test_another_file_under_an_old_name_is_another_run(tmp_path: Path) -> None:
    inputs = {"plan": "predictor/config.json", "probe": "probe.json", "include": "tasks/one.yaml"}
    inputs |= {"adapter": "adapter/adapter_config.json", "text": "text.txt"}
    files = {name: tmp_path / path for name, path in inputs.items()}
    for file in files.values():
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    options: dict[str, object] = {name: str(tmp_path / path.split("/")[0]) for name, path in inputs.items()}
    options |= {"text": [options["text"]], "out": str(tmp_path / "out.json")}
    for _ in range(2):  # what a run writes is none of its inputs
        with runs.opened(tmp_path / "run", "eval", options):
            (tmp_path / "out.json").write_text("written")
    before = (tmp_path / "run/run.json").read_bytes()
    for name, file in files.items():
        kept = file.read_text()
        file.write_text("other")
        with (
            pytest.raises(InputError, match=f"was begun with what --{name} held then, now it is something else"),
            runs.opened(tmp_path / "run", "eval", options),
        ):
            pass
        file.write_text(kept)
    assert (tmp_path / "run/run.json").read_bytes() == before


def test_the_factors_beside_a_plan_are_an_input_like_the_plan(tmp_path: Path) -> None:
    plan, factors = tmp_path / "plan.v2.json", tmp_path / "plan.v2.factors.safetensors"
    plan.write_text("{}")
    alone = runs.contents({"plan": str(plan)})
    factors.write_bytes(b"one")
    before = runs.contents({"plan": str(plan)})
    factors.write_bytes(b"another")
    assert len({found["plan"] for found in (alone, before, runs.contents({"plan": str(plan)}))}) == 3


def test_another_runs_directory_is_refused_by_what_differs(tmp_path: Path) -> None:
    place = tmp_path / "run"
    with runs.opened(place, "spd calibrate", OPTIONS):
        pass
    before = {path: path.read_bytes() for path in place.iterdir()}
    for command, options, words in (
        ("spd heal", OPTIONS, "run of elision spd calibrate"),
        ("spd calibrate", OPTIONS | {"ranks": 8}, "ranks 4, now it is 8"),
        ("spd calibrate", OPTIONS | {"drop": 0.5}, "drop None, now it is 0.5"),
        ("spd calibrate", {"model": "reference"}, "ranks 4, now it is None"),
    ):
        with pytest.raises(InputError, match=words), runs.opened(place, command, options):
            pass
    assert {path: path.read_bytes() for path in place.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for other in ("mine", "mine/thesis.tex"):
        with pytest.raises(InputError, match="holds something else"), runs.opened(tmp_path / other, "x", {}):
            pass


app = typer.Typer(cls=Commands)


@app.callback()
def common() -> None: ...


@app.command()
def measure(
    ctx: typer.Context,
    model: Model,
    rows: int = 3,
    run: RunDirectory = None,
    dry: DryRun = False,
    as_json: Json = False,
) -> None:
    if dry:
        return show({"rows": rows, "memory_mb": 2.5}, as_json)
    with run_directory(ctx, run) as kept:
        kept.metric(rows=rows)
    return show({"model": model}, as_json, f"measured {model}")


def test_a_command_in_its_run_directory(tmp_path: Path) -> None:
    place = tmp_path / "run"
    said = CliRunner().invoke(app, ["measure", "reference", "--rows", "5", "--run", str(place)])
    assert said.exit_code == 0 and said.stdout == "measured reference\n"
    assert json.loads((place / "run.json").read_text())["command"] == "measure"
    assert (place / "metrics.jsonl").read_text() == '{"rows": 5}\n'
    again = CliRunner().invoke(app, ["measure", "--config", str(place / "config.yaml"), "--run", str(place), "--json"])
    assert again.exit_code == 0 and json.loads(again.stdout) == {"model": "reference"}
    assert (place / "metrics.jsonl").read_text() == '{"rows": 5}\n'  # measured again to the same
    other = CliRunner().invoke(
        app, ["measure", "--config", str(place / "config.yaml"), "--run", str(place), "--rows", "6"]
    )
    assert other.exit_code == 2 and "rows 5, now it is 6" in other.stderr


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["measure", "reference", "--dry-run", "--run", str(tmp_path / "run")])
    assert said.exit_code == 0 and said.stdout.split() == ["rows", "3", "memory", "mb", "2.5"]
    assert not (tmp_path / "run").exists()


def test_input_that_is_refused_leaves_the_place_free(tmp_path: Path) -> None:
    place = tmp_path / "run"
    with pytest.raises(InputError), runs.opened(place, "x", {"drop": 1.5}):
        raise InputError("drop=1.5 is not a share")
    assert not place.exists()
    with pytest.raises(InputError), runs.opened(place, "x", {"drop": 0.5}) as run:
        run.metric(step=1, loss=2.0)
        raise InputError("the loss is not finite")
    assert (place / "metrics.jsonl").exists()  # what was measured is kept
    other = tmp_path / "other"
    with pytest.raises(InputError, match="the loss is not finite"), runs.opened(other, "x", {"drop": 0.5}):
        (other / "plan.json.journal").touch()
        raise InputError("the loss is not finite")
    assert [path.name for path in other.iterdir()] == ["plan.json.journal"]


def test_a_run_without_a_directory_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = runs.Run(None, {})
    run.log("nothing")
    run.metric(step=1)
    run.finish(training=[])
    assert run.metrics() == [] and not list(tmp_path.iterdir())
