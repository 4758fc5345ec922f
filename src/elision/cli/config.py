"""`--config FILE`: every option of every command from a YAML file.

    # plan.yaml                         elision spd calibrate --config plan.yaml --ranks 4
    model: reference
    text: [notes.txt, manual.txt]
    ranks: 8
    max-loss: 0.01

Keys are the options' names without their dashes, and the names of arguments in small letters. A value is read as if it
had been typed, so it is checked by the same rules; what is typed goes before what the file says. A key that the
command does not have is refused by name. `Commands` in common.py gives the option to every command.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from elision.errors import InputError


def option() -> Any:
    """The option itself, built by typer from a signature as all others are."""
    app = typer.Typer(add_completion=False)

    @app.command()
    def command(
        config: Annotated[
            Path | None,
            typer.Option(callback=_read, is_eager=True, metavar="FILE", help="YAML of these options; typed ones win."),
        ] = None,
    ) -> None: ...

    made = typer.main.get_command(app).params[0]
    made.expose_value = False
    return made


def options(ctx: typer.Context) -> dict[str, Any]:
    """The values that a command was called with, as a file for `--config` would hold them; not where they are shown."""
    values = {}
    for name, param in _named(ctx).items():
        value = ctx.params.get(param.name)
        if value is not None and name not in ("json", "run", "dry-run"):
            values[name] = _plain(value)
    return values


def command_line(ctx: typer.Context) -> str:
    """The command with everything that was typed or read from a file, to be typed to the same effect."""
    words = ["elision", *ctx.command_path.split()[1:]]
    for name, value in options(ctx).items():
        param = _named(ctx)[name]
        source = ctx.get_parameter_source(param.name)
        if param.param_type_name == "argument":
            words.append(str(value))
        elif value is not False and source is not None and source.name != "DEFAULT":
            for each in value if isinstance(value, list) else [value]:
                words += [f"--{name}"] if each is True else [f"--{name}", str(each)]
    return shlex.join(words)


def _read(ctx: typer.Context, config: Path | None) -> None:
    if config is None or ctx.resilient_parsing:  # completion only asks what could be typed
        return
    params = _named(ctx)
    found: dict[str, Any] = {}
    for key, value in _mapping(config).items():
        name = str(key).replace("_", "-")
        if name not in params:
            raise InputError(f"config {config}: {ctx.info_name} has no option {key!r}: use {', '.join(params)}")
        if value is not None:
            found[params[name].name] = _checked(ctx, params[name], value, f"config {config}: {key}")
    ctx.default_map = found


def _mapping(path: Path) -> Mapping[Any, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"config {path} is not a file: give a YAML file of options") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"config {path} is not YAML ({' '.join(str(error).split())}): write it as key: value"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise InputError(f"config {path} holds no options: write one a line, as key: value")
    return values


def _named(ctx: typer.Context) -> dict[str, Any]:
    """The command's parameters by the names that people know."""
    named = {}
    for param in ctx.command.params:
        if param.expose_value:
            long = max(param.opts, key=len).lstrip("-")
            named[long.replace("_", "-")] = param
    return named


def _checked(ctx: typer.Context, param: Any, value: Any, where: str) -> Any:
    """`value` as the parser would hand it over, once it has passed the parameter's own checks."""
    if getattr(param, "is_flag", False):
        if not isinstance(value, bool):
            raise InputError(f"{where}: {value!r} is not a switch: write true or false")
        return value
    several = param.multiple or param.nargs != 1
    values = value if isinstance(value, list) else [value]
    if (len(values) != 1 and not several) or not all(isinstance(each, (str, int, float)) for each in values):
        raise InputError(
            f"{where}: {value!r} is not {'a list of values' if several else 'one value'}: write it plainly"
        )

    def typed(spelt: Callable[[str], str]) -> Any:
        return [spelt(str(each)) for each in values] if several else spelt(str(values[0]))

    try:
        read = param.process_value(ctx, typed(os.path.expanduser))
    except typer.BadParameter as error:
        reason = " ".join(error.message.split()) or "give one at least"
        raise InputError(f"{where}: {value!r} will not do: {reason}") from None
    places = all(isinstance(each, Path) for each in (read if isinstance(read, (list, tuple)) else [read]))
    return typed(os.path.expanduser if places or param.name == "plan" else str)  # a shell spells "~" out in paths


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (bool, int, float, str)) else str(value)
