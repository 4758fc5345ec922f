"""Single measurements drawn: losses, evaluation, quality against saving, step times, latencies.

Same manner as plots.py, whose figures compare the variants of one experiment. What the arithmetic would allow, the
ideal, is an open mark beside what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes

from elision.report.canvas import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, SKY, STYLE, VERMILLION, Plot
from elision.report.plots import DASHED, SERIES, TIER_COLOURS, blocks_below, panels, percents, side_by_side, smooth
from elision.report.results import (
    TIERS,
    Latency,
    LayerSensitivity,
    Links,
    Measure,
    StepTime,
    Tradeoff,
    Training,
)
from elision.report.verdict import bounds, change, difference, listed, number, percent

PARTS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK, MUTED)
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "+++", "ooo")
PART_NAMES = {"ffn": "Feed-forward", "qk": "Q and K", "vo": "V and O"}


def losses(runs: Sequence[Training]) -> Plot:
    """Training loss of every run against its steps."""
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 3.2)
        for index, run in enumerate(runs):
            colour, marker = SERIES[index % len(SERIES)]
            shown = {"marker": marker, "markersize": 3.5} if len(run.losses) <= 30 else {}
            steps, values = smooth(dict(run.losses), max(1, len(run.losses) // 25))
            axis.plot(steps, values, color=colour, label=run.name, linestyle=_dashes(index), **shown)
        axis.set_title("Training loss")
        axis.set_xlabel("optimizer step")
        figure.legend(loc="outside lower left", ncols=1 if max(len(run.name) for run in runs) > 18 else 2)
    steps = sorted({step for run in runs for step, _ in run.losses})
    ends = [f"{run.name} ends at {number(run.losses[-1][1], 3)}" for run in runs]
    by_run = [dict(run.losses) for run in runs]
    return Plot(
        name="training",
        title="Loss while fine-tuning",
        caption="Running means where a run logged more than 50 times; the CSV holds every value.",
        description=f"Loss against optimizer step, {steps[0]} to {steps[-1]}. {listed(ends)}.",
        figure=figure,
        header=("step", *(run.name for run in runs)),
        rows=[(step, *(run.get(step) for run in by_run)) for step in steps],
    )


def changes(measures: Sequence[Measure], name: str, title: str) -> Plot | None:
    """Paired differences to the baseline with their 95% intervals, one row a metric."""
    rows = [m for m in measures if m.change is not None and m.change.low is not None and m.change.high is not None]
    if not rows:
        return None
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 1.1 + 0.5 * len(rows))
        for place, measure in enumerate(rows):
            found = measure.change
            assert found is not None and found.low is not None and found.high is not None
            good = (found.value > 0) == (measure.better == "higher")
            axis.errorbar(
                100 * found.value,
                place,
                xerr=[[100 * (found.value - found.low)], [100 * (found.high - found.value)]],
                color=MUTED if not found.tells_apart else GREEN if good else VERMILLION,
                marker="o" if found.tells_apart else "|",
                markersize=7,
                elinewidth=1.6,
                capsize=3,
            )
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.set_yticks(range(len(rows)), [_label(measure) for measure in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x", visible=True)
        axis.set_xlabel("% of the baseline" if rows[0].relative else "difference, points")
    return Plot(
        name=name,
        title=title,
        caption="Paired on the same rows or documents. Grey: the 95% interval holds 0, so the two cannot be told "
        "apart; green is better, red worse.",
        description=" ".join(
            f"{_label(m, ', ')}: {difference(m.change.value, m.relative)} ({bounds(m.change, m.relative)})."
            for m in rows
            if m.change is not None
        ),
        figure=figure,
        header=("model", "task", "metric", "change", "low", "high"),
        rows=[
            (m.model, m.task, m.metric, m.change.value, m.change.low, m.change.high)
            for m in rows
            if m.change is not None
        ],
    )


def tradeoff(is_: Tradeoff, name: str) -> Plot:
    """Cost against saving, numbered: points that nothing beats joined, the chosen one and controls told apart."""
    points = sorted(is_.points, key=lambda point: point.saving)
    best = front([(point.saving, point.cost) for point in points if point.kind != "control"])
    looks = {"plan": (BLUE, "o"), "chosen": (VERMILLION, "D"), "control": (MUTED, "X")}
    width = 100 * max(0.1, points[-1].saving - points[0].saving)
    places = side_by_side([100 * point.saving for point in points], 0.035 * width)
    at = {(point.saving, point.cost): place for point, place in zip(points, places, strict=True)}
    columns = 1 if max(len(point.name) for point in points) > 24 else 2
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 3.3 + 0.2 * -(-len(points) // columns))
        joined = {"color": BLUE, "linewidth": 1, "linestyle": DASHED, "zorder": 1}
        axis.plot([at[point] for point in best], [100 * cost for _, cost in best], **joined)
        for number_, (point, place) in enumerate(zip(points, places, strict=True), 1):
            colour, marker = looks[point.kind]
            label = f"{number_} {point.name}" + ("" if point.kind == "plan" else f" ({point.kind})")
            axis.plot(place, 100 * point.cost, marker, color=colour, linestyle="none", label=label, markersize=7)
            if point.low is not None and point.high is not None:
                axis.plot([place, place], [100 * point.low, 100 * point.high], color=colour, linewidth=1.2)
            axis.annotate(str(number_), (place, 100 * point.cost), (5, 4), textcoords="offset points", fontsize=8.5)
        if max(point.cost for point in points) > 0.3:  # what fails as a whole would press the rest to the ground
            axis.set_yscale("symlog", linthresh=1)
        axis.xaxis.set_major_formatter(percents())
        axis.yaxis.set_major_formatter(percents())
        axis.margins(0.12)
        axis.set_title(f"Increase of {is_.cost}")
        axis.set_xlabel(f"{is_.saving} left out")
        figure.legend(loc="outside lower left", ncols=columns, fontsize=8.5)
    return Plot(
        name=name,
        title=f"Quality against saving, {is_.name}",
        caption="Down and to the right is better. The dashed line joins the plans that no other beats in both. Points "
        "that save alike stand side by side.",
        description=" ".join(
            f"{point.name} ({point.kind}): leaves out {percent(point.saving)} of {is_.saving} for {change(point.cost)} "
            f"{is_.cost}."
            for point in points
        ),
        figure=figure,
        header=("name", "kind", "saving", "cost", "low", "high"),
        rows=[(p.name, p.kind, p.saving, p.cost, p.low, p.high) for p in points],
    )


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (saving, cost) that no other point beats in both, by ascending saving."""
    kept: list[tuple[float, float]] = []
    for point in sorted(set(points), key=lambda point: (-point[0], point[1])):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept[::-1]


