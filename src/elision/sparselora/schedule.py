"""The callback that keeps the first steps of transformers' Trainer dense (METHODS 1.3)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from elision.sparselora.apply import SparseHandle

logger = logging.getLogger(__name__)


def schedule(handle: SparseHandle) -> TrainerCallback:
    """The callback that tells `handle` at the start of every optimizer step how far training is.

    Trainer resumes a callback by building it anew from its class and exported state, without arguments: so the class
    itself knows its handle.
    """
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class SparsitySchedule(TrainerCallback, ExportableState):
        @property
        def draws(self) -> int:
            return handle.draws

        @draws.setter
        def draws(self, value: int) -> None:
            handle.draws = value

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            handle.step(min(1.0, state.global_step / max(1, state.max_steps)))
            if state.is_world_process_zero:
                logger.info(handle.summary())

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            handle.step(min(1.0, state.global_step / max(1, state.max_steps)))

        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"draws": self.draws}}

    return SparsitySchedule()
