"""Numbers in words: every sentence of the page that claims something is computed here.

A sentence states its numbers and no more than they allow. Two variants differ only where the 95% interval of their
paired difference leaves out 0; where it does not, the sentence says that this task at this scale cannot tell them
apart, which is not the same as saying that they are equal. A control that cannot be told from the method means that the
run does not show what the method's choice is worth, and that is said as plainly as a gain would be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from elision.report.results import (
    LORA,
    NO_FFN,
    RANDOM,
    SPARSE,
    Bounds,
    FineTune,
    Latency,
    Links,
    Measure,
    Pair,
    Ranks,
    Results,
    StepTime,
    SyncPointDrop,
    Tradeoff,
    Training,
)

MINUS = "\N{MINUS SIGN}"
CALIBRATION, HELD_OUT = "the calibration text", "held-out text"
SYNCS = "the syncs after attention"  # that plans of SPD save


def percent(share: float, digits: int = 1) -> str:
    """A share as "71.5%"."""
    return f"{number(100 * share, digits)}%"


def number(value: float, digits: int = 1) -> str:
    """A number with a true minus sign, and no minus before what rounds to zero."""
    if not math.isfinite(value):
        return "not finite"
    text = f"{abs(value):,.{digits}f}"
    return f"{MINUS}{text}" if value < 0 and text.strip("0.,") else text


def signed(value: float, digits: int = 1) -> str:
    """A difference with its sign; what rounds to zero has none."""
    text = number(value, digits)
    return f"+{text}" if value > 0 and text.strip("0.,") and math.isfinite(value) else text


def change(share: float) -> str:
    """A relative change as "+0.75%", with the digits that small ones need and large ones do not."""
    if not math.isfinite(share):
        return "not finite"
    return f"{signed(100 * share, 2 if abs(share) < 0.0995 else 1)}%"


def limit(share: float) -> str:
    """A budget as "1%" or "0.5%"."""
    return f"{100 * share:g}%"


def duration(seconds: float) -> str:
    """Seconds as "48 s", "3 min 20 s" or "1 h 5 min"."""
    whole = math.floor(seconds + 0.5)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def operations(flops: float) -> str:
    """A count of floating-point operations as "3.2 TFLOP"."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}FLOP" if flops / size < 999.5 else f"{flops / size:.0f} {unit}FLOP"
    return f"{flops:.0f} FLOP"


def listed(parts: Sequence[object]) -> str:
    """The parts as one enumeration: "a, b and c"."""
    *front, last = map(str, parts)
    return f"{', '.join(front)} and {last}" if front else last


def spans(blocks: Sequence[int]) -> str:
    """Block numbers, runs of three and more drawn together: "1-7, 9, 10"."""
    texts: list[str] = []
    ascending = sorted(blocks)
    start = 0
    for end in range(1, len(ascending) + 1):
        if end == len(ascending) or ascending[end] != ascending[end - 1] + 1:
            run = ascending[start:end]
            texts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(block) for block in run]
            start = end
    return ", ".join(texts) or "none"


def interval(low: float, high: float) -> str:
    """The 95% interval of a difference between shares, in points."""
    return f"95% interval {signed(100 * low)} to {signed(100 * high)} points"


def points(difference: float) -> str:
    """A difference between shares as "3.1 points"; the direction is for the sentence to say."""
    return f"{number(abs(100 * difference))} points"


def headline(results: Results) -> str:
    """The verdict on the whole run in one sentence with numbers."""
    first: dict[str, Tradeoff] = {}  # of those that save alike
    for each in results.tradeoffs:
        first.setdefault(each.saving, each)
    # What was verified on held-out text goes before the text that was planned on.
    spd = [] if SYNCS in first and results.spd and results.spd[0].text == CALIBRATION else results.spd
    clauses = [clause for clause in (_trained(results.finetune), _dropped(spd)) if clause]
    clauses += [clause for clause in (evaluated(results.evaluation), fastest(results.steps)) if clause]
    clauses += [clause for clause in (served(results.latency),) if clause]
    clauses += [chosen(each) for each in first.values()]
    clauses += [linked(each) for each in results.links[:1]]
    if not clauses and results.training:
        clauses = [descended(results.training[0])]
    if not clauses:
        return "This run has measured nothing that could be judged yet."
    return capital("; ".join(clauses)) + "."


