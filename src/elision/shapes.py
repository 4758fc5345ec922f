"""Shape annotations of the pure functions: jaxtyping's where it is installed, inert otherwise.

Serving (the vLLM plugin) needs torch, transformers and safetensors and nothing more; the shapes are checked in
tests only, where jaxtyping is always present.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ImportError:

        class _Inert:
            def __class_getitem__(cls, item):
                return item[0]

        Bool = Float = Int = _Inert

__all__ = ["Bool", "Float", "Int"]
