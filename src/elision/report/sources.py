"""What a report can be made of: run directories, plans, and the JSON of benchmarks; several make one page.

runs/a/                  its results.json; of a run that goes on, the losses in its metrics.jsonl
plan.json                a SyncPlan's sensitivities and curve, or a SparsityPlan's layers
bench.json               the last line of a benchmark program's output, or the whole output
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elision import files
from elision.errors import InputError
from elision.report.results import Results, Tradeoff, check
from elision.report.verdict import CALIBRATION, HELD_OUT, SYNCS, unhealed
from elision.runs import Run

GIVE = "give a run directory, a plan or a benchmark's JSON"


def load(source: str | Path) -> Results:
    """The results in a run directory or file.

    Raises:
        InputError: there is nothing, or nothing that a report can show.
    """
    path = Path(source)
    if not path.exists():
        raise InputError(f"{path} does not exist: {GIVE}")
    if path.is_dir():
        if (path / "results.json").exists():
            return check(files.read_json(path / "results.json", "results"), f"results {path / 'results.json'}")
        if not (path / "run.json").exists():
            raise InputError(f"{path} is no run, for it holds neither results.json nor run.json: {GIVE}")
        return check(_unfinished(path), f"run {path}")
    values = _json(path)
    try:
        return _of_file(path, values)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:  # fields that are absent, or of a kind
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is not a whole plan or benchmark ({reason}): write it again") from None


def _of_file(path: Path, values: Mapping[str, Any]) -> Results:
    if {"alpha", "beta", "all_reduces"} <= values.keys():
        return check({"title": f"Links {path.name}", "links": [{"name": path.stem, **values}]}, f"probe {path}")
    if "rows" in values or "links" in values:
        told = {name: value for name, value in values.items() if isinstance(value, (str, int, float))}
        page = {"title": str(values.get("benchmark", path.stem)), "settings": told, **of_benchmark(values)}
        return check(page, f"benchmark {path}")
    if {"ffn", "qk", "vo"} <= values.keys() or {"ranks", "dropped"} <= values.keys():
        _check_plan(values, f"plan {path}")
        page = {"title": f"Plan {path.name}", "settings": _settings(values), **of_plan(values, path.stem)}
        if "dropped" in values and page.keys() == {"title", "settings"}:
            raise InputError(
                f"plan {path} was made by hand, nothing was measured: calibrate one with elision spd calibrate"
            )
        return check(page, f"plan {path}")
    if values.keys() & set(Results.model_fields):
        return check(values, f"results {path}")
    raise InputError(f"{path} is no run, plan or benchmark: {GIVE}")


def _check_plan(values: Mapping[str, Any], where: str) -> None:
    """Raise InputError where no command would take the plan."""
    from elision.sparselora import SparsityPlan
    from elision.spd import SyncPlan

    (SyncPlan if "dropped" in values else SparsityPlan).from_dict(values, where)


def together(results: Sequence[tuple[str, Results]]) -> Results:
    """Several runs as one, every name saying its run where it would be ambiguous.

    Raises:
        InputError: two of them compare fine-tuning variants, whose plots stand for one set of problems.
    """
    if len(results) == 1:
        return results[0][1]
    tuned = [label for label, run in results if run.finetune is not None]
    if len(tuned) > 1:
        raise InputError(f"{tuned[0]} and {tuned[1]} each compare fine-tuning variants: make a page of each")
    merged: dict[str, Any] = {"title": " and ".join(dict.fromkeys(run.title for _, run in results)), "settings": {}}
    for label, run in results:
        merged["settings"] |= {f"{label}: {name}": value for name, value in run.settings.items()}
        merged["finetune"] = run.finetune or merged.get("finetune")
        for kind, field in (("spd", "model"), ("training", "name"), ("layers", "name")):
            for part in getattr(run, kind):
                merged.setdefault(kind, []).append(part.model_copy(update={field: _named(label, getattr(part, field))}))
        names = {name: _named(label, name) if name else label for name in (part.model for part in run.evaluation)}
        scored = [part.model_copy(update={"model": names[part.model]}) for part in run.evaluation]
        merged.setdefault("evaluation", []).extend(scored)
        # What one run timed is held against that run's own baseline, so its name goes where rows are told apart by.
        for kind, field in (("steps", "shape"), ("latency", "link"), ("links", "name")):
            alone = sum(bool(getattr(other, kind)) for _, other in results) == 1
            for part in getattr(run, kind):
                named = part if alone else part.model_copy(update={field: _named(label, getattr(part, field))})
                merged.setdefault(kind, []).append(named)
        merged.setdefault("plans", {}).update({_named(label, name): plan for name, plan in run.plans.items()})
    merged["tradeoffs"] = _joined([(label, each) for label, run in results for each in run.tradeoffs])
    return Results(**merged)


def _named(label: str, name: str) -> str:
    """A part's name on a page of several runs."""
    return name if name == label else f"{label}: {name}"


def _joined(tradeoffs: Sequence[tuple[str, Tradeoff]]) -> list[Tradeoff]:
    """Trade-offs of several runs; those that are one plan each are one picture where they save and cost the same."""
    single = [each for _, each in tradeoffs if len(each.points) == 1]
    alike = Counter((each.saving, each.cost) for each in single)
    names = Counter(each.name for each in single)
    found: list[Tradeoff] = []
    places: dict[tuple[str, str], int] = {}
    for label, each in tradeoffs:
        kind = (each.saving, each.cost)
        if len(each.points) > 1:
            found.append(each.model_copy(update={"name": _named(label, each.name)}))
        elif alike[kind] == 1:
            found.append(each)
        else:
            name = each.name if names[each.name] == 1 else _named(label, each.name)
            (point,) = each.points
            called = f"{name} on {point.name}" if point.name.startswith(HELD_OUT) else point.name
            points = [point.model_copy(update={"name": name if point.name == each.name else called})]
            if (place := places.setdefault(kind, len(found))) == len(found):
                found.append(each.model_copy(update={"name": name, "points": points}))
            else:
                joined = {"name": f"{found[place].name} and {name}", "points": [*found[place].points, *points]}
                found[place] = found[place].model_copy(update=joined)
    return found