def _trained(is_: FineTune | None) -> str | None:
    if is_ is None or (sparse := is_.variant(SPARSE)) is None or (lora := is_.variant(LORA)) is None:
        return None
    clause = (
        f"with {percent(sparse.flops_ratio, 0)} of LoRA's FLOPs, SparseLoRA answers {percent(sparse.accuracy)} of "
        f"{is_.test_problems:,} held-out problems and LoRA {percent(lora.accuracy)}"
    )
    if lora.accuracy_low <= is_.majority_rate:
        clause += f" (not clearly above the {percent(is_.majority_rate)} of always giving the most frequent answer)"
    pair = is_.pair(SPARSE, LORA)
    if pair is None:
        return clause
    outcome = "a real difference" if pair.tells_apart else "which this test cannot tell apart"
    return f"{clause}, {outcome} ({interval(pair.low, pair.high)})"


def _dropped(models: Sequence[SyncPointDrop]) -> str | None:
    if not models:
        return None
    model = models[0]
    found = [(each.ranks, each.chosen, each.increases[each.chosen]) for each in model.ranks if each.chosen is not None]
    if not found:
        return "; ".join(mixed(model.model, each) for each in model.ranks)
    counts = listed([chosen for _, chosen, _ in found])
    ranks = listed([ranks for ranks, _, _ in found])
    worst = max(cost for _, _, cost in found)
    at_most = " at most" if len(found) > 1 else ""
    return (
        f"on {ranks} ranks, Sync-Point Drop leaves out {counts} of the {model.model}'s {model.ranks[0].layers} syncs "
        f"after attention for {change(worst)} perplexity{at_most}"
        + (f" on {CALIBRATION} itself" if model.text == CALIBRATION else "")
    )


def mixed(name: str, is_: Ranks) -> str:
    """A plan that is no point of the curve beside it: what it does to which blocks, and what that was found to cost."""
    done = [f"{how} in {spans(blocks)}" for how, blocks in is_.other.items() if blocks]
    cost = "a cost that was not measured"
    if is_.cost is not None:
        cost = f"{change(is_.cost)} perplexity on {HELD_OUT}{unhealed(is_.healed_cost)}"
    return (
        f"on {is_.ranks} ranks, the plan of {name} spares syncs after attention in "
        f"{sum(map(len, is_.other.values()))} of {is_.layers} blocks ({listed(done or ['none'])}) for {cost}"
    )


def unhealed(expected: float | None) -> str:
    """What stands behind a cost that was measured before a healing that is planned; `expected` is that after it."""
    return "" if expected is None else f" before healing, {change(expected)} expected after it"


def learned(is_: FineTune) -> list[str]:
    """What fine-tuning shows, sentence by sentence: the task's worth, the method, its controls, its cost."""
    sentences: list[str] = []
    lora, sparse = is_.variant(LORA), is_.variant(SPARSE)
    if lora is not None:
        before = (
            ""
            if is_.base_accuracy is None
            else f" and the model itself, before fine-tuning, {percent(is_.base_accuracy)}"
        )
        majority = f"always giving the most frequent answer gets {percent(is_.majority_rate)}{before}"
        found = f"LoRA answers {percent(lora.accuracy)} of the held-out problems, where {majority}"
        if lora.accuracy_low > is_.majority_rate:
            sentences.append(f"{found}: the task was learned, so quality can be lost.")
        else:
            sentences.append(f"{found}: the task was not clearly learned, so this run cannot show a loss of quality.")
        if lora.swapped_accuracy is not None:
            swapped = f"with another problem's facts in the context LoRA answers {percent(lora.swapped_accuracy)}"
            if lora.swapped_accuracy < lora.accuracy_low:
                sentences.append(f"The answers depend on the context: {swapped}.")
            else:
                sentences.append(f"The answers are not shown to depend on the context: {swapped}.")
    for other, worth in (
        (LORA, None),
        (RANDOM, "choosing channels by their estimated norm"),
        (NO_FFN, "computing any feed-forward channel for context tokens"),
    ):
        if (pair := is_.pair(SPARSE, other)) is not None:
            sentences.append(_compared(pair, worth))
    if lora is not None and sparse is not None and lora.seconds > 0:
        cost, time = sparse.flops_ratio, sparse.seconds / lora.seconds
        sentence = f"SparseLoRA needs {percent(cost, 0)} of LoRA's FLOPs and {percent(time, 0)} of its time"
        if time >= 1 > cost:
            sentence += ": here it saves arithmetic, not time"
        sentences.append(f"{sentence}.")
    return sentences


