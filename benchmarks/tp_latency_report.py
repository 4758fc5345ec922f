"""What tp_latency.py measured as a page: `python benchmarks/tp_latency_report.py docs/results/tp_latency.json`.

Every number of the page is read or computed from the JSON line; the page lies beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from elision import files

BARS = {"decode, loopback": 0.18, "prefill 512, 1 Gbit": 0.28, "of the ideal": 0.95, "empty plan": 0.02}
SHOWN = {"plan": "plan (8 of 12)", "all dropped": "all dropped", "int8": "int8"}


def page(found: dict[str, Any], beside: str) -> str:
    """Markdown: how it was measured, a row a link and workload, what else was timed, the bars."""
    links = [link["link"] for link in found["links"]]
    command = f"python benchmarks/tp_latency.py --links {','.join(links)} --turns {found['turns']}"
    lines = [
        "# Latency of dropped syncs, two ranks on one machine",
        "",
        f"`{command}`, {found['date']}: 2 ranks over gloo on {found['cores']} cores of {found['machine']}, fp32,",
        f"{found['parameters'] / 1e6:.0f} M random parameters in 12 blocks, medians of {found['turns']} turns, torch",
        f"{found['torch']}. The JSON of the run, quartiles included, is [beside this page]({beside}).",
        "How busy the machine was before each link, as its load (processes that want a core, mean of a minute):",
        ", ".join(f"{link['link']} {link['load']:.1f} ({link['threads']})" for link in found["links"]) + ".",
        "",
        "| link | work | all syncs, ms | transformers' own TP, ms | "
        + " | ".join(f"{shown} saves | of the ideal" for shown in SHOWN.values())
        + " | one cold all-reduce, ms |",
        "| --- | --- |" + " --: |" * (2 + 2 * len(SHOWN) + 1),
    ]
    for link in found["links"]:
        for work, rows in by_work(link).items():
            cells = [link["link"], work, f"{rows['all syncs']['ms']:.1f}", f"{rows['transformers']['ms']:.1f}"]
            for name in SHOWN:
                cells += [f"{rows[name]['saved']:.1%}", share_of_ideal(rows[name])]
            lines.append("| " + " | ".join([*cells, f"{rows['all syncs']['all_reduce_ms']:.2f}"]) + " |")
    lines += [
        "",
        "What surrounds the syncs: one process without tensor parallelism, and a bare loop of the same maths.",
        "",
    ]
    lines += ["| link | work | single process, ms | bare loop, ms | all syncs over bare | bare, all dropped, saves |"]
    lines += ["| --- | --- |" + " --: |" * 4]
    for link in found["links"]:
        for work, rows in by_work(link).items():
            over = rows["all syncs"]["ms"] / rows["bare"]["ms"] - 1
            cells = [link["link"], work, f"{rows['single process']['ms']:.1f}", f"{rows['bare']['ms']:.1f}"]
            lines.append("| " + " | ".join([*cells, f"{over:+.1%}", f"{rows['bare dropped']['saved']:.1%}"]) + " |")
    lines += [
        "",
        "What alpha and beta, fitted to all-reduces of other sizes on the link, say that dropping all saves:",
        "",
    ]
    lines += [
        "| link | alpha, us | GB/s | work | saved, ms | ideal, ms | model, ms |",
        "| --- | --: | --: | --- |" + " --: |" * 3,
    ]
    for link in found["links"]:
        fit = [link["link"], f"{link['alpha_us']:.0f}", f"{link['gbytes_per_s']:.3g}"]
        for work, rows in by_work(link).items():
            dropped = rows["all dropped"]
            cells = [*fit, work, *(f"{dropped[kind]:.1f}" for kind in ("saved_ms", "ideal_ms", "model_ms"))]
            lines.append("| " + " | ".join(cells) + " |")
    if found.get("vllm"):
        own = ", ".join(f"{row['workload']} {row['all_reduce_ms']:.3f} ms" for row in found["vllm"])
        lines += ["", f"One cold all-reduce in vLLM's shared memory, the same sizes: {own}."]
    lines += [
        "",
        "An empty plan against transformers' own tensor parallelism, and a second copy of the latter against the",
        "first, which shows what no difference looks like: the median over pairs of tokens or prompts computed",
        "one right after the other, with its 95% interval.",
        "",
        "| link | work | pairs | empty plan | a second copy |",
        "| --- | --- | --: | --: | --: |",
    ]
    for link in found["links"]:
        for row in link["empty_plan"]:
            cells = [link["link"], row["workload"], str(row["pairs"]), ratio(*row["empty plan"]), ratio(*row["twin"])]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Bars:", ""]
    lines += [f"- {said(bar)}" for bar in found["bars"]]
    lines += [
        "",
        "The ideal is the number of dropped syncs times one cold all-reduce. Savings above it are the waiting for the",
        "slower rank that a dropped sync also removes. A share of the ideal is a bar only where the ideal exceeds the",
        "noise (the quartiles' distance). Links slower than loopback are shaped by token buckets, whose burst lets",
        "small messages through at full speed; one alpha and one beta then lie between the two, and the model says",
        "less than the ideal where messages are long.",
    ]
    return "\n".join(lines) + "\n"


def verdicts(links: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each bar with what was measured; a saving is held against the ideal where that exceeds the noise."""
    by = {(f["link"], row["workload"], row["variant"]): row for f in links for row in f["rows"]}
    found = []

    def bar(name: str, value: float, limit: float, least: bool = True, interval: list[float] | None = None) -> None:
        met = value >= limit if least else value <= limit
        found.append({"bar": name, "value": value, "limit": limit, "met": met, "interval": interval})

    for (link, workload, variant), row in by.items():
        if variant == "all dropped" and link == "loopback" and workload.startswith("decode"):
            bar(f"all dropped, {workload}, {link}", row["saved"], BARS["decode, loopback"])
        if variant == "all dropped" and link == "1gbit" and workload.startswith("prefill 512"):
            bar(f"all dropped, {workload}, {link}", row["saved"], BARS["prefill 512, 1 Gbit"])
        if variant in ("plan", "all dropped"):
            noise = row["quartiles_ms"][1] - row["quartiles_ms"][0]
            if row["ideal_ms"] > noise:
                share = row["saved_ms"] / row["ideal_ms"]
                bar(f"of the ideal: {variant}, {workload}, {link}", share, BARS["of the ideal"])
    for link in links:
        for row in link["empty_plan"]:
            name = f"empty plan over transformers, {row['workload']}, {link['link']}"
            value, *interval = row["empty plan"]
            bar(name, value, BARS["empty plan"], least=False, interval=interval)
    return found


