"""Files and problems to batches: labels where answers are, and one line where a file is not what it should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from elision import data, files
from elision.errors import InputError
from elision.loading import load_texts, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    model = Tokenizer(models.WordLevel({"<end>": 0, "<pad>": 1, **{c: i + 2 for i, c in enumerate(characters)}}, "~"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", pad_token="<pad>")


def test_labels_stand_on_the_answer_and_the_end_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = data.encode(tokenizer, [data.Example("ab", "cd")])
    assert len(row["input_ids"]) == len("ab cd") + 1
    assert row["labels"] == [data.IGNORED, data.IGNORED, *row["input_ids"][2:]]
    assert row["labels"][-1] == tokenizer.eos_token_id


def test_long_rows_lose_the_end_of_the_answer_and_longer_prompts_are_left_out(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    examples = [data.Example("ab", "cdef"), data.Example("abcdef", "g")]
    (row,) = data.encode(tokenizer, examples, max_length=5)
    assert len(row["input_ids"]) == 5 and row["labels"][2:] == row["input_ids"][2:]
    with pytest.raises(InputError, match="no row has an answer within 2 tokens"):
        data.encode(tokenizer, examples, max_length=2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_and_unlabelled(tokenizer: PreTrainedTokenizerFast, side: str) -> None:
    rows = data.encode(tokenizer, [data.Example("ab", "c"), data.Example("abcd", "efg")])
    batch = data.collate(rows, 1, side, multiple=4)
    assert batch["input_ids"].shape[1] % 4 == 0
    for i, row in enumerate(rows):
        real = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][real].tolist() == row["input_ids"]
        assert batch["labels"][i][real].tolist() == row["labels"]
        assert (batch["labels"][i][~real] == data.IGNORED).all() and (batch["input_ids"][i][~real] == 1).all()
        assert bool(real[-1 if side == "left" else 0])


def test_a_batch_without_a_label_is_refused() -> None:
    with pytest.raises(InputError, match="every label of the batch is -100"):
        data.collate([{"input_ids": [3, 4], "labels": [-100, -100]}], 0)
    with pytest.raises(InputError, match="no rows to batch"):
        data.collate([], 0)
    with pytest.raises(InputError, match="side 'top'"):
        data.collate([{"input_ids": [3], "labels": [3]}], 0, "top")


def test_a_field_that_is_null_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "2+2?", "completion": None, "answer": "4"},
        {"prompt": None, "instruction": "2+2?", "input": float("nan"), "output": "4"},
        {"system": None, "question": "2+2?", "answer": 4.0},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert data.load_examples(path) == [data.Example("2+2?", answer) for answer in ("4", "4", "4.0")]
    for row in ({"prompt": "x", "answer": float("nan")}, {"prompt": "x", "answer": None}):
        path.write_text(json.dumps(row))
        with pytest.raises(InputError, match=r"row 1 has no answer \(.*\): its fields are prompt, answer \(empty\)$"):
            data.load_examples(path)


def test_text_is_cut_into_rows_end_to_end(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = data.text_batches(tokenizer, ["abcde", "fgh"], length=3, rows=2)
    ids = torch.cat([batch["input_ids"] for batch in batches]).flatten().tolist()
    assert ids == [*tokenizer.encode("abcde"), 0, *tokenizer.encode("fgh")]
    assert len(data.text_batches(tokenizer, ["abcdef"] * 9, length=3, rows=1, limit=2)) == 2
    with pytest.raises(InputError, match="fewer than one row of 100"):
        data.text_batches(tokenizer, ["abc"], length=100)


def test_a_limit_leaves_out_no_text_whose_rows_are_taken_in_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    def rows(*texts: str, limit: int | None = None) -> list[str]:
        batches = data.text_batches(tokenizer, texts, length=2, rows=2, limit=limit, in_turn=True)
        return [
            "".join(tokenizer.convert_ids_to_tokens(row.tolist())) for batch in batches for row in batch["input_ids"]
        ]

    assert rows("abcd", "xyz", limit=2) == ["ab", "xy"]
    assert rows("abcd", "xyz") == ["ab", "xy", "cd", "z<end>"]
    assert rows("abcd", "p", "x", limit=9) == ["ab", "p<end>", "x<end>", "cd"]
    assert rows("ab", "cd", "ef", limit=9) == ["ab", "cd", "ef", "<end><end>"]
    assert rows("abcde") == ["ab", "cd", "e<end>"]


@pytest.mark.parametrize("in_turn", [True, False])
def test_of_a_long_text_no_more_is_tokenized_than_is_taken(in_turn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own = load_tokenizer("reference")
    code = Path(data.__file__).read_text(encoding="utf-8")
    texts = [code * 40, "a" * 50_000, code[::-1] * 40, "short"]
    whole = data.text_batches(own, texts, 16, in_turn=in_turn)
    read, encode = [], own.encode
    monkeypatch.setattr(own, "encode", lambda text: read.append(len(text)) or encode(text))
    for limit in (1, 9, 200):
        read.clear()
        found = data.text_batches(own, texts, 16, limit=limit, in_turn=in_turn)
        rows, expected = (torch.cat([batch["input_ids"] for batch in batches]) for batches in (found, whole))
        assert torch.equal(rows, expected[:limit])
        assert max(read) < 40_000


@pytest.mark.parametrize(
    ("name", "text", "prompt", "answer"),
    [
        (
            "a.jsonl",
            '{"question": "q?", "answer": "a #### 1"}\n\n{"prompt": "p", "completion": "c"}\n',
            "q?",
            "a #### 1",
        ),
        ("a.json", '[{"instruction": "do", "input": "this", "output": "done", "answer": "x"}]', "do\nthis", "done"),
        ("a.json", '[{"instruction": "do", "input": "", "output": "done"}]', "do", "done"),
        ("a.json", '[{"instruction": "do", "context": "where", "response": "done"}]', "where\ndo", "done"),
        ("a.json", '[{"question": "q?", "passage": "p", "system": "s", "answer": true}]', "s\np\nq?", "True"),
    ],
)
def test_usual_files_are_read(tmp_path: Path, name: str, text: str, prompt: str, answer: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert data.load_examples(path)[0] == data.Example(prompt, answer)


def test_text_that_is_not_read_is_named_once(tmp_path: Path) -> None:
    path, said = tmp_path / "data.json", []
    path.write_text(json.dumps([{"prompt": "p", "answer": "a", "id": 3, "kind": ""}] * 2))
    data.load_examples(path, said.append)
    path.write_text(json.dumps([{"context": "c", "prompt": "p", "answer": "a", "kind": "open", "hint": "h"}] * 3))
    data.load_examples(path, said.append)
    assert said == [f"data {path}: of a row's text context, prompt, answer is read, kind, hint is not"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a file"),
        ("[{", "is not JSON"),
        ("[]", "holds no rows"),
        ('{"question": "q", "answer": "a"}', "holds no rows"),
        ('["q"]', "row 1 is not an object"),
        ('[{"question": "q"}]', "row 1 has no answer"),
        ('[{"answer": "a"}]', "row 1 has no prompt"),
        ('[{"question": " ", "answer": "a"}]', "row 1 has an empty prompt or answer"),
        ('[{"context": "c", "answer": "a"}]', "row 1 has no prompt"),
        ('[{"question": "q", "context": ["c"], "answer": "a"}]', "row 1 holds a list or an object"),
        ('[{"question": "q \\ud83d", "answer": "a"}]', r"row 1 holds '\\ud83d', half of a character"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "data.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as raised:
        data.load_examples(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_binary_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not UTF-8"):
        data.load_examples(path)


def test_training_rows_that_stand_in_the_evaluation_set_are_dropped() -> None:
    evaluation = [data.Example("How many, in all?", "3")]
    train = [data.Example("how MANY in all", "4"), data.Example("How many are there in all?", "5")]
    assert data.without_overlap(train, evaluation) == train[1:]


@pytest.mark.skipif(data.shared_folder() is None, reason="the folder of real data sets (ELISION_DATA) is not here")
def test_no_training_question_of_the_real_sets_is_evaluated_on() -> None:
    folder = data.shared_folder()
    assert folder is not None
    for train, test in (("mawps_trainset.json", "mawps_testset.json"), ("boolq_train.json", "boolq_test.json")):
        rows, held_out = data.load_examples(folder / train), data.load_examples(folder / test)
        kept = data.without_overlap(rows, held_out)
        assert len(kept) > 0.5 * len(rows)
        questions = {"".join(filter(str.isalnum, example.prompt.lower())) for example in held_out}
        assert not questions & {"".join(filter(str.isalnum, example.prompt.lower())) for example in kept}
    assert len(data.load_examples(folder / "gsm8k_train.jsonl")) == 7473


def test_the_folder_of_data_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELISION_DATA", str(tmp_path))
    assert data.shared_folder() == tmp_path
    monkeypatch.setenv("ELISION_DATA", str(tmp_path / "absent"))
    assert data.shared_folder() is None


def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "one\N{LINE SEPARATOR}two\x85", "answer": "three"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n" + json.dumps(row) + "\n", encoding="utf-8")
    assert [example.prompt for example in data.load_examples(path)] == [row["prompt"]] * 2


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    row = {"prompt": "one", "answer": "two"}
    for name, text in (("rows.jsonl", json.dumps(row)), ("rows.json", json.dumps([row])), ("text.txt", "some words")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    for name in ("rows.jsonl", "rows.json"):
        assert data.load_examples(tmp_path / name) == [data.Example("one", "two")]
    assert files.read_json(tmp_path / "rows.json", "plan") == [row]
    assert load_texts([tmp_path / "text.txt"]) == ["some words"]


def test_a_file_that_may_not_be_read_is_not_said_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", "rows.json")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(
        InputError, match=r"^data rows\.json cannot be read \(Permission denied\): give a file that you"
    ):
        data.load_examples("rows.json")
    with pytest.raises(
        InputError, match=r"^plan rows\.json cannot be read \(Permission denied\): give a file that you"
    ):
        files.read_json("rows.json", "plan")
