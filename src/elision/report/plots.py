"""The plots of a report, drawn from checked results.

A figure is as wide as a phone's column: there it is shown at its own size, on a desk two stand side by side. Where two
models are compared their plots share scales. Shapes, positions and labels repeat what colours say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from elision.report.canvas import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILLION,
    Plot,
)
from elision.report.results import LORA, NO_FFN, RANDOM, SPARSE, TIERS, FineTune, LayerPlan, Pair, SyncPointDrop
from elision.report.verdict import MINUS, change, interval, limit, listed, number, percent, signed, spans

WIDTH = 4.6  # inches; 331 of SVG's units
LOOKS = {LORA: (BLUE, "o"), SPARSE: (VERMILLION, "D"), RANDOM: (GREEN, "s"), NO_FFN: (PURPLE, "^")}
OTHERS = [(ORANGE, "v"), (SKY, "P"), (INK, "X")]
DASHED = (0, (4, 3))
SERIES = [(ORANGE, "s"), (GREEN, "^"), (BLUE, "o"), (PURPLE, "D"), (VERMILLION, "v"), (SKY, "P")]
TIER_COLOURS = (SKY, ORANGE, VERMILLION)


def losses(is_: FineTune) -> Plot | None:
    """Training loss of every variant, and its difference to LoRA's on the same batches."""
    runs = {variant.name: dict(variant.losses) for variant in is_.variants if variant.losses}
    if not runs:
        return None
    steps = sorted(set().union(*runs.values()))
    lora = runs.get(LORA)
    others = {
        name: run for name, run in runs.items() if lora is not None and name != LORA and run.keys() == lora.keys()
    }
    width = max(1, len(steps) // 25)
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(2 if others else 1, 4.3 if others else 3.0, heights=(3, 2) if others else (1,))
        for (name, run), (colour, marker) in zip(runs.items(), looks(list(runs)), strict=True):
            style = {"color": colour, "label": name, "zorder": 3 if name == SPARSE else 2}
            if len(steps) <= 30:  # few enough to be seen one by one, and a single one not at all without
                style |= {"marker": marker, "markersize": 3.5}
            if name == LORA:  # wide and beneath: the others may lie on it
                style |= {"linewidth": 3.2, "zorder": 1.9}
            axes[0].plot(*smooth(run, width), **style)
            if name in others and lora is not None:
                axes[1].plot(*smooth({step: run[step] - lora[step] for step in lora}, width), **style)
        axes[0].set_title("Training loss")
        if others:
            axes[1].set_title(f"Difference to {LORA}, same batches")
            axes[1].axhline(0, color=BLUE, linewidth=3.2, zorder=1.9)
        axes[-1].set_xlabel("optimizer step")
        axes[0].legend(loc="upper right", ncols=2)
    ends = [f"{name} ends at {number(smooth(run, width)[1][-1], 3)}" for name, run in runs.items()]
    smoothing = f" Running means over {width} logged steps." if width > 1 else ""
    return Plot(
        name="losses",
        title="Loss while fine-tuning",
        caption="All variants see the same batches in the same order, so the lower panel shows what elision adds to "
        f"the loss.{smoothing}"
        if others
        else f"Loss on the batches of each step.{smoothing}",
        description=f"Loss against optimizer step, {steps[0]} to {steps[-1]}. {listed(ends)}.",
        figure=figure,
        header=("step", *runs),
        rows=[(step, *(run.get(step) for run in runs.values())) for step in steps],
    )


def accuracy(is_: FineTune, name: str = "accuracy") -> Plot:
    """Accuracy against counted FLOPs, with 95% intervals, beside what guessing gets."""
    variants = is_.variants
    names = [variant.name for variant in variants]
    costs = [100 * variant.flops_ratio for variant in variants]
    places = side_by_side(costs, gap=0.06 * max(40.0, max(costs) - min(costs)))
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 4.4)
        for variant, place, (colour, marker) in zip(variants, places, looks(names), strict=True):
            low, high = variant.accuracy - variant.accuracy_low, variant.accuracy_high - variant.accuracy
            axis.errorbar(
                place,
                100 * variant.accuracy,
                yerr=[[100 * low], [100 * high]],
                color=colour,
                marker=marker,
                markersize=8 if variant.name == SPARSE else 6,
                elinewidth=1.6,
                capsize=3,
                linestyle="none",
                label=variant.name,
            )
            if variant.swapped_accuracy is not None:
                axis.plot(place, 100 * variant.swapped_accuracy, marker, color=colour, markerfacecolor="none")
        axis.axhline(100 * is_.majority_rate, color=MUTED, linewidth=1, linestyle=DASHED, label="most frequent answer")
        if is_.base_accuracy is not None:
            axis.axhline(100 * is_.base_accuracy, color=MUTED, linewidth=1, linestyle=":", label="before fine-tuning")
        if any(variant.swapped_accuracy is not None for variant in variants):
            axis.plot([], [], "o", color=MUTED, markerfacecolor="none", label="facts swapped")
        axis.set_ylim(0, min(100, 5 + 100 * max(is_.majority_rate, *(v.accuracy_high for v in variants))))
        axis.set_xlim(max(0.0, min(places) - 12), max(places) + 12)
        axis.yaxis.set_major_formatter(percents())
        axis.xaxis.set_major_formatter(percents())
        axis.set_title(f"Accuracy on {is_.test_problems:,} held-out problems")
        axis.set_xlabel("FLOPs, in % of LoRA's")
        handles, labels = axis.get_legend_handles_labels()  # lines come first there, variants shall
        order = sorted(range(len(labels)), key=lambda i: labels[i] not in names)
        figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside lower left", ncols=2)
    described = [
        f"{v.name}: {percent(v.accuracy)} ({percent(v.accuracy_low)} to {percent(v.accuracy_high)}) with "
        f"{percent(v.flops_ratio)} of LoRA's FLOPs."
        for v in variants
    ]
    return Plot(
        name=name,
        title="Quality against arithmetic",
        caption="Up and to the left is better. Bars are 95% intervals; points of like FLOPs are moved apart sideways. "
        "Facts swapped: the context tells of another problem.",
        description=f"{' '.join(described)} The most frequent answer is right in {percent(is_.majority_rate)}.",
        figure=figure,
        header=("variant", "flops_ratio", "accuracy", "accuracy_low", "accuracy_high", "swapped_accuracy"),
        rows=[
            (v.name, v.flops_ratio, v.accuracy, v.accuracy_low, v.accuracy_high, v.swapped_accuracy) for v in variants
        ],
    )


