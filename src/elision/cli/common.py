"""What every command shares: how failures end, the options that recur, how a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from elision.errors import InputError


class Commands(TyperGroup):
    """Turns the two failures that are no fault of ours into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("\ninterrupted: run the same command again to resume", err=True)
            raise typer.Exit(130) from None


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's directory, a Hugging Face id, or 'reference'.")]
Text = Annotated[list[Path], typer.Option(help="Plain text; may be given several times.")]
Rows = Annotated[int, typer.Option(min=1, help="Rows of text at most.")]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens a row.")]


def load(model: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Model and tokenizer, without the libraries' own bars and warnings."""
    import warnings

    from transformers.utils import logging

    from elision.loading import load_model

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    return load_model(model, dtype)
