"""What results.json of a run holds: the contract between whoever measures and whoever reports.

Every section may be missing and unknown keys are ignored, so a page can be made of a run that is half done or of a
newer version. What is there is checked before anything is drawn: a page is whole or absent.

Rates and accuracies are shares (0 to 1); sensitivities are in percent of the dense perplexity (maths: Which blocks).
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from elision.errors import InputError

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Loss = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]  # null: it diverged

LORA = "LoRA"
SPARSE = "SparseLoRA"
RANDOM = "random channels"
NO_FFN = "no context FFN"

TIERS = ("in-sensitive", "sensitive", "extremely sensitive")


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Variant(_Part):
    """One way to fine-tune, on the same data with the same seeds as the others."""

    name: str
    losses: list[tuple[int, Loss]] = []  # (step, training loss)
    test_loss: FiniteFloat | None = None
    accuracy: Share
    accuracy_low: Share  # 95% interval
    accuracy_high: Share
    swapped_accuracy: Share | None = None  # the context's facts are another problem's
    correct: list[Literal[0, 1]] = []  # one a test problem
    flops: Annotated[FiniteFloat, Field(gt=0)]  # counted, of the whole run
    flops_ratio: Annotated[FiniteFloat, Field(gt=0)]  # to LoRA's
    seconds: Annotated[FiniteFloat, Field(ge=0)]

    @model_validator(mode="after")
    def _interval_holds_its_value(self) -> Self:
        if not self.accuracy_low <= self.accuracy <= self.accuracy_high:
            raise ValueError(
                f"accuracy {self.accuracy} is not between accuracy_low {self.accuracy_low} "
                f"and accuracy_high {self.accuracy_high}"
            )
        return self


class Pair(_Part):
    """Accuracy of `a` minus accuracy of `b` on the same problems, with its 95% interval."""

    a: str
    b: str
    difference: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat

    @property
    def tells_apart(self) -> bool:
        """The interval leaves out 0."""
        return self.low > 0 or self.high < 0


class LayerPlan(_Part):
    """Sparsity of each layer, by part."""

    ffn: list[Share]
    qk: list[Share]
    vo: list[Share]

    @model_validator(mode="after")
    def _same_depth(self) -> Self:
        if not len(self.ffn) == len(self.qk) == len(self.vo) > 0:
            raise ValueError(f"ffn, qk and vo list {len(self.ffn)}, {len(self.qk)} and {len(self.vo)} layers")
        return self


class Example(_Part):
    """One test problem and what every variant answered."""

    prompt: str
    expected: str
    answers: dict[str, str] = {}


class FineTune(_Part):
    """One problem family, learned by several variants."""

    family: str
    task: str
    train_problems: Count
    test_problems: Count
    majority_rate: Share
    base_accuracy: Share | None = None
    variants: Annotated[list[Variant], Field(min_length=1)]
    paired: list[Pair] = []
    plan: LayerPlan | None = None
    example: Example | None = None

    def variant(self, name: str) -> Variant | None:
        """The variant of that name, if it was run."""
        return next((variant for variant in self.variants if variant.name == name), None)

    def pair(self, a: str, b: str) -> Pair | None:
        """The comparison of `a` with `b`, turned round where it was stored as `b` with `a`."""
        for pair in self.paired:
            if (pair.a, pair.b) == (a, b):
                return pair
            if (pair.a, pair.b) == (b, a):
                return Pair(a=a, b=b, difference=-pair.difference, low=-pair.high, high=-pair.low)
        return None


class Ranks(_Part):
    """What dropping syncs costs one model on one number of ranks; nothing healed."""

    ranks: Annotated[int, Field(ge=1)]
    sensitivities: Annotated[list[Loss], Field(min_length=1)]  # of each block, % of the dense perplexity
    order: list[int]  # blocks by ascending sensitivity
    perplexities: list[Loss]  # with the first k = 0..L of that order dropped
    chosen: Count | None  # the k that the budget allows; None: the plan is `other` than the first k
    max_loss: Annotated[FiniteFloat, Field(ge=0)] | None = None  # the budget, if it was one: 0.01 is +1% perplexity
    # A plan that mixes treatments, or was edited: blocks by how their sync is spared, and the increase of perplexity on
    # held-out text, where it was verified.
    other: dict[Literal["dropped", "int8", "skipped"], list[int]] = {}
    other_cost: FiniteFloat | None = None
    healed_cost: FiniteFloat | None = None  # expected after healing that is planned and still to be done

    @model_validator(mode="after")
    def _one_value_a_block(self) -> Self:
        layers = self.layers
        if sorted(self.order) != list(range(layers)):
            raise ValueError(f"order {self.order} does not name each of {layers} blocks once")
        if len(self.perplexities) != layers + 1:
            raise ValueError(f"perplexities has {len(self.perplexities)} values, {layers} blocks need {layers + 1}")
        if self.chosen is not None and self.chosen > layers:
            raise ValueError(f"chosen {self.chosen} is more than {layers} blocks")
        if not self.perplexities[0] > 0:
            raise ValueError(f"perplexities[0] {self.perplexities[0]} is not a perplexity")
        return self

    @property
    def layers(self) -> int:
        """Number of blocks L."""
        return len(self.sensitivities)

    @property
    def increases(self) -> list[float]:
        """Increase of perplexity with k = 0..L syncs dropped, as a share of the dense perplexity."""
        return [perplexity / self.perplexities[0] - 1 for perplexity in self.perplexities]

    @property
    def dropped(self) -> list[int]:
        """The blocks of the plan whose syncs are left out, in the model's order."""
        return sorted(self.order[: self.chosen] if self.chosen is not None else self.other.get("dropped", []))

    @property
    def cost(self) -> float | None:
        """Increase of perplexity under the plan, as a share; None where it was not measured."""
        return self.other_cost if self.chosen is None else self.increases[self.chosen]