def paired(is_: FineTune) -> Plot | None:
    """Differences of accuracy on the same problems, with their 95% intervals."""
    if not is_.paired:
        return None
    count = len(is_.paired)
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 1.2 + 0.5 * count)
        for row, (pair, (colour, marker)) in enumerate(
            zip(is_.paired, looks([_compared(pair) for pair in is_.paired]), strict=True)
        ):
            axis.errorbar(
                100 * pair.difference,
                row,
                xerr=[[100 * (pair.difference - pair.low)], [100 * (pair.high - pair.difference)]],
                color=colour,
                marker=marker,
                markersize=7,
                elinewidth=1.6,
                capsize=3,
            )
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.set_yticks(range(count), [f"{pair.a}\n{MINUS} {pair.b}" for pair in is_.paired])
        axis.set_ylim(count - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x", visible=True)
        axis.set_xlabel("difference of accuracy, points")
    return Plot(
        name="paired",
        title="Which differences are real",
        caption="Paired on the same problems; an interval (95%) that crosses 0 cannot tell the two apart.",
        description=" ".join(
            f"{pair.a} minus {pair.b}: {signed(100 * pair.difference)} points ({interval(pair.low, pair.high)})."
            for pair in is_.paired
        ),
        figure=figure,
        header=("a", "b", "difference", "low", "high"),
        rows=[(pair.a, pair.b, pair.difference, pair.low, pair.high) for pair in is_.paired],
    )


def _compared(pair: Pair) -> str:
    """The variant that names the comparison: what SparseLoRA is held against."""
    return pair.b if pair.a == SPARSE else pair.a


def layer_plan(plan: LayerPlan | None, name: str = "plan", title: str = "What SparseLoRA leaves out") -> Plot | None:
    """Sparsity of every layer, one panel a part."""
    if plan is None:
        return None
    parts = {"Feed-forward": plan.ffn, "Q and K": plan.qk, "V and O": plan.vo}
    layers = range(len(plan.ffn))
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(parts), 3.6)
        for axis, (part, sparsities) in zip(axes, parts.items(), strict=True):
            axis.bar(layers, [100 * s for s in sparsities], width=0.7, color=VERMILLION)
            axis.set_ylim(0, 100)
            axis.set_yticks([0, 50, 100])
            axis.yaxis.set_major_formatter(percents())
            axis.set_title(part)
        blocks_below(axes[-1], len(layers), "layer")
    return Plot(
        name=name,
        title=title,
        caption="Share of each layer's channels that context tokens skip, chosen anew for every batch. A layer "
        "without a bar is dense.",
        description=" ".join(
            f"{part}: {listed([percent(s, 0) for s in sparsities])}." for part, sparsities in parts.items()
        )
        + " One value a layer, from layer 0.",
        figure=figure,
        header=("layer", "ffn", "qk", "vo"),
        rows=[(i, plan.ffn[i], plan.qk[i], plan.vo[i]) for i in layers],
    )


