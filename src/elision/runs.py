"""The directory of a long run: what was asked, with which versions, and what came of it.

    config.yaml     the command's options; `elision COMMAND --config config.yaml` does it again
    run.json        command, options and versions: what a resumed run must agree with
    log.txt         what happened, with times
    metrics.jsonl   numbers as they were measured, one object a line
    results.json    what `elision report` shows; written last

    with runs.opened(directory, "sparselora train", options) as run:
        run.log("12,000 rows")
        run.metric(step=10, loss=1.25)
        run.finish(training=[...])

Seeds are options like any other; a command without one draws nothing at random. Only the log knows the time of day:
the other files of an interrupted and resumed run equal those of one that was not.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import elision
from elision import files
from elision.errors import InputError

PACKAGES = ("torch", "transformers", "peft")
# Options that name files to be read, and which files of a directory are.
INPUTS: dict[str, str] = {
    **dict.fromkeys(("plan", "data", "text", "held-out", "probe"), "**/*"),
    **dict.fromkeys(("adapter", "against"), "adapter_*"),
    "include": "**/*.yaml",
}


class Run:
    """One run's directory, made by `opened`; without a path, a run that keeps nothing."""

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = identity
        self._measured = set(self._lines())

    def log(self, text: str) -> None:
        """Append lines, each with the time, to log.txt."""
        for line in text.splitlines():
            self._append("log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")

    def metric(self, **values: Any) -> None:
        """Append one object to metrics.jsonl; what a run of the same command measured to the same numbers is there."""
        if (line := json.dumps(files.plain(values))) not in self._measured:
            self._measured.add(line)
            self._append("metrics.jsonl", line)

    def metrics(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds. Of a step that was measured again after an interruption, the last; no torn line."""
        rows: dict[Any, dict[str, Any]] = {}
        for number, line in enumerate(self._lines()):
            row = json.loads(line)
            rows[row.get("step", f"line {number}")] = row
        return list(rows.values())

    def finish(self, settings: Mapping[str, Any] | None = None, /, **sections: Any) -> None:
        """Write results.json: `sections` are those of `elision.report.results.Results`; `settings` join the options."""
        if self.path is None:
            return
        command, versions = self.identity["command"], self.identity["versions"]
        told = {"command": f"elision {command}", **self.identity["options"], **versions, **(settings or {})}
        shown = {name: ", ".join(map(str, v)) if isinstance(v, list) else v for name, v in told.items()}
        results = {"title": f"elision {command}", "settings": shown, **sections}
        files.write_json(self.path / "results.json", files.plain(results))

    def callback(self) -> Any:
        """A TrainerCallback that notes every log of a Trainer as a metric of its step."""
        from transformers import TrainerCallback

        run = self

        class Metrics(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                if state.is_world_process_zero:
                    run.metric(step=state.global_step, **(logs or {}))

        return Metrics()

    def _lines(self) -> list[str]:
        """The whole lines of metrics.jsonl."""
        return [] if self.path is None else files.whole_lines(self.path / "metrics.jsonl")

    def _append(self, name: str, line: str) -> None:
        if self.path is not None:
            files.append_line(self.path / name, line)


@contextmanager
def opened(path: str | Path, command: str, options: Mapping[str, Any]) -> Iterator[Run]:
    """The directory `path`, new or of the same run; notes in its log how the run ended.

    Input that is refused before anything was measured leaves no new directory behind, so that the corrected command
    finds the place free.

    Args:
        path: the directory.
        command: such as "spd calibrate".
        options: values that JSON and YAML can hold, by the names of the command's options.

    Raises:
        InputError: `path` belongs to a run with another command, options, input files or versions, or to no run;
            nothing is written.
    """
    import yaml

    path = Path(path)
    identity = {"command": command, "options": dict(options), "contents": contents(options), "versions": versions()}
    _check(path, identity)
    there, begun = path.exists(), (path / "run.json").exists()
    if not begun:  # first, for it makes the directory the run's: a kill may follow
        files.write_json(path / "run.json", identity)
    if not (path / "config.yaml").exists():
        text = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
        files.write_text(path / "config.yaml", f"# elision {command} --config config.yaml\n{text}")
    run = Run(path, identity)
    run.log("start")
    try:
        yield run
    except BaseException as error:
        run.log(f"ended by {type(error).__name__}: {' '.join(str(error).split())}")
        if isinstance(error, InputError) and not begun and not (path / "metrics.jsonl").exists():
            for name in ("config.yaml", "run.json", "log.txt"):
                (path / name).unlink()
            if not there:
                with suppress(OSError):  # the command left something in it
                    path.rmdir()
        raise
    run.log("done")


def contents(options: Mapping[str, Any]) -> dict[str, str]:
    """Hash of the files that each option of INPUTS names: another file under an old name is another input."""
    found = {}
    for name in sorted(INPUTS.keys() & options.keys()):
        given = options[name] if isinstance(options[name], list) else [options[name]]
        digest = hashlib.sha256()
        for path in (Path(str(each)) for each in given if each is not None):
            # An adapter to be read is a directory; one that is a file is written.
            if path.is_dir() or name in ("adapter", "against"):
                named = sorted(path.glob(INPUTS[name]))
            else:
                named = [path, factors_beside(path)] if name == "plan" else [path]
            for file in named:
                if not file.is_file():
                    continue
                with file.open("rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
        found[name] = digest.hexdigest()[:16]
    return found


def factors_beside(plan: Path) -> Path:
    """Where `sparselora calibrate` keeps the whitened factors of a plan: they are read with it."""
    return plan.with_name(f"{plan.name.removesuffix('.json')}.factors.safetensors")


def versions() -> dict[str, str]:
    """Of elision, Python and the libraries that numbers depend on, where they are installed."""
    found = {"elision": elision.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _check(path: Path, identity: Mapping[str, Any]) -> None:
    if not (path / "run.json").exists():
        held = path.iterdir() if path.is_dir() else [path] if path.exists() else []
        if any(not each.name.startswith(".run.json.") for each in held):  # which a kill leaves of writing that file
            raise InputError(f"run directory {path} holds something else: give a new directory")
        return
    before = files.read_json(path / "run.json", "run")
    if before.get("command") != identity["command"]:
        raise InputError(f"{path} is a run of elision {before.get('command')}: give another directory")
    for kind in ("options", "contents", "versions"):
        old, new = before.get(kind, identity[kind] if kind == "contents" else {}), identity[kind]
        for name in [*old, *new]:
            if old.get(name) != new.get(name):
                shown = [f"{name} {old.get(name)}", str(new.get(name))]
                if kind == "contents":  # hashes say nothing to a person
                    shown = [f"what --{name} held then", "something else"]
                raise InputError(
                    f"{path} was begun with {shown[0]}, now it is {shown[1]}: "
                    "give another directory, or the same options and versions to resume"
                )
