"""Fine-tune and serve LLMs without the work that does not matter.

Two methods, one shape: calibrate measures what each layer can spare, a plan writes it down, apply leaves the
rest out and hands back a handle that undoes it, evaluate says what it cost and what it saved.

Importing this package imports its rooms lazily and does nothing else: no patch, no registration, no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elision import blocks, data, evaluate, reference_model, report, sparselora, spd
    from elision.errors import InputError

__version__ = "0.1.0"
__all__ = ["InputError", "blocks", "data", "evaluate", "reference_model", "report", "sparselora", "spd"]


def __getattr__(name: str) -> Any:
    if name == "InputError":
        from elision.errors import InputError

        return InputError
    if name in __all__:
        return importlib.import_module(f"elision.{name}")
    raise AttributeError(f"module 'elision' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