def sensitivity(model: SyncPointDrop, every: Sequence[SyncPointDrop], name: str) -> Plot:
    """Sensitivity of every block, coloured by tier, one panel a number of ranks; the scale is that of `every` model."""
    low, high = model.tiers
    values = [value for each in every for ranks in each.ranks for value in ranks.sensitivities if np.isfinite(value)]
    top, bottom = max([*values, 2 * high]), min([*values, -0.2 * low])
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(model.ranks), 0.7 + 1.35 * len(model.ranks))
        for axis, ranks in zip(axes, model.ranks, strict=True):
            colours = [TIER_COLOURS[model.tier(value)] for value in ranks.sensitivities]
            axis.bar(range(ranks.layers), _finite(ranks.sensitivities), width=0.7, color=colours)
            _logarithmic(axis, bottom, top, linear=low, ticks=[0, low, 1, high, 20, 100])
            axis.axhline(0, color=MUTED, linewidth=0.6)
            for bound in (low, high):
                axis.axhline(bound, color=MUTED, linewidth=0.8, linestyle=DASHED)
            axis.set_title(f"{ranks.ranks} ranks")
        blocks_below(axes[-1], model.ranks[0].layers, "block")
        handles = [Patch(color=colour) for colour in TIER_COLOURS]
        texts = [f"{TIERS[0]} ≤ {low:g}%", f"{TIERS[1]} ≤ {high:g}%", f"extremely > {high:g}%"]
        figure.legend(handles, texts, loc="outside lower center", ncols=3, handlelength=0.9, columnspacing=1.2)
    described = []
    for ranks in model.ranks:
        tiers = [[i for i, s in enumerate(ranks.sensitivities) if model.tier(s) == tier] for tier in range(3)]
        blocks = [f"{TIERS[tier]} {spans(found)}" for tier, found in enumerate(tiers)]
        described.append(f"{ranks.ranks} ranks: blocks {listed(blocks)}.")
    return Plot(
        name=name,
        title=f"Sensitivity by block, {model.model}",
        caption="What dropping a block's sync adds to perplexity, in % of the dense model's, when all later blocks "
        f"have dropped theirs. The scale is linear up to {low:g}% and logarithmic beyond.",
        description=" ".join(described),
        figure=figure,
        header=("block", *(f"{ranks.ranks} ranks, % of perplexity" for ranks in model.ranks)),
        rows=[(i, *(ranks.sensitivities[i] for ranks in model.ranks)) for i in range(model.ranks[0].layers)],
    )


