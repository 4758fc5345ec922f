"""The command line: exit codes, one-line errors, what people and machines are shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

import elision
from elision.cli import app
from elision.cli.common import device, load
from elision.errors import InputError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}


def run(*words: str | Path) -> Result:
    plain = {"COLUMNS": "100", "FORCE_COLOR": None, "GITHUB_ACTIONS": None}  # a terminal of our own, whoever runs this
    return CliRunner().invoke(app, [str(word) for word in words], env=plain)


def write(place: Path, config: object) -> Path:
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return place


def refused(result: Result) -> str:
    """The one line with which the command refused its input."""
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "elision", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"elision {elision.__version__}\n"


def test_version_and_help() -> None:
    assert run("--version").stdout == f"elision {elision.__version__}\n"
    assert run("--help").exit_code == 0
    for command in ("demo", "inspect"):
        shown = run(command, "--help")
        assert shown.exit_code == 0 and command in run("--help").stdout


def test_inspect_for_machines(tmp_path: Path) -> None:
    shown = json.loads(run("inspect", write(tmp_path, LLAMA), "--json").stdout)
    assert (shown["family"], shown["layers"], shown["kv_heads"], shown["tied"]) == ("Llama", 3, 4, True)
    (block,) = shown["blocks"]
    assert block["blocks"] == [0, 1, 2]
    assert block["projections"]["k"] == {
        "module": "k_proj",
        "out_features": 32,
        "in_features": 64,
        "bias": False,
        "parameters": 2048,
    }
    assert shown["parameters"] == 100 * 64 + 64 + 3 * block["parameters"]
    assert shown["sparselora"] is None and shown["spd"] is None
    assert shown["served_by"] == {"vLLM": [1, 2, 4, 8], "transformers": [1, 2, 4]}


def test_inspect_for_people(tmp_path: Path) -> None:
    text = run("inspect", write(tmp_path, LLAMA)).stdout
    for words in ("Llama (llama)", "0-2", "gate_proj", "176 x 64", "8 heads of 8, 4 for keys and values"):
        assert words in text
    assert "ranks can be 1, 2, 4, 8" in text and "vLLM on 1, 2, 4, 8; transformers on 1, 2, 4 ranks" in text
    gemma = write(tmp_path, LLAMA | {"model_type": "gemma2", "head_dim": 16, "num_hidden_layers": 4})
    text = " ".join(run("inspect", gemma).stdout.split())
    assert "sandwich" in text and "SparseLoRA covered" in text and "SPD SPD does not cover" in text
    assert "0, 2" in text and "1, 3" in text  # every other block has a window


def test_inspect_cuts_no_number_and_no_name(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(write(tmp_path, LLAMA))], env={"COLUMNS": "60"}).stdout
    assert "11,264" in shown and "176 x 64" in shown and "\N{HORIZONTAL ELLIPSIS}" not in shown


def test_inspect_says_that_a_healed_checkpoint_is_no_original(tmp_path: Path) -> None:
    plan = {"version": 1, "ranks": 4, "dropped": [1]}
    for healed, told in (({}, None), ({"healed": [1]}, "carries a plan for 4 ranks and serves only under it")):
        model = write(tmp_path, LLAMA | {"spd_plan": plan | healed})
        shown = json.loads(run("inspect", model, "--json").stdout)
        assert all(
            (told is None) == (said is None) and (told or "") in (said or "")
            for said in (shown["sparselora"], shown["spd"])
        )
    assert "SPD carries a plan for 4 ranks" in " ".join(run("inspect", model).stdout.split())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param("{", ["config.json", "not JSON"], id="broken"),
        pytest.param("[]", ["config.json", "model_type"], id="list"),
        pytest.param({"hidden_size": 64}, ["config.json", "model_type"], id="no type"),
        pytest.param({"model_type": "abacus"}, ["abacus", "not supported", "llama"], id="unknown"),
        pytest.param({"model_type": "mixtral"}, ["mixtral", "expert"], id="experts"),
        pytest.param(LLAMA | {"hidden_size": "wide"}, ["config.json", "hidden_size"], id="wrong type"),
        pytest.param(LLAMA | {"num_hidden_layers": 0}, ["num_hidden_layers"], id="no layers"),
    ],
)
def test_inspect_refuses_a_config_in_one_line(tmp_path: Path, config: object, words: list[str]) -> None:
    line = refused(run("inspect", write(tmp_path, config)))
    for word in words:
        assert word in line


def test_inspect_refuses_what_is_not_there(tmp_path: Path) -> None:
    assert "nowhere" in refused(run("inspect", tmp_path / "nowhere"))
    assert "config.json" in refused(run("inspect", tmp_path))
    assert "no/such-model" in refused(run("inspect", "no/such-model"))
    assert sorted(tmp_path.iterdir()) == []


def test_usage_errors_exit_with_2() -> None:
    assert run("inspect").exit_code == 2
    assert run("inspect", "reference", "--jason").exit_code == 2
    assert run("demolish").exit_code == 2
    assert run("demo", "--threads", "0").exit_code == 2


def every_command() -> list[tuple[str, ...]]:
    """The words of each command of the tree."""
    found, open_ = [], [((), typer.main.get_command(app))]
    for words, command in open_:
        inner = getattr(command, "commands", None)
        if inner is None:
            found.append(words)
        else:
            open_ += [((*words, name), each) for name, each in inner.items()]
    return found


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_every_command_has_help_and_a_config(words: tuple[str, ...], tmp_path: Path) -> None:
    assert "--config" in run(*words, "--help").stdout
    (tmp_path / "c.yaml").write_text("no-such-option: 1")
    assert f"{words[-1]} has no option 'no-such-option': use " in refused(run(*words, "--config", tmp_path / "c.yaml"))


def test_a_config_gives_arguments_options_and_switches(tmp_path: Path, demo: dict) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"model: {write(tmp_path / 'model', LLAMA)}\njson: true\n")
    assert json.loads(run("inspect", "--config", file).stdout)["family"] == "Llama"
    file.write_text(f"out: {tmp_path}\nseed: 3\nthreads: 2\n")
    assert run("demo", "--config", file, "--seed", "4").exit_code == 0
    assert demo["arguments"] == {"out": tmp_path, "seed": 4, "threads": 2}  # what is typed wins
    file.write_text("seed: null  # as if it were not there")
    assert run("demo", "--config", file).exit_code == 0 and demo["arguments"]["seed"] == 0


def test_a_config_spells_a_home_directory_out_in_paths_alone(
    tmp_path: Path, demo: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("out: ~/demo\n")
    assert run("demo", "--config", tmp_path / "c.yaml").exit_code == 0
    assert demo["arguments"]["out"] == tmp_path / "demo"
    (tmp_path / "c.yaml").write_text("model: reference\nprompt: ~/x\nplan: ~/none.json\n")
    assert f"plan {tmp_path}/none.json is not a file" in refused(
        run("spd", "generate", "--config", tmp_path / "c.yaml")
    )
    (tmp_path / "c.yaml").write_text("data: ~/data.json\nmodel: reference\nout: x\nplan: ~/none.json\n")
    assert f"data {tmp_path}/data.json" in refused(run("sparselora", "train", "--config", tmp_path / "c.yaml"))
    (tmp_path / "c.yaml").write_text("model: reference\nranks: 2\nout: x\ntext: []\n")
    assert "[] will not do: give one at least" in refused(run("spd", "calibrate", "--config", tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("seed: two", ["c.yaml", "seed", "'two'", "integer"], id="word for a number"),
        pytest.param("seed: 1.5", ["c.yaml", "seed", "1.5", "integer"], id="fraction"),
        pytest.param("seed: true", ["c.yaml", "seed", "True", "integer"], id="switch for a number"),
        pytest.param("seed: -1", ["c.yaml", "seed", "-1", "greater than or equal to 0"], id="out of range"),
        pytest.param("seed: [1, 2]", ["c.yaml", "seed", "[1, 2]", "one value"], id="several"),
        pytest.param("seed: {a: 1}", ["c.yaml", "seed", "one value"], id="mapping"),
        pytest.param("sede: 1", ["c.yaml", "demo has no option 'sede'", "out, seed, threads"], id="unknown"),
        pytest.param("config: c.yaml", ["demo has no option 'config'"], id="itself"),
        pytest.param("- seed", ["c.yaml", "holds no options"], id="list"),
        pytest.param("seed: [", ["c.yaml", "not YAML"], id="broken"),
    ],
)
def test_a_config_is_checked_before_anything_runs(tmp_path: Path, demo: dict, text: str, words: list[str]) -> None:
    (tmp_path / "c.yaml").write_text(text)
    line = refused(run("demo", "--config", tmp_path / "c.yaml"))
    for word in words:
        assert word in line
    assert "arguments" not in demo


def test_a_config_that_is_not_there(demo: dict) -> None:
    assert "nowhere.yaml is not a file" in refused(run("demo", "--config", "nowhere.yaml"))


def test_a_command_in_the_shells_completion() -> None:
    command = [sys.executable, "-c", "from elision.cli import main; main()"]
    for typed, expected in (("elision spar", "sparselora"), ("elision demo --th", "--threads")):
        words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_ELISION_COMPLETE": "complete_bash"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | words)
        assert expected in done.stdout.split(), done


def test_models_are_loaded_onto_the_gpu_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert device() == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device() == "cuda:3"
    monkeypatch.setattr(sys.modules[load.__module__], "device", lambda: "meta")
    model, _ = load("reference")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_the_installed_command_behaves_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from elision.cli import main; main()", "inspect", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "nowhere" in line


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A stand-in for the demo: raises what stands under "raises", notes what it was called with."""
    seen: dict = {"raises": None}

    def run(**arguments: object) -> None:
        seen["arguments"] = arguments
        if seen["raises"] is not None:
            raise seen["raises"]

    module = types.ModuleType("elision.demo")
    module.__dict__["run"] = run
    monkeypatch.setitem(sys.modules, "elision.demo", module)
    return seen