def _compared(pair: Pair, worth: str | None) -> str:
    """The outcome of one paired test; `worth` is what the comparison with a control puts to the test."""
    against = f"{pair.a} against {pair.b}"
    bounds = interval(pair.low, pair.high)
    if not pair.tells_apart:
        shown = "" if worth is None else f", so it does not show that {worth} matters"
        return (
            f"{against}: this task at this scale cannot tell them apart "
            f"({signed(100 * pair.difference)} points, {bounds}){shown}."
        )
    more = pair.difference > 0
    shown = ""
    if worth is not None:
        shown = f": {worth} matters here" if more else f": {worth} does harm here"
    return f"{against}: {points(pair.difference)} {'more' if more else 'fewer'} ({bounds}){shown}."


def reading(pair: Pair) -> str:
    """One paired test in a few words, for a table."""
    if not pair.tells_apart:
        return "cannot be told apart"
    return f"{pair.a if pair.difference > 0 else pair.b} is better"


def dropped(models: Sequence[SyncPointDrop]) -> list[str]:
    """What dropping syncs shows: one sentence a model, then how every later model compares with the first."""
    sentences = []
    for model in models:
        found = [(each, each.increases[each.chosen]) for each in model.ranks if each.chosen is not None]
        if found:
            some = [f"{each.chosen} ({change(cost)})" for each, cost in found]
            every = [change(each.increases[-1]) for each, _ in found]
            ranks = listed([each.ranks for each, _ in found])
            sentences.append(
                f"{capital(model.model)}, on {ranks} ranks: the plan leaves out {listed(some)} of "
                f"{model.ranks[0].layers} syncs after attention; leaving out all of them costs {listed(every)} "
                "perplexity."
            )
        for each in model.ranks:
            if each.chosen is None:
                beside = "The curve is that of dropping alone, in the calibration's order"
                sentences.append(f"{capital(mixed(model.model, each))}. {beside}: no point of it is this plan.")
        over = [(each, cost) for each, cost in found if each.max_loss is not None and cost > each.max_loss]
        if over:
            budgets = listed(sorted({f"+{limit(each.max_loss or 0.0)}" for each, _ in over}))
            places = listed([f"{change(cost)} on {each.ranks} ranks" for each, cost in over])
            sentences.append(f"{capital(model.model)}: the budget of {budgets} does not hold on this text ({places}).")
    for model in models[1:]:
        first = {each.ranks: each.chosen for each in models[0].ranks if each.chosen is not None}
        shared = [each for each in model.ranks if each.ranks in first and each.chosen is not None]
        same = [each.ranks for each in shared if each.chosen == first[each.ranks]]
        counts = [f"as many on {listed(same)} ranks"] if same else []
        counts += [
            f"{each.chosen} instead of {first[each.ranks]} on {each.ranks} ranks"
            for each in shared
            if each.ranks not in same
        ]
        if counts:
            sentences.append(f"{capital(model.model)}, against the {models[0].model}: {listed(counts)} can go.")
    return sentences


def evaluated(measures: Sequence[Measure]) -> str | None:
    """The first compared number, else the first number, with its interval."""
    if not measures:
        return None
    is_ = next((measure for measure in measures if measure.change is not None), measures[0])
    value = number(is_.value, 4 if abs(is_.value) < 10 else 2)
    clause = f"{is_.metric} on {is_.task} is {value}"
    clause += f" for {is_.model}" if is_.model else ""
    if is_.change is None or is_.baseline is None:
        return clause
    against = f"{difference(is_.change.value, is_.relative)} against the baseline"
    return f"{clause}, {against} (95% interval {bounds(is_.change, is_.relative)}: {judged(is_)})"


