"""SyncPlan: which blocks leave out the sync after attention, for how many ranks, and how that was decided.

A plan is a value: made by `calibrate` or by hand (`SyncPlan(ranks=8, dropped=(4, 7, 9))`), saved as readable JSON,
carried in a checkpoint's config. What it was measured on travels with it, because a plan holds for one model
geometry and one number of ranks: `check` refuses another model by naming the fact that differs (facts.py).

Nothing here needs torch or transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from elision import files
from elision.errors import InputError
from elision.facts import ModelFacts

VERSION = 1
CORRECTIONS = ("constant", "gain", "local_o")  # kinds of correction of the local MLP input, each wider than the last
HEALING = ("correct", "b2b", "hg+b2b")  # what a dropped block may wait for: a correction, distillation, regrouped heads
TIERS = ("ISB", "SB", "ESB")  # maths: Which blocks; in-sensitive, sensitive, extremely sensitive
SCHEMA = Path(__file__).with_name("plan.schema.json")  # of what `SyncPlan.save` writes


EXCLUSIVE = ("dropped", "int8", "skipped")  # ways to spare a block's first sync; a block has one of them at most


@dataclass(frozen=True)
class Calibration:
    """What a plan was decided on: the measurements for its ranks (maths: Which blocks), in perplexity.

    sensitivities[i] is what block i's sync is worth, by `method` ("sequential": PPL(SPD on i..L-1) - PPL(SPD on
    i+1..L-1), the others are proxies.py's); order lists the blocks by ascending sensitivity; perplexities[k] is
    measured with the first k blocks of that order dropped as they are, so [0] is the dense model's, and kls[k] is the
    mean KL divergence from the dense model there, in nats a token. tiers[i] is block i's of TIERS by `thresholds`,
    which are shares of the dense perplexity; both are absent where no thresholds were given. `recovered` says what
    share of its loss each treatment of HEALING was expected to win back; absent where no healing was planned for.
    """

    data: str  # fingerprint of the batches
    sensitivities: tuple[float, ...]
    order: tuple[int, ...]
    perplexities: tuple[float, ...]
    versions: Mapping[str, str] = field(hash=False)
    method: str = "sequential"
    kls: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()
    tiers: tuple[str, ...] = ()
    recovered: Mapping[str, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name in ("sensitivities", "perplexities", "kls", "thresholds"):
            object.__setattr__(self, name, _numbers(getattr(self, name), name))
        object.__setattr__(self, "order", _indices(self.order, "order"))
        layers = len(self.sensitivities)
        if sorted(self.order) != list(range(layers)):
            raise InputError(f"order {list(self.order)} does not name each of {layers} blocks once: calibrate again")
        for name in ("perplexities", "kls"):
            values = getattr(self, name)
            if len(values) != layers + 1 and (values or name == "perplexities"):
                raise InputError(f"{name} has {len(values)} values for {layers} blocks: calibrate again")
        for name in ("data", "method"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} {getattr(self, name)!r} is not a {_STRINGS[name]}: calibrate again")
        if not isinstance(self.versions, Mapping) or not all(isinstance(v, str) for v in self.versions.values()):
            raise InputError(f"versions {self.versions!r} is not a mapping of names to versions: calibrate again")
        object.__setattr__(self, "tiers", _names(self.tiers, "tiers"))
        if (len(self.thresholds), len(self.tiers)) not in ((0, 0), (2, layers)) or set(self.tiers) - set(TIERS):
            raise InputError(
                f"thresholds {list(self.thresholds)} and tiers {list(self.tiers)} are not two numbers and one of "
                f"{', '.join(TIERS)} a block: calibrate again"
            )
        if self.recovered is not None:
            if not isinstance(self.recovered, Mapping) or set(self.recovered) - set(HEALING):
                raise InputError(f"recovered {self.recovered!r} is no mapping of {', '.join(HEALING)}: calibrate again")
            _numbers(tuple(self.recovered.values()), "recovered")


_STRINGS = {"data": "fingerprint", "method": "name"}


@dataclass(frozen=True)
class Verified:
    """What a plan costs on text that it was not made on, beside what was predicted of it.

    Perplexities of the same text: `dense` with every sync, `zero_shot` with the plan's blocks dropped and nothing done
    about it, `planned` under the plan as it is. `kl` is the mean KL divergence from the dense model in nats a token;
    `predicted` the relative increase of perplexity that calibration led to expect, of a plan with `healing` after that.
    """

    data: str  # fingerprint of the held-out batches
    tokens: int
    dense: float
    zero_shot: float
    planned: float
    kl: float
    predicted: float

    def __post_init__(self) -> None:
        if not isinstance(self.data, str):
            raise InputError(f"data {self.data!r} is not a fingerprint: verify again")
        _integer(self.tokens, "tokens", minimum=1)
        _numbers([getattr(self, entry.name) for entry in fields(self)[2:]], "verified")
        if self.dense <= 0:
            raise InputError(f"dense {self.dense} is not a perplexity: verify again")

    @property
    def loss(self) -> float:
        """Relative increase of perplexity under the plan."""
        return self.planned / self.dense - 1

    @property
    def recovery(self) -> float | None:
        """Share of what zero-shot dropping loses that the plan's treatment wins back; None where nothing is lost."""
        lost = self.zero_shot - self.dense
        return (self.zero_shot - self.planned) / lost if lost > 0 else None


