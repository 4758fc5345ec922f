"""What spd_quality.py measured as docs/results/spd_quality.md: `python benchmarks/spd_quality_report.py [OUT]`.

Every number of the page is computed here from the journals; nothing is typed in. Means are over seeds, with the
smallest and the largest beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from elision import files

ROOT = Path(__file__).resolve().parents[1]
JOURNALS = ROOT / "docs/results/spd_quality"
COMMAND = "python benchmarks/spd_quality.py reference runs/second_models/opt/model runs/second_models/qwen2/model"
FAST = ("integrated", "fisher", "output_error", "single")
CURVES = ("zero-shot", "B2B (paper)", "HG + B2B (paper)", "ours")

Journals = list[dict[str, Any]]


def load(out: Path, recipe: dict[str, Any]) -> Journals:
    """The finished measurements under this recipe, by model, number of ranks and seed."""
    found = [files.read_json(path, "journal") for path in sorted(out.glob("*.json"))]
    mine = [each for each in found if each.get("done") and each["about"]["recipe"] == recipe]
    return sorted(mine, key=lambda each: [each["about"][name] for name in ("model", "ranks", "seed")])


def loss(journal: dict[str, Any], way: str, text: str = "library") -> float:
    """Relative increase of perplexity."""
    return journal[f"{way} | {text}"]["perplexity"] / journal[f"dense | {text}"]["perplexity"] - 1


def won_back(journal: dict[str, Any], way: str, text: str = "library") -> float:
    """Share of the perplexity lost by zero-shot dropping that `way` does not lose."""
    return 1 - loss(journal, way, text) / loss(journal, "zero-shot", text)


def droppable(journal: dict[str, Any], way: str, limit: float) -> int:
    """The most blocks, in the order of sensitivity, whose dropping stays within the limit."""
    ceiling = journal["dense | library"]["perplexity"] * (1 + limit)
    within = [int(k) for k, value in journal[f"curve | {way}"].items() if value["perplexity"] <= ceiling]
    return max(within)


def significant(journal: dict[str, Any], noise: float) -> list[int]:
    """The blocks whose exact sensitivity exceeds `noise` of its own standard errors."""
    exact = journal["exact"]
    pairs = zip(exact["sensitivities"], exact["errors"], strict=True)
    return [index for index, (value, error) in enumerate(pairs) if value > noise * error]


def pooled(journals: Journals, method: str, noise: float) -> tuple[float, int]:
    """Spearman's correlation of a fast order with the exact one over all significant blocks, and how many those are.

    Fast scores in perplexity are taken relative to the dense one, as the exact ones are, so that models can be pooled.
    """
    exact, fast = [], []
    for journal in journals:
        unit = 1.0 if method == "output_error" else journal["dense | library"]["perplexity"]
        for index in significant(journal, noise):
            exact.append(journal["exact"]["sensitivities"][index])
            fast.append(journal[f"fast | {method}"][index] / unit)
    return (rank_correlation(exact, fast) if len(exact) > 2 else float("nan")), len(exact)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, of values without ties."""
    ranks = [torch.tensor(values, dtype=torch.float64).argsort().argsort().double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def bars(journals: Journals, recipe: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(what, the bar, what was measured, met) of every bar; the worst mean over seeds of any model counts."""
    wanted = recipe["bars"]
    paper, ours, int8 = ({} for _ in range(3))
    for (model, ranks), group in grouped(journals).items():
        paper[model, ranks] = mean(won_back(each, "B2B (paper)") for each in group)
        ours[model, ranks] = mean(won_back(each, "ours") for each in group)
        int8[model, ranks] = mean(loss(each, "int8 syncs") for each in group)
    low, high = min(paper.values()), min(ours.values())
    dear = max(int8.values())
    found = [
        ("All syncs dropped, the paper's B2B wins back", f"≥ {wanted['paper']:.0%}", worst(paper, min, "{:.1%}"),
         low >= wanted["paper"]),
        ("All syncs dropped, our best recipe wins back", f"≥ {wanted['ours']:.0%}", worst(ours, min, "{:.1%}"),
         high >= wanted["ours"]),
        ("Cost of int8 syncs", f"< {wanted['int8']:.2%}", worst(int8, max, "{:+.3%}"), dear < wanted["int8"]),
    ]  # fmt: skip
    eight = {key: group for key, group in grouped(journals).items() if key[1] == 8}
    if eight:
        most = {key: mean(droppable(each, "ours", 0.01) for each in group) for key, group in eight.items()}
        met = all(12 * most[key] >= wanted["droppable"] * group[0]["about"]["layers"] for key, group in eight.items())
        bar = f"≥ {wanted['droppable']} of 12 blocks"
        found.append(("Droppable at 8 ranks below +1%, our best recipe", bar, worst(most, min, "{:.1f}"), met))
    correlation, count = pooled(journals, recipe["fast"], recipe["noise"])
    what = f"Rank correlation of the fast order ({recipe['fast']}) with the exact one, pooled"
    bar = f"≥ {wanted['correlation']} over ≥ {wanted['blocks']} blocks"
    met = correlation >= wanted["correlation"] and count >= wanted["blocks"]
    found.append((what, bar, f"{correlation:.3f} over {count}", met))
    return found


def heads_help(journals: Journals) -> str:
    """What head grouping did, in one sentence."""
    signs = [loss(each, "HG + B2B (paper)") < loss(each, "B2B (paper)") for each in journals]
    plain = [loss(each, "HG") < loss(each, "zero-shot") for each in journals]
    return (
        f"Head grouping lowered the loss in {sum(plain)} of {len(plain)} measurements before distillation and in "
        f"{sum(signs)} of {len(signs)} after it"
        + ("." if sum(signs) > 0.8 * len(signs) else ": it does not reliably help here, and stays an option.")
    )


def grouped(journals: Journals) -> dict[tuple[str, int], Journals]:
    """By model and number of ranks."""
    found: dict[tuple[str, int], Journals] = {}
    for each in journals:
        found.setdefault((each["about"]["model"], each["about"]["ranks"]), []).append(each)
    return found


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean."""
    listed = list(values)
    return sum(listed) / len(listed)


def spread(values: Iterable[float], form: str) -> str:
    """Mean, and the range where there is more than one value."""
    listed = list(values)
    shown = form.format(mean(listed))
    return shown if len(set(listed)) == 1 else f"{shown} ({form.format(min(listed))} … {form.format(max(listed))})"


def worst(values: dict[tuple[str, int], float], pick: Any, form: str) -> str:
    """The value that counts against the bar, with where it was measured."""
    key = pick(values, key=values.__getitem__)
    return f"{form.format(values[key])} ({key[0]}, {key[1]} ranks)"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def page(journals: Journals, recipe: dict[str, Any]) -> str:
    """The page, in Markdown."""
    models = {each["about"]["model"]: each["about"] for each in journals}
    rows = []
    for name, about in models.items():
        dense = next(each for each in journals if each["about"]["model"] == name)["dense | library"]["perplexity"]
        size = f"{about['parameters'] / 1e6:.1f} M"
        rows.append([name, size, str(about["layers"]), f"`{about['weights']}`", f"{dense:.3f}"])
    seeds = sorted({each["about"]["seed"] for each in journals})
    parts = [
        "# SPD: quality\n",
        f"Written by `benchmarks/spd_quality_report.py` from what this measured:\n\n    {COMMAND}\n",
        f"It has come this far (its recipe has seeds {listed(recipe['seeds'])}): {so_far(journals)}.\n",
        f"The recipe, fixed before the measurement, is `benchmarks/spd_quality.json`: {recipe['rows']} rows of "
        f"{recipe['length']} tokens of the standard library to calibrate on, {recipe['held_out_rows']} rows of its "
        f"other files to score on; a seed ({listed(seeds)}) is another choice of calibration text. "
        '"Won back" is the share of the perplexity lost by dropping all syncs as they are. Numbers are means over '
        "seeds, with the range in brackets. Where fewer blocks are dropped, ours is healed anew for them; the "
        "paper's way treats a block alike whatever else is dropped.\n",
        table(("model", "parameters", "blocks", "weights", "dense perplexity"), rows),
        "## Bars\n",
        table(
            ("", "bar", "measured, worst case", ""),
            [[*line, "met" if met else "**not met**"] for *line, met in bars(journals, recipe)],
        ),
        f"{heads_help(journals)}\n",
    ]
    texts = sorted(journals[0]["about"]["scored"])
    for (model, ranks), group in grouped(journals).items():
        ways = [name.removesuffix(" | library") for name in group[0] if name.endswith(" | library")]
        rows = []
        for way in ways:
            row = [way, spread((each[f"{way} | library"]["accuracy"] for each in group), "{:.2%}")]
            for text in texts:
                row.append("" if way == "dense" else spread((loss(each, way, text) for each in group), "{:+.2%}"))
                treated = way not in ("dense", "zero-shot", "int8 syncs")
                row.append(spread((won_back(each, way, text) for each in group), "{:.1%}") if treated else "")
            rows.append(row)
        head = ["all syncs", "next token, library"]
        for text in texts:
            head += [f"perplexity, {text}", f"won back, {text}"]
        parts += [f"## {model}, {ranks} ranks\n", table(head, rows)]
        rows = []
        for way in CURVES:
            row = [way]
            for limit in recipe["limits"]:
                most = [droppable(each, way, limit) for each in group]
                right = [each[f"curve | {way}"][str(k)]["accuracy"] for each, k in zip(group, most, strict=True)]
                row += [spread(most, "{:.1f}") + f" of {models[model]['layers']}", spread(right, "{:.2%}")]
            rows.append(row)
        head = ["droppable"]
        for limit in recipe["limits"]:
            head += [f"below +{limit:.0%}", "next token there"]
        parts.append(table(head, rows))
    parts.append("## Order of blocks\n")
    parts.append(
        f"Rank correlation with the exact sequential sensitivities, over blocks whose sensitivity exceeds "
        f"{recipe['noise']:g} standard errors, all models, ranks and seeds together; in brackets, blocks.\n"
    )
    rows = []
    for method in FAST:
        row = [method]
        for chosen in [journals, *([e for e in journals if e["about"]["model"] == model] for model in models)]:
            correlation, count = pooled(chosen, method, recipe["noise"])
            row.append(f"{correlation:.3f} ({count})")
        rows.append(row)
    parts.append(table(["order", "all", *models], rows))
    return "\n".join(parts)


def summary(journals: Journals, recipe: dict[str, Any]) -> dict[str, Any]:
    """The bars as JSON values."""
    found = [
        {"bar": what, "wanted": bar, "measured": value, "met": met} for what, bar, value, met in bars(journals, recipe)
    ]
    return {"recipe": recipe, "measurements": len(journals), "bars": found, **sections(journals, recipe)}


def sections(journals: Journals, recipe: dict[str, Any]) -> dict[str, Any]:
    """The same for `elision report`: perplexity against dropped syncs, each way all dropped and within the least limit.

    Values are means over seeds, bounds the smallest and the largest; "zero-shot" is the control.
    """
    least = min(recipe["limits"])
    tradeoffs = []
    for (model, ranks), group in grouped(journals).items():
        layers, points = group[0]["about"]["layers"], []
        ways = [name.removesuffix(" | library") for name in group[0] if name.endswith(" | library")]
        for way in ways:
            if way in ("dense", "int8 syncs"):
                continue
            kind = "control" if way == "zero-shot" else "plan"
            losses = [loss(each, way) for each in group]
            points.append(point(f"{way}, all dropped", 1.0, losses, kind))
            if way in CURVES:
                most = [droppable(each, way, least) for each in group]
                found = [each[f"curve | {way}"][str(k)]["perplexity"] for each, k in zip(group, most, strict=True)]
                losses = [p / each["dense | library"]["perplexity"] - 1 for p, each in zip(found, group, strict=True)]
                kind = "chosen" if way == "ours" else kind
                points.append(point(f"{way}, within +{least:.0%}", mean(most) / layers, losses, kind))
        what = {"saving": "the syncs after attention", "cost": "perplexity"}
        tradeoffs.append({"name": f"SPD, {model}, {ranks} ranks", **what, "points": points})
    return {"title": "SPD: quality", "settings": {"command": COMMAND}, "tradeoffs": tradeoffs}


def so_far(journals: Journals) -> str:
    """Which seeds are measured, by model and number of ranks."""
    found: dict[str, list[int]] = {}
    for about in (each["about"] for each in journals):
        found.setdefault(f"{about['model']} at {about['ranks']} ranks", []).append(about["seed"])
    return "; ".join(f"{which}: {listed(seeds)}" for which, seeds in found.items())


def listed(values: Iterable[int]) -> str:
    """The numbers, separated by commas."""
    return ", ".join(map(str, values))


def point(name: str, saving: float, costs: Sequence[float], kind: str) -> dict[str, Any]:
    """One point of a trade-off."""
    return {
        "name": name,
        "saving": saving,
        "cost": mean(costs),
        "low": min(costs),
        "high": max(costs),
        "kind": kind,
    }


def main(
    out: Annotated[Path, typer.Argument(help="The working directory of spd_quality.py.")] = JOURNALS,
    recipe: Annotated[Path, typer.Option(help="The recipe.")] = ROOT / "benchmarks/spd_quality.json",
    report: Annotated[Path, typer.Option(help="Page to write.")] = ROOT / "docs/results/spd_quality.md",
) -> None:
    """Write the page from what has been measured so far."""
    settings = files.read_json(recipe, "recipe")
    journals = load(out, settings)
    if not journals:
        raise typer.BadParameter(f"{out} holds no finished measurement under {recipe}: run spd_quality.py first")
    files.write_text(report, page(journals, settings))
    print(json.dumps(summary(journals, settings)))


if __name__ == "__main__":
    typer.run(main)