def layer_sensitivity(is_: LayerSensitivity, name: str) -> Plot:
    """What sparsity in one layer costs, one panel a part, coloured by tier where there are bounds."""
    layers = range(len(next(iter(is_.parts.values()))))
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(is_.parts), 0.8 + 1.25 * len(is_.parts))
        for axis, (part, values) in zip(axes, is_.parts.items(), strict=True):
            tiers = [0 if is_.bounds is None else sum(value > bound for bound in is_.bounds) for value in values]
            axis.bar(layers, values, width=0.7, color=[TIER_COLOURS[tier] for tier in tiers])
            axis.axhline(0, color=MUTED, linewidth=0.6)
            for bound in is_.bounds or ():
                axis.axhline(bound, color=MUTED, linewidth=0.8, linestyle=DASHED)
            axis.yaxis.set_major_formatter(percents())
            axis.set_title(PART_NAMES.get(part, part))
        blocks_below(axes[-1], len(layers), "layer")
    tiers = "" if is_.bounds is None else f" Dashed: the bounds between {listed(TIERS)}."
    return Plot(
        name=name,
        title=f"Sensitivity by layer, {is_.name}",
        caption=f"What sparsity in this layer alone adds to the loss, in % of the dense model's.{tiers}",
        description=" ".join(
            f"{PART_NAMES.get(part, part)}: {listed([number(value, 2) for value in values])}."
            for part, values in is_.parts.items()
        )
        + " In % of the dense loss, one value a layer, from layer 0.",
        figure=figure,
        header=("layer", *is_.parts),
        rows=[(layer, *(values[layer] for values in is_.parts.values())) for layer in layers],
    )


def step_times(rows: Sequence[StepTime], name: str, title: str) -> Plot:
    """Milliseconds of a step by variant, the ideal of the counted operations as an open mark."""
    slowest = max(rows, key=lambda row: row.step_ms / (row.speedup or 1))
    base = next((row.step_ms * row.speedup for row in rows if row.speedup), slowest.step_ms)
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 0.9 + 0.42 * len(rows))
        axis.barh(range(len(rows)), [row.step_ms for row in rows], height=0.62, color=SKY, label="measured")
        bases = [row.step_ms * row.speedup if row.speedup else base for row in rows]  # several runs have each its own
        ideals = [(place, bases[place] / row.ideal) for place, row in enumerate(rows) if row.ideal]
        if ideals:
            places, values = zip(*ideals, strict=True)
            axis.plot(
                values, places, "D", color=INK, markerfacecolor="none", linestyle="none", label="ideal, from operations"
            )
        for place, row in enumerate(rows):
            if row.speedup:
                axis.annotate(
                    f"{row.speedup:.2f}×",
                    (row.step_ms, place),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                )
        _named_rows(axis, [row.variant for row in rows])
        axis.set_xlim(0, 1.18 * max(row.step_ms for row in rows))
        axis.set_xlabel("milliseconds a step")
        figure.legend(loc="outside lower left", ncols=2)
    return Plot(
        name=name,
        title=title,
        caption="Shorter is better; beside each bar its speedup over the first kind of step. The open mark is what the "
        "counted operations alone would allow.",
        description=" ".join(
            f"{row.variant}: {number(row.step_ms, 1)} ms"
            f"{'' if row.speedup is None else f', {number(row.speedup, 2)} times as fast'}"
            f"{'' if row.ideal is None else f', ideal {number(row.ideal, 2)}'}."
            for row in rows
        ),
        figure=figure,
        header=("variant", "shape", "output_share", "device", "step_ms", "speedup", "ideal", "peak_mb"),
        rows=[(r.variant, r.shape, r.output_share, r.device, r.step_ms, r.speedup, r.ideal, r.peak_mb) for r in rows],
    )