class SyncPointDrop(_Part):
    """One model's sensitivities and zero-shot curves."""

    model: str
    text: str
    tokens: Count
    dense_perplexity: Annotated[FiniteFloat, Field(gt=0)]
    ranks: Annotated[list[Ranks], Field(min_length=1)]
    # Bounds of the tiers in % of the dense perplexity. The paper does not state its own. Ours follow from the usual
    # budget of 1%: five blocks at 0.2% still fit into it, a block beyond 5% is far outside it alone.
    tiers: tuple[FiniteFloat, FiniteFloat] = (0.2, 5.0)

    @model_validator(mode="after")
    def _like_ranks(self) -> Self:
        if len({each.layers for each in self.ranks}) > 1:
            raise ValueError(f"ranks list {[each.layers for each in self.ranks]} blocks for one model")
        if not 0 < self.tiers[0] < self.tiers[1]:
            raise ValueError(f"tiers {self.tiers} are not two ascending bounds above 0")
        return self

    def tier(self, sensitivity: float) -> int:
        """0, 1 or 2: the place in TIERS of a block with this sensitivity."""
        return 0 if sensitivity <= self.tiers[0] else 1 if sensitivity <= self.tiers[1] else 2


class Bounds(_Part):
    """An estimate with its 95% interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def tells_apart(self) -> bool:
        """The interval is known and leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


class Measure(Bounds):
    """One number of `elision eval`; `change` is its paired difference to the baseline, relative for perplexity."""

    task: str
    metric: str
    count: Count = 0
    better: Literal["higher", "lower"] = "higher"
    baseline: float | None = None
    change: Bounds | None = None
    relative: bool = False
    model: str = ""  # of several runs on one page, which


class Training(_Part):
    """The loss of one fine-tuning run, and what it took."""

    name: str
    losses: Annotated[list[tuple[int, Loss]], Field(min_length=1)]
    flops_ratio: Annotated[FiniteFloat, Field(gt=0)] | None = None  # to plain LoRA's
    seconds: Annotated[FiniteFloat, Field(ge=0)] | None = None
    plan: LayerPlan | None = None


