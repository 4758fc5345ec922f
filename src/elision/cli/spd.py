"""`elision spd`: serve with fewer syncs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elision.cli.common import Commands, Model, Rows, Text, Tokens, load

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Drop the syncs that tensor parallelism can spare.")


@app.command()
def calibrate(
    model: Model,
    text: Text,
    ranks: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks that will serve.")],
    out: Annotated[Path, typer.Option(help="Where the plan goes; what was measured is kept beside it.")],
    max_loss: Annotated[float | None, typer.Option(help="Allowed perplexity increase; 0.01 is one percent.")] = None,
    drop: Annotated[float | None, typer.Option(help="Share of the blocks to drop instead.")] = None,
    rows: Rows = 32,
    tokens: Tokens = 512,
) -> None:
    """Measure what each dropped sync costs on text, and write the plan that the limit allows; a rerun resumes."""
    from elision import spd
    from elision.data import text_batches
    from elision.loading import load_texts

    texts = load_texts(text)
    loaded, tokenizer = load(model)
    batches = text_batches(tokenizer, texts, tokens, limit=rows)
    journal = out.with_name(f"{out.name}.journal")
    made = spd.calibrate(loaded, batches, ranks, max_loss=max_loss, drop=drop, state=journal)
    made.save(out)
    found = made.calibration
    assert found is not None
    count = len(made.dropped)
    cost = 100 * (found.perplexities[count] / found.perplexities[0] - 1)
    typer.echo(f"{count} of {len(found.order)} blocks drop their first sync, perplexity {cost:+.2f}%: {out}")