def test_demo_passes_its_options_on(demo: dict, tmp_path: Path) -> None:
    assert run("demo").exit_code == 0
    assert demo["arguments"] == {"out": Path("runs/demo"), "seed": 0, "threads": None}
    assert run("demo", "--out", tmp_path, "--seed", "3", "--threads", "2").exit_code == 0
    assert demo["arguments"] == {"out": tmp_path, "seed": 3, "threads": 2}


def test_a_gpu_that_is_too_small_is_told_with_what_would_help(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr("elision.cli.spd_plan.load", full)
    words = ["--text", tmp_path, "--ranks", "2", "--out", tmp_path / "plan.json"]
    said = refused(run("spd", "calibrate", "reference", *words))
    assert said == "error: the GPU has too little memory for calibrate: give --dtype bfloat16 or --stream"


def test_failures_of_a_command(demo: dict) -> None:
    demo["raises"] = InputError("seed 7 in plan.json is odd: use an even one")
    assert refused(run("demo")) == "error: seed 7 in plan.json is odd: use an even one"
    demo["raises"] = KeyboardInterrupt()
    result = run("demo")
    assert result.exit_code == 130 and "to resume" in result.stderr
    demo["raises"] = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    assert refused(run("demo")) == "error: the GPU has too little memory for demo: give a smaller model"
    demo["raises"] = ZeroDivisionError("a bug of ours")
    result = run("demo")
    assert result.exit_code == 1 and isinstance(result.exception, ZeroDivisionError)
