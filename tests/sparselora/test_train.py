"""The fine-tuning of the command line: what an interrupted run leaves is taken up by the same run and no other."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback
from typer.testing import CliRunner

from elision import reference_model
from elision.cli import app
from elision.data import Example
from elision.errors import InputError
from elision.sparselora import Factors, SparsityPlan
from elision.sparselora.train import Settings, add_adapter, check_free, train

EXAMPLES = [Example(f"Count to {n}:", " ".join(map(str, range(1, n + 1)))) for n in range(2, 10)]
SETTINGS = Settings(steps=4, batch=2, rank=2, checkpoints=4)
WEIGHTS = "adapter_model.safetensors"


class Stop(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def run(
    out: Path,
    settings: Settings = SETTINGS,
    sparsity: float = 0.5,
    count: int = 8,
    stop: bool = False,
    base: str | None = None,
) -> None:
    changed, (base, tokenizer) = base, reference_model.load()
    if changed == "bfloat16":
        base.bfloat16()
    elif changed is not None:
        base.model.layers[3].mlp.up_proj.weight.data *= 2
    plan = SparsityPlan.uniform(base, sparsity, selection="weights")
    callbacks = [Stop()] if stop else []
    train(add_adapter(base, settings), tokenizer, EXAMPLES[:count], plan, out, settings, callbacks=callbacks)


def test_an_interrupted_run_is_gone_on_with_by_itself_alone(tmp_path: Path) -> None:
    run(tmp_path / "straight")
    out = tmp_path / "adapter"
    with pytest.raises(KeyboardInterrupt):
        run(out, stop=True)
    assert list((tmp_path / "adapter.training").glob("checkpoint-*")) and not out.exists()
    for other, name in (
        ({"settings": replace(SETTINGS, rank=4)}, "rank, adapter"),
        ({"settings": replace(SETTINGS, learning_rate=1e-3, seed=1)}, "learning_rate, seed"),
        ({"sparsity": 0.75}, "plan"),
        ({"count": 6}, "data"),
        ({"base": "other weights"}, "base"),
        ({"base": "bfloat16"}, "base"),
    ):
        with pytest.raises(InputError, match=rf"adapter.training has checkpoints of a run with other {name}: run that"):
            run(out, **other)
    run(out)
    assert not (tmp_path / "adapter.training").exists()
    for path in (tmp_path / "straight").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_a_run_is_not_gone_on_with_under_other_factors(tmp_path: Path) -> None:
    def learn(out: Path, scale: float = 1.0, stop: bool = False) -> None:
        base, tokenizer = reference_model.load()
        plan = SparsityPlan.uniform(base, 0.5, parts=("qk",), layers=(1,), selection="svd")
        factors = Factors.compute(base, plan=plan)
        factors = replace(factors, pairs={name: (b * scale, a) for name, (b, a) in factors.pairs.items()})
        callbacks = [Stop()] if stop else []
        model = add_adapter(base, SETTINGS)
        train(model, tokenizer, EXAMPLES, plan, out, SETTINGS, callbacks=callbacks, factors=factors)

    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "adapter", stop=True)
    with pytest.raises(InputError, match="checkpoints of a run with other factors: run that again"):
        learn(tmp_path / "adapter", 2.0)
    learn(tmp_path / "adapter")


def test_a_checkpoint_that_was_torn_in_its_last_file_is_not_gone_on_with(tmp_path: Path) -> None:
    run(tmp_path / "straight")
    out = tmp_path / "adapter"
    with pytest.raises(KeyboardInterrupt):
        run(out, stop=True)
    (checkpoint,) = (tmp_path / "adapter.training").glob("checkpoint-*")
    torn = shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-9"))
    state = torn / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:100])
    run(out)
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "straight" / WEIGHTS).read_bytes()


def test_a_kill_while_the_adapter_is_written_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = PeftModel.save_pretrained

    def torn(model: Any, path: str, **settings: Any) -> None:
        if not path.endswith("adapter"):  # a checkpoint
            return save(model, path, **settings)
        Path(path).mkdir(parents=True)
        (Path(path) / WEIGHTS).write_bytes(b"torn")
        raise KeyboardInterrupt

    out = tmp_path / "adapter"
    with monkeypatch.context() as patched:
        patched.setattr("peft.PeftModel.save_pretrained", torn)
        with pytest.raises(KeyboardInterrupt):
            run(out)
    assert not out.exists()
    run(out)
    assert (out / "adapter_config.json").is_file()


def test_a_single_step_trains(tmp_path: Path) -> None:
    run(tmp_path / "adapter", replace(SETTINGS, steps=1))
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    assert all(bool(weight.any()) for name, weight in weights.items() if "lora_B" in name)  # which begin as zeros


def test_one_of_several_processes_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"training runs in 2 processes \(WORLD_SIZE\), and is made for one: start it"):
        run(tmp_path / "adapter")
    command = ["sparselora", "train", "reference", "--data", "none.jsonl", "--out", str(tmp_path / "adapter")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "training runs in 2 processes" in result.stderr
    assert not [*tmp_path.iterdir()]


def test_a_place_where_the_adapter_cannot_go_is_refused_before_the_training(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "notes").touch()
    with pytest.raises(InputError, match=r"^out .*adapter is not empty: give a new directory"):
        run(out)
    (out / "notes").rename(out / "adapter_config.json")
    with pytest.raises(InputError, match=r"^out .*adapter holds a finished adapter"):
        run(out)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    (out / "adapter_config.json").unlink()
    check_free(out, run=tmp_path / "run")
