"""The table of docs/compatibility.md says what the tests hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from elision.blocks import FAMILIES

HERE = Path(__file__).parent
TABLE = (HERE.parents[1] / "docs" / "compatibility.md").read_text(encoding="utf-8")


def test_every_row_names_a_test_that_exists() -> None:
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", TABLE))
    assert len(named) > 10
    for file, function in sorted(named):
        tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{function}"


def test_every_family_has_its_row() -> None:
    rows = TABLE.partition("## Models")[2].partition("## Adapters")[0]
    for family in FAMILIES.values():
        assert re.search(rf"\b{re.escape(family.name)}\b", rows), family.name
