"""torch.compile around a sparse model: the method stays outside of the graphs, so that no batch is baked into one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elision.sparselora import sparsify
from tests.sparselora import tiny

# Dynamo looks at `.grad` of every tensor that it meets, and torch warns where one is no leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
BATCHES = (tiny.batch((5, 3), (3, 2)), tiny.batch((3, 5), (2, 3), left=True), tiny.batch((6, 2), (2, 5)))


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    yield
    torch._dynamo.reset()


def results(model: Any, path: Any, backend: str | None) -> list[Any]:
    """Loss and gradients of each batch, a dense first step among them, and the loss of a dense evaluation."""
    found: list[Any] = []
    with sparsify(model, tiny.plan(model, 0.6, dense_steps=0.2), path=path) as handle:
        compiled = model if backend is None else torch.compile(model, backend=backend)
        for step, batch in enumerate(BATCHES):
            handle.step(step / len(BATCHES))
            loss = compiled(**batch, use_cache=False).loss
            loss.backward()
            found.append((loss.detach(), tiny.gradients(model)))
        model.eval()
        evaluated = compiled(**BATCHES[0], use_cache=False).loss.detach()
        model.train()
        assert handle.forwards == {"dense (first steps)": 1, "sparse": 2, "dense (eval mode)": 1}
        assert handle.paths == ({"fast": 3} if path == "fast" else {})
    return [*found, (evaluated, {})]


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_a_compiled_model_gives_what_the_model_gives(path: Any) -> None:
    model = tiny.lora()
    for one, other in zip(results(model, path, None), results(model, path, "eager"), strict=True):
        assert tiny.close(one, other, 1e-6)  # norms are in single precision


def test_compiled_layers_are_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled one by one, as is usual: the fast step has no use for them, dense forwards run them."""
    model, inputs = tiny.lora(), BATCHES[0]
    expected = model.eval()(**inputs).logits
    calls: list[int] = []
    for layer in model.get_base_model().model.layers:
        layer.compile(backend=lambda graph, _: (calls.append(1), graph.forward)[1])
    model.train()
    with sparsify(model, tiny.plan(model), path="fast") as handle:
        model(**inputs).loss.backward()
        assert handle.paths == {"fast": 1} and not calls
        assert torch.allclose(model.eval()(**inputs).logits, expected, rtol=1e-6, atol=1e-6)
    assert calls
