"""The examples run as they stand, for a few steps, and leave what they say."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# What TRL 1.16, PEFT 0.21 and transformers 5.23 say of each other.
pytestmark = pytest.mark.filterwarnings("ignore:`\\w*gradient_checkpointing\\w*` is deprecated:FutureWarning")


def run(name: str, out: Path, **settings: Any) -> None:
    runpy.run_path(str(EXAMPLES / name))["main"](out, **settings)


@pytest.mark.parametrize("name", ["finetune_trainer.py", "finetune_trl.py", "finetune_loop.py"])
def test_fine_tuning(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(name, tmp_path, steps=3, batch=1)
    printed = capsys.readouterr().out
    assert "forwards so far: 2 sparse, 1 dense (first steps); training paths: 3 fast" in printed
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_trl_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match=r"^error: this example needs TRL: pip install 'elision\[trl\]'$"):
        run("finetune_trl.py", tmp_path)


def test_the_whole_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("finetune_to_serving.py", tmp_path, steps=2, batch=1, rows=8, length=64)
    assert f"vllm serve {tmp_path / 'served'} --tensor-parallel-size 2" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "served" / "config.json").is_file()


def test_sync_point_drop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("calibrate_heal_serve.py", tmp_path, rows=8, length=64, epochs=1)
    printed = capsys.readouterr().out
    assert "11 of 12 blocks without their sync" in printed and "2 ranks generated the same as one process" in printed
    dense, dropped, healed = map(float, re.findall(r"\d+\.\d\d", printed)[:3])
    assert all(abs(each / dense - 1) < 0.05 for each in (dropped, healed))  # on eight rows no order is sure
    assert f"vllm serve {tmp_path / 'served'} --tensor-parallel-size 2" in printed


def test_each_has_its_command_line() -> None:
    found = sorted(EXAMPLES.glob("*.py"))
    assert len(found) == 5
    for path in found:
        command = rf"python examples/{path.name} --(steps 60|rows 32) --out runs/\w+$"
        assert re.search(command, path.read_text(encoding="utf-8"), re.MULTILINE), path
