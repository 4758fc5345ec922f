"""What a plan remembers of the model that it was made for: its geometry, fact by fact.

Facts are kept one by one instead of hashed, so that another model is refused by naming what differs. Weights are not
among them: a plan outlives a fine-tuning. They are integers that any runtime can state about its model; this file
needs the standard library only, and what looks at a model imports torch when it is called.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

from elision.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from elision.blocks import Decoder


@dataclass(frozen=True)
class ModelFacts:
    """The geometry that a plan depends on. `type` is the config's model_type."""

    type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int

    def __post_init__(self) -> None:
        if not isinstance(self.type, str):
            raise InputError(f"type {self.type!r} is not a string: give the config's model_type")
        for fact in fields(self)[1:]:
            value = getattr(self, fact.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{fact.name} {value!r} is not a whole number of at least 1: give one")

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The facts of `model`, a transformers causal LM or a PEFT model around one.

        Raises:
            InputError: the model is of no supported family.
        """
        from elision import blocks

        return cls.seen(blocks.decoder(model))

    @classmethod
    def seen(cls, view: Decoder) -> Self:
        """The facts of a model that is viewed already."""
        block = view.blocks[0]
        return cls(
            type=view.config.model_type,
            layers=len(view.blocks),
            heads=block.heads,
            kv_heads=block.kv_heads,
            head_dim=block.head_dim,
            hidden=block.hidden_size,
            intermediate=block.intermediate_size,
        )

    def check(self, found: ModelFacts) -> None:
        """Raise InputError, naming what differs, where a plan made for these facts meets a model with others."""
        for fact in fields(ModelFacts):
            planned, other = getattr(self, fact.name), getattr(found, fact.name)
            if planned != other:
                raise InputError(
                    f"plan was made for a model with {fact.name} {planned}, this model has {fact.name} {other}: "
                    "calibrate a plan for this model"
                )
