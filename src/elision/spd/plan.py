"""SyncPlan: which blocks leave out the sync after attention, for how many ranks, and how that was decided.

A plan is a value: made by `calibrate` or by hand (`SyncPlan(ranks=8, dropped=(4, 7, 9))`), saved as readable JSON,
carried in a checkpoint's config. What it was measured on travels with it, because a plan holds for one model
geometry and one number of ranks: `check` refuses another model by naming the fact that differs (facts.py).

Nothing here needs torch or transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from elision import files
from elision.errors import InputError
from elision.facts import ModelFacts

VERSION = 1
CORRECTIONS = ("constant", "gain", "local_o")  # kinds of correction of the local MLP input, each wider than the last


@dataclass(frozen=True)
class Calibration:
    """What a plan was decided on: METHODS 2.2's measurements for its ranks, in perplexity.

    sensitivities[i] is PPL(SPD on i..L-1) - PPL(SPD on i+1..L-1); order lists the blocks by ascending sensitivity;
    perplexities[k] is measured with the first k blocks of that order dropped as they are, so [0] is the dense model's.
    """

    data: str  # fingerprint of the batches
    sensitivities: tuple[float, ...]
    order: tuple[int, ...]
    perplexities: tuple[float, ...]
    versions: Mapping[str, str] = field(hash=False)

    def __post_init__(self) -> None:
        for name in ("sensitivities", "perplexities"):
            object.__setattr__(self, name, _numbers(getattr(self, name), name))
        object.__setattr__(self, "order", _indices(self.order, "order"))
        layers = len(self.sensitivities)
        if sorted(self.order) != list(range(layers)):
            raise InputError(f"order {list(self.order)} does not name each of {layers} blocks once: calibrate again")
        if len(self.perplexities) != layers + 1:
            raise InputError(f"perplexities has {len(self.perplexities)} values for {layers} blocks: calibrate again")
        if not isinstance(self.data, str):
            raise InputError(f"data {self.data!r} is not a fingerprint: calibrate again")
        if not isinstance(self.versions, Mapping) or not all(isinstance(v, str) for v in self.versions.values()):
            raise InputError(f"versions {self.versions!r} is not a mapping of names to versions: calibrate again")


@dataclass(frozen=True)
class SyncPlan:
    """Blocks `dropped` run with one sync instead of two on `ranks` tensor-parallel devices.

    A dropped block may be treated. `corrections` says which tensors beside its weights correct its local MLP input,
    block number to one of CORRECTIONS; `healed` blocks have weights that were distilled for this plan. Both belong to
    a checkpoint: what `correct`, `heal` and `load` return carries the plan and its tensors together. Blocks `int8`
    keep their sync and send it in int8.

    Made by hand, a plan carries no `model` and fits every model that has its blocks and allows its ranks.

    Raises:
        InputError: ranks below 1; a block that is negative, given twice or not in `model`; a treated block that is
            not dropped, an int8 one that is; an unknown correction; a `calibration` of another depth than `model`.
    """

    ranks: int
    dropped: tuple[int, ...] = ()
    corrections: Mapping[int, str] = field(default_factory=dict, hash=False)
    healed: tuple[int, ...] = ()
    int8: tuple[int, ...] = ()
    model: ModelFacts | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        _integer(self.ranks, "ranks", minimum=1)
        for name in ("dropped", "healed", "int8"):
            blocks = tuple(sorted(_indices(getattr(self, name), name)))
            object.__setattr__(self, name, blocks)
            for block in blocks:
                if blocks.count(block) > 1:
                    raise InputError(f"{name} block {block} is given twice in {list(blocks)}: name it once")
        object.__setattr__(self, "corrections", _kinds(self.corrections))
        for name in ("corrections", "healed"):
            if stray := sorted(set(getattr(self, name)) - set(self.dropped)):
                raise InputError(f"{name} block {stray[0]} keeps its sync: name it in dropped, or do not treat it")
        if both := sorted(set(self.int8) & set(self.dropped)):
            raise InputError(f"int8 block {both[0]} is dropped too: its sync is either left out or sent in int8")
        if self.model is not None:
            self._check_blocks(self.model)
            if self.calibration is not None and len(self.calibration.order) != self.model.layers:
                measured = len(self.calibration.order)
                raise InputError(f"calibration is of {measured} blocks, layers is {self.model.layers}: calibrate again")

    @property
    def original_weights(self) -> bool:
        """Whether the plan's checkpoint is the original model's, so that it may be loaded without the plan."""
        return not self.corrections and not self.healed

    def check(self, model: ModelFacts) -> None:
        """Raise InputError, naming what differs, where this plan is not for a model with these facts."""
        if self.model is not None:
            self.model.check(model)
        self._check_blocks(model)

    def _check_blocks(self, model: ModelFacts) -> None:
        for name in ("dropped", "int8"):
            blocks = getattr(self, name)
            if blocks and blocks[-1] >= model.layers:
                last = model.layers - 1
                raise InputError(f"{name} block {blocks[-1]} does not exist: name blocks from 0 to {last}")

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values; what is None or empty is left out."""
        data: dict[str, Any] = {"version": VERSION, "ranks": self.ranks, "dropped": list(self.dropped)}
        if self.corrections:
            data["corrections"] = {str(block): kind for block, kind in self.corrections.items()}
        data |= {name: list(blocks) for name in ("healed", "int8") if (blocks := getattr(self, name))}
        for name in ("model", "calibration"):
            part = getattr(self, name)
            if part is not None:
                data[name] = {entry.name: _plain(getattr(part, entry.name)) for entry in fields(part)}
        return data

    @classmethod
    def from_dict(cls, data: Any, where: str = "plan") -> Self:
        """The plan that `to_dict` wrote. `where` names the source in errors.

        Raises:
            InputError: another version, a field that is missing, unknown or of the wrong kind.
        """
        if not isinstance(data, Mapping):
            raise InputError(f"{where} holds {type(data).__name__}, not an object: write it with SyncPlan.save")
        if data.get("version") != VERSION:
            found = data.get("version")
            raise InputError(f"{where} has version {found!r}, this elision reads {VERSION}: calibrate again or upgrade")
        values = {name: value for name, value in data.items() if name != "version"}
        if isinstance(kinds := values.get("corrections"), Mapping):  # JSON's keys are strings
            values["corrections"] = {int(k) if str(k).isdecimal() else k: kind for k, kind in kinds.items()}
        for name, part in (("model", ModelFacts), ("calibration", Calibration)):
            if name in values:
                values[name] = _build(part, values[name], f"{where}, {name}")
        return _build(cls, values, where)

    def save(self, path: str | Path) -> Path:
        """Write JSON, atomically: equal plans give equal bytes."""
        return files.write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, not JSON, or not a plan.
        """
        return cls.from_dict(files.read_json(path, "plan"), f"plan {path}")


def _build(kind: type, values: Any, where: str) -> Any:
    """`kind(**values)`, with every way in which it can fail told as bad input at `where`."""
    if not isinstance(values, Mapping):
        raise InputError(f"{where} is {values!r}, not an object: write it with SyncPlan.save")
    known = {entry.name for entry in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise InputError(f"{where} has an unknown field {unknown[0]!r}: use {', '.join(sorted(known))}")
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except TypeError:
        required = {"ranks", "dropped"} if kind is SyncPlan else known
        missing = ", ".join(sorted(required - set(values)))
        raise InputError(f"{where} lacks {missing}: write it with SyncPlan.save") from None


def _integer(value: Any, name: str, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise InputError(f"{name} {value!r} is not a whole number of at least {minimum}: give one")


def _indices(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InputError(f"{name} {value!r} is not a list of blocks: give block numbers, counted from 0")
    for index in value:
        _integer(index, f"{name} block", minimum=0)
    return tuple(value)


def _kinds(value: Any) -> dict[int, str]:
    """Corrections in ascending order of their blocks."""
    if not isinstance(value, Mapping):
        raise InputError(f"corrections {value!r} is not a mapping: give block numbers with one of {_names()}")
    for kind in value.values():
        if kind not in CORRECTIONS:
            raise InputError(f"correction {kind!r} is not known: use one of {_names()}")
    return {block: value[block] for block in sorted(_indices(tuple(value), "corrections"))}


def _names() -> str:
    return ", ".join(CORRECTIONS)


def _numbers(value: Any, name: str) -> tuple[float, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InputError(f"{name} {value!r} is not a list of numbers: calibrate again")
    for number in value:
        if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
            raise InputError(f"{name} holds {number!r}, not a finite number: calibrate again")
    return tuple(float(number) for number in value)


def _plain(value: Any) -> Any:
    """Tuples as lists, mappings as dicts: what JSON gives back."""
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