def best_step(rows: Sequence[StepTime]) -> StepTime:
    """The fastest of the steps that were timed against another: what they are held against is not one of them."""
    return max([row for row in rows if row.speedup != 1.0] or rows, key=lambda row: row.speedup or 0)


def fastest(rows: Sequence[StepTime]) -> str | None:
    """The best speedup that was timed, with what the operations would allow."""
    known = [row for row in rows if row.speedup is not None]
    if not known:
        return None
    best = best_step(known)
    ideal = "" if best.ideal is None else f", where the counted operations allow {number(best.ideal, 2)}"
    return f"a step of {best.variant} at {best.shape} is {number(best.speedup or 0, 2)} times as fast{ideal}"


def served(rows: Sequence[Latency]) -> str | None:
    """What a plan, or else dropping every sync, saved most over all syncs, with the ideal beside it."""
    whole = {(row.phase, row.link, row.ranks): row.ms for row in rows if row.variant == "all syncs"}
    timed = [row for row in rows if row.ideal_ms is not None and (row.phase, row.link, row.ranks) in whole]
    known = [row for row in timed if row.variant == "plan"] or [row for row in timed if row.variant == "all dropped"]
    if not known:
        return None
    saved = {id(row): 1 - row.ms / whole[row.phase, row.link, row.ranks] for row in known}
    best = max(known, key=lambda row: saved[id(row)])
    share, ideal = saved[id(best)], 1 - (best.ideal_ms or 0.0) / whole[best.phase, best.link, best.ranks]
    what = "the plan" if best.variant == "plan" else "dropping every sync after attention"
    took = f"takes {percent(share)} off" if share >= 0 else f"adds {percent(-share)} to"
    alone = "the dropped syncs alone " + ("would be" if share >= 0 else "would take off")
    return f"{what} {took} {best.phase} on {best.link}, where {alone} {percent(ideal)}"


def linked(is_: Links) -> str:
    """What an all-reduce costs between ranks."""
    rate = f", and bytes leave a rank at {number(1e-9 / is_.beta, 2)} GB/s" if is_.beta else ""
    return (
        f"on {is_.name} an all-reduce of next to nothing between {is_.ranks} ranks takes "
        f"{number(1e6 * is_.alpha)} microseconds by the fit{rate}"
    )


def chosen(is_: Tradeoff) -> str:
    """What the chosen plan saves and costs, or each of several, else how many were measured."""
    found = [point for point in is_.points if point.kind == "chosen"]
    said = [
        f"{is_.name if len(found) == 1 else point.name} leaves out {percent(point.saving)} of {is_.saving} for "
        f"{change(point.cost)} {is_.cost}"
        + (f" ({point.name})" if len(found) == 1 and point.name.startswith(HELD_OUT) else "")
        for point in found
    ]
    return listed(said) if said else f"{len(is_.points)} plans of {is_.name} were measured"


def descended(is_: Training) -> str:
    """Where a training loss began and ended."""
    first, last = is_.losses[0], is_.losses[-1]
    return (
        f"the training loss of {is_.name} went from {number(first[1], 3)} to {number(last[1], 3)} in {last[0]:,} steps"
    )


def difference(value: float, relative: bool) -> str:
    """A change: relative ones in percent, others in points."""
    return change(value) if relative else f"{signed(100 * value)} points"


def bounds(is_: Bounds, relative: bool) -> str:
    """The interval of a change, or why there is none."""
    if is_.low is None or is_.high is None:
        return "unknown: one row"
    return f"{difference(is_.low, relative)} to {difference(is_.high, relative)}"


def judged(is_: Measure) -> str:
    """A paired difference in a few words."""
    if is_.change is None:
        return "–"
    if not is_.change.tells_apart:
        return "cannot be told apart"
    return "better" if (is_.change.value > 0) == (is_.better == "higher") else "worse"


def capital(text: str) -> str:
    """`text` with a capital first letter, the rest as it is."""
    return text[:1].upper() + text[1:]
