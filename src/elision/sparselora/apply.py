"""sparsify(model, plan): SparseLoRA on a PEFT model in place, with a handle that undoes it.

Three seams, all of them module boundaries of this one model; nothing global is patched:

    the causal LM          a pre-hook reads labels, mask and position ids of the call and decides whether this forward
                           is sparse, and which of its tokens
    its stack of blocks    a pre-hook adds the decision to the keyword arguments that the stack hands to every block
    a block's attention    a pre-hook takes it out again, before the model's code sees it, and opens the block with it

and the frozen linear maps of pruned projections are exchanged for masked ones (reference.py). The decision travels as
an argument because gradient checkpointing runs blocks again during backward with the arguments of their forward: each
recomputation finds its own batch, also where a dense pass (DPO's reference, an evaluation) came in between. Attention
comes first in every block, so what it opens holds for the MLP behind it.

That is the reference path. Where it can, a training forward takes the fast path instead (fast.py): `forward` of the
causal LM, or of its stack, on this instance, is stood in for (standin.py), and computes the same loss and gradients
from the rows that matter. What it cannot do it names, and the forward goes through the modules as above;
`SparseHandle.paths` counts both.

A forward is dense in eval mode, without labels, with a key/value cache (generate), with adapters disabled, merged or
never trained (a reference policy), in the first steps of the schedule, and where no context token is left. Nothing
else depends on grad mode: reentrant checkpointing runs its forward under no_grad.

Where a trainer computes the loss itself, from logits (label smoothing, a loss function of its own), it keeps labels
from the model. Then they come as the argument `sparse_labels`, which `keep_labels` puts into every batch: it tells the
tokens apart, is taken out before the model sees it, and has the fast path give all logits.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from elision import blocks
from elision.errors import InputError
from elision.sparselora import tokens
from elision.sparselora.choices import BlockChoices, Kept, SparseBatch
from elision.sparselora.coverage import active_names, check_adapters, check_model, check_whole, idle
from elision.sparselora.factors import Factors, check_used, estimated
from elision.sparselora.fast import Fast, Step, checkpointing
from elision.sparselora.obstacles import condition
from elision.sparselora.plan import ModelFacts, SparsityPlan
from elision.sparselora.reference import ABSENT, MaskedLinear, masked
from elision.sparselora.rows import Elisions, arrange, between
from elision.sparselora.standin import StandIn, eagerly
from elision.sparselora.tokens import Given, TokenKinds
from elision.sparselora.trainers import LABELS, REMOVED, UNLABELLED, UNSCHEDULED, UNSEEN, announce, schedule

_ARGUMENT = "elision_sparse_batch"
logger = logging.getLogger(__name__)
Route = Literal["auto", "reference", "fast"]


def sparsify(
    model: nn.Module,
    plan: SparsityPlan,
    factors: Factors | str | Path | None = None,
    *,
    path: Route = "auto",
    elisions: Elisions | None = None,
) -> SparseHandle:
    """Make the LoRA fine-tuning of `model` sparse as `plan` says (maths: SparseLoRA), until the handle is removed.

    On the fast path a training forward with labels returns its loss and no logits: `output.logits` is None there,
    unless `elisions` asks for them. Forwards without labels, in eval mode or in generate are the model's own. A sparse
    model cannot be copied (copy.deepcopy raises InputError): copy it before, or when the handle is removed.

    Args:
        model: a PEFT model with LoRA adapters, or a transformers model with such adapters added.
        plan: what each layer leaves out.
        factors: of the SVD estimator, or the path of their file; None: computed here, if the plan needs them.
        path: "auto" takes the fast path where it applies and the reference elsewhere; "fast" raises where it does
            not apply; "reference" never takes it.
        elisions: what the fast path leaves out although that is exact; None: all of it.

    Raises:
        InputError: an uncovered family, a plan or factors that do not fit it, no adapter to train, an adapter or base
            that the method does not cover, or a model that is sparse already. The model is unchanged then.
    """
    if not isinstance(plan, SparsityPlan):
        raise InputError(f"plan is a {type(plan).__name__}, not a SparsityPlan: use SparsityPlan.load(path)")
    if path not in get_args(Route):
        raise InputError(f"path {path!r} is not known: use one of {', '.join(get_args(Route))}")
    view = blocks.decoder(model)
    if reason := blocks.refusal(view.model.config, "sparselora"):
        raise InputError(reason)
    plan.check(ModelFacts.of(model))
    check_model(view, plan)
    if isinstance(factors, str | Path):
        factors = Factors.load(factors)
    if any(estimated(plan, block.index, name) for block in view.blocks for name in block.projections):
        if factors is None and plan.selection == "whitened":
            raise InputError("selection 'whitened' needs factors made on data: give Factors.whitened(model, batches)")
        factors = factors or Factors.compute(model, plan.rank, plan)
        factors.check(view, plan)
    else:
        check_used(factors, plan)
    return SparseHandle(model, view, plan, factors, path, elisions or Elisions())


def lossless(model: nn.Module, elisions: Elisions | None = None, *, path: Route = "auto") -> SparseHandle:
    """Make the LoRA fine-tuning of `model` leave out what changes nothing (rows.py), and be dense otherwise.

    The same handle as `sparsify` gives, under a plan without sparsity: the baseline that sparsity is measured against.
    No schedule is needed.

    Raises:
        InputError: as `sparsify`.
    """
    return sparsify(model, SparsityPlan.uniform(model, 0.0, dense_steps=0.0), path=path, elisions=elisions)


class SparseHandle:
    """What `sparsify` did to a model, and the way back: `remove()`, or the end of a `with` block.

    Attributes:
        schedule: callback for transformers' Trainer that keeps the first steps dense.
        forwards: how many forwards were "sparse" and how many dense, by reason.
        paths: how many training forwards were "fast", and how many took the reference, by reason.
        kept: channels kept in the latest sparse forward, by (layer, projection).
    """

    def __init__(
        self,
        model: nn.Module,
        view: blocks.Decoder,
        plan: SparsityPlan,
        factors: Factors | None,
        path: Route,
        elisions: Elisions,
    ) -> None:
        self.plan = plan
        self.forwards: Counter[str] = Counter()
        self.paths: Counter[str] = Counter()
        self.schedule = schedule(self)
        self.draws = 0  # sparse forwards so far: the control "random" draws by it
        self._model = model
        self._view = view
        self._done: float | None = None  # share of the steps done; None: nobody has told
        self._untold = False  # whether a run began whose line is still to be said
        self._trains = False  # whether a forward in train mode came since the latest step
        self._warnings: set[str] = set()
        self._held: Kept | None = None
        self._batch: SparseBatch | None = None  # of the causal LM's forward that is running
        self._latest: SparseBatch | None = None
        self._stack: nn.Module = view.model.get_decoder()
        self._signature = inspect.signature(type(view.model).forward)
        self._exchanged: list[tuple[nn.Module, str, nn.Linear, MaskedLinear]] = []
        self._hooks: list[Any] = []
        self._choices: list[BlockChoices] = []
        self._path: Route = path
        self._fast: Fast | None = None
        self._standins: dict[str, StandIn] = {}
        self._step: tuple[str, Step] | None = None  # what the fast path is to compute, and at which forward
        self._trained = active_names(view.model)  # names of adapters that were, or are about to be, trained
        try:
            self._exchange(factors)
            if path != "reference":
                self._stand_in(elisions)
        except BaseException:
            self.remove()
            raise

    @property
    def kept(self) -> Mapping[tuple[int, str], Tensor]:
        return {} if self._latest is None else dict(self._latest.kept)

    def step(self, done: float) -> None:
        """Tell the schedule the share of optimizer steps done, in [0, 1]: for loops without a Trainer, once a step.

        The first training forward of a run then says `summary()`, once, in the main process.

        Raises:
            InputError: `done` is not in [0, 1].
        """
        if not 0.0 <= done <= 1.0:
            raise InputError(f"step({done!r}) is not in [0, 1]: give steps done / steps in all")
        if not self._hooks:
            self._warn(REMOVED)
        elif self._done is not None and done > self._done and not self._trains:
            self._warn(UNSEEN)
        self._trains = False
        self._untold = self._untold or self._done is None or done < self._done
        self._done = float(done)

    def hold(self, kept: Mapping[tuple[int, str], Tensor] | None) -> None:
        """Use these channels, as `kept` gave them, in every sparse forward from now on; None: choose again."""
        self._held = None if kept is None else dict(kept)

    def remove(self) -> None:
        """Put the model back as it was, bit for bit; does nothing the second time."""
        while self._hooks:
            self._hooks.pop().remove()
        while self._standins:
            self._standins.popitem()[1].remove()
        if self._fast is not None:
            self._fast.remove()
        self._fast = self._step = None
        originals = {id(stand_in): base for _, _, base, stand_in in self._exchanged}
        holders = [holder for holder, *_ in self._exchanged]
        for module in [*self._view.model.modules(), *holders]:  # merging moves a base; its old holder keeps it too
            for name, child in list(module.named_children()):
                if id(child) in originals:
                    setattr(module, name, originals[id(child)])
        for _, _, base, stand_in in self._exchanged:
            base.training = stand_in.training
        self._exchanged.clear()
        self._batch = self._latest = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Asked by the hooks of a model that is copied: nobody would hold the handle of the copy, to take it off."""
        raise InputError("model is sparse, and so would be a copy: copy it before sparsify, or remove() its handle")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def summary(self) -> str:
        """One line: what is sparse, what is dense and why, and what happened so far."""
        plan = self.plan
        line = (
            f"SparseLoRA, {plan.selection} selection: {plan.describe()}; dense: "
            + ("output tokens, " if plan.dense_outputs else "")
            + (f"the first {100 * plan.dense_steps:g}% of steps, " if plan.dense_steps else "")
            + "adapters, eval and generate"
            + self._place()
        )
        if self.forwards:
            line += "; forwards so far: " + ", ".join(f"{count} {what}" for what, count in self.forwards.most_common())
        if self.paths:
            line += "; training paths: " + ", ".join(f"{count} {what}" for what, count in self.paths.most_common())
        return line

    __str__ = summary

    def _place(self) -> str:
        """Where training forwards are computed, as the model stands now."""
        if not self._hooks:
            return "; removed"
        if self._fast is None:
            return "; on the reference path, as asked for"
        reason = self._fast.obstacle()
        if reason is not None:
            return f"; on the reference path ({reason})"
        asked = condition(self._view)
        return "; on the fast path" + (f" {asked}, else on the reference path" if asked else "")

    def _exchange(self, factors: Factors | None) -> None:
        stack = self._stack
        self._hooks += [
            self._view.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._view.model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
            stack.register_forward_pre_hook(self._hand_over, with_kwargs=True),
            stack.register_forward_hook(self._arrived),
        ]
        for block in self._view.blocks:
            choices = BlockChoices(block, self.plan, factors)
            self._choices.append(choices)
            maps: dict[tuple[nn.Module, str], dict[str, slice | None]] = {}
            for name, projection in block.projections.items():
                if self.plan.sparsity(block.index, name) > 0:
                    maps.setdefault(projection.slot, {})[name] = projection.rows
            for (holder, attribute), projections in maps.items():
                base = getattr(holder, attribute)
                stand_in = masked(base, choices, projections)
                self._exchanged.append((holder, attribute, base, stand_in))
                setattr(holder, attribute, stand_in)
                if base.bias is not None and not projections.keys().isdisjoint(ABSENT):
                    self._hooks.append(stand_in.wrapper.register_forward_hook(stand_in.without_bias))
            self._hooks.append(block.attention.register_forward_pre_hook(partial(_open, choices), with_kwargs=True))

    def _stand_in(self, elisions: Elisions) -> None:
        """Put forwards in front of the model's own, and of its stack's, that can take the fast path."""
        fast = Fast(self._model, self._view, self._choices, elisions)
        if self._path == "fast" and (reason := fast.obstacle()):
            raise InputError(_uncovered(reason))
        self._fast = fast
        for name, module in (("model", self._view.model), ("stack", self._stack)):
            if "forward" not in vars(module):
                self._standins[name] = StandIn(module, partial(self._compute, name))

    def _compute(self, name: str) -> Any:
        """The output of the step that is to be computed at this forward, once; None: there is none."""
        if self._step is None or self._fast is None or self._step[0] != name:
            return None
        (_, step), self._step, self._batch = self._step, None, None
        return self._fast.forward(step) if name == "model" else self._fast.hidden(step)

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if getattr(model, "_is_replica", False):  # threads would share this handle, and the original's forward
            raise InputError(
                "model runs in nn.DataParallel, as Trainer has it where it sees several GPUs: start one process a GPU "
                "with torchrun, or show it one GPU, CUDA_VISIBLE_DEVICES=0"
            )
        return eagerly(self._decided, model, args, kwargs)  # a graph would keep the first batch's decision

    def _decided(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self._batch = self._step = None
        self._trains = self._trains or model.training
        if self._untold and model.training:  # here and not before, for what autocast and wrappers change is known now
            self._untold = False
            announce(self.summary())
        call = self._signature.bind_partial(model, *args, **kwargs).arguments
        call = {**call.pop("kwargs", {}), **call}
        call.pop("self")
        labels = call.pop(LABELS, None)
        labels = labels if call.get("labels") is None else call["labels"]
        given = None if labels is None else Given(labels, call.get("attention_mask"), call.get("position_ids"))
        kinds, rows, reason = self._decide(model, call, labels, given)
        self.forwards[f"dense ({reason})" if rows is None else "sparse"] += 1
        if rows is not None:
            self._batch = self._latest = SparseBatch(rows, self.draws, dict(self._held or {}))
            self.draws += 1
        if given is not None and kinds is not None and self._path != "reference":
            self._route(call, given, kinds, rows)
        kwargs = {name: value for name, value in kwargs.items() if name != LABELS}
        if model.training and labels is not None and "use_cache" not in call and call.get("past_key_values") is None:
            kwargs["use_cache"] = False  # transformers tells packed rows apart only where it makes no cache
        return args, kwargs

    def _route(self, call: dict[str, Any], given: Given, kinds: TokenKinds, rows: Tensor | None) -> None:
        """Set the fast step of a training forward, or name why there is none."""
        assert self._fast is not None
        elisions, inside = self._fast.elisions, call.get("labels") is not None
        if not inside:
            elisions = replace(elisions, logits=False).effective()
        at, obstacle = self._obstacle(call, given)
        if obstacle is None and rows is not None and between(kinds, rows, elisions):
            obstacle = "sparse output tokens beside dense rows that are not left out"
        if obstacle is not None:
            if self._path == "fast":
                raise InputError(_uncovered(obstacle))
            self._count(f"reference ({obstacle})")
            return
        self._count("fast" if inside else "fast, with all logits (no labels in the call)")
        arranged = arrange(kinds, *given.on_cpu, rows, elisions)
        batch, sequence = kinds.dense.shape
        self._step = at, Step(call, arranged, self._batch, elisions, (batch, sequence))

    def _obstacle(self, call: dict[str, Any], given: Given) -> tuple[str, str | None]:
        """At which forward this training forward is computed, and why it takes the reference; None: it does not."""
        assert self._fast is not None
        model = self._standins.get("model")
        # 4-bit maps have a precision of their own to be compared with autocast's, which is not on yet
        mixed = model is not None and model.in_mixed_precision and not blocks.quantised(self._view.blocks[0].q.base)
        at = "model" if model is not None and (model.stands or mixed) else "stack"
        if at not in self._standins or not self._standins["stack"].stands:
            return at, f"a replaced forward of {'the model' if at == 'model' else 'its stack'}"
        if at == "stack" and call.get("fused_lm_head") is not True:  # TRL's, which reads what bears the loss
            return at, "a replaced forward of the model"
        return at, self._fast.obstacle(call, given)

    def _count(self, path: str) -> None:
        self.paths[path] += 1
        if self.paths[path] == 1 and path != "fast":
            slow = " (exact, but slower than dense training)" if path.startswith("reference") else ""
            logger.warning("SparseLoRA trains on the path: %s%s", path, slow)

    def _end(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self._batch = self._step = None

    def _hand_over(self, stack: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return None if self._batch is None else (args, {**kwargs, _ARGUMENT: self._batch})

    def _arrived(self, stack: nn.Module, args: tuple, output: Any) -> None:
        if self._batch is None:
            return
        if not self._batch.opened:
            raise RuntimeError(f"{type(stack).__name__} hands no keyword arguments to its attention: cannot be sparse")
        if output[0].requires_grad and any(checkpointing(block) for block in self._view.blocks):
            output[0].register_hook(self._still_sparse)

    def _still_sparse(self, gradient: Tensor) -> None:
        """Before blocks run again in backward: without our hooks they would be dense, and gradients of no forward."""
        if not self._hooks:
            raise InputError(
                "backward under gradient checkpointing comes after the handle was removed: call it in the with block"
            )

    def _decide(
        self, model: nn.Module, call: dict[str, Any], labels: Tensor | None, given: Given | None
    ) -> tuple[TokenKinds | None, Tensor | None, str]:
        """Kinds of the tokens of a training forward with a loss (None: it is none), mask of its sparse tokens
        (batch, sequence), and where that is None the reason why this forward is dense; on the CPU.
        """
        if not model.training:
            return None, None, "eval mode"
        check_whole(self._view)  # Trainer partitions after `sparsify`, before its first step
        if labels is None or given is None:
            if torch.is_grad_enabled() and self._done is not None:
                self._warn(UNLABELLED)
            return None, None, "no labels in the call"
        inputs = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
        if inputs is not None and labels.shape != inputs.shape[:2]:
            shapes = f"{tuple(labels.shape)}, the inputs {tuple(inputs.shape[:2])}"
            raise InputError(f"labels have shape {shapes}: give them the same (batch, sequence)")
        if call.get("past_key_values") is not None:
            return None, None, "a key/value cache in the call"
        if reason := idle(model):
            return None, None, reason
        active = active_names(model)
        if torch.is_grad_enabled():
            self._trained |= active
        elif not active <= self._trained:  # a copy of the first adapter, say, that DPO compares with
            return None, None, "an adapter that is not trained"
        kinds = tokens.classify(*given.on_cpu)
        if not bool(kinds.loss_bearing.any()):
            return None, None, "no label to predict"
        if self._done is None and self.plan.dense_steps > 0:
            self._warn(UNSCHEDULED)
            return kinds, None, "the schedule was never told a step"
        if (self._done or 0.0) < self.plan.dense_steps:
            return kinds, None, "first steps"
        rows = kinds.kept if self.plan.dense_outputs else (kinds.context | kinds.dense) & ~kinds.elided
        if not bool(rows.any()):
            return kinds, None, "no context token before an output token"
        check_adapters(self._view, self.plan)
        return kinds, rows, ""

    def _warn(self, message: str) -> None:
        """Once for each message."""
        if message not in self._warnings:
            self._warnings.add(message)
            warnings.warn(message, stacklevel=2)


def _uncovered(obstacle: str) -> str:
    return f"path='fast' does not cover {obstacle}: use path='auto', which takes the reference there"


def _open(choices: BlockChoices, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Attention's pre-hook: the block is in the batch that came with the arguments, or dense."""
    choices.batch = kwargs.get(_ARGUMENT)
    if choices.batch is None:
        return None
    choices.batch.opened = True
    return args, {name: value for name, value in kwargs.items() if name != _ARGUMENT}
