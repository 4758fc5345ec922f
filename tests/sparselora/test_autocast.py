"""Models in single precision under autocast: the fast path computes in the precisions of the model's own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elision import blocks
from elision.sparselora import lossless, sparsify
from tests.sparselora import tiny
from tests.sparselora.test_fast_apply import packed, run, turns
from tests.sparselora.test_trainer import losses, trainer

LOW = torch.bfloat16
SHAPE = {"hidden_size": 64, "num_hidden_layers": 3}


def step(model: Any, inputs: dict[str, Tensor], dtype: torch.dtype | None = LOW) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients under autocast to `dtype`; None: without."""
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), tiny.gradients(model)


def distance(found: tuple[Tensor, dict[str, Tensor]], exact: tuple[Tensor, dict[str, Tensor]]) -> float:
    """Of the gradients, relative."""
    squares = [
        ((g.double() - exact[1][name]).square().sum(), exact[1][name].square().sum()) for name, g in found[1].items()
    ]
    return float(sum(d for d, _ in squares) / sum(n for _, n in squares)) ** 0.5


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, LOW) for family in ("llama", "qwen3", "gemma2", "olmo2", "opt")] + [("llama", torch.float16)],
    ids=str,
)
def test_it_errs_no_more_than_the_reference(family: str, dtype: torch.dtype) -> None:
    """Against double precision."""
    own: dict[str, Any] = {**SHAPE, **({"word_embed_proj_dim": 64} if family == "opt" else {})}
    double, single = (tiny.lora(family, dtype=dtype, **own) for dtype in (torch.float64, torch.float32))
    inputs, plan, errors = turns(), tiny.plan(double, 0.6), {}
    with sparsify(double, plan, path="reference") as handle:
        exact, kept = tiny.loss_and_gradients(double, **inputs), handle.kept
    for name in ("reference", "fast"):
        with sparsify(single, plan, path=name) as handle:  # type: ignore[arg-type]
            handle.hold(kept)
            found = step(single, inputs, dtype)
            assert handle.paths == ({"fast": 1} if name == "fast" else {})
        errors[name] = distance(found, exact)
        errors[f"loss, {name}"] = abs(float(found[0]) - float(exact[0])) / float(exact[0])
        assert found[0].dtype == torch.float32
        assert {g.dtype for g in found[1].values()} == {torch.float32}
    assert 1e-5 < errors["fast"] <= 1.2 * errors["reference"], errors
    assert errors["loss, fast"] <= 2 * errors["loss, reference"] + 2**-8, errors


class Precisions(TorchDispatchMode):
    """In which dtypes products and attention are taken; less the rotary angles', outer products of two vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        factors = {"mm": args[:2], "bmm": args[:2], "addmm": args[1:3], "addmm_": args[1:3]}.get(name, ())
        if "scaled_dot_product" in name:
            factors = args[:3]
        if factors and factors[0].shape[-1] > 1:
            self.seen |= {factor.dtype for factor in factors}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_every_product_is_low_and_the_stream_is_not(family: str, attention: str) -> None:
    model = tiny.lora(family, dtype=torch.float32, attn_implementation=attention)
    view, streams = blocks.decoder(model), []
    assert view.final_norm is not None
    view.final_norm.register_forward_pre_hook(lambda _, args: streams.append(args[0].dtype))
    with Precisions() as precisions:
        step(model, turns())
    assert precisions.seen == {LOW}
    with lossless(model, path="fast") as handle, Precisions() as precisions:
        step(model, turns())
        assert precisions.seen == {LOW} and handle.paths == {"fast": 1}
    assert streams == [torch.float32] * 2


def test_double_precision_is_left_alone_as_autocast_does() -> None:
    model, plan = tiny.lora(), tiny.plan(tiny.lora(), 0.6)
    with torch.autocast("cpu", LOW):
        expected = run(model, turns(), "reference", plan)
        assert tiny.close(run(model, turns(), "fast", plan), expected)


def test_checkpointing_repeats_the_precision() -> None:
    model, found = tiny.lora(dtype=torch.float32), []
    for checkpointed in (False, True):
        if checkpointed:
            tiny.checkpoint(model, reentrant=False)
        with sparsify(model, tiny.plan(model), path="fast"):
            found.append(step(model, packed()))
    assert tiny.close(found[0], found[1], 0.0)


def test_weights_are_cast_anew_and_never_kept() -> None:
    model = tiny.lora(dtype=torch.float32)
    with sparsify(model, tiny.plan(model), path="fast") as handle:
        first = step(model, turns())
        assert handle._fast is not None
        for weights in handle._fast.layout.weights:
            assert all(m.storage is not None and m.storage.dtype == torch.float32 for m in vars(weights).values())
        plain = step(model, turns(), None)
        assert tiny.close(step(model, turns()), first, 0.0) and not tiny.close(plain, first, 1e-4)


@pytest.mark.parametrize("wrapped", [True, False], ids=["PeftModel", "add_adapter"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_trainer_s_bf16(tmp_path: Path, wrapped: bool) -> None:
    """Also where accelerate puts autocast over the very forward that ours stands at."""
    found = []
    for path in ("reference", "auto"):
        model = tiny.lora(dtype=torch.float32)
        if not wrapped:
            torch.manual_seed(2)
            model = tiny.base(dtype=torch.float32)
            model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=tiny.ALL, init_lora_weights=False))
        with sparsify(model, tiny.plan(model, 0.6, dense_steps=0.25), path=path) as handle:  # type: ignore[arg-type]
            run = trainer(model, handle, tmp_path, bf16=True, max_steps=4)
            run.train()
            assert handle.forwards == {"dense (first steps)": 1, "sparse": 3}
            assert handle.paths == ({"fast": 4} if path == "auto" else {})
        found.append(losses(run))
    assert found[1] == pytest.approx(found[0], rel=2e-2)  # rounding decides between channels of nearly equal score
