"""lm-evaluation-harness, for real, on the embedded model and on files of ours; nothing of it needs a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from elision import data, evaluate, harness, reference_model, spd
from elision.cli import app
from elision.errors import InputError
from elision.tasks import rows
from tests.spd.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-evaluation-harness and what it brings are not ours to mend


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return reference_model.load()


def test_word_problems_score_as_our_own_loop_does(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    (score,) = harness.run(model, tokenizer, ["elision_word_problems"], limit=12)
    problems = data.problems(tuple(data.FAMILIES), "test", 500)[:12]
    given = evaluate.answers(model, tokenizer, [each.prompt for each in problems], 64)
    correct = [int(evaluate.exact_match(text, each.answer)) for text, each in zip(given, problems, strict=True)]
    assert list(score.samples) == correct
    assert score.value == evaluate.accuracy(correct)


def test_git_is_not_heard_outside_of_a_repository(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from lm_eval import evaluator

    own = evaluator.get_git_commit_hash
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    harness.run(*loaded, ["elision_word_problems"], limit=2)
    assert "fatal" not in capfd.readouterr().err and evaluator.get_git_commit_hash is own


def test_a_plan_changes_what_is_scored(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELISION_DATA", str(tmp_path))
    (tmp_path / "wikitext2_valid.txt").write_text("a line of text about nothing\n" * 300)
    model, tokenizer = loaded
    (dense,) = harness.run(model, tokenizer, ["elision_wikitext2"])
    with spd.simulate(model, spd.SyncPlan(ranks=4, dropped=tuple(range(12)))):
        (dropped,) = harness.run(model, tokenizer, ["elision_wikitext2"])
    (again,) = harness.run(model, tokenizer, ["elision_wikitext2"])
    assert dropped.value.value != dense.value.value == again.value.value
    assert dense.metric == "word_perplexity" and not dense.higher_is_better and dense.samples == ()
    assert harness.difference(dropped, dense) is None and dense.count == 2


def test_choices_pair_by_document(loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELISION_DATA", str(tmp_path))
    questions = [{"instruction": f"Is {n} even?", "output": "", "answer": str(n % 2 == 0).lower()} for n in range(10)]
    (tmp_path / "boolq_test.json").write_text(json.dumps([row | {"output": row["answer"]} for row in questions]))
    model, tokenizer = loaded
    (score,) = harness.run(model, tokenizer, ["elision_boolq"], batch=4)
    assert len(score.samples) == score.count == 10 and set(score.samples) <= {0.0, 1.0}
    same = harness.difference(score, score)
    assert same is not None and same.value == 0 and -0.3 < same.low < 0 < same.high < 0.3


def test_every_task_file_reads_a_function_of_ours() -> None:
    files = sorted(harness.OURS.glob("*.yaml"))
    assert len(files) >= 8

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    for path in files:
        task = yaml.load(path.read_text(), Loader)
        assert task["task"] == path.stem
        for name in (task["custom_dataset"], task.get("process_results", "rows.exact")):
            assert hasattr(rows, name.removeprefix("rows."))


def test_local_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if data.shared_folder() is None:
        pytest.skip("the folder of data sets (ELISION_DATA) is not here")
    for path in sorted(harness.OURS.glob("*.yaml")):
        for line in path.read_text().splitlines():
            if line.strip().startswith("file:"):
                name = line.split()[-1]
                found = (rows.pages if name.endswith(".txt") else rows.answers)(name)["test"]
                assert len(found) > 100 and all(all(str(value).strip() for value in row.values()) for row in found)
    monkeypatch.setenv("ELISION_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"boolq_test\.json is not in .*ELISION_DATA"):
        rows.answers("boolq_test.json")
    monkeypatch.setenv("ELISION_DATA", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"boolq_test\.json is not here, where no folder of data sets is: name the"):
        rows.answers("boolq_test.json")


def test_what_cannot_be_run(loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.import_module", _absent)
    with pytest.raises(InputError, match=r'pip install "elision\[eval\]"'):
        harness.run(*loaded, ["elision_boolq"])
    monkeypatch.undo()
    small = tiny("llama", max_position_embeddings=512)
    with pytest.raises(
        InputError, match=r"^the tasks' documents have token \d+, the model's vocabulary has 97: tokenize"
    ):
        harness.run(small, loaded[1], ["elision_word_problems"], limit=2)
    assert not small.get_input_embeddings()._forward_pre_hooks
    with pytest.raises(InputError, match="is no directory"):
        harness.run(*loaded, ["elision_boolq"], include=tmp_path / "none")


def _absent(name: str, *_: Any) -> Any:
    raise ImportError(f"No module named {name!r}")


def test_the_command_compares_with_the_dense_model(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 60)
    (tmp_path / "data.json").write_text(json.dumps([{"prompt": "2 + 2 =", "answer": "4"}] * 3))
    spd.SyncPlan(ranks=2, dropped=(0, 1, 2)).save(tmp_path / "plan.json")
    words = ["eval", "reference", "--text", tmp_path / "text.txt", "--plan", tmp_path / "plan.json", "--rows", 4]
    words += [
        "--tokens",
        48,
        "--data",
        tmp_path / "data.json",
        "--answer-tokens",
        4,
        "--run",
        tmp_path / "run",
        "--json",
    ]
    said = CliRunner().invoke(app, [str(word) for word in words])
    assert said.exit_code == 0, said.output
    found = {row["metric"]: row for row in json.loads(said.stdout)["scores"]}
    perplexity = found["perplexity"]
    assert perplexity["change"]["value"] == pytest.approx(perplexity["value"] / perplexity["baseline"] - 1, rel=1e-6)
    assert perplexity["low"] < perplexity["value"] < perplexity["high"]
    assert found["KL to the baseline, nats"]["value"] > 0
    assert found["exact match"]["count"] == 3 and found["exact match"]["baseline"] is not None
    page = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert page.exit_code == 0 and "perplexity-change" in (tmp_path / "run" / "report.html").read_text()


def test_a_dry_run_says_what_it_takes(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words " * 400)
    words = ["eval", "reference", "--text", tmp_path / "text.txt", "--rows", 4, "--tokens", 48, "--dry-run", "--json"]
    said = CliRunner().invoke(app, [*map(str, words), "--run", str(tmp_path / "run")])
    found = json.loads(said.stdout)
    assert found["models"] == 1 and found["text_rows"] == 4 and found["text_seconds"] > 0
    assert not (tmp_path / "run").exists()
    assert CliRunner().invoke(app, ["eval", "reference"]).exit_code == 2
