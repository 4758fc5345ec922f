"""What SparseLoRA's sparsity costs in quality: `python benchmarks/sparselora_quality.py --processes 3`.

Fine-tunes of the embedded model on tasks that it was not trained on: LoRA, SparseLoRA at three shares of its
operations, calibrated and uniform, and what the method claims to need taken away piece by piece: dense outputs, dense
first steps, the estimator, and, as controls, any choice at all ("random channels") and the context's FFN as a whole.
Two families of word problems that the model never saw, and MAWPS, train and test set of the data folder, where that is
there. A problem counts as solved if greedy decoding gives the worked solution token by token.

Recipe, plans' budgets, seeds and comparisons are sparselora_quality.json beside this file, fixed before the first run;
that of an earlier round, with other seeds and problems, is in the history, its results in the lab notes. A second one,
`--recipe benchmarks/sparselora_quality_long.json`, trains the main variants for three passes over the problems, and
`sparselora_quality_seeds.json` does that with more seeds and problems on one of the tasks.
Plans are calibrated once a task, after a rehearsal of some dense steps, on training problems of their own; "paper's
layers" is its plan for LLaMA3-8B on Math10K, scaled to this depth. Dense steps run by the same lossless fast path as
sparse ones. Runs are done in the order of their tiers, seed by seed; each leaves a file in --out, so that a killed
program goes on where it was, and the page is written from what is there after every tier.

Intervals take in seeds and problems: with d the mean over s seeds and p problems, its variance is estimated by
var_seeds(mean over problems) / s + var_problems(mean over seeds) / p, with Student's t at s - 1 degrees of freedom.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import multiprocessing
import re
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from elision import data, files
from elision.evaluate import Interval, evaluating
from elision.loading import load_model
from elision.sparselora import Factors, SparsityPlan, calibrate, flops, lossless, sparsify
from elision.sparselora.forecasts import under, workloads
from elision.sparselora.train import Settings, add_adapter

RECIPE = Path(__file__).with_suffix(".json")
RESULTS = Path(__file__).parents[1] / "docs" / "results"  # a page a recipe, and beside it the plans and runs behind it
_TOO_FEW = 0.05  # share solved by LoRA below which there is nothing to lose
CALIBRATION_SEED = 10_004  # of problems, as the recipe's test_seed; training takes the run's own seed

console = Console(highlight=False, width=120)
Rows = list[dict[str, list[int]]]


def examples(task: Mapping[str, Any], split: str, seed: int) -> list[Any]:
    """Problems of a task: of a generator's family by `seed`, or rows of a data file, their equation the solution."""
    number = task["test" if split == "test" else "train"]
    if "family" in task:
        return data.problems((task["family"],), "train", number, seed)
    folder = data.shared_folder()
    assert folder is not None
    train, test = (_equations(folder / name) for name in task["files"])
    if split == "test":
        return test[:number]
    return data.without_overlap(train, test)[:number]


def _equations(path: Path) -> list[data.Example]:
    found = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        equation, answer = (re.sub(r"\.0+\b", "", str(row[name])) for name in ("equation", "ans"))
        found.append(data.Example(row["original_text"], f"{equation.removeprefix('X=')} #### {answer}"))
    return found


