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

from elision import demo
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

    results = numbers(straight)
    variants = {variant["name"]: variant for variant in results["finetune"]["variants"]}
    assert list(variants) == ["LoRA", "SparseLoRA", "random channels", "no context FFN"]
    assert variants["LoRA"]["flops_ratio"] == 1 > variants["SparseLoRA"]["flops_ratio"]
    losses = {name: variant["test_loss"] for name, variant in variants.items()}
    assert len(set(losses.values())) == 4, losses
    assert [spd["model"] for spd in results["spd"]] == ["embedded model", "fine-tuned and merged"]
    assert results["spd"][0]["dense_perplexity"] != results["spd"][1]["dense_perplexity"]


def test_results_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"seed": 7}')
    with pytest.raises(InputError, match=r"settings\.json belongs to a run with other settings: give another --out"):
        demo.run(tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
