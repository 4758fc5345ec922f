"""What every test runs under: shapes checked, no network, a fixed share of the machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

# Set before any Hugging Face import: a test that would reach the hub fails at once instead of hanging.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
# The same product of the same bits, wherever in memory they begin. Without this, MKL on an AMD processor adds up in
# another order for weights mapped from a file than for those they were saved from, and tests of bit equality fail.
os.environ["MKL_CBWR"] = "AUTO,STRICT"

import pytest
import torch
from jaxtyping import install_import_hook

SOURCE = Path(__file__).parents[1] / "src"


def _annotated() -> list[str]:
    """Modules that annotate shapes: the pure functions. Elsewhere a test meets the library's own checks first."""
    uses_shapes = re.compile(r"^from elision\.shapes import", re.MULTILINE)
    files = (path for path in SOURCE.rglob("*.py") if uses_shapes.search(path.read_text(encoding="utf-8")))
    return sorted(".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in files)


# Before the first import of elision by any test, and for this process only: users never pay for the checks.
install_import_hook(_annotated(), "beartype.beartype")

# Workers of pytest-xdist share the machine; alone, two threads keep timings and rounding alike everywhere.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, in whatever order and company it runs."""
    torch.manual_seed(0)
