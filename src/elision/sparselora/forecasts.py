"""What a fine-tuning run will cost, told before its first step.

A plan's saving depends on the data: output tokens stay dense, so a plan that halves the work on prompts of 500 tokens
and answers of 50 saves next to nothing where four tokens in five are outputs. `forecast` counts the operations of the
user's own batches under the plan and without it (flops.py), in the four ways in which such figures are quoted:
attention in full or at the half that is causal, with the output head or without.

The speedup is that of the operations, dense first steps included, attention causal, head included, with everything that
is lossless left out on both sides. Time per operation is taken to be the same for all of them, which flatters
sparsity: gathers, selection and smaller products cost time and no operations. So it is an upper bound;
`elision sparselora bench` times real steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from elision.blocks import decoder
from elision.errors import InputError
from elision.facts import ModelFacts
from elision.sparselora import flops, tokens
from elision.sparselora.flops import Adapter, Cost, Shape, Workload
from elision.sparselora.obstacles import condition, model_obstacle
from elision.sparselora.plan import SparsityPlan

RANK = 32  # of the LoRA that a model without adapters is taken to get on Q, K, V and O

FIGURES = {  # names of the shares of operations, and how Cost.total counts them
    "full": {"head": True, "causal": False},
    "half": {"head": True, "causal": True},
    "full, without head": {"head": False, "causal": False},
    "half, without head": {"head": False, "causal": True},
}


@dataclass(frozen=True)
class Forecast:
    """Of a run over the given data under a plan.

    Attributes:
        output_share: of the tokens that are computed, those that stay dense because they are outputs.
        flops: operations of the run over those of dense LoRA, by FIGURES.
        speedup: over dense LoRA, by operations.
        obstacle: why the model, as it stands, trains on the reference path; None: it does not, or has no adapters yet.
        condition: what else training off the reference path needs, "under autocast to bfloat16"; None: nothing.
    """

    output_share: float
    flops: Mapping[str, float]
    speedup: float
    obstacle: str | None = None
    condition: str | None = None

    def line(self) -> str:
        """One line for people."""
        if self.obstacle is not None:
            return (
                f"expect no speedup: {self.obstacle}, so training takes the reference path, which is exact and slower "
                f"than dense training; the fast path would need {self.flops['full']:.0%} of dense LoRA's operations"
            )
        return (
            ("" if self.condition is None else f"{self.condition}, ")
            + f"expect at most {self.speedup:.2f}x over dense LoRA that computes no padding and no unread logits "
            "either: "
            f"{self.flops['full']:.0%} of its operations "
            f"({self.flops['half']:.0%} with causal attention, {self.flops['full, without head']:.0%} without the "
            f"output head); {self.output_share:.0%} of the tokens are outputs and stay dense"
        )


def forecast(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], plan: SparsityPlan) -> Forecast:
    """What fine-tuning `model` on such `batches` under `plan` costs.

    A model without adapters is taken to get LoRA of rank 32 on Q, K, V and O.

    Raises:
        InputError: a batch without labels, nothing to learn in any of them, or a plan for another model.
    """
    plan.check(ModelFacts.of(model))
    told = compare(Shape.of(model), workloads(batches), adapters_or_usual(model), plan)
    if not any(isinstance(module, LoraLayer) for module in model.modules()):
        return told
    view = decoder(model)
    return replace(told, obstacle=model_obstacle(model, view), condition=condition(view))


def compare(
    shape: Shape, works: Sequence[Workload], adapters: Sequence[Sequence[Adapter]], plan: SparsityPlan
) -> Forecast:
    """`forecast`, of batches of known size."""
    dense, sparse = Cost(), Cost()
    for work in works:
        dense += flops.step(shape, work, adapters)
        sparse += flops.step(shape, under(work, plan), adapters, plan)
    first = plan.dense_steps
    shares = {
        name: first + (1 - first) * sparse.total(**how) / dense.total(**how)  # type: ignore[arg-type]
        for name, how in FIGURES.items()
    }
    tokens_in_all = sum(work.tokens for work in works)
    outputs = 1 - sum(work.context for work in works) / tokens_in_all
    return Forecast(outputs, shares, 1 / shares["half"])


def ideals(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], plan: SparsityPlan) -> dict[str, float]:
    """Speedups that the operations of a step alone would allow, over LoRA as PEFT runs it, by stopwatch's variants.

    Raises:
        InputError: as `forecast`.
    """
    plan.check(ModelFacts.of(model))
    shape, adapters = Shape.of(model), adapters_or_usual(model)
    padded, fast = workloads(batches, padded=True), workloads(batches)

    def operations(works: Iterable[Workload], under_plan: SparsityPlan | None = None) -> float:
        return sum(flops.step(shape, work, adapters, under_plan).total(causal=True) for work in works)

    whole = operations(padded)
    sparse = operations([under(work, plan) for work in fast], plan)
    return {"LoRA": 1.0, "dense + lossless": whole / operations(fast), "sparse + lossless": whole / sparse}


def under(work: Workload, plan: SparsityPlan) -> Workload:
    """`work` as `plan` has it: in the ablation with sparse outputs every token is sparse."""
    return work if plan.dense_outputs else replace(work, context=work.tokens, last_block=False)


def workloads(batches: Iterable[Mapping[str, Tensor]], padded: bool = False) -> list[Workload]:
    """Sizes of batches, with everything left out that is lossless to leave out; `padded`: with nothing left out.

    Raises:
        InputError: no batch, one without labels or with what is no tensor, or none with anything to learn.
    """
    found = []
    for number, batch in enumerate(batches):
        batch = tokens.read(batch, f"batch {number}")
        if "labels" not in batch:
            raise InputError(f"batch {number} has no labels, which tell context from output: give batches with labels")
        given = [batch[name].cpu() if name in batch else None for name in ("attention_mask", "position_ids")]
        labels = batch["labels"].cpu()
        kinds, segment = tokens.classify(labels, *given), tokens.segments(labels, *given)
        if bool(kinds.loss_bearing.any()):
            found.append(Workload.of(kinds, padded=True) if padded else Workload.fast(kinds, segment))
    if not found:
        raise InputError("the data has no label to predict: give prompts with answers")
    return found


def adapters_or_usual(model: nn.Module) -> tuple[tuple[Adapter, ...], ...]:
    """The adapters of `model`, or, where it has none, LoRA of the usual rank on Q, K, V and O."""
    own = flops.adapters_of(model)
    return own if any(own) else flops.uniform_adapters(Shape.of(model), RANK)