class Point(_Part):
    """One way of saving: how much it saves (a share) and what it costs (a share of the dense value)."""

    name: str
    saving: FiniteFloat
    cost: FiniteFloat
    low: FiniteFloat | None = None  # of the cost
    high: FiniteFloat | None = None
    kind: Literal["plan", "chosen", "control"] = "plan"


class Tradeoff(_Part):
    """Quality against saving: the plans that were measured, the chosen one among them, and the controls."""

    name: str
    saving: str  # of what: "FLOPs of a step", "syncs"
    cost: str  # in what: "perplexity", "validation loss"
    points: Annotated[list[Point], Field(min_length=1)]


class LayerSensitivity(_Part):
    """What sparsity in one layer costs, by part, in % of the dense loss; `bounds` separate the tiers."""

    name: str
    parts: dict[str, Annotated[list[Loss], Field(min_length=1)]]
    bounds: tuple[FiniteFloat, FiniteFloat] | None = None

    @model_validator(mode="after")
    def _same_depth(self) -> Self:
        if len({len(values) for values in self.parts.values()}) != 1:
            raise ValueError(f"parts list {[len(values) for values in self.parts.values()]} layers for one model")
        return self


class StepTime(_Part):
    """One fine-tuning step, timed; `ideal` is the speedup that the counted operations allow."""

    variant: str
    shape: str
    output_share: Share | None = None
    device: str = ""
    step_ms: Annotated[FiniteFloat, Field(gt=0)]
    speedup: Annotated[FiniteFloat, Field(gt=0)] | None = None
    ideal: Annotated[FiniteFloat, Field(gt=0)] | None = None
    peak_mb: Annotated[FiniteFloat, Field(ge=0)] | None = None
    breakdown: dict[str, Annotated[FiniteFloat, Field(ge=0)]] | None = None  # ms by part of the step


class Latency(_Part):
    """One serving measurement; `ideal_ms` is all syncs' time less what the dropped ones take."""

    variant: str
    phase: str  # "decode", "prefill 512"
    link: str
    ranks: Count = 0
    ms: Annotated[FiniteFloat, Field(gt=0)]
    ideal_ms: FiniteFloat | None = None


class AllReduce(_Part):
    """An all-reduce of so many bytes, timed, and what the fitted alpha and beta say of it."""

    bytes: Annotated[int, Field(gt=0)]
    seconds: Annotated[FiniteFloat, Field(gt=0)]
    fitted: Annotated[FiniteFloat, Field(gt=0)]


class Links(_Part):
    """The links between ranks as `elision spd probe` found them: seconds, and seconds a byte that leaves a rank."""

    name: str = "this machine"
    ranks: Count
    alpha: Annotated[FiniteFloat, Field(ge=0)]
    beta: Annotated[FiniteFloat, Field(ge=0)]
    all_reduces: Annotated[list[AllReduce], Field(min_length=1)]


class Results(_Part):
    """Everything that one run measured."""

    title: str = "Results"
    settings: dict[str, str | bool | int | float | None] = {}
    finetune: FineTune | None = None
    spd: list[SyncPointDrop] = []
    training: list[Training] = []
    evaluation: list[Measure] = []
    tradeoffs: list[Tradeoff] = []
    layers: list[LayerSensitivity] = []
    plans: dict[str, LayerPlan] = {}
    steps: list[StepTime] = []
    latency: list[Latency] = []
    links: list[Links] = []


def check(results: Any, where: str = "results") -> Results:
    """Results as a checked value; `where` names their source in the error.

    Raises:
        InputError: a field is missing, of the wrong kind or contradicts another.
    """
    if isinstance(results, Results):
        return results
    try:
        return Results.model_validate(results)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        reason = " ".join(first["msg"].removeprefix("Value error, ").split())
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise InputError(f"{where}: {place}: {reason}{more}: run the measurement again to write it anew") from None
