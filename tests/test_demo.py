"""The demo at a hundredth of its size: whole, killed and resumed, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elision import demo, runs
from elision.errors import InputError

SMALL = """
import sys
from pathlib import Path
from elision import demo
demo.TRAIN_PROBLEMS, demo.TEST_PROBLEMS, demo.BATCH, demo.CHECKPOINTS = 24, 4, 4, 6
demo.TEXT_ROWS, demo.TEXT_TOKENS, demo.RANKS = 2, 32, (2,)
demo.run(Path(sys.argv[1]), seed=0, threads=1)
"""


def start(out: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SMALL, str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    return output


def numbers(out: Path) -> dict:
    """The results without what depends on the clock."""
    results = json.loads((out / "results.json").read_text())
    for variant in results["finetune"]["variants"]:
        del variant["seconds"]
    for name in ("seconds", "date", "command"):
        del results["settings"][name]
    return results


@pytest.mark.slow
def test_a_demo_killed_in_training_and_in_calibration_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    said = finish(start(straight))
    assert "report.html" in said and (straight / "report.html").stat().st_size > 10_000
    for sign in ("adapters/sparselora.training/checkpoint-2", "stages/spd-embedded-model-2.json"):
        process = start(killed)
        while process.poll() is None and not list(killed.glob(sign)):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (killed / "report.html").exists()
    said = finish(start(killed))
    assert "done before" in said
    assert numbers(killed) == numbers(straight)
    for name in ("config.yaml", "run.json"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()
    stages = [sorted(path.stem for path in (out / "stages").iterdir()) for out in (killed, straight)]
    for out, names in zip((killed, straight), stages, strict=True):
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert sorted({row["stage"] for row in metrics}) == names
        assert (out / "log.txt").read_text().splitlines()[-1].endswith(" done")

    results = numbers(straight)
    variants = {variant["name"]: variant for variant in results["finetune"]["variants"]}
    assert list(variants) == ["LoRA", "SparseLoRA", "random channels", "no context FFN"]
    assert variants["LoRA"]["flops_ratio"] == 1 > variants["SparseLoRA"]["flops_ratio"]
    losses = {name: variant["test_loss"] for name, variant in variants.items()}
    assert len(set(losses.values())) == 4, losses
    assert [spd["model"] for spd in results["spd"]] == ["embedded model", "fine-tuned and merged"]
    assert results["spd"][0]["dense_perplexity"] != results["spd"][1]["dense_perplexity"]


def test_results_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    with runs.opened(tmp_path / "run", "demo", {"seed": 7}):
        pass
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError, match="was begun with seed 7, now it is 0: give another directory"):
        demo.run(tmp_path / "run", seed=0)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_kill_between_an_adapter_and_its_stage_is_trained_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TRAIN_PROBLEMS": 8, "TEST_PROBLEMS": 2, "BATCH": 4, "CHECKPOINTS": 1}.items():
        monkeypatch.setattr(demo, name, value)
    found = [demo._finetune(tmp_path, "LoRA", "lora", 0)]
    (tmp_path / "adapters" / "lora.training" / "checkpoint-2").mkdir(parents=True)  # its removal was cut off, too
    found.append(demo._finetune(tmp_path, "LoRA", "lora", 0))
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["lora"]
    assert found[0] | {"seconds": 0} == found[1] | {"seconds": 0}
