"""How the weight of a linear map is quantised, and the matrix that it stands for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def quantised(base: nn.Module) -> str | None:
    """How the weight of a linear map is quantised: "nf4", "fp4", "int8", "int4" (torchao, weight only) or another class
    of torchao's; None: not, as far as is known.
    """
    weight: Any = getattr(base, "weight", None)
    if type(weight).__name__ == "Params4bit":
        return str(weight.quant_type)
    if not type(weight).__module__.startswith("torchao."):
        return None
    name = type(weight).__name__
    activations = {"Int8Tensor": "act_quant_kwargs", "IntxUnpackedToInt8Tensor": "activation_quantization"}
    if name not in activations or getattr(weight, activations[name], None) is not None:
        return f"torchao's {name}"
    return str(getattr(weight, "target_dtype", "int8")).removeprefix("torch.")


def matrix(base: nn.Module) -> Tensor:
    """(out_features, in_features): the weight of a linear map, dequantised anew where it is quantised."""
    module: Any = base
    if quantised(base) is None:
        return module.weight
    from peft.utils.integrations import dequantize_module_weight  # not at import: a serving process has no PEFT

    return dequantize_module_weight(module).detach().reshape(module.out_features, module.in_features)
