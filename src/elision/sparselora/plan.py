"""SparsityPlan: how much of each layer's frozen base a SparseLoRA step leaves out, and how it chooses.

A plan is a value: made by calibration, by `SparsityPlan.uniform` or by hand, saved as readable JSON. It holds one
sparsity per layer for each of the three parts of a block whose channels are pruned together (maths: Which channels):

    ffn   channels between gate/up and down
    qk    channels of the queries and keys
    vo    channels of the values, and with them the inputs of the output projection

and the switches of the method. The geometry of the model that it was made for travels with it (facts.py), so that
another model is refused. Weights are not among the facts: a plan outlives the fine-tuning that it serves (the SVD
factors, which do depend on weights, are checked on their own).

This module needs the standard library only; what looks at a model imports torch when it is called.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from elision import files
from elision.errors import InputError
from elision.facts import ModelFacts

if TYPE_CHECKING:
    from torch import nn

VERSION = 1

Part = Literal["ffn", "qk", "vo"]
PARTS: tuple[Part, ...] = get_args(Part)
PROJECTIONS: dict[Part, tuple[str, ...]] = {"ffn": ("gate", "up", "down"), "qk": ("q", "k"), "vo": ("v", "o")}
PART_OF: dict[str, Part] = {name: part for part, names in PROJECTIONS.items() for name in names}

Selection = Literal["svd", "whitened", "sampled", "oracle", "weights", "random", "no-ffn"]
SELECTIONS: tuple[Selection, ...] = get_args(Selection)


@dataclass(frozen=True)
class Calibration:
    """Where a plan's sparsities come from: what was measured, under which budget, and what is to be expected.

    Attributes:
        data: fingerprint of the batches.
        output_tokens: that the loss was measured on, and `output_share`, their share of all tokens.
        loss: of the dense model, in nats per output token.
        grid: sparsities that were tried, ascending.
        ffn, qk, vo: by layer and grid, the increase of the loss with that part of that layer alone sparse.
        budget: "flops", "time" or "max_loss", and `limit`, its value.
        expected_increase: of the loss under the plan, the sum of what its steps cost by the curves, each measured
            in the company of the legs before; `measured_increase` with all parts sparse together.
        flops: operations of the whole run over those of dense LoRA, dense first steps included: "full" and with
            attention at its causal "half", each also "without head".
        speedup: expected of a run on such data over dense LoRA, both without what is lossless to leave out.
        speedup_from: "operations" (an upper bound: time per operation is taken to be the same) or "timed steps".
        versions: of what measured it.
        rehearsed: dense steps that the model had before it was measured, taken back afterwards.
    """

    data: str
    output_tokens: int
    output_share: float
    loss: float
    grid: tuple[float, ...]
    ffn: tuple[tuple[float, ...], ...]
    qk: tuple[tuple[float, ...], ...]
    vo: tuple[tuple[float, ...], ...]
    budget: str
    limit: float
    expected_increase: float
    measured_increase: float
    flops: Mapping[str, float]
    speedup: float
    speedup_from: str
    versions: Mapping[str, str]
    rehearsed: int = 0

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "grid", tuple(map(float, self.grid)))
            for part in PARTS:
                object.__setattr__(self, part, tuple(tuple(map(float, curve)) for curve in getattr(self, part)))
        except (TypeError, ValueError):
            raise InputError("curves are not lists of numbers: calibrate again") from None
        for part in PARTS:
            if any(len(curve) != len(self.grid) for curve in getattr(self, part)):
                raise InputError(
                    f"{part} has a curve of other length than the grid's {len(self.grid)}: calibrate again"
                )


@dataclass(frozen=True)
class SparsityPlan:
    """Sparsities by layer and part, and the switches of the method (maths: SparseLoRA).

    Attributes:
        model: geometry of the model that the plan is for.
        ffn, qk, vo: one sparsity in [0, 1) per layer, the share of channels left out on context tokens; 0 is dense.
        selection: how channels are scored (estimator.py). "sampled", the default, is the exact criteria on some
            of the context tokens, "oracle" on all of them; "svd" is the paper's way, "whitened" the same from
            factors made on calibration data, "weights" the norms of the weights alone. Two controls for claims of
            quality: "random" draws channels anew for every batch, "no-ffn" leaves out the whole base FFN of context
            tokens in every layer whose ffn sparsity is above 0 (Q, K, V, O as with "sampled").
        rank: of the SVD factors.
        dense_steps: share of the optimizer steps, from the first on, that run dense; in [0, 1].
        rotary_pairs: keep or drop both halves of a rotary pair of Q and K together.
        dense_outputs: output tokens take the dense path. False is the ablation in which all tokens are sparse.
        seed: of the control "random".
        calibration: what the sparsities were read off; None: made by hand.

    Raises:
        InputError: a value that is out of its range or of the wrong kind, or a list of another length than the model.
    """

    model: ModelFacts
    ffn: tuple[float, ...]
    qk: tuple[float, ...]
    vo: tuple[float, ...]
    selection: Selection = "sampled"
    rank: int = 8
    dense_steps: float = 0.05
    rotary_pairs: bool = False
    dense_outputs: bool = True
    seed: int = 0
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, ModelFacts):
            raise InputError(f"model {self.model!r} is not ModelFacts: use ModelFacts.of(model)")
        for part in PARTS:
            object.__setattr__(self, part, _sparsities(getattr(self, part), part, self.model.layers))
        if self.selection not in SELECTIONS:
            raise InputError(f"selection {self.selection!r} is not known: use one of {', '.join(SELECTIONS)}")
        if not _is_int(self.rank) or self.rank < 1:
            raise InputError(f"rank {self.rank!r} is not a whole number of at least 1: give one, 8 is usual")
        if not _is_number(self.dense_steps) or not 0.0 <= self.dense_steps <= 1.0:
            raise InputError(
                f"dense_steps {self.dense_steps!r} is not in [0, 1]: give the share of steps, such as 0.05"
            )
        object.__setattr__(self, "dense_steps", float(self.dense_steps))
        for switch in ("rotary_pairs", "dense_outputs"):
            if not isinstance(getattr(self, switch), bool):
                raise InputError(f"{switch} {getattr(self, switch)!r} is not a switch: give true or false")
        if not _is_int(self.seed) or self.seed < 0:
            raise InputError(f"seed {self.seed!r} is not a whole number of at least 0: give one")
        if self.calibration is not None and not isinstance(self.calibration, Calibration):
            raise InputError(f"calibration {self.calibration!r} is not a Calibration: leave it out, or calibrate")

    @classmethod
    def default(cls, model: nn.Module, **settings: Any) -> Self:
        """A plan for whoever has not calibrated: the paper's for LLaMA3-8B on Math10K, scaled to the depth of `model`.

        FFN 99% from a tenth of the depth on, attention 75% in the deeper half, the last layer dense. `settings` are the
        other fields of a plan (selection, rank, dense_steps, ...).

        Raises:
            InputError: an unknown setting, or what the constructor refuses.
        """
        _check_settings(settings)
        facts = ModelFacts.of(model)

        def share(first: int, last: int, sparsity: float) -> tuple[float, ...]:
            of = facts.layers / 32
            chosen = range(round(first * of), min(facts.layers - 1, round((last + 1) * of)))
            return tuple(sparsity if layer in chosen else 0.0 for layer in range(facts.layers))

        attention = share(14, 29, 0.75)
        return cls(facts, share(3, 30, 0.99), attention, attention, **settings)

    @classmethod
    def uniform(
        cls,
        model: nn.Module,
        sparsity: float,
        *,
        parts: Iterable[Part] = PARTS,
        layers: Iterable[int] | None = None,
        **settings: Any,
    ) -> Self:
        """The same `sparsity` in the given parts of the given layers of `model`; None: of every layer.

        Of every layer it costs more than `default` and calibrated plans do that save as much
        (docs/results/sparselora_quality.md).

        `settings` are the other fields of a plan (selection, rank, dense_steps, ...).

        Raises:
            InputError: an unknown part, a layer that the model lacks, or what the constructor refuses.
        """
        facts = ModelFacts.of(model)
        chosen = set(range(facts.layers)) if layers is None else set(layers)
        if outside := sorted(chosen - set(range(facts.layers))):
            raise InputError(f"layer {outside[0]} does not exist: name layers from 0 to {facts.layers - 1}")
        wanted = tuple(parts)
        if unknown := sorted(set(wanted) - set(PARTS)):
            raise InputError(f"part {unknown[0]!r} is not known: use {', '.join(PARTS)}")
        _check_settings(settings)
        by_part = {
            part: tuple(sparsity if part in wanted and layer in chosen else 0.0 for layer in range(facts.layers))
            for part in PARTS
        }
        return cls(model=facts, **by_part, **settings)

    @classmethod
    def preset(cls, name: str) -> SparsityPlan:
        """The paper's plan of that name, such as "llama3-8b/math10k"; `elision sparselora presets` lists them.

        Raises:
            InputError: no preset of that name.
        """
        from elision.sparselora.presets import preset

        return preset(name)

    def sparsity(self, layer: int, projection: str) -> float:
        """Sparsity of the part that `projection` (q, k, v, o, gate, up or down) of `layer` belongs to."""
        return getattr(self, PART_OF[projection])[layer]

    def check(self, model: ModelFacts) -> None:
        """Raise InputError, naming what differs, where this plan is not for a model with these facts."""
        self.model.check(model)

    def describe(self) -> str:
        """One line: "ffn 99% in 3-30; qk 75% in 14-19, 21-23; vo dense"."""
        return "; ".join(f"{part} {_runs(getattr(self, part))}" for part in PARTS)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        values = asdict(self)
        if self.calibration is None:
            del values["calibration"]
        return {"version": VERSION, **{name: list(v) if name in PARTS else v for name, v in values.items()}}

    @classmethod
    def from_dict(cls, data: Any, where: str = "plan") -> Self:
        """The plan that `to_dict` wrote. `where` names the source in errors.

        Raises:
            InputError: another version, a field that is missing, unknown or of the wrong kind.
        """
        if not isinstance(data, Mapping):
            raise InputError(f"{where} holds {type(data).__name__}, not an object: write it with SparsityPlan.save")
        if {"ranks", "dropped"} <= set(data):
            raise InputError(f"{where} is of SPD, for serving: make one with elision sparselora calibrate")
        if data.get("version") != VERSION or not _is_int(data["version"]):
            raise InputError(
                f"{where} has version {data.get('version')!r}, this elision reads {VERSION}: make it anew or upgrade"
            )
        values = {name: value for name, value in data.items() if name != "version"}
        if "model" in values:
            values["model"] = _build(ModelFacts, values["model"], f"{where}, model")
        if values.get("calibration") is not None:
            values["calibration"] = _build(Calibration, values["calibration"], f"{where}, calibration")
        return _build(cls, values, where)

    def save(self, path: str | Path) -> Path:
        """Write JSON, atomically: equal plans give equal bytes."""
        return files.write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, not JSON (truncated, say), or not a plan.
        """
        return cls.from_dict(files.read_json(path, "plan"), f"plan {path}")


