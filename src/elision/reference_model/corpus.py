"""What the embedded model is trained on: the running Python's standard library and our own word problems.

The library is text that every machine with Python has. Its hash is recorded with the recipe, so that a retraining
on another Python version is noticed rather than silently different.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

EXCLUDED = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "_bundled"}


def library_files(split: Literal["train", "test"]) -> list[Path]:
    """The standard library's own .py files in a fixed order; one in twenty, by the hash of its path, is "test".

    Left out: test suites, character tables, and modules generated for one machine.
    """
    root = Path(sysconfig.get_path("stdlib"))
    chosen = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if EXCLUDED & set(name.parts) or name.name.startswith("_sysconfigdata") or name.parts[0].startswith("config-"):
            continue
        held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] % 20 == 0
        if held_out == (split == "test"):
            chosen.append(path)
    return chosen


def library_texts(split: Literal["train", "test"]) -> list[str]:
    """One text per file of `library_files`, undecodable bytes replaced."""
    return [path.read_text(encoding="utf-8", errors="replace") for path in library_files(split)]


def library_hash() -> str:
    """SHA-256 over names and contents of both splits."""
    root = Path(sysconfig.get_path("stdlib"))
    digest = hashlib.sha256()
    for split in ("train", "test"):
        for path in library_files(split):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