@dataclass(frozen=True)
class SyncPlan:
    """Blocks `dropped` run with one sync instead of two on `ranks` tensor-parallel devices.

    A dropped block may be treated. `corrections` says which tensors beside its weights correct its local MLP input,
    block number to one of CORRECTIONS; `healed` blocks have weights that were distilled for this plan; `heads` says
    for a block whose heads were regrouped which original query head stands at each place. These belong to a
    checkpoint: what `correct`, `heal` and `load` return carries the plan and its tensors together. `healing` is what
    is still to be done, block number to one of HEALING: until `heal` has done it, the block is dropped as it is.
    Blocks `int8` keep their sync and send it in int8; blocks `skipped` leave out attention and its sync altogether.

    Made by hand, a plan carries no `model` and fits every model that has its blocks and allows its ranks.

    Raises:
        InputError: ranks below 1; a block that is negative, given twice or not in `model`; a treated block that is
            not dropped; a block in two of dropped, int8 and skipped; an unknown correction or healing; heads that are
            no permutation; a `calibration` of another depth than `model`.
    """

    ranks: int
    dropped: tuple[int, ...] = ()
    corrections: Mapping[int, str] = field(default_factory=dict, hash=False)
    healed: tuple[int, ...] = ()
    int8: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()
    heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict, hash=False)
    healing: Mapping[int, str] = field(default_factory=dict, hash=False)
    model: ModelFacts | None = None
    calibration: Calibration | None = None
    verified: Verified | None = None

    def __post_init__(self) -> None:
        _integer(self.ranks, "ranks", minimum=1)
        for name in ("dropped", "healed", *EXCLUSIVE[1:]):
            blocks = tuple(sorted(_indices(getattr(self, name), name)))
            object.__setattr__(self, name, blocks)
            for block in blocks:
                if blocks.count(block) > 1:
                    raise InputError(f"{name} block {block} is given twice in {list(blocks)}: name it once")
        object.__setattr__(self, "corrections", _kinds(self.corrections, "corrections", "correction", CORRECTIONS))
        object.__setattr__(self, "healing", _kinds(self.healing, "healing", "healing", HEALING))
        object.__setattr__(self, "heads", _permutations(self.heads))
        for name in ("corrections", "healed", "healing", "heads"):
            if stray := sorted(set(getattr(self, name)) - set(self.dropped)):
                raise InputError(f"{name} block {stray[0]} keeps its sync: name it in dropped, or do not treat it")
        for first, second in (("dropped", "int8"), ("dropped", "skipped"), ("int8", "skipped")):
            if both := sorted(set(getattr(self, first)) & set(getattr(self, second))):
                raise InputError(f"{second} block {both[0]} is {first} too: its sync is spared in one way or another")
        if self.model is not None:
            self._check_blocks(self.model)
            if self.calibration is not None and len(self.calibration.order) != self.model.layers:
                measured = len(self.calibration.order)
                raise InputError(f"calibration is of {measured} blocks, layers is {self.model.layers}: calibrate again")

    @classmethod
    def of(cls, ranks: int, treatments: Mapping[int, str], healing: Mapping[int, str] | None = None) -> Self:
        """The plan that treats blocks as `treatments` says, each "dropped", "int8" or "skipped"."""
        dropped, int8, skipped = (
            tuple(block for block, how in treatments.items() if how == kind) for kind in EXCLUSIVE
        )
        return cls(ranks, dropped, int8=int8, skipped=skipped, healing=healing or {})

    @property
    def original_weights(self) -> bool:
        """Whether the plan's checkpoint is the original model's, so that it may be loaded without the plan."""
        return not self.corrections and not self.healed and not self.heads

    def treatment(self, block: int) -> str:
        """How `block` spares its first sync: "dropped", "int8", "skipped", or "dense" where it does not."""
        return next((name for name in EXCLUSIVE if block in getattr(self, name)), "dense")

    def check(self, model: ModelFacts) -> None:
        """Raise InputError, naming what differs, where this plan is not for a model with these facts."""
        if self.model is not None:
            self.model.check(model)
        self._check_blocks(model)

    def _check_blocks(self, model: ModelFacts) -> None:
        for name in EXCLUSIVE:
            blocks = getattr(self, name)
            if blocks and blocks[-1] >= model.layers:
                last = model.layers - 1
                raise InputError(f"{name} block {blocks[-1]} does not exist: name blocks from 0 to {last}")
        for block, order in self.heads.items():
            if len(order) != model.heads:
                raise InputError(
                    f"heads of block {block} are {len(order)}, the model has {model.heads}: name each once"
                )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values; what is None or empty is left out."""
        data: dict[str, Any] = {"version": VERSION, "ranks": self.ranks, "dropped": list(self.dropped)}
        for name in ("corrections", "healed", "int8", "skipped", "heads", "healing"):
            if value := getattr(self, name):
                data[name] = _plain(value)
        for name in PARTS:
            part = getattr(self, name)
            if part is not None:
                values = {entry.name: getattr(part, entry.name) for entry in fields(part)}
                data[name] = {name: _plain(value) for name, value in values.items() if value not in ((), None)}
        return data

    @classmethod
    def from_dict(cls, data: Any, where: str = "plan") -> Self:
        """The plan that `to_dict` wrote. `where` names the source in errors.

        Raises:
            InputError: another version, a field that is missing, unknown or of the wrong kind.
        """
        if not isinstance(data, Mapping):
            raise InputError(f"{where} holds {type(data).__name__}, not an object: write it with SyncPlan.save")
        if {"ffn", "qk", "vo"} <= set(data):
            raise InputError(f"{where} is of SparseLoRA, for fine-tuning: make one with elision spd calibrate")
        if data.get("version") != VERSION:
            found = data.get("version")
            raise InputError(f"{where} has version {found!r}, this elision reads {VERSION}: calibrate again or upgrade")
        values = {name: value for name, value in data.items() if name != "version"}
        for name in ("corrections", "heads", "healing"):
            if isinstance(kinds := values.get(name), Mapping):  # JSON's keys are strings
                values[name] = {int(k) if str(k).isdecimal() else k: kind for k, kind in kinds.items()}
        for name, part in PARTS.items():
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
    except TypeError as error:
        required = {entry.name for entry in fields(kind) if entry.default is MISSING}
        required = {"ranks", "dropped"} if kind is SyncPlan else required
        missing = ", ".join(sorted(required - set(values)))
        wrong = f"lacks {missing}" if missing else f"has a field of the wrong kind ({error})"
        raise InputError(f"{where} {wrong}: write it with SyncPlan.save") from None


def _integer(value: Any, name: str, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise InputError(f"{name} {value!r} is not a whole number of at least {minimum}: give one")


def _indices(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InputError(f"{name} {value!r} is not a list of blocks: give block numbers, counted from 0")
    for index in value:
        _integer(index, f"{name} block", minimum=0)
    return tuple(value)


def _kinds(value: Any, name: str, one: str, known: Sequence[str]) -> dict[int, str]:
    """Block to one of `known`, in ascending order of the blocks."""
    if not isinstance(value, Mapping):
        raise InputError(f"{name} {value!r} is not a mapping: give block numbers with one of {', '.join(known)}")
    for kind in value.values():
        if kind not in known:
            raise InputError(f"{one} {kind!r} is not known: use one of {', '.join(known)}")
    return {block: value[block] for block in sorted(_indices(tuple(value), name))}


def _permutations(value: Any) -> dict[int, tuple[int, ...]]:
    """Block to its order of heads, in ascending order of the blocks."""
    if not isinstance(value, Mapping):
        raise InputError(f"heads {value!r} is not a mapping: give block numbers, each with the order of its heads")
    for block, order in value.items():
        if sorted(_indices(order, f"heads of block {block},")) != list(range(len(order))):
            raise InputError(f"heads of block {block} are {list(order)}, no permutation: name each head once, from 0")
    return {block: tuple(value[block]) for block in sorted(_indices(tuple(value), "heads"))}


def _numbers(value: Any, name: str) -> tuple[float, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InputError(f"{name} {value!r} is not a list of numbers: calibrate again")
    for number in value:
        if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
            raise InputError(f"{name} holds {number!r}, not a finite number: calibrate again")
    return tuple(float(number) for number in value)


def _names(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(each, str) for each in value):
        raise InputError(f"{name} {value!r} is not a list of names: calibrate again")
    return tuple(value)


def _plain(value: Any) -> Any:
    """Tuples as lists, mappings as dicts with strings for keys: what JSON gives back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return list(value) if isinstance(value, tuple) else value


PARTS = {"model": ModelFacts, "calibration": Calibration, "verified": Verified}  # of a plan, objects in its JSON
