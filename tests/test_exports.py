"""Public names are explicit, sorted, and there."""

from __future__ import annotations

import importlib
import inspect
import types

import pytest

ROOMS = ["elision", "elision.reference_model", "elision.sparselora", "elision.spd"]


def by_kind(name: str) -> tuple[int, str]:
    """Constants, classes, functions and modules; each in alphabetical order, as ruff sorts them."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("room", ROOMS)
def test_all_is_sorted_and_resolves(room: str) -> None:
    module = importlib.import_module(room)
    assert module.__all__ == sorted(set(module.__all__), key=by_kind)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_public_is_missing_from_all(room: str) -> None:
    module = importlib.import_module(room)
    found = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__.startswith("elision")
    }
    assert found <= set(module.__all__)


def test_the_package_names_its_rooms() -> None:
    import elision

    for name in elision.__all__:
        value = getattr(elision, name)
        assert name == "InputError" or (isinstance(value, types.ModuleType) and value.__name__ == f"elision.{name}")
    with pytest.raises(AttributeError, match="no attribute 'sparse'"):
        _ = elision.sparse