def dropping(model: SyncPointDrop, every: Sequence[SyncPointDrop], name: str) -> Plot:
    """Increase of perplexity against the number of dropped syncs, the chosen number ringed."""
    layers = model.ranks[0].layers
    values = [100 * x for each in every for ranks in each.ranks for x in ranks.increases if np.isfinite(x)]
    budgets = sorted({100 * ranks.max_loss for ranks in model.ranks if ranks.max_loss is not None})
    linear = max([*budgets, 0.1]) if budgets else 1.0
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 3.9)
        for index, ranks in enumerate(model.ranks):
            colour, marker = SERIES[index % len(SERIES)]
            increases = _finite([100 * x for x in ranks.increases])
            axis.plot(
                range(layers + 1), increases, marker=marker, color=colour, markersize=4, label=f"{ranks.ranks} ranks"
            )
            if ranks.chosen is not None:
                axis.plot(
                    ranks.chosen,
                    increases[ranks.chosen],
                    "o",
                    color=colour,
                    markerfacecolor="none",
                    markeredgewidth=1.5,
                    markersize=11 + 4 * index,
                )
        for budget in budgets:
            axis.axhline(budget, color=MUTED, linewidth=1, linestyle=DASHED)
            axis.text(0, budget, f"budget {limit(budget / 100)}", color=MUTED, va="bottom", fontsize=9)
        _logarithmic(
            axis, min([*values, 0]), max([*values, 2 * linear]), linear, [0, linear / 2, linear, 2, 5, 10, 20, 50]
        )
        axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axis.set_title("Increase of perplexity")
        axis.set_xlabel(f"dropped syncs, of {layers}")
        axis.legend(loc="upper left")
    ringed = f" Ringed: what the plan chose{' within its budget' if budgets else ''}."
    return Plot(
        name=name,
        title=f"Cost of dropping, {model.model}",
        caption="Blocks go in ascending order of sensitivity, nothing is healed."
        f"{ringed if any(ranks.chosen is not None for ranks in model.ranks) else ''} "
        f"The scale is linear up to {linear:g}% and logarithmic beyond.",
        description=" ".join(
            f"{ranks.ranks} ranks: "
            + (
                ""
                if ranks.chosen is None
                else f"{ranks.chosen} of {layers} dropped at {change(ranks.increases[ranks.chosen])}, "
            )
            + f"all at {change(ranks.increases[-1])}."
            for ranks in model.ranks
        ),
        figure=figure,
        header=("dropped", *(f"{ranks.ranks} ranks, perplexity" for ranks in model.ranks)),
        rows=[(k, *(ranks.perplexities[k] for ranks in model.ranks)) for k in range(layers + 1)],
    )


def panels(count: int, height: float, heights: Sequence[float] = ()) -> tuple[Figure, Sequence[Axes]]:
    """A figure of `count` panels, one below the other, that share their x axis."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(count, 1, sharex=True, squeeze=False, height_ratios=heights or None)[:, 0]
    return figure, list(axes)


def looks(names: Sequence[str]) -> list[tuple[str, str]]:
    """Colour and marker of each variant; those of the paper's comparison are fixed."""
    free = iter(OTHERS * len(names))
    return [LOOKS[name] if name in LOOKS else next(free) for name in names]


def smooth(run: Mapping[int, float], width: int) -> tuple[list[int], list[float]]:
    """Steps and running means over `width` values, each at its last step."""
    steps = sorted(run)
    if len(steps) < width:
        width = 1
    means = np.convolve([run[step] for step in steps], np.ones(width) / width, mode="valid")
    return steps[width - 1 :], means.tolist()


def side_by_side(values: Sequence[float], gap: float) -> list[float]:
    """`values`, those closer than `gap` moved apart around their common middle, in the given order."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and values[i] - values[groups[-1][-1]] < gap:
            groups[-1].append(i)
        else:
            groups.append([i])
    places = list(values)
    for group in groups:
        middle = sum(values[i] for i in group) / len(group)
        for place, i in enumerate(sorted(group)):
            places[i] = middle + gap * (place - (len(group) - 1) / 2)
    return places


def _finite(values: Sequence[float]) -> list[float]:
    """`values`, with a gap where one cannot be drawn."""
    return [value if np.isfinite(value) else np.nan for value in values]


def percents() -> FuncFormatter:
    """Ticks as "5%"."""
    return FuncFormatter(lambda value, _: f"{value:g}%".replace("-", MINUS))


def blocks_below(axis: Axes, count: int, what: str) -> None:
    """Number the blocks, all of them where there is room."""
    axis.set_xlim(-0.6, count - 0.4)
    axis.xaxis.set_major_locator(FixedLocator(range(count)) if count <= 16 else MaxNLocator(12, integer=True))
    axis.set_xlabel(what)


def _logarithmic(axis: Axes, bottom: float, top: float, linear: float, ticks: Sequence[float]) -> None:
    """Percent, linear up to `linear` and logarithmic beyond, so that 0.1% and 20% can both be read."""
    axis.set_yscale("symlog", linthresh=linear, linscale=0.6)
    axis.set_ylim(1.3 * bottom if bottom < 0 else bottom, 1.3 * top)
    axis.yaxis.set_major_locator(
        FixedLocator([tick for tick in sorted(set(ticks)) if 1.3 * bottom <= tick <= 1.3 * top])
    )
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(percents())