def breakdown(rows: Sequence[StepTime], name: str) -> Plot | None:
    """Where the time of a step goes, one stacked bar a variant."""
    known = [(row, row.breakdown) for row in rows if row.breakdown]
    if not known:
        return None
    parts = list(dict.fromkeys(part for _, times in known for part in times))
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 1.5 + 0.42 * len(known) + 0.14 * len(parts))
        left = [0.0] * len(known)
        for index, part in enumerate(parts):
            widths = [times.get(part, 0.0) for _, times in known]
            colour, hatch = PARTS[index % len(PARTS)], HATCHES[index % len(HATCHES)]
            axis.barh(
                range(len(known)),
                widths,
                left=left,
                height=0.62,
                color=colour,
                hatch=hatch,
                edgecolor="#ffffff",
                label=part,
            )
            left = [start + width for start, width in zip(left, widths, strict=True)]
        _named_rows(axis, [row.variant for row, _ in known])
        axis.set_xlabel("milliseconds a step")
        figure.legend(loc="outside lower left", ncols=2)
    return Plot(
        name=name,
        title="Where a step's time goes",
        caption="Parts of the step as the benchmark timed them, one below the other in the legend's order.",
        description=" ".join(
            f"{row.variant}: {listed([f'{part} {number(value, 1)} ms' for part, value in times.items()])}."
            for row, times in known
        ),
        figure=figure,
        header=("variant", *parts),
        rows=[(row.variant, *(times.get(part) for part in parts)) for row, times in known],
    )


def latencies(rows: Sequence[Latency], name: str, title: str) -> Plot:
    """Milliseconds of every variant of one phase over each link, the ideal as an open mark."""
    links = list(dict.fromkeys(row.link for row in rows))
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(links), 0.7 + sum(0.5 + 0.3 * sum(r.link == link for r in rows) for link in links))
        for axis, link in zip(axes, links, strict=True):
            own = [row for row in rows if row.link == link]
            axis.barh(range(len(own)), [row.ms for row in own], height=0.62, color=SKY)
            marks = [(row.ideal_ms, place) for place, row in enumerate(own) if row.ideal_ms is not None]
            if marks:
                axis.plot(*zip(*marks, strict=True), "D", color=INK, markerfacecolor="none", linestyle="none")
            several = len({row.ranks for row in own}) > 1
            _named_rows(axis, [f"{row.variant}, {row.ranks} ranks" if several else row.variant for row in own])
            axis.set_title(link)
        axes[-1].set_xlabel("milliseconds")
    return Plot(
        name=name,
        title=title,
        caption="Shorter is better. Open mark: the ideal, all syncs' time less that of the dropped ones.",
        description=" ".join(
            f"{row.link}, {row.variant}: {number(row.ms, 2)} ms"
            f"{'' if row.ideal_ms is None else f', ideal {number(row.ideal_ms, 2)} ms'}."
            for row in rows
        ),
        figure=figure,
        header=("phase", "link", "ranks", "variant", "ms", "ideal_ms"),
        rows=[(r.phase, r.link, r.ranks, r.variant, r.ms, r.ideal_ms) for r in rows],
    )


def all_reduces(is_: Links, name: str) -> Plot:
    """Microseconds of an all-reduce against its bytes, timed and as alpha and beta have it."""
    rows = sorted(is_.all_reduces, key=lambda row: row.bytes)
    sizes = [row.bytes for row in rows]
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 3.2)
        axis.plot(sizes, [1e6 * row.fitted for row in rows], color=MUTED, linestyle=DASHED, label="alpha and beta")
        axis.plot(sizes, [1e6 * row.seconds for row in rows], "o", color=BLUE, label="timed")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title("An all-reduce, microseconds")
        axis.set_xlabel("bytes a rank")
        axis.legend(loc="upper left")
    return Plot(
        name=name,
        title=f"What a sync costs, {is_.name}",
        caption="A decoded token's sync is at the left, where alpha rules; a prompt's at the right, where bytes count.",
        description=" ".join(
            f"{row.bytes:,} bytes: {number(1e6 * row.seconds)} microseconds, {number(1e6 * row.fitted)} fitted."
            for row in rows
        ),
        figure=figure,
        header=("bytes", "seconds", "fitted"),
        rows=[(row.bytes, row.seconds, row.fitted) for row in rows],
    )


def _named_rows(axis: Axes, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", visible=True)


def _label(measure: Measure, separator: str = "\n") -> str:
    return separator.join(part for part in (measure.model, measure.task, measure.metric) if part)


def _dashes(index: int) -> object:
    """Lines that more than colour tells apart."""
    return ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (4, 2, 1, 2)))[index % 4]
