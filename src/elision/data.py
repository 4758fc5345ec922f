"""Text and prompt/answer files, and generated word problems, turned into token batches with labels.

A batch is a dict of tensors, (rows, tokens) each: `input_ids`, `attention_mask` (1 on real tokens) and `labels`, which
repeat the input ids where the model is to be trained or scored and are -100 elsewhere. Labels are not shifted; the
model shifts them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from elision.errors import InputError
from elision.word_problems import FAMILIES, NEW_FAMILIES, Problem, majority_rate, problem, problems

__all__ = [
    "FAMILIES",
    "IGNORED",
    "NEW_FAMILIES",
    "Example",
    "Problem",
    "collate",
    "encode",
    "load_examples",
    "majority_rate",
    "problem",
    "problems",
    "text_batches",
    "without_overlap",
]

IGNORED = -100  # the label of a position that is neither trained nor scored
MARGIN = 8000  # characters between the tokens that are taken of a long text and where it is cut, at least

# Field names of prompt/answer files in common use: prompt fields are joined by a line break, the first answer counts.
_PROMPTS = (("prompt",), ("question",), ("instruction", "input"), ("original_text",))
_CONTEXT = ("system", "context", "passage")  # stand before any of these
_ANSWERS = ("completion", "response", "output", "solution", "answer", "ans")


@dataclass(frozen=True)
class Example:
    """One prompt and the text that should follow it."""

    prompt: str
    answer: str


def load_examples(path: str | Path, say: Callable[[str], object] = lambda _: None) -> list[Example]:
    """Read prompt/answer pairs from a .json (list of objects) or .jsonl (an object a line) file.

    Prompts stand under "prompt", "question", "instruction" (with "input") or "original_text"; "system", "context" and
    "passage" of a row go before it, a line break between each two. Answers stand under "completion", "response",
    "output", "solution", "answer" or "ans". A field that is null is not there.

    Args:
        path: the file.
        say: told, in a line, which other fields hold text, where there are any: they are not read.

    Raises:
        InputError: no such file, not JSON, no rows, or a row without prompt or answer, or with text that cannot be
            written; names the line or row.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(f"data {path} is not a file: give a .json or .jsonl file of prompts and answers") from None
    except OSError as error:
        raise InputError(f"data {path} cannot be read ({error.strerror}): give a file that you may read") from None
    except UnicodeDecodeError:
        raise InputError(f"data {path} is not UTF-8 text: give a .json or .jsonl file") from None
    remedy = "write .json as one list, .jsonl as a row a line"
    if path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(text.split("\n"), 1):  # JSON's strings may hold what else counts as an end
            try:
                rows += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:  # too many digits and too deep are no JSONDecodeError
                wrong = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise InputError(f"data {path}, line {number} is not JSON ({wrong}): {remedy}") from None
    else:
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"data {path} is not JSON ({error}): {remedy}") from None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"data {path} holds no rows: give a list of objects with a prompt and an answer")
    examples = [_example(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    read: dict[str, None] = {}
    unread: dict[str, None] = {}
    for row in rows:
        names, answer = _fields(row)
        for name, value in row.items():
            if isinstance(value, str) and value:
                (read if name in names or name == answer else unread)[name] = None
    if unread:
        say(f"data {path}: of a row's text {', '.join(read)} is read, {', '.join(unread)} is not")
    return examples


def _fields(row: Mapping[str, object]) -> tuple[list[str], str | None]:
    """The names of a row's prompt fields, in the order in which they are joined, and of its answer."""
    there = {name for name, value in row.items() if not _missing(value)}
    names = next((names for names in _PROMPTS if names[0] in there), ())
    answer = next((name for name in _ANSWERS if name in there), None)
    return [name for name in (*_CONTEXT, *names) if names and name in there], answer


def _missing(value: object) -> bool:
    """Whether a table has nothing in this column: null, or the NaN that some writers put there."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _example(row: object, where: str) -> Example:
    if not isinstance(row, dict):
        raise InputError(f"{where} is not an object: give one with a prompt and an answer")
    names, answers = _fields(row)
    if not names or answers is None:
        missing = (
            f"answer ({', '.join(_ANSWERS)})" if names else f"prompt ({', '.join(names[0] for names in _PROMPTS)})"
        )
        turns = ": turns of a chat are not read, write each as a prompt and an answer" if "messages" in row else ""
        fields = ", ".join(f"{name} (empty)" if _missing(value) else name for name, value in row.items())
        raise InputError(f"{where} has no {missing}: its fields are {fields or 'none'}{turns}")
    answer = row[answers]
    if any(isinstance(part, list | dict) for part in (answer, *(row[name] for name in names))):
        raise InputError(f"{where} holds a list or an object, not text: write each turn of a chat as prompt and answer")
    prompt = "\n".join(str(row[name]) for name in names if row[name])
    if not prompt.strip() or not str(answer).strip():
        raise InputError(f"{where} has an empty prompt or answer: fill it in or drop the row")
    if half := re.search("[\ud800-\udfff]", prompt + str(answer)):  # JSON can spell it, no tokenizer reads it
        raise InputError(f"{where} holds {half[0]!a}, half of a character: mend it or drop the row")
    return Example(prompt, str(answer))


def without_overlap(train: Sequence[Example], evaluation: Iterable[Example]) -> list[Example]:
    """The rows of `train` whose prompt, in lower case, letters and digits alone, is none of `evaluation`'s."""
    seen = {_normal(example.prompt) for example in evaluation}
    return [example for example in train if _normal(example.prompt) not in seen]


def _normal(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.lower())


def encode(
    tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example | Problem], max_length: int = 2048
) -> list[dict[str, list[int]]]:
    """Token ids of prompt, a space, answer and end; labels on answer and end alone.

    A row longer than `max_length` tokens loses the end of its answer; one whose prompt alone is that long is left out.

    Raises:
        InputError: a tokenizer without an end token, or nothing left to train on.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError(f"tokenizer {tokenizer.name_or_path} has no end token: set tokenizer.eos_token")
    rows = []
    for example in examples:
        answer = example.solution if isinstance(example, Problem) else example.answer
        prompt = tokenizer.encode(example.prompt)
        ids = [*prompt, *tokenizer.encode(f" {answer}", add_special_tokens=False), end][:max_length]
        if len(prompt) < len(ids):
            rows.append({"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]})
    if not rows:
        raise InputError(f"no row has an answer within {max_length} tokens: give data, or a larger max_length")
    return rows


def collate(
    rows: Sequence[dict[str, list[int]]], pad: int | None, side: str = "right", multiple: int = 1
) -> dict[str, Tensor]:
    """Pad rows of `encode` to one (rows, tokens) batch of int64 tensors.

    Raises:
        InputError: no rows, an unknown side, or every label of the batch -100.
    """
    if not rows:
        raise InputError("no rows to batch: give at least one")
    if side not in ("left", "right"):
        raise InputError(f"side {side!r} is neither 'left' nor 'right': name one of them")
    longest = max(len(row["input_ids"]) for row in rows)
    length = -(-longest // multiple) * multiple
    batch = {
        "input_ids": torch.full((len(rows), length), pad or 0),
        "attention_mask": torch.zeros((len(rows), length), dtype=torch.int64),
        "labels": torch.full((len(rows), length), IGNORED),
    }
    for i, row in enumerate(rows):
        size = len(row["input_ids"])
        place = slice(0, size) if side == "right" else slice(length - size, length)
        batch["input_ids"][i, place] = torch.tensor(row["input_ids"])
        batch["attention_mask"][i, place] = 1
        batch["labels"][i, place] = torch.tensor(row["labels"])
    if not bool((batch["labels"] != IGNORED).any()):
        raise InputError("every label of the batch is -100, so there is nothing to learn: keep the answers' labels")
    return batch


def text_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    length: int,
    rows: int = 8,
    limit: int | None = None,
    in_turn: bool = False,
) -> list[dict[str, Tensor]]:
    """Texts end to end, cut into rows of `length` tokens and batches of up to `rows`; at most `limit` rows.

    `in_turn` takes a row of each text after the other, so that a limit leaves no text out; what is left of each, end to
    end, comes last.

    Raises:
        InputError: fewer than `length` tokens of text.
    """
    enough = None if limit is None else limit * length  # of one text, for none gives more rows than there are to be
    ids: list[int] = []
    if in_turn:
        each = [_tokens(tokenizer, text, enough) for text in texts]
        whole = [len(own) // length for own in each]
        for row in range(max(whole, default=0)):
            for own, count in zip(each, whole, strict=True):
                ids += own[row * length : (row + 1) * length] if row < count else []
        for own, count in zip(each, whole, strict=True):
            ids += own[count * length :]
    else:
        for text in texts:
            ids += _tokens(tokenizer, text, enough)
            if enough is not None and len(ids) >= enough:
                break
    count = min(len(ids) // length, limit or len(ids))
    if count == 0:
        raise InputError(f"the text has {len(ids)} tokens, fewer than one row of {length}: give more text")
    blocks = torch.tensor(ids[: count * length]).view(count, length)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in blocks.split(rows)]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, enough: int | None) -> list[int]:
    """A text's tokens and the end; of a long text the first `enough` at least, without the others being made.

    A cut changes the tokens beside it, so that as many again are left between it and what is taken.
    """
    if enough is not None:
        size = 8 * enough + MARGIN
        while size < len(text):
            ids = tokenizer.encode(text[:size])
            if len(ids) >= 2 * enough + MARGIN // 8:
                return ids[:enough]
            size *= 2
    end: Any = tokenizer.eos_token_id
    return [*tokenizer.encode(text), *([] if end is None else [end])]


def shared_folder() -> Path | None:
    """The folder of real data sets that ELISION_DATA names, or the one beside a checkout; None where there is none."""
    named = os.environ.get("ELISION_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "data"
    return folder if folder.is_dir() else None
