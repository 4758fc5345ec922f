"""What stands at a `forward` while a model is sparse: the fast step where one is set, the module's own elsewhere.

It stands in two places, on the instance alone: at the causal LM's `forward`, which gives loss (and logits), and at
that of its stack of blocks, which gives hidden states. The second serves trainers that put a forward of their own
over the first, and read the hidden states themselves where there are labels: TRL with its fused head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import nn


def _called(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, outside of any graph that torch.compile makes of what is around it."""
    return function(*args)


eagerly: Callable[..., Any] = torch.compiler.disable(_called)


class StandIn:
    """Stands at the `forward` of `module`; `compute` gives the output of the step that is set, None where none is."""

    def __init__(self, module: nn.Module, compute: Callable[[], Any]) -> None:
        self.module = module
        self.compute = compute
        self.original = module.forward
        self.__signature__ = inspect.signature(self.original)  # Trainer and generate read it
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = eagerly(self.compute)
        return self.original(*args, **kwargs) if output is None else output

    @property
    def stands(self) -> bool:
        """Whether nothing was put over it since."""
        return vars(self.module).get("forward") is self

    @property
    def in_mixed_precision(self) -> bool:
        """Whether accelerate stands over it, which calls it under autocast and widens what comes out."""
        over = getattr(vars(self.module).get("forward"), "__wrapped__", None)
        return isinstance(over, ConvertOutputsToFp32) and inspect.unwrap(over) is self  # type: ignore[arg-type]

    def remove(self) -> None:
        """Leave the module its own forward, unless something else stands there now."""
        if self.stands:
            del self.module.forward
