"""Gradient checkpointing on the fast path: blocks run again in backward, with the channels of their own forward."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from elision.errors import InputError
from elision.sparselora import sparsify
from tests.sparselora import tiny

Result = tuple[Tensor, dict[str, Tensor]]
# What torch says of reentrant checkpointing under no_grad, here in the model's own forward of the reference pass.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


def result(model: Any, path: Any, between: Any = None, double: bool = True, **settings: Any) -> Result:
    """Two batches in one backward, with a dense reference pass and an evaluation between forward and backward."""
    one, two = tiny.batch((5, 3, 4), (4, 3, 1)), tiny.batch((4, 2, 6), (2, 4, 1), left=True)
    with (
        tiny.InDouble() if double else nullcontext(),
        sparsify(model, tiny.plan(model, 0.6, **settings), path=path) as handle,
    ):
        loss = model(**one, use_cache=False).loss + 2 * model(**two, use_cache=False).loss
        with torch.no_grad(), model.disable_adapter():
            model(**one)
        model.eval()
        model(**two)
        model.train()
        if between is not None:
            between(handle)
        loss.backward()
        assert handle.forwards["sparse"] == 2 and handle.paths == ({"fast": 2} if path == "fast" else {})
    return loss.detach(), tiny.gradients(model)


@REENTRANT
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_equal_to_the_reference_without_it(family: str, reentrant: bool) -> None:
    model = tiny.lora(family)
    expected = result(model, "reference")
    tiny.checkpoint(model, reentrant)  # nobody asks for input gradients: the fast path needs no such help
    assert tiny.close(result(model, "fast"), expected)


@REENTRANT
def test_channels_drawn_at_random_are_drawn_once(reentrant: bool) -> None:
    model = tiny.lora("qwen3", tiny.ATTENTION)
    model.enable_input_require_grads()
    settings: dict[str, Any] = {"selection": "random", "double": False}  # its q/k norms are in single precision
    expected = result(model, "fast", **settings)
    tiny.checkpoint(model, reentrant)
    assert tiny.close(result(model, "fast", **settings), expected)


@REENTRANT
def test_a_recomputation_with_other_channels_would_show(reentrant: bool) -> None:
    def choose_others(handle: Any) -> None:
        kept = handle._latest.kept
        kept[0, "down"] = kept[0, "up"] = kept[0, "gate"] = torch.arange(len(kept[0, "up"]))

    model = tiny.lora()
    expected = result(model, "fast")
    assert tiny.close(result(model, "fast", choose_others), expected, 0.0)  # what was saved is what counts
    tiny.checkpoint(model, reentrant)
    assert not tiny.close(result(model, "fast", choose_others), expected, 1e-6)


@REENTRANT
def test_blocks_do_run_again(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from elision.sparselora import fast

    model, calls = tiny.lora(), []
    right = fast.mlp_residual
    monkeypatch.setattr(fast, "mlp_residual", lambda *args: (calls.append(1), right(*args))[1])
    tiny.checkpoint(model, reentrant)
    with sparsify(model, tiny.plan(model), path="fast"):
        loss = model(**tiny.batch()).loss
        assert len(calls) == 2
        loss.backward()
        assert len(calls) == 4
        with torch.no_grad():  # nothing to save, and reentrant checkpointing would warn
            model(**tiny.batch())


@REENTRANT
def test_a_backward_after_removal_is_right_or_refused(reentrant: bool) -> None:
    model = tiny.lora()
    model.enable_input_require_grads()
    plan, inputs = tiny.plan(model, 0.6), tiny.batch()
    for checkpointed in (False, True):
        for path in ("reference", "fast"):
            with sparsify(model, plan, path=path):
                loss = model(**inputs, use_cache=False).loss
                loss.backward(retain_graph=True)
                expected = tiny.gradients(model)
            if checkpointed and path == "reference":  # whose blocks would run again densely
                with pytest.raises(InputError, match="comes after the handle was removed: call it in the with block"):
                    loss.backward()
                continue
            loss.backward()
            assert tiny.close((loss, tiny.gradients(model)), (loss, expected))
        tiny.checkpoint(model, reentrant)


def test_every_second_layer() -> None:
    model = tiny.lora(num_hidden_layers=4)
    expected = result(model, "reference")
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    assert tiny.close(result(model, "fast"), expected)


def test_a_hosts_own_checkpointing_finds_the_layer() -> None:
    """As LLaMA-Factory's, which checkpoints only what trains and asks a bound method for its module."""
    model, seen = tiny.lora(), []
    expected = result(model, "fast")
    tiny.checkpoint(model, False)
    layers = [layer for layer in model.modules() if hasattr(layer, "self_attn")]
    for layer in layers:

        def asking(function: Any, *args: Any, own: Any = layer._gradient_checkpointing_func) -> Any:
            seen.append(getattr(function, "__self__", None))
            return own(function, *args)

        layer._gradient_checkpointing_func = asking
    assert tiny.close(result(model, "fast"), expected)
    assert seen[: len(layers)] == layers  # block by block
