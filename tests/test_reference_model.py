"""The embedded model is what its card says, and its training resumes to what it would have been."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elision import data, evaluate, reference_model
from elision.errors import InputError
from elision.reference_model import train
from elision.reference_model.corpus import library_files, library_hash, library_texts

MEASURED = json.loads((reference_model.PATH / "measured.json").read_text())


@pytest.fixture(scope="module")
def embedded():
    return reference_model.load()


def test_it_ships_small_and_loads_as_any_model_does() -> None:
    weights = reference_model.PATH / "model.safetensors"
    assert weights.stat().st_size <= 16_000_000
    model = AutoModelForCausalLM.from_pretrained(reference_model.PATH)
    assert model.dtype == torch.bfloat16 and model.config.model_type == "llama"
    assert 7.4e6 < model.num_parameters() < 7.6e6
    assert AutoTokenizer.from_pretrained(reference_model.PATH).eos_token == "<|end|>"


def test_its_tokenizer_takes_digits_one_by_one_and_comes_back(embedded) -> None:
    _, tokenizer = embedded
    assert tokenizer.tokenize("1203") == list("1203")
    text = "def f(x):\n\treturn 'ä€😀' + x  # 42\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.skipif(
    library_hash() != train.RECIPE["library_sha256"], reason="this Python's library is not the one of the card"
)
def test_its_perplexity_is_the_cards(embedded) -> None:
    model, tokenizer = embedded
    rows = data.text_batches(tokenizer, library_texts("test"), 384)
    assert MEASURED["tokens"] == sum(len(batch["input_ids"]) for batch in rows) * 384
    sample = rows[:: max(1, len(rows) // 6)]
    assert evaluate.perplexity(model, sample) == pytest.approx(MEASURED["perplexity"], rel=0.25)


def test_its_accuracy_is_the_cards_and_needs_the_facts(embedded) -> None:
    model, tokenizer = embedded
    problems = data.problems(("gain", "price"), "train", 100, seed=5)
    misled = [p.with_facts_of(q) for p, q in zip(problems, problems[1:] + problems[:1], strict=True)]

    def score(asked):
        given = evaluate.answers(model, tokenizer, [p.prompt for p in asked])
        return evaluate.accuracy([evaluate.final_answer(a) == p.answer for a, p in zip(given, asked, strict=True)])

    expected = (MEASURED["gain train"] + MEASURED["price train"]) / 2
    found = score(problems)
    assert found.low - 0.1 <= expected <= found.high + 0.1
    assert score(misled).value < 0.1 < found.value


def test_the_card_holds_the_measurement() -> None:
    from elision.reference_model.card import card

    assert (reference_model.PATH / "README.md").read_text() == card(MEASURED)


def test_the_librarys_splits_are_disjoint_and_say_nothing_of_this_machine() -> None:
    training, held_out = set(library_files("train")), set(library_files("test"))
    assert training and held_out and not training & held_out
    assert 0.02 < len(held_out) / len(training) < 0.1
    assert not any("site-packages" in path.parts or "_sysconfigdata" in path.name for path in training | held_out)


def test_problem_batches_label_solutions_alone(embedded) -> None:
    _, tokenizer = embedded
    ids, labels = train.problem_batch(tokenizer, step=3, number=1)
    again, _ = train.problem_batch(tokenizer, step=3, number=1)
    other, _ = train.problem_batch(tokenizer, step=3, number=2)
    assert torch.equal(ids, again) and not torch.equal(ids, other)
    for row, label in zip(ids, labels, strict=True):
        assert torch.equal(row[label != -100], label[label != -100])
        assert tokenizer.decode(row[label == -100]).rstrip().split("<|pad|>")[0].endswith("Answer:")
        assert "####" in tokenizer.decode(label[label != -100])


_TRAIN = """
import sys
from elision.reference_model import train
train.RECIPE.update(
    phases=[
        {"until": 3, "distractors": [3, 5], "rows": [2, 176]},
        {"until": 6, "distractors": [0, 1], "rows": [3, 96]},
    ],
    micro_batches={"problems": 2, "library": 1},
    processes=int(sys.argv[2]),
    library_rows=[1, 64],
)
train.CONFIG.update(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=2)
train.library_texts = lambda split: [f"x = {i}" * 40 for i in range(80)]
from pathlib import Path
train.main(Path(sys.argv[1]), stop_after=int(sys.argv[3]), compiled=False, any_library=True)
"""


def _train(out: Path, stop_after: int = 0) -> None:
    subprocess.run([sys.executable, "-c", _TRAIN, str(out), "1", str(stop_after)], check=True, timeout=300)


def test_training_that_was_stopped_resumes_to_identical_bytes(tmp_path: Path) -> None:
    _train(tmp_path / "straight")
    _train(tmp_path / "stopped", stop_after=2)
    assert not (tmp_path / "stopped" / "model").exists()
    _train(tmp_path / "stopped")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("straight", "stopped")]
    assert weights[0] == weights[1]
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(6))


def test_training_on_another_library_must_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "library_hash", lambda: "other")
    with pytest.raises(InputError, match="pass --any-library"):
        train.main(tmp_path / "out")
    assert not (tmp_path / "out").exists()
