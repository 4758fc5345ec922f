"""`elision eval`: what a model, a plan or an adapter is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from elision.cli.common import Model, Rows, Text, Tokens, load


def evaluate(
    model: Model,
    text: Text,
    plan: Annotated[Path | None, typer.Option(help="SPD plan: score what its ranks would compute.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="PEFT adapter to merge into the model first.")] = None,
    rows: Rows = 32,
    tokens: Tokens = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Perplexity of a model on text, with an SPD plan or a PEFT adapter if given."""
    from contextlib import nullcontext

    from elision import evaluate, spd
    from elision.data import text_batches
    from elision.loading import load_adapter, load_texts

    texts = load_texts(text)
    planned = None if plan is None else spd.SyncPlan.load(plan)
    loaded, tokenizer = load(model)
    if adapter is not None:
        loaded = load_adapter(loaded, adapter)
    batches = text_batches(tokenizer, texts, tokens, limit=rows)
    with nullcontext() if planned is None else spd.simulate(loaded, planned):
        found = evaluate.perplexity(loaded, batches)
    scored = sum(batch["input_ids"][:, 1:].numel() for batch in batches)
    line = f"perplexity {found:.4f} over {scored:,} tokens"
    typer.echo(json.dumps({"perplexity": found, "tokens": scored}) if as_json else line)
