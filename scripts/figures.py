"""Draw the README's figures from a run of the demo.

    python scripts/figures.py runs/demo

Writes docs/img/measured-finetune.svg and docs/img/measured-spd.svg. Their numbers are the run's; the
page beside it holds the same plots with their numbers as CSV.
"""

from __future__ import annotations

import sys
from pathlib import Path

from elision import files
from elision.report import plots, sources

IMAGES = Path(__file__).parents[1] / "docs" / "img"


def main() -> None:
    """Draw both, or none where one is missing from the run."""
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


if __name__ == "__main__":
    main()
