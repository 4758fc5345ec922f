"""The files around the code say what the code says."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import elision

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
ARTICLES = {
    "SparseLoRA": "https://proceedings.mlr.press/v267/khaki25a.html",
    "SPD": "https://proceedings.mlr.press/v267/kim25g.html",
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PROJECT = tomllib.loads(read("pyproject.toml"))["project"]
PINS = dict(line.split("==") for line in read("constraints.txt").splitlines() if not line.startswith("#"))
PINNED = {canonicalize_name(name): Version(version) for name, version in PINS.items()}


def uncovered(requirement: Requirement, seen: set[str]) -> list[str]:
    """What `requirement` needs, itself included, on this machine, and constraints.txt does not pin within its range."""
    name = canonicalize_name(requirement.name)
    if name not in PINNED:
        return [f"{name}: no pin"]
    wrong = [] if requirement.specifier.contains(PINNED[name]) else [f"{requirement}: pinned to {PINNED[name]}"]
    key = f"{name}{sorted(requirement.extras)}"
    if key in seen:
        return wrong
    seen.add(key)
    try:
        needed = [Requirement(line) for line in requires(name) or []]
    except PackageNotFoundError:
        return wrong
    for inner in needed:
        extras = requirement.extras or {""}
        if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
            wrong += uncovered(inner, seen)
    return wrong


def test_constraints_pin_every_dependency() -> None:
    installed = ("dev", "docs", "eval", "qlora", "torchao")
    extras = [line for extra in installed for line in PROJECT["optional-dependencies"][extra]]
    direct = [*PROJECT["dependencies"], *extras, "hatchling", "editables"]
    seen: set[str] = set()
    assert [fault for line in direct for fault in uncovered(Requirement(line), seen)] == []
    assert len(seen) > 40  # it did look behind the direct ones
    assert uncovered(Requirement("numpy<2"), seen) == [f"numpy<2: pinned to {PINNED['numpy']}"]
    assert uncovered(Requirement("liger-kernel"), seen) == ["liger-kernel: no pin"]


@pytest.mark.skipif(sys.version_info[:2] > (3, 11), reason="newer Pythons install what the oldest does not need")
def test_pins_install_on_the_first_release_of_the_oldest_python() -> None:
    # A system's Python 3.11 may be 3.11.2 for years: one pin that wanted 3.11.5 kept everything from being installed.
    oldest = PROJECT["requires-python"].partition(",")[0].removeprefix(">=") + ".0"
    wanted = {each.name: each.metadata.get("Requires-Python", "") for each in distributions()}
    pinned = {name: needs for name, needs in wanted.items() if canonicalize_name(name) in PINNED}
    assert [f"{name}: {needs}" for name, needs in pinned.items() if not SpecifierSet(needs).contains(oldest)] == []
    assert len(pinned) > 40


def imported(path: Path) -> set[str]:
    """What a file imports beside the standard library: elision's modules in full, of others the package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names |= {f"elision.{alias.name}" for alias in node.names} if module == "elision" else {module}
    short = {name if name.startswith("elision.") else name.partition(".")[0] for name in names}
    return short - set(sys.stdlib_module_names)


def test_every_import_is_a_declared_dependency() -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    allowed = {name.replace("-", "_") for name in declared} | {"elision", "yaml"}  # which pyyaml is imported as
    for path in SOURCES:
        plugin = {"vllm"} if path.parent.name == "runtimes" and path.stem.startswith("vllm") else set()
        assert {name.partition(".")[0] for name in imported(path)} <= allowed | plugin, path


def test_constraints_hold_everywhere() -> None:
    assert "+" not in read("constraints.txt")  # no build of one machine
    assert "://" not in read("constraints.txt")  # no index of one machine


def test_commands_of_the_prose_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    assert {"demo", "test", "lint", "types"} <= targets
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run", ".pre-commit-config.yaml"):
        for words in re.findall(r"(?:^ {4}|`|\bsection \w+ )make ((?:[a-z]+ ?)+)", read(name), re.MULTILINE):
            assert set(words.split()) <= targets, f"{name} says make {words}"
    for name in ("README.md", "CONTRIBUTING.md", "Makefile"):
        for place in re.findall(r"(?:\]\(|\s)((?:docs|scripts|\.ci)/[\w./-]+)", read(name)):
            assert (ROOT / place).exists(), f"{name} names {place}"


def test_versions_agree() -> None:
    assert f"## [{elision.__version__}]" in read("CHANGELOG.md")
    assert yaml.safe_load(read("CITATION.cff"))["version"] == elision.__version__


def test_python_versions_agree() -> None:
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    assert "(3, 11) <= sys.version_info[:2] < (3, 14)" in read("scripts/setup.sh")
    for version in ("3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
        assert version in read("README.md")


def test_both_articles_are_cited() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert [reference["url"] for reference in citation["references"]] == list(ARTICLES.values())
    for url in ARTICLES.values():
        assert url in read("README.md")
    for reference in citation["references"]:
        assert reference["title"].rstrip(".") in " ".join(read("README.md").split())
        for author in reference["authors"]:
            assert f"{author['given-names']} {author['family-names']}" in " ".join(read("README.md").split())


def test_licence_is_apache() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert read("LICENSE").split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert len(read("LICENSE").splitlines()) == 201


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_files_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


def test_methods_do_not_know_each_other() -> None:
    for method, other in (("sparselora", "spd"), ("spd", "sparselora")):
        files = [path for path in SOURCES if path.is_relative_to(ROOT / "src" / "elision" / method)]
        assert len(files) >= 4
        for path in files:
            assert not [name for name in imported(path) if name.startswith(f"elision.{other}")], path


def test_every_file_has_its_place_in_the_design() -> None:
    tree = re.search(r"^## Rooms\n\n((?: {4}.*\n)+)", read("docs/design.md"), re.MULTILINE)
    assert tree is not None
    above: list[str] = []  # the directory at each depth
    named = set()
    for indent, name in re.findall(r"^ {4}( *)(\S+)", tree[1], re.MULTILINE):
        depth = len(indent) // 2
        above[depth:] = [name]
        named.add("".join(above[: depth + 1]))
    assert sorted(name for name in named if not (ROOT / name).exists()) == [], "named in docs/design.md, but not there"
    files = {path.relative_to(ROOT).as_posix() for path in SOURCES if path.name != "__init__.py"}
    assert sorted(files - named) == [], "there, but not in the tree of docs/design.md: add a line"


def test_pure_files_stay_pure() -> None:
    named = re.findall(r"^ +(\w+\.py) .*\(pure\)$", read("docs/design.md"), re.MULTILINE)
    assert len(named) >= 4
    for path in (path for path in SOURCES if path.name in named):
        assert imported(path) <= {"torch", "elision.shapes", "elision.errors"}, path