def said(bar: dict[str, Any]) -> str:
    """A bar in words: not decided where the value misses it and the interval reaches to where it would be met."""
    low, high = bar["interval"] or (None, None)
    word = "met" if bar["met"] else "**missed**" if low is None or low > bar["limit"] else "not decided"
    between = f", 95% interval {low:+.1%} to {high:+.1%}" if low is not None else ""
    return f"{word}: {bar['bar']}: {bar['value']:.1%} ({bar['limit']:.0%}){between}"


def by_work(link: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of a link by workload and variant."""
    found: dict[str, dict[str, Any]] = {}
    for row in link["rows"]:
        found.setdefault(row["workload"], {})[row["variant"]] = row
    return found


def share_of_ideal(row: dict[str, Any]) -> str:
    """How much of the ideal saving was seen; a dash where the quartiles are further apart than it is large."""
    low, high = row["quartiles_ms"]
    return f"{row['saved_ms'] / row['ideal_ms']:.0%}" if row["ideal_ms"] > high - low else "-"


def ratio(value: float, low: float, high: float) -> str:
    """A relative difference and its interval."""
    return f"{value:+.1%} ({low:+.1%} to {high:+.1%})"


def write(path: Path) -> None:
    """The page beside the JSON line."""
    found = json.loads(path.read_text(encoding="utf-8"))
    files.write_text(path.with_suffix(".md"), page(found, path.name))


def main(path: Annotated[Path, typer.Argument(help="The JSON line that tp_latency.py kept.")]) -> None:
    """Write the page beside it."""
    write(path)


if __name__ == "__main__":
    typer.run(main)
