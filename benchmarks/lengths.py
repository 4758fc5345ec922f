"""How long real prompts and answers are: `python benchmarks/lengths.py gsm8k_train.jsonl` writes gsm8k_lengths.json.

Counts of GSM8K's training problems by (prompt, answer) length in bins of 8 tokens of the embedded model's tokenizer,
which was made for code and splits numbers into digits: a large model's would give about two thirds of them. The
benchmark draws padded batches from it, so the data itself need not be there.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

BIN = 8
FILE = Path(__file__).with_name("gsm8k_lengths.json")


def draw(rows: int, seed: int, longest: int) -> list[tuple[int, int]]:
    """(prompt, answer) tokens of `rows` problems, prompts cut where a row would exceed `longest`."""
    counts = json.loads(FILE.read_text())["counts"]
    rng = random.Random(seed)
    bins = rng.choices([(p, a) for p, a, _ in counts], [n for *_, n in counts], k=rows)
    pairs = [(max(1, p * BIN + rng.randrange(BIN)), max(1, a * BIN + rng.randrange(BIN))) for p, a in bins]
    return [(min(p, longest - min(a, longest // 2)), min(a, longest // 2)) for p, a in pairs]


def main(source: Path) -> None:
    """Count the problems in `source` and write FILE."""
    from elision import data, reference_model

    _, tokenizer = reference_model.load()
    counts: Counter[tuple[int, int]] = Counter()
    for example in data.load_examples(source):
        prompt, answer = (len(tokenizer.encode(text)) // BIN for text in (example.prompt, example.answer))
        counts[prompt, answer] += 1
    found = {"bin": BIN, "problems": counts.total(), "counts": sorted([p, a, n] for (p, a), n in counts.items())}
    FILE.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
