"""Measure a trained reference model and write its card: `python -m elision.reference_model.card DIRECTORY`."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from elision import evaluate, files
from elision.data import FAMILIES, NEW_FAMILIES, problems, text_batches
from elision.progress import progress
from elision.reference_model.corpus import library_texts
from elision.reference_model.train import CONFIG, RECIPE
from elision.word_problems import Split

PROBLEMS = 100  # per family and split
ASKED: tuple[Split, ...] = ("train", "test", "rephrased")
SEED = 1
LENGTH = 384  # tokens per row of scored text


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Held-out perplexity per token on library text, and accuracy per family of problems."""
    model.eval()
    text = text_batches(tokenizer, library_texts("test"), LENGTH)
    found = {"perplexity": round(evaluate.perplexity(model, text), 3), "tokens": LENGTH * sum(map(_rows, text))}
    with progress("answering", PROBLEMS * len(FAMILIES) * len(ASKED)) as advance:
        for family, split in product(FAMILIES, ASKED):
            test = problems((family,), split, PROBLEMS, SEED)
            given = evaluate.answers(model, tokenizer, [p.prompt for p in test], advance=advance)
            correct = [evaluate.final_answer(text) == p.answer for text, p in zip(given, test, strict=True)]
            found[f"{family} {split}"] = round(evaluate.accuracy(correct).value, 4)
    return found


def _rows(batch: dict) -> int:
    return len(batch["input_ids"])


def card(found: dict[str, float]) -> str:
    """The card's text."""
    shares = {family: [f"{100 * found[f'{family} {split}']:.0f}%" for split in ASKED] for family in FAMILIES}
    rows = "\n".join(f"| {family} | {' | '.join(shares[family])} |" for family in FAMILIES)
    return f"""# The embedded reference model

A Llama of {CONFIG["num_hidden_layers"]} layers, hidden size {CONFIG["hidden_size"]},
{CONFIG["num_attention_heads"]} heads and kv heads, vocabulary {CONFIG["vocab_size"]} (byte-level BPE, single digits),
tied embeddings: 7.5 M parameters, stored in bf16. It exists so that both methods can be tried and tested with no
download, and is of no other use.

## Trained on
- the sources of CPython {RECIPE["library_python"]}'s standard library (PSF licence), test suites left out, one file in
  twenty held out; SHA-256 of all `{RECIPE["library_sha256"]}`
- word problems from the seeded generator in `elision.word_problems`, families {", ".join(FAMILIES)}, loss on the worked
  solution alone; one combination of numbers in five and one phrasing of every sentence held out

for {RECIPE["phases"][-1]["until"]} steps, {_tokens():,} tokens: `python -m elision.reference_model.train`. A killed run
resumes. On another Python version (`--any-library`) the library's text differs a little, and so does the result.

## Measured
On what was held out, by `python -m elision.reference_model.card`:

Perplexity {found["perplexity"]:.3f} per token over {found["tokens"]:,} tokens of library text, rows of {LENGTH}.

Accuracy on {PROBLEMS} problems of a family, none of them seen: as in training; with combinations of numbers held out of
training; with phrasings held out as well:

| family | new problems | new numbers | new phrasings too |
| --- | --- | --- | --- |
{rows}

The families {", ".join(NEW_FAMILIES)} are not trained on: they are for fine-tuning, `elision demo` shows with what
success.
"""


def _tokens() -> int:
    """Of the whole training, padding included."""
    counts, library = RECIPE["micro_batches"], RECIPE["library_rows"]
    total = first = 0
    for phase in RECIPE["phases"]:
        rows = counts["problems"] * phase["rows"][0] * phase["rows"][1] + counts["library"] * library[0] * library[1]
        total += (phase["until"] - first) * rows
        first = phase["until"]
    return total


def main(
    directory: Annotated[Path, typer.Argument(help="Where the model's files are; the card goes there.")],
) -> None:
    """Measure a trained reference model and write README.md and measured.json beside it."""
    model = LlamaForCausalLM.from_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    found = measure(model, tokenizer)
    files.write_json(directory / "measured.json", found)
    files.write_text(directory / "README.md", card(found))
    typer.echo(card(found))


if __name__ == "__main__":
    typer.run(main)
