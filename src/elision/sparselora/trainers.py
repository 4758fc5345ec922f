"""What trainers are given: the schedule that tells a handle how far training is, labels beside a batch's own, and the
line that says what is sparse.

The callback is for transformers' Trainer, and so for TRL's, which are Trainers. The state that a checkpoint carries is
how many sparse forwards there were, by which the control "random" draws; how far training is, Trainer knows itself.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import distributed
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

if TYPE_CHECKING:
    from elision.sparselora.apply import SparseHandle

LABELS = "sparse_labels"  # argument of the model's call: labels that only tell its tokens apart
logger = logging.getLogger(__name__)

# Why training is dense although it is meant to be sparse: said once a handle.
UNLABELLED = (
    "SparseLoRA is dense where a training call has no labels: give the Trainer "
    "data_collator=elision.sparselora.keep_labels(collate), or the model sparse_labels=labels"
)
UNSCHEDULED = (
    "SparseLoRA stays dense until its schedule knows how far training is: pass callbacks=[handle.schedule] "
    "to the Trainer, or call handle.step(done) in your loop"
)
UNSEEN = (
    "SparseLoRA saw no forward in train mode since the last step, so that one was dense: call model.train() before the "
    "loop and model(**batch) in it, not model.forward or a module inside of it"
)
REMOVED = "SparseLoRA was removed from the model, so training is dense: train within the with block"


def schedule(handle: SparseHandle) -> TrainerCallback:
    """The callback that tells `handle` at the start of every optimizer step how far training is.

    Trainer resumes a callback by building it anew from its class and exported state, without arguments: so the class
    itself knows its handle.
    """

    class SparsitySchedule(TrainerCallback, ExportableState):
        @property
        def draws(self) -> int:
            return handle.draws

        @draws.setter
        def draws(self, value: int) -> None:
            handle.draws = value

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            handle.step(min(1.0, state.global_step / max(1, state.max_steps)))

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            handle.step(min(1.0, state.global_step / max(1, state.max_steps)))

        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"draws": self.draws}}

    return SparsitySchedule()


def announce(line: str) -> None:
    """Say `line` once for all processes: in this library's log where the program shows that at INFO, else on stderr.

    Python shows no INFO unless a program asks for it, and setting up its logging is not for a library.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0:
        return
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info(line)
    else:
        print(line, file=sys.stderr, flush=True)


def keep_labels(collate: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """`collate`, with a batch's labels once more as `sparse_labels`, for trainers that keep labels from the model.

    For Trainer's label smoothing and `compute_loss_func`: without it such steps are dense, and say so. Loops of one's
    own that compute their loss from logits pass `model(..., sparse_labels=labels)` themselves.
    """
    return partial(_keep_labels, collate)


def _keep_labels(collate: Callable[[Any], dict[str, Any]], rows: Any) -> dict[str, Any]:
    batch = collate(rows)
    return {**batch, LABELS: batch["labels"]} if "labels" in batch else batch
