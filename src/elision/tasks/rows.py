"""The documents of the tasks in this directory, and how an answer to them is scored.

lm-evaluation-harness calls these functions by the names that the .yaml files give.
"""

from __future__ import annotations

from typing import Any

from elision.errors import InputError


def generated(families: str, count: int = 500, seed: int = 0, **_: Any) -> dict[str, Any]:
    """Held-out problems of the generator: "trained" families, which the embedded model learned, or "new" ones."""
    from datasets import Dataset

    from elision.word_problems import FAMILIES, NEW_FAMILIES, problems

    chosen = problems(tuple(FAMILIES if families == "trained" else NEW_FAMILIES), "test", count, seed)
    return {"test": Dataset.from_list([{"prompt": each.prompt, "answer": each.answer} for each in chosen])}


def answers(file: str, cue: str = "", **_: Any) -> dict[str, Any]:
    """Prompts and final answers of a local file; `cue` ends every prompt."""
    import json

    from datasets import Dataset

    from elision.data import load_examples

    path = _local(file)
    finals = [row.get("answer", row.get("ans")) for row in json.loads(path.read_text(encoding="utf-8"))]
    pairs = zip(load_examples(path), finals, strict=True)
    rows = [{"prompt": f"{example.prompt.strip()}{cue}", "answer": str(final)} for example, final in pairs]
    return {"test": Dataset.from_list(rows)}


def pages(file: str, characters: int = 6000, **_: Any) -> dict[str, Any]:
    """A text file, cut at line breaks into pages of about `characters` characters."""
    from datasets import Dataset

    found, page = [], ""
    for line in _local(file).read_text(encoding="utf-8").splitlines(keepends=True):
        page += line
        if len(page) >= characters:
            found.append({"page": page})
            page = ""
    return {"test": Dataset.from_list([*found, {"page": page}] if page.strip() else found)}


def exact(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the final answer of the model's text is the right one."""
    from elision.evaluate import exact_match

    return {"exact_match": float(exact_match(results[0], doc["answer"]))}


def likelihood(doc: dict[str, Any], results: list[float]) -> dict[str, Any]:
    """A page's log-likelihood with its number of words."""
    (nats,) = results
    return {"word_perplexity": (nats, len(doc["page"].split()))}


def _local(file: str) -> Any:
    from elision.data import shared_folder

    folder = shared_folder()
    if folder is None or not (folder / file).is_file():
        place = "here, where no folder of data sets is" if folder is None else f"in {folder}"
        raise InputError(f"data set {file} is not {place}: name the folder that holds it in ELISION_DATA")
    return folder / file