def labels(sources: Sequence[str | Path]) -> list[str]:
    """A short name for each source: its last part, or as much of the path as tells them apart."""
    paths = [Path(source) for source in sources]
    names = [path.absolute().name if path.is_dir() else path.stem for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def _json(path: Path) -> Mapping[str, Any]:
    """The one object of a JSON file, or that of a program's last line."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace").strip()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a file that you may read") from None
    for part in (text, *text.splitlines()[-1:]):
        try:
            values = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, Mapping):
            return values
    raise InputError(f"{path} is no run, plan or benchmark: {GIVE}")


def _unfinished(path: Path) -> dict[str, Any]:
    begun = files.read_json(path / "run.json", "run")
    rows = [row for row in Run(path, begun).metrics() if "step" in row and "loss" in row]
    if not rows:
        raise InputError(f"run {path} has measured nothing yet: wait for it, or run the same command again to resume")
    command = f"elision {begun['command']}"
    losses = [(row["step"], row["loss"]) for row in rows]
    settings = {"command": command, "state": "not finished", **begun["versions"]}
    return {"title": command, "settings": settings, "training": [{"name": path.name, "losses": losses}]}


def of_benchmark(values: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of Results that timings fill: those of the `bench` commands, finetune_step.py and tp_latency.py."""
    if "rows" in values and "workload" not in next(iter(values["rows"]), {}):
        return {"steps": values["rows"]}
    latency = []
    for link in values.get("links", [{"link": "this machine", **values}]):
        for row in link["rows"]:
            ideal = row.get("ideal_ms")
            if "saved_ms" in row:  # there the ideal is a saving, here it is a time
                ideal = row["ms"] + row["saved_ms"] - ideal if ideal else None
            named = {"variant": row["variant"], "phase": row["workload"], "link": link["link"], "ms": row["ms"]}
            latency.append({**named, "ranks": values.get("ranks", 0), "ideal_ms": ideal})
    return {"latency": latency}


def of_plan(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The sections of Results that the JSON of a SyncPlan or a SparsityPlan fills, under `name`."""
    return _sync_plan(values, name) if "dropped" in values else _sparsity_plan(values, name)


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    found = values.get("calibration") or {}
    shown = ("selection", "rank", "dense_steps", "rotary_pairs", "dense_outputs", "seed")
    own = {name: values[name] for name in shown if name in values}
    return own | {name: found[name] for name in ("budget", "limit") if name in found} | found.get("versions", {})


def _sync_plan(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    sections: dict[str, Any] = {}
    verified = values.get("verified")
    after = verified["predicted"] if verified is not None and values.get("healing") else None
    if (found := values.get("calibration")) is not None:
        dense, dropped = found["perplexities"][0], values["dropped"]
        treated = {how: values[how] for how in ("dropped", "int8", "skipped") if values.get(how)}
        ranks: dict[str, Any] = {
            "ranks": values["ranks"],
            "sensitivities": [100 * value / dense for value in found["sensitivities"]],
            "order": found["order"],
            "perplexities": found["perplexities"],
            "chosen": len(dropped),
        }
        # What spd.calibration.on_curve asks: whether the curve's k-th point is this plan.
        if treated.keys() - {"dropped"} or set(found["order"][: len(dropped)]) != set(dropped):
            ranks |= {"chosen": None, "other": treated}
            if verified is not None:
                ranks |= {"other_cost": verified["planned"] / verified["dense"] - 1, "healed_cost": after}
        text = {"text": CALIBRATION, "tokens": 0}
        sections["spd"] = [{"model": name, **text, "dense_perplexity": dense, "ranks": [ranks]}]
    mixed = sections and (values.get("int8") or values.get("skipped"))  # saves more than what is left out
    if verified is not None and values.get("model") is not None and not mixed:
        costs = {"as it is": verified["zero_shot"], "healed": verified["planned"]}
        if costs["as it is"] == costs["healed"] or not values.get("healed"):
            costs = {HELD_OUT + unhealed(after): verified["planned"]}
        point = {"saving": len(values["dropped"]) / values["model"]["layers"], "kind": "chosen"}
        points = [{**point, "name": how, "cost": value / verified["dense"] - 1} for how, value in costs.items()]
        points[0]["kind"] = "chosen" if len(points) == 1 else "control"
        sections["tradeoffs"] = [{"name": name, "saving": SYNCS, "cost": "perplexity", "points": points}]
    return sections


def _sparsity_plan(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    plan = {part: values[part] for part in ("ffn", "qk", "vo")}
    if (found := values.get("calibration")) is None:
        return {"plans": {name: plan}}
    share = {part: [100 * curve[-1] / found["loss"] for curve in found[part]] for part in plan}
    point = {"name": name, "kind": "chosen", "saving": 1 - found["flops"]["full"]}
    point["cost"] = found["measured_increase"] / found["loss"]
    return {
        "plans": {name: plan},
        "layers": [{"name": f"{name}, sparsity {found['grid'][-1]:g}", "parts": share}],
        "tradeoffs": [{"name": name, "saving": "LoRA's FLOPs", "cost": "loss", "points": [point]}],
    }
