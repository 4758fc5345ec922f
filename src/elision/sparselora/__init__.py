"""SparseLoRA: LoRA fine-tuning that computes only the channels of the frozen base that a batch's context needs.

After Khaki et al., "SparseLoRA: Accelerating LLM Fine-Tuning with Contextual Sparsity", ICML 2025, PMLR
267:29768-29783 (https://proceedings.mlr.press/v267/khaki25a.html). What is sparse is the frozen branch, on context
tokens, while training; adapters and output tokens stay dense, and the result is an ordinary PEFT adapter.

    plan = calibrate(model, batches, flops=0.5, rehearse=others)  # or SparsityPlan.load, .uniform, .preset
    with sparsify(model, plan) as sparse:
        Trainer(model, ..., callbacks=[sparse.schedule]).train()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elision.sparselora.apply import SparseHandle, lossless, sparsify
    from elision.sparselora.calibration import calibrate
    from elision.sparselora.factors import Factors
    from elision.sparselora.forecasts import Forecast, forecast
    from elision.sparselora.plan import Calibration, ModelFacts, SparsityPlan
    from elision.sparselora.presets import load_predictor
    from elision.sparselora.rows import Elisions
    from elision.sparselora.trainers import keep_labels

__all__ = [
    "Calibration",
    "Elisions",
    "Factors",
    "Forecast",
    "ModelFacts",
    "SparseHandle",
    "SparsityPlan",
    "calibrate",
    "forecast",
    "keep_labels",
    "load_predictor",
    "lossless",
    "sparsify",
]

_HOME = {
    "Calibration": "plan",
    "Elisions": "rows",
    "Factors": "factors",
    "Forecast": "forecasts",
    "ModelFacts": "plan",
    "SparseHandle": "apply",
    "SparsityPlan": "plan",
    "calibrate": "calibration",
    "forecast": "forecasts",
    "keep_labels": "trainers",
    "load_predictor": "presets",
    "lossless": "apply",
    "sparsify": "apply",
}


def __getattr__(name: str) -> Any:
    """Import what is public where it is first used, so that a plan is read without torch."""
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
