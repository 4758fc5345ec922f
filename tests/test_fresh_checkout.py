"""What is committed suffices: a clone sets itself up, builds a whole wheel and imports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

if not (ROOT / ".git").exists() or shutil.which("git") is None:
    pytest.skip("not a git checkout: nothing to clone", allow_module_level=True)

# A stand-in for Python in scripts/setup.sh: notes each call, makes a venv that is a copy of itself, and lets pip fail
# when told to. So the script's own decisions are tested without a download.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$LOG"
case "$*" in
  "-c import ensurepip"*) [ -z "${OLD:-}" ] ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip "*) [ -z "${OFFLINE:-}" ] ;;
esac
"""
DEV = "--editable .[dev,docs,eval,qlora,torchao]"


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # make and git tell their children about themselves through the environment; a fresh machine has none of that
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "GIT_"))}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fresh") / "elision"
    done = run("git", "clone", "--quiet", "--no-hardlinks", ROOT, place, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return place


def test_the_two_commands_set_up_first(clone: Path) -> None:
    for target, setup, last in (
        ("demo", "scripts/setup.sh", ".venv/bin/elision demo"),
        ("test", "scripts/setup.sh dev", ".venv/bin/python -m pytest"),
    ):
        done = run("make", "--dry-run", target, cwd=clone)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[0] == setup
        assert lines[-1].startswith(last)
    for script in (clone / "scripts" / "setup.sh", clone / ".ci" / "run"):
        assert os.access(script, os.X_OK)


@pytest.fixture
def checkout(clone: Path, tmp_path: Path) -> Path:
    """A directory in which scripts/setup.sh can run, with the stand-in for Python beside it."""
    place = tmp_path / "checkout"
    (place / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup.sh"):
        shutil.copy2(clone / name, place / name)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return place


def setup(checkout: Path, *words: str, **environment: str) -> tuple[int, list[str], str]:
    """Exit code, the calls to Python that change something, and stderr."""
    log = checkout.parent / "log"
    log.write_text("")
    fake = {"PYTHON": str(checkout.parent / "python"), "LOG": str(log)}
    done = run(checkout / "scripts" / "setup.sh", *words, cwd=checkout.parent, **fake, **environment)
    return done.returncode, [line for line in log.read_text().splitlines() if line.startswith("-m")], done.stderr


def test_setup_runs_once(checkout: Path) -> None:
    code, calls, _ = setup(checkout)
    assert code == 0
    assert calls[0] == "-m venv .venv"
    assert "--constraint constraints.txt" in calls[-1] and calls[-1].endswith("--editable .")
    assert setup(checkout) == (0, [], "")


def test_setup_adds_the_tools_and_keeps_them(checkout: Path) -> None:
    setup(checkout)
    code, calls, _ = setup(checkout, "dev")
    assert code == 0 and calls and "-m venv .venv" not in calls and calls[-1].endswith(DEV)
    assert setup(checkout) == (0, [], "")
    (checkout / "constraints.txt").write_text("# other versions\n")
    code, calls, _ = setup(checkout)
    assert code == 0 and "-m venv .venv" not in calls and calls[-1].endswith(DEV)


def test_interrupted_setup_starts_over(checkout: Path) -> None:
    code, calls, _ = setup(checkout, OFFLINE="1")
    assert code != 0
    (checkout / ".venv" / "half-installed").touch()
    code, calls, _ = setup(checkout)
    assert code == 0 and calls[0] == "-m venv .venv"
    assert not (checkout / ".venv" / "half-installed").exists()
    assert setup(checkout) == (0, [], "")


def test_a_moved_checkout_starts_over(checkout: Path) -> None:
    setup(checkout)
    moved = checkout.rename(checkout.with_name("moved"))
    code, calls, _ = setup(moved)
    assert code == 0 and calls[0] == "-m venv .venv"


def test_an_old_python_is_one_clear_line(checkout: Path) -> None:
    code, calls, errors = setup(checkout, OLD="1")
    assert code == 1 and calls == []
    (line,) = errors.splitlines()
    assert line.startswith("error: found ") and "needs Python 3.11, 3.12 or 3.13" in line and "PYTHON=" in line
    assert not (checkout / ".venv").exists()


def test_the_committed_package_imports(clone: Path) -> None:
    script = "import elision, elision.cli; print(elision.__file__)"
    done = run(sys.executable, "-c", script, cwd=clone, PYTHONPATH=str(clone / "src"))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(clone)


def test_the_wheel_is_whole(clone: Path, tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the build tool is not installed here; `make test` installs it")
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=clone)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("elision-*.whl")
    tracked = run("git", "ls-files", "src", cwd=clone).stdout.splitlines()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        packed = {name for name in names if name.startswith("elision/")}
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert packed == {name.removeprefix("src/") for name in tracked}  # data and py.typed included
    assert "elision/py.typed" in packed
    assert any(name.endswith("entry_points.txt") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
