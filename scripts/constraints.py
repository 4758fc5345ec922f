"""Write constraints.txt anew: what pip resolves today from pyproject.toml alone.

An empty environment of the oldest supported Python is filled, so that a pin is something that installed and that holds
for the newer ones too; what else the newer ones need, and torch's CUDA build, is resolved on top of it but not
installed. The oldest Python is its first release, which a system may well have: where a package wants a later one,
an earlier version of it is taken. Local version labels, such as the "+cpu" of a torch build, are dropped: a pin holds
for every build.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OLDEST, NEWER = (3, 11), ("3.12", "3.13")
EXTRAS = ("dev", "docs", "eval", "qlora", "torchao")  # what scripts/setup.sh dev installs
TORCH = "torch==2.13.0"  # the version that the project is developed against
HEADER = (
    "# Every dependency of `make demo`, `make test` and `make docs`, build and test tools included. "
    "Written by `make constraints`."
)


def main() -> None:
    """Write the file, or leave it as it is where anything fails."""
    if sys.version_info[:2] != OLDEST:
        sys.exit(f"error: run with Python {OLDEST[0]}.{OLDEST[1]}, the oldest supported one: its pins hold for all")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    wanted = [*project["dependencies"], *extras, "hatchling", "editables", TORCH]
    with tempfile.TemporaryDirectory() as place:
        venv.create(Path(place) / "venv", with_pip=True)
        pip = [Path(place) / "venv" / "bin" / "python", "-m", "pip", "--quiet"]
        report, wheels = Path(place) / "report.json", Path(place) / "wheels"
        wheels.mkdir()
        bounds, built = [], set()
        while True:
            subprocess.run([*pip, "install", "--report", report, *wanted, *bounds], check=True)
            built |= {pin(item["metadata"]) for item in installed(report) if not from_wheel(item)}
            if not (more := too_new(pip[0])):
                break
            bounds += more
        if built:
            subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, *sorted(built)], check=True)
        frozen = subprocess.run(
            [*pip, "freeze", "--all", "--exclude", "pip"], check=True, text=True, capture_output=True
        )
        pins = {canonical(name): version for name, version in (line.split("==") for line in frozen.stdout.splitlines())}
        for version in NEWER:
            constraints = Path(place) / "constraints.txt"
            constraints.write_text(lines(pins), encoding="utf-8")
            elsewhere = ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--python-version", version]
            elsewhere += ["--target", Path(place) / "nowhere"]  # pip asks for one, though it writes nothing
            elsewhere += ["--find-links", wheels]  # of what publishes none, and so is no binary
            subprocess.run(
                [*pip, "install", *elsewhere, "--report", report, "--constraint", constraints, *wanted], check=True
            )
            found = [item["metadata"] for item in installed(report)]
            pins = {canonical(item["name"]): item["version"] for item in found} | pins
    (ROOT / "constraints.txt").write_text(f"{HEADER}\n{lines(pins)}", encoding="utf-8")


def too_new(python: Path) -> list[str]:
    """Bounds for what is installed there but not to be had on the first release of the oldest Python."""
    listing = (
        "from importlib.metadata import distributions\n"
        "from pip._vendor.packaging.specifiers import SpecifierSet\n"
        "for each in distributions():\n"
        f"    if not SpecifierSet(each.metadata.get('Requires-Python', '')).contains('{OLDEST[0]}.{OLDEST[1]}.0'):\n"
        "        print(each.metadata['Name'] + '<' + each.version)\n"
    )
    return subprocess.run([python, "-c", listing], check=True, text=True, capture_output=True).stdout.split()


def installed(report: Path) -> list[dict[str, Any]]:
    """What pip says that it installed, or would."""
    return json.loads(report.read_text(encoding="utf-8"))["install"]


def from_wheel(item: dict[str, Any]) -> bool:
    """Whether it was downloaded as a wheel, and not built here."""
    return item["download_info"]["url"].endswith(".whl")


def pin(metadata: dict[str, Any]) -> str:
    """As a requirement."""
    return f"{canonical(metadata['name'])}=={metadata['version']}"


def lines(pins: dict[str, str]) -> str:
    """The pins as lines, sorted, without local version labels."""
    return "".join(f"{name}=={version.partition('+')[0]}\n" for name, version in sorted(pins.items()))


def canonical(name: str) -> str:
    """The one spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