def available(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks whose data is there."""
    folder = data.shared_folder()
    missing = [
        name
        for name, task in tasks.items()
        if "files" in task and not (folder and all((folder / file).is_file() for file in task["files"]))
    ]
    if missing:
        console.print(f"left out, data not found: {', '.join(missing)}")
    return {name: task for name, task in tasks.items() if name not in missing}


def batches(rows: Rows, steps: int, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """`steps` batches, in an order drawn by seed; every row once before any a second time."""
    order: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        if len(order) < size:
            order += torch.randperm(len(rows), generator=generator).tolist()
        chosen, order = order[:size], order[size:]
        yield data.collate([rows[i] for i in chosen], None)


def fit(
    model: Any,
    rows: Rows,
    recipe: Mapping[str, Any],
    steps: int,
    seed: int,
    plan: SparsityPlan | None = None,
    factors: Factors | None = None,
) -> list[dict[str, Tensor]]:
    """Train the adapter for `steps` steps; returns the batches."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe["learning_rate"], weight_decay=0.0)
    warmup = max(1, round(recipe["warmup"] * steps))
    seen = []
    model.train()
    with lossless(model) if plan is None else sparsify(model, plan, factors) as handle:
        for step, batch in enumerate(batches(rows, steps, recipe["batch"], seed)):
            done = max(0.0, (step - warmup) / max(1, steps - warmup))
            rate = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = recipe["learning_rate"] * rate
            handle.step(step / steps)
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen.append(batch)
    return seen


@torch.no_grad()
def score(model: Any, rows: Rows, size: int) -> tuple[list[int], float]:
    """Which problems greedy decoding solves word for word, and the mean loss in nats per token of the solutions."""
    solved, total, count = [], 0.0, 0
    with evaluating(model):
        for first in range(0, len(rows), size):
            batch = data.collate(rows[first : first + size], None)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
            labels = batch["labels"][:, 1:]
            asked = labels != data.IGNORED
            right = (logits.argmax(-1) == labels) | ~asked  # as greedy decoding, as long as all before was right
            solved += right.all(dim=1).int().tolist()
            total += F.cross_entropy(logits[asked], labels[asked], reduction="sum").item()
            count += int(asked.sum())
    return solved, total / count


def share(model: Any, seen: Sequence[Mapping[str, Tensor]], plan: SparsityPlan, count: Sequence[str]) -> float:
    """Operations of the run under `plan` over those of dense LoRA on the same batches, dense first steps included."""
    shape, adapters = flops.Shape.of(model), flops.adapters_of(model)
    dense = sparse = 0.0
    for work in workloads(seen):
        one, other = flops.step(shape, work, adapters), flops.step(shape, under(work, plan), adapters, plan)
        dense += sum(getattr(one, name) for name in count)
        sparse += sum(getattr(other, name) for name in count)
    return plan.dense_steps + (1 - plan.dense_steps) * sparse / dense


def fresh(recipe: Mapping[str, Any], seed: int) -> tuple[Any, Any]:
    """The model with a new adapter, and its tokenizer."""
    quiet()
    model, tokenizer = load_model(recipe["model"])
    return add_adapter(model, Settings(steps=1, rank=recipe["rank"], seed=seed)), tokenizer


def quiet() -> None:
    """One thread a process, and no words from the libraries."""
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def prepare(job: tuple[Path, dict[str, Any], str]) -> str:
    """Calibrate the plans of a task: one measurement, all budgets. Leaves plans/TASK-BUDGET.json and the factors."""
    out, recipe, name = job
    task, folder = recipe["tasks"][name], out / "plans"
    budgets = sorted({v["flops"] for v in recipe["variants"].values() if "flops" in v}, reverse=True)
    uniform = sorted({v["uniform"] for v in recipe["variants"].values() if "uniform" in v}, reverse=True)
    factors = folder / f"{name}-whitened.safetensors"
    paths = {budget: folder / f"{name}-{budget:g}.json" for budget in budgets}
    even = {budget: folder / f"{name}-uniform-{budget:g}.json" for budget in uniform}
    if all(path.exists() for path in (factors, *paths.values(), *even.values())):
        return name
    number, size = recipe["calibration_rows"], min(recipe["calibration_rows"], recipe["batch"])
    model, tokenizer = fresh(recipe, CALIBRATION_SEED)
    rows = data.encode(tokenizer, examples(task, "calibration", CALIBRATION_SEED))
    measured = list(batches(rows[:number], number // size, size, 0))
    learned = list(batches(rows[number:] or rows, recipe["rehearsed_steps"], recipe["batch"], 0))
    for budget, path in paths.items():
        if path.exists():
            continue
        calibrate(
            model,
            measured,
            flops=budget,
            grid=recipe["grid"],
            count=recipe["count"],
            rehearse=learned,
            learning_rate=recipe["learning_rate"],
            state=folder / f"{name}.journal",
            quiet=True,
            selection=recipe["selection"],
            dense_steps=recipe["dense_steps"],
        ).save(path)
    switches = {"selection": recipe["selection"], "dense_steps": recipe["dense_steps"]}
    for budget, path in even.items():
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            plan = SparsityPlan.uniform(model, middle, **switches)
            low, high = (middle, high) if share(model, measured, plan, recipe["count"]) > budget else (low, middle)
        SparsityPlan.uniform(model, high, **switches).save(path)
    Factors.whitened(model, measured).save(factors)
    return name


def run(job: tuple[Path, dict[str, Any], str, str, int]) -> str:
    """One fine-tune, scored; leaves runs/TASK/VARIANT-SEED.json."""
    out, recipe, name, variant, seed = job
    task, how = recipe["tasks"][name], recipe["variants"][variant]
    started = time.perf_counter()
    model, tokenizer = fresh(recipe, seed)
    steps = max(1, round(how.get("steps", 1.0) * recipe["epochs"] * -(-task["train"] // recipe["batch"])))
    plan, factors = None, None
    if "layers" in how:
        plan = SparsityPlan.default(model, selection=recipe["selection"], dense_steps=recipe["dense_steps"], seed=seed)
    if "flops" in how or "uniform" in how:
        kind = f"{how['flops']:g}" if "flops" in how else f"uniform-{how['uniform']:g}"
        plan = replace(SparsityPlan.load(out / "plans" / f"{name}-{kind}.json"), calibration=None, seed=seed)
    if plan is not None:
        plan = replace(plan, **{k: v for k, v in how.items() if k in ("selection", "dense_steps", "dense_outputs")})
        factors = Factors.load(out / "plans" / f"{name}-whitened.safetensors") if plan.selection == "whitened" else None
    rows = data.encode(tokenizer, examples(task, "train", seed))
    seen = fit(model, rows, recipe, steps, seed, plan, factors)
    trained = time.perf_counter() - started
    solved, loss = score(model, data.encode(tokenizer, examples(task, "test", recipe["test_seed"])), recipe["batch"])
    shares = dict.fromkeys(("frozen", "all"), how.get("steps", 1.0))
    if plan is not None:
        everything = ("base", "adapters", "attention", "estimator", "head")
        shares = {"frozen": share(model, seen, plan, recipe["count"]), "all": share(model, seen, plan, everything)}
    result = {"solved": "".join(map(str, solved)), "loss": loss, "flops": shares, "seconds": trained, "steps": steps}
    files.write_json(out / "runs" / name / f"{slug(variant)}-{seed}.json", result)
    return f"{name}, {variant}, seed {seed}: {statistics.fmean(solved):.1%} solved, loss {loss:.4f}, {trained:.0f} s"


def slug(variant: str) -> str:
    """A file name."""
    return re.sub(r"[^a-z0-9]+", "-", variant.lower()).strip("-")


def student(freedom: int) -> float:
    """The 97.5% quantile of Student's t, by bisection on its integrated density."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def above(x: float, parts: int = 2000) -> float:
        """Probability of 0 to x, by Simpson's rule."""
        density = [scale * (1 + (x * i / parts) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(parts + 1)]
        return x / parts / 3 * (density[0] + density[-1] + 4 * sum(density[1::2]) + 2 * sum(density[2:-1:2]))

    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) < 0.475 else (low, middle)
    return high


def interval(values: Sequence[Sequence[float]]) -> Interval:
    """Mean of values[seed][problem] with its 95% interval over seeds and problems; see above. One seed: none."""
    by_seed = [statistics.fmean(row) for row in values]
    by_problem = [statistics.fmean(column) for column in zip(*values, strict=True)]
    mean = statistics.fmean(by_seed)
    if len(by_seed) < 2:
        return Interval(mean, math.nan, math.nan)
    variance = statistics.variance(by_seed) / len(by_seed)
    if len(by_problem) > 1:
        variance += statistics.variance(by_problem) / len(by_problem)
    half = student(len(by_seed) - 1) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)


def difference(one: Mapping[int, Any], other: Mapping[int, Any]) -> tuple[Interval, Interval] | None:
    """Solved and loss of `one` minus `other`, paired by seed and problem; None where they share no two seeds."""
    seeds = sorted(one.keys() & other.keys())
    if len(seeds) < 2:
        return None
    pairs = [(one[seed], other[seed]) for seed in seeds]
    solved = interval([[a - b for a, b in zip(x["solved"], y["solved"], strict=True)] for x, y in pairs])
    return solved, interval([[x["loss"] - y["loss"]] for x, y in pairs])


def collect(out: Path, recipe: Mapping[str, Any]) -> dict[str, dict[str, dict[int, Any]]]:
    """Results by task, variant and seed, as far as they are there."""
    return {
        task: {
            variant: {
                seed: (found := files.read_json(path, "result")) | {"solved": [int(one) for one in found["solved"]]}
                for seed in recipe["seeds"]
                if (path := out / "runs" / task / f"{slug(variant)}-{seed}.json").exists()
            }
            for variant in recipe["variants"]
        }
        for task in recipe["tasks"]
    }


def points(found: Interval) -> str:
    """Percentage points with their interval."""
    if math.isnan(found.low):
        return f"{100 * found.value:+.1f}"
    return f"{100 * found.value:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def page(results: dict[str, dict[str, dict[int, Any]]], recipe: Mapping[str, Any], out: Path, command: str) -> str:
    """Everything that was found, as Markdown."""
    expected = len(recipe["tasks"]) * len(recipe["variants"]) * len(recipe["seeds"])
    done = sum(len(seeds) for variants in results.values() for seeds in variants.values())
    passes = f", {recipe['epochs']} passes over the problems, {len(recipe['seeds'])} seeds"
    lines = [
        "# SparseLoRA: what sparsity costs in quality" + (passes if recipe["epochs"] > 1 else ""),
        "",
        f"Written by `{command}` from {done} of {expected} fine-tunes of the embedded model. Recipe, budgets, seeds "
        f"and comparisons were fixed before the first run. {recipe['about']}",
        "",
        "*Solved*: share of test problems whose worked solution greedy decoding gives token by token. *Loss*: nats per "
        "token of the solutions. *Operations*: of the whole run over LoRA's, dense first steps included, both without "
        "what is lossless to leave out: of the *frozen products* alone, which is what the paper counts and what the "
        "percentages in names are budgets of, and of *all*, with adapters, attention, estimator and output head, "
        "which is what `calibrate(flops=...)` budgets unless told otherwise: its 0.6 is a tighter plan than 60% here. "
        "Intervals are 95%, over seeds and problems (the program says how). Unless the name says otherwise, plans are "
        f"calibrated and channels chosen by {recipe['selection']!r}.",
    ]
    for task, variants in results.items():
        ready = {variant: seeds for variant, seeds in variants.items() if seeds}
        if not ready:
            continue
        count = len(next(iter(next(iter(ready.values())).values()))["solved"])
        told = ", those of a file, the same in every recipe" if "files" in recipe["tasks"][task] else ""
        lines += ["", f"## {task}", "", f"{count} test problems{told}.", ""]
        lines += ["| variant | seeds | operations, frozen products | all | solved | loss | minus LoRA, points |"]
        lines += ["| --- | --: | --: | --: | --: | --: | --: |"]
        for variant, seeds in ready.items():
            solved = interval([result["solved"] for result in seeds.values()])
            loss = statistics.fmean(result["loss"] for result in seeds.values())
            ops = {k: statistics.fmean(result["flops"][k] for result in seeds.values()) for k in ("frozen", "all")}
            minus = None if variant == "LoRA" else difference(seeds, ready.get("LoRA", {}))
            told = "" if math.isnan(solved.low) else f" ({100 * solved.low:.1f} to {100 * solved.high:.1f})"
            lines.append(
                f"| {variant} | {len(seeds)} | {ops['frozen']:.1%} | {ops['all']:.1%} | "
                f"{100 * solved.value:.1f}%{told} | {loss:.4f} | {'' if minus is None else points(minus[0])} |"
            )
        paired = [
            (one, other, found)
            for one, other in recipe["comparisons"]
            if (found := difference(ready.get(one, {}), ready.get(other, {}))) is not None
        ]
        if paired:
            lines += ["", "| paired difference | solved, points | loss |", "| --- | --: | --: |"]
        for one, other, (solved, loss) in paired:
            told = f"{loss.value:+.4f} ({loss.low:+.4f} to {loss.high:+.4f})"
            lines.append(f"| {one} minus {other} | {points(solved)} | {told} |")
        if any("steps" in recipe["variants"][variant] for variant in ready):
            lines += ["", "LoRA with fewer steps has as many operations in the frozen products, and fewer in all."]
        for budget in sorted({v["flops"] for v in recipe["variants"].values() if "flops" in v}, reverse=True):
            path = out / "plans" / f"{task}-{budget:g}.json"
            if path.exists():
                plan = SparsityPlan.load(path)
                assert plan.calibration is not None
                lines += [
                    "",
                    f"Plan at {budget:.0%}: {plan.describe()}. Expected increase of the loss "
                    f"{plan.calibration.expected_increase:.4f}, measured with all parts sparse together "
                    f"{plan.calibration.measured_increase:.4f}.",
                ]
    lines += ["", "## Held against the bars", "", *verdict(results)]
    return "\n".join(lines) + "\n"


def verdict(results: dict[str, dict[str, dict[int, Any]]]) -> list[str]:
    """What the numbers allow to be said, and no more: of problems solved, then of the loss, where lower is better."""
    lines = []
    told_apart: dict[str, dict[str, list[str]]] = {
        control: {"problems solved": [], "loss": []} for control in ("random channels", "no context FFN")
    }
    for task, variants in results.items():
        by_name = collections.defaultdict(dict, variants)
        if (found := difference(by_name["46%"], by_name["LoRA"])) is not None:
            solved = interval([result["solved"] for result in by_name["LoRA"].values()]).value
            held = f"the lower bound is {'above' if found[0].low > -0.01 else 'not above'} -1 point"
            told = (
                held if solved >= _TOO_FEW else f"LoRA solves {100 * solved:.1f}%, too few for points to say anything"
            )
            lines.append(f"- {task}: 46% minus LoRA {points(found[0])} points; {told}.")
        for control, by in told_apart.items():
            for plan in ("46%", "46%, uniform"):
                against = difference(by_name[plan], by_name[f"{plan}, {control}"])
                name = f"{task} ({'calibrated' if plan == '46%' else 'uniform'} plan)"
                by["problems solved"] += [name] if against is not None and against[0].low > 0 else []
                by["loss"] += [name] if against is not None and against[1].high < 0 else []
    ran = {variant for variants in results.values() for variant, seeds in variants.items() if seeds}
    if not any(variant.endswith(tuple(told_apart)) for variant in ran):
        lines.append("- No controls were run here, so nothing is said of whether the choice of channels matters.")
    for control, by in told_apart.items():
        if not any(variant.endswith(control) for variant in ran):
            continue
        for measure, tasks in by.items():
            lines.append(
                f"- Better than the control {control!r} by {measure}, interval clear of 0, on: {', '.join(tasks)}."
                if tasks
                else f"- By {measure}, this scale does not tell SparseLoRA from the control {control!r}: nothing is "
                "claimed there."
            )
    return lines


def sections(results: dict[str, dict[str, dict[int, Any]]], recipe: Mapping[str, Any], command: str) -> dict[str, Any]:
    """The same for `elision report`: problems lost against operations left out, controls among them, and all scores."""
    settings = {"command": command, "model": recipe["model"], "seeds": ", ".join(map(str, recipe["seeds"]))}
    tradeoffs, scores = [], []
    for task, variants in results.items():
        if not (lora := variants["LoRA"]):
            continue
        before = interval([result["solved"] for result in lora.values()]).value
        points = []
        for variant, seeds in variants.items():
            if not seeds:
                continue
            solved = [result["solved"] for result in seeds.values()]
            found, minus = interval(solved), None if variant == "LoRA" else difference(seeds, lora)
            saving = 1 - statistics.fmean(result["flops"]["frozen"] for result in seeds.values())
            change = {"value": found.value - before} if minus is None else minus[0]._asdict()
            lost = {"cost": 0.0 - change["value"], "low": None, "high": None}
            lost |= {} if minus is None else {"low": -change["high"], "high": -change["low"]}
            points.append({"name": variant, "saving": saving, **lost, "kind": kind_of(variant, recipe)})
            known = {name: None if math.isnan(value) else value for name, value in found._asdict().items()}
            row = {"task": task, "metric": "solved", "model": variant, **known, "count": sum(map(len, solved))}
            scores.append(row | ({} if variant == "LoRA" else {"baseline": before, "change": change}))
        what = {"saving": "the operations of LoRA's frozen products", "cost": "problems not solved"}
        tradeoffs.append({"name": f"SparseLoRA on {task}", **what, "points": points})
    return {"title": "SparseLoRA: quality", "settings": settings, "tradeoffs": tradeoffs, "evaluation": scores}


def kind_of(variant: str, recipe: Mapping[str, Any]) -> str:
    """A control takes away what the method claims to need; chosen is the plan that the first comparison is about."""
    how = recipe["variants"][variant]
    if variant == recipe["comparisons"][0][0]:
        return "chosen"
    taken = how.get("selection") in ("random", "no-ffn") or not how.get("dense_outputs", True) or "steps" in how
    return "control" if taken else "plan"


def main() -> None:
    """Calibrate, fine-tune, score, write the page; resume where it was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory of plans and results; by default docs/results/RECIPE")
    parser.add_argument("--processes", type=int, default=1, help="of one thread each")
    parser.add_argument("--tiers", default="1,2,3", help="which variants, by their tier in the recipe")
    parser.add_argument("--variants", nargs="*", help="of these tiers, those named; by default all")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--page", type=Path, help="where the page goes; by default docs/results/RECIPE.md")
    parser.add_argument("--quick", action="store_true", help="two seeds, two steps, to see that all of it runs")
    given = parser.parse_args()
    recipe = files.read_json(given.recipe, "recipe")
    command = f"python benchmarks/{Path(__file__).name}"
    command += "" if given.recipe == RECIPE else f" --recipe {given.recipe}"
    given.page = given.page or RESULTS / f"{given.recipe.stem}.md"
    if given.quick:
        small = {"train": 32, "test": 16}
        recipe |= {"seeds": recipe["seeds"][:2], "grid": [0.99], "calibration_rows": 4, "rehearsed_steps": 2}
        recipe["tasks"] = {name: {**task, **small} for name, task in list(recipe["tasks"].items())[-2:]}
        given.out = given.out or Path("runs/sparselora_quality")
        given.out, given.page, command = given.out / "quick", given.out / "quick" / "page.md", f"{command} --quick"
    given.out = given.out or RESULTS / given.recipe.stem
    recipe["tasks"] = available(recipe["tasks"])
    known = given.out / "recipe.json"
    if known.exists() and files.read_json(known, "recipe") != recipe:
        parser.error(f"--out {given.out} holds runs of another recipe: give a new directory")
    files.write_json(known, recipe)
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        for name in pool.imap_unordered(prepare, [(given.out, recipe, name) for name in recipe["tasks"]]):
            console.print(f"{name}: plans ready")
        for tier in map(int, given.tiers.split(",")):
            jobs = [
                (given.out, recipe, task, variant, seed)
                for seed in recipe["seeds"]
                for variant, how in recipe["variants"].items()
                for task in recipe["tasks"]
                if how["tier"] == tier
                and (given.variants is None or variant in given.variants)
                and not (given.out / "runs" / task / f"{slug(variant)}-{seed}.json").exists()
            ]
            for number, line in enumerate(pool.imap_unordered(run, jobs), 1):
                gone = (time.perf_counter() - started) / 60
                console.print(f"[{gone:.0f} min] tier {tier}, {number} of {len(jobs)}: {line}", markup=False)
            results = collect(given.out, recipe)
            files.write_text(given.page, page(results, recipe, given.out, command))
    results = collect(given.out, recipe)
    shown = sections(results, recipe, command)
    told = {
        task: {
            variant: {
                "seeds": len(seeds),
                "solved": interval([result["solved"] for result in seeds.values()])._asdict(),
                "loss": statistics.fmean(result["loss"] for result in seeds.values()),
            }
            for variant, seeds in variants.items()
            if seeds
        }
        for task, variants in results.items()
    }
    console.print(f"page: {given.page}")
    print(json.dumps({"benchmark": "sparselora_quality", "recipe": recipe, "results": told, **shown}))


if __name__ == "__main__":
    main()