_REQUIRED: dict[type, list[str]] = {
    **{kind: [item.name for item in fields(kind)] for kind in (ModelFacts, Calibration)},
    SparsityPlan: ["model", *PARTS],
}
_SETTINGS = [field.name for field in fields(SparsityPlan) if field.name not in _REQUIRED[SparsityPlan]]


def _check_settings(settings: Mapping[str, Any]) -> None:
    if unknown := sorted(set(settings) - set(_SETTINGS)):
        raise InputError(f"setting {unknown[0]!r} is not known: use {', '.join(_SETTINGS)}")


def _build(kind: type, values: Any, where: str) -> Any:
    """`kind(**values)`, with every way in which it can fail told as bad input at `where`."""
    if not isinstance(values, Mapping):
        raise InputError(f"{where} is {values!r}, not an object: write it with SparsityPlan.save")
    known = [field.name for field in fields(kind)]
    if unknown := sorted(set(values) - set(known)):
        raise InputError(f"{where} has an unknown field {unknown[0]!r}: use {', '.join(known)}")
    if missing := [name for name in _REQUIRED[kind] if name not in values]:
        raise InputError(f"{where} lacks {', '.join(missing)}: write it with SparsityPlan.save")
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _sparsities(values: Any, part: str, layers: int) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise InputError(f"{part} {values!r} is not a list of sparsities: give one number in [0, 1) per layer")
    if len(values) != layers:
        raise InputError(f"{part} has {len(values)} sparsities for {layers} layers: give one number per layer")
    for layer, value in enumerate(values):
        if not _is_number(value) or not 0.0 <= value < 1.0:  # NaN fails the comparison too
            raise InputError(f"{part} sparsity {value!r} of layer {layer} is not in [0, 1): give the share left out")
    return tuple(float(value) for value in values)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and not math.isnan(value))


def _runs(values: tuple[float, ...]) -> str:
    """Equal sparsities with the runs of layers that have them: "90% in 3-5, 7; 50% in 8" or "dense"."""
    described = []
    for value in sorted(set(values) - {0.0}, reverse=True):
        layers = [layer for layer, own in enumerate(values) if own == value]
        starts = [layer for layer in layers if layer - 1 not in layers]
        ends = [layer for layer in layers if layer + 1 not in layers]
        runs = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
        described.append(f"{100 * value:.4g}% in {', '.join(runs)}")
    return " + ".join(described) or "dense"
