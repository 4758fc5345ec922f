"""What every command shares: `--config`, how failures end, the options that recur, what is shown, where a run is kept.

A command declares only what is its own:

    @app.command()
    def measure(ctx: typer.Context, model: Model, run: RunDirectory = None, dry: DryRun = False, as_json: Json = False):
        ...                                  # here everything that can be refused, before anything is written
        if dry:
            return show({"seconds": 40, "memory_mb": 900}, as_json)
        with run_directory(ctx, run) as kept:
            kept.metric(step=1, loss=2.5)    # keeps nothing where --run was not given
            kept.finish(training=[...])
        show({"perplexity": 3.2}, as_json, "perplexity 3.2")
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from elision import files
from elision.cli import config
from elision.errors import InputError

if TYPE_CHECKING:
    from elision.runs import Run


class Commands(TyperGroup):
    """Gives every command `--config`, and turns failures that are no fault of ours into one line and an exit code."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for command in self.commands.values():
            if not isinstance(command, TyperGroup):
                command.params.append(config.option())
                for param in command.params:
                    if param.name in ("out", "run"):
                        param.callback = _writable

    def invoke(self, ctx: Any) -> Any:
        try:
            with files.disk_errors():
                return super().invoke(ctx)
        except InputError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno not in files.OF_THE_DISK:
                raise
            done = "opened" if error.errno in files.NO_PLACE else "written"
            typer.echo(f"error: {error.filename or 'a file'} cannot be {done}: {error.strerror}", err=True)
            raise typer.Exit(2) from None
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which `--help` does not import
                raise
            typer.echo(f"error: {self._out_of_memory(ctx.invoked_subcommand)}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("\ninterrupted: run the same command again to resume", err=True)
            raise typer.Exit(130) from None

    def _out_of_memory(self, name: str) -> str:
        """What to say of a GPU that was too small for the command `name`."""
        options = {option for param in self.commands[name].params for option in param.opts}
        ways = {"--dtype": "--dtype bfloat16", "--stream": "--stream", "--batch": "a smaller --batch"}
        named = [way for option, way in ways.items() if option in options]
        return f"the GPU has too little memory for {name}: give {' or '.join(named) or 'a smaller model'}"


def _writable(ctx: Any, param: Any, value: Any) -> Any:
    """Before hours of work, not after them: that its outcome has a place."""
    if value is not None and not ctx.resilient_parsing:
        files.check_place(value, f"--{param.name}")
    return value


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's directory, a Hugging Face id, or 'reference'.")]
Text = Annotated[list[Path], typer.Option(help="Plain text; rows of several files are taken in turn.")]
Rows = Annotated[int, typer.Option(min=1, help="Rows of text at most.")]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens a row.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done, what it takes and what it gains; write nothing.")
]
Dtype = Annotated[str, typer.Option(help="Type of the weights: float32, bfloat16, float16; auto: as stored.")]
RunDirectory = Annotated[
    Path | None,
    typer.Option("--run", metavar="DIR", help="Directory that keeps options, versions, log, metrics and results."),
]


def load(model: str, dtype: str = "float32", *, stream: bool = False) -> tuple[Any, Any]:
    """Model, on `device()`, and tokenizer, without the libraries' own bars and warnings; `stream` leaves the blocks on
    disk.
    """
    import warnings

    from transformers.utils import logging

    from elision.loading import load_model, load_tokenizer, named_dtype

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if stream:
        from elision.streaming import open_streamed

        return open_streamed(model, dtype=named_dtype(dtype), device=device()), load_tokenizer(model)
    loaded, tokenizer = load_model(model, dtype)
    return loaded.to(device()), tokenizer


def device() -> str:
    """The GPU where there is one, under torchrun this process's own."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def show(values: Mapping[str, Any], as_json: bool, text: Any = None) -> None:
    """Print `values` as one JSON object, or `text` (a string or what rich can print) for people; without it, a list."""
    if as_json:
        typer.echo(json.dumps(files.plain(values)))
    elif isinstance(text, str):
        typer.echo(text)
    else:
        from rich.console import Console
        from rich.table import Table

        if text is None:
            text = Table.grid(padding=(0, 2))
            for name, value in values.items():
                text.add_row(
                    name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value)
                )
        Console(markup=False, highlight=False).print(text)


def tell(run: Run, text: str, as_json: bool) -> None:
    """Say `text` ahead of the answer, on the error stream where that is JSON, and note it in the run's log."""
    typer.echo(text, err=as_json)
    run.log(text)


def warn(text: str) -> None:
    """Say `text` on the error stream."""
    typer.echo(text, err=True)


@contextmanager
def run_directory(ctx: typer.Context, path: Path | None) -> Iterator[Run]:
    """The directory that `--run` named, else a run that keeps nothing; under torchrun rank 0 alone keeps one."""
    from elision import runs

    if path is None or os.environ.get("RANK", "0") != "0":
        yield runs.Run(None, {})
        return
    command = ctx.command_path.partition(" ")[2]
    with runs.opened(path, command, config.options(ctx)) as run:
        yield run
