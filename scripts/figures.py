"""Write the README's figures and tables from a run of the demo.

    python scripts/figures.py runs/demo

Writes docs/img/measured-finetune.svg and docs/img/measured-spd.svg, and what stands between the README's two marks.
Their numbers are the run's; the page beside it holds the same plots with their numbers as CSV.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from elision import files
from elision.report import plots, sources
from elision.report.results import FineTune, Results, SyncPointDrop

ROOT = Path(__file__).parents[1]
IMAGES, README = ROOT / "docs" / "img", ROOT / "README.md"
MARKS = ("<!-- measured: begin (by scripts/figures.py) -->", "<!-- measured: end -->")


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage with its sign left to the number."""
    return f"{100 * share:.{digits}f}%"


def finetuning(is_: FineTune) -> list[str]:
    """The table of variants, and SparseLoRA's paired differences to the others."""
    lines = ["| fine-tuning | accuracy (95% interval) | facts swapped | test loss | operations | seconds |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for v in is_.variants:
        interval = f"({100 * v.accuracy_low:.1f} to {100 * v.accuracy_high:.1f})"
        swapped = "" if v.swapped_accuracy is None else percent(v.swapped_accuracy)
        lines.append(
            f"| {v.name} | {percent(v.accuracy)} {interval} | {swapped} | {v.test_loss:.3f} "
            f"| {percent(v.flops_ratio, 0)} | {v.seconds:.0f} |"
        )
    lines += [
        "",
        "LoRA runs as Hugging Face does, padding and all logits included; the others take the fast step, which",
    ]
    lines += ["leaves those out too. Differences in points, paired, with their 95% intervals:", ""]
    for pair in is_.paired:
        found = f"{100 * pair.difference:+.1f} ({100 * pair.low:+.1f} to {100 * pair.high:+.1f})"
        lines.append(f"- {pair.a} minus {pair.b}: {found}")
    return [*lines, "", "Where an interval holds 0, this run cannot tell the two apart."]


def dropping(runs: Sequence[SyncPointDrop]) -> list[str]:
    """The table of what dropping syncs costs, zero-shot."""
    lines = ["| sync-point drop, zero-shot | ranks | dropped at +1% | their cost on held-out text | all dropped |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for run in runs:
        for n in run.ranks:
            dense, chosen, last = n.perplexities[0], n.perplexities[n.chosen], n.perplexities[-1]
            cost, worst = 100 * (chosen / dense - 1), 100 * (last / dense - 1)
            blocks = len(n.perplexities) - 1
            lines.append(f"| {run.model} | {n.ranks} | {n.chosen} of {blocks} | {cost:+.2f}% | {worst:+.0f}% |")
    return lines


def measured(results: Results) -> str:
    """The README's section, marks included."""
    settings, finetune = results.settings, results.finetune
    assert finetune is not None
    how = f"{settings['threads']} threads, {settings['seconds']} seconds in all on a shared machine"
    task = f"{finetune.train_problems:,} problems to learn from, {finetune.test_problems} held out, one seed"
    said = f"Printed by `elision demo` on {settings['date']}, {how}:\n{task}. Times are no benchmark."
    return "\n".join([MARKS[0], "", said, "", *finetuning(finetune), "", *dropping(results.spd), "", MARKS[1]])


def main() -> None:
    """Draw both figures and write the section, or nothing where something is missing from the run."""
    if len(sys.argv) != 2:
        sys.exit("error: give the directory of a demo run, such as runs/demo")
    results = sources.load(sys.argv[1])
    if results.finetune is None or not results.spd:
        sys.exit(f"error: {sys.argv[1]} holds no whole demo run: let elision demo finish first")
    for plot in (
        plots.accuracy(results.finetune, "measured-finetune"),
        plots.dropping(results.spd[0], results.spd, "measured-spd"),
    ):
        print(files.write_text(IMAGES / f"{plot.name}.svg", plot.file()))
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition("<!-- measured: begin")
    _, _, after = rest.partition(MARKS[1])
    print(files.write_text(README, before + measured(results) + after))


if __name__ == "__main__":
    main()
