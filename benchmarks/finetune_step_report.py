"""What finetune_step.py measured as a page: `python benchmarks/finetune_step_report.py FILE` with the kept JSON line.

Every number of the page is read or computed from the JSON line; the page lies beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from elision import files

# sparse + lossless over dense + lossless, and over PEFT with bf16 adapters, of full rows with 25% output on CPU
BARS = {"S1": (1.25, 2.4), "S2": (1.3, 2.0)}
OF_IDEAL = 0.85  # of the ideal of the first, attention's own time and operations taken out of both
BASE = "PEFT bf16 adapters"


def page(found: dict[str, Any], beside: str) -> str:
    """Markdown: how it was measured, a row a shape and variant, the bars."""
    lines = [
        "# A fine-tuning step, timed",
        "",
        f"`python benchmarks/finetune_step.py`, {found['date']}: {found['threads']} threads of {found['machine']},",
        f"torch {found['torch']}, {found['rounds']} turns, bfloat16, random weights, LoRA r 32 on QKVO.",
        "Steps are medians, with the quartiles behind them: how far apart these are is how far to trust a ratio.",
        f"What the variants are stands at the top of the program; the JSON of the run is [beside this page]({beside}).",
        "",
        "| shape | output | variant | step, ms | quartiles | over PEFT | over PEFT bf16 adapters | ideal | efficiency "
        "| peak MB |",
        "| --- | --- | --- |" + " --: |" * 7,
    ]
    for row in found["rows"]:
        cells = [row["shape"], share(row), row["variant"], f"{row['step_ms']:.0f}"]
        cells.append("{:.0f} to {:.0f}".format(*row["quartiles_ms"]))
        cells += [f"{row[key]:.2f}x" for key in ("speedup", "speedup_bf16", "ideal")]
        lines.append("| " + " | ".join([*cells, f"{row['efficiency']:.0%}", str(row["peak_mb"])]) + " |")
    lines += [
        "",
        "`ideal` is the ratio of the operations that have to be done, over PEFT with bf16 adapters.",
        "",
        *([*without_attention(found), ""] if profiled(found) else []),
        "Bars:",
        "",
    ]
    lines += [
        f"- {'met' if met else '**missed**'}: {name}: {value:.2f}x ({limit:.2f}x)"
        for name, value, limit, met in bars(found)
    ]
    return "\n".join(lines) + "\n"


def beyond_attention(dense: dict[str, Any], sparse: dict[str, Any]) -> tuple[float, float]:
    """How many times faster the sparse step is without attention's own time, and its ideal without its operations."""
    took = [row["step_ms"] - row["attention_ms"] for row in (dense, sparse)]
    needs = [row["gflops"] - row["attention_gflops"] for row in (dense, sparse)]
    return took[0] / took[1], needs[0] / needs[1]


def profiled(found: dict[str, Any]) -> bool:
    """Whether attention's own time was measured; it was not before 2026-11-23."""
    return any(row.get("attention_ms") for row in found["rows"])


def without_attention(found: dict[str, Any]) -> list[str]:
    """Markdown: what sparsity gains over the lossless step, and what of it once attention's own time is left out."""
    lines = [
        "Sparse + lossless over dense + lossless, with attention and without: sparsity leaves it as it is. Its time is",
        "its share of three profiled steps, forward and backward; the ideal without it has none of its operations.",
        "",
        "| shape | output | attention, ms | gain | ideal | gain without attention | ideal without | of it |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for shape, output in dict.fromkeys((row["shape"], share(row)) for row in found["rows"]):
        rows = {r["variant"]: r for r in found["rows"] if (r["shape"], share(r)) == (shape, output)}
        dense, sparse = rows["dense + lossless"], rows["sparse + lossless"]
        rest, ideal = beyond_attention(dense, sparse)
        cells = [shape, output, f"{dense['attention_ms']:.0f} and {sparse['attention_ms']:.0f}"]
        cells += [f"{dense[key] / sparse[key]:.2f}x" for key in ("step_ms", "gflops")]
        lines.append("| " + " | ".join([*cells, f"{rest:.2f}x", f"{ideal:.2f}x", f"{rest / ideal:.0%}"]) + " |")
    return lines


def share(row: dict[str, Any]) -> str:
    """The batch's output tokens."""
    return "padded rows" if row["output_share"] is None else f"{row['output_share']:.0%}"


def bars(found: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Name, what was measured, the limit, whether it was met."""
    judged = []
    for shape, output in dict.fromkeys((row["shape"], share(row)) for row in found["rows"]):
        rows = {r["variant"]: r for r in found["rows"] if (r["shape"], share(r)) == (shape, output)}
        own = {variant: row["step_ms"] for variant, row in rows.items()}
        sparse, dense = own["sparse + lossless"], own["dense + lossless"]
        limits = BARS.get(shape) if output == "25%" else None
        pairs = [
            ("sparse + lossless over dense + lossless", dense / sparse, limits[0] if limits else 1.0),
            ("sparse + lossless over PEFT bf16 adapters", own[BASE] / sparse, limits[1] if limits else 1.0),
            ("dense + lossless over PEFT bf16 adapters", own[BASE] / dense, 1.0),
            ("sparse over PEFT bf16 adapters", own[BASE] / own["sparse"], 1.0),
        ]
        if limits and profiled(found):
            rest, ideal = beyond_attention(rows["dense + lossless"], rows["sparse + lossless"])
            name = "sparse + lossless over dense + lossless, without attention's own time"
            pairs.append((name, rest, OF_IDEAL * ideal))
        judged += [(f"{shape}, {output}: {name}", value, limit, value >= limit) for name, value, limit in pairs]
    return judged


def write(path: Path) -> None:
    """The page beside the JSON line."""
    found = json.loads(path.read_text(encoding="utf-8"))
    files.write_text(path.with_suffix(".md"), page(found, path.name))


def main(path: Annotated[Path, typer.Argument(help="The JSON line that finetune_step.py kept.")]) -> None:
    """Write the page beside it."""
    write(path)


if __name__ == "__main__":
    typer.run(main)
