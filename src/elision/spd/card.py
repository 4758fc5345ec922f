"""The model card of a checkpoint with a plan: what was left out, how it was decided, how to run it."""

from __future__ import annotations

from collections.abc import Mapping

from elision.spd.plan import SyncPlan


def card(plan: SyncPlan, architecture: str, command: str | None, results: Mapping[str, str]) -> str:
    """README.md's text: a function of its arguments alone, so that a rerun writes the same bytes."""
    treatments = {
        "dropped as they are": [b for b in plan.dropped if b not in plan.corrections and b not in plan.healed],
        "with healed weights": plan.healed,
        **{
            f"with a correction of the local MLP input ({kind})": [b for b, k in plan.corrections.items() if k == kind]
            for kind in dict.fromkeys(plan.corrections.values())
        },
    }
    rows = {
        "Tensor-parallel ranks": str(plan.ranks),
        "Blocks without the sync after attention": _list(plan.dropped),
        **{f"… {how}": _list(blocks) for how, blocks in treatments.items() if blocks},
    }
    if plan.int8:
        rows["Blocks whose sync after attention is in int8"] = _list(plan.int8)
    if plan.skipped:
        rows["Blocks without attention"] = _list(plan.skipped)
    if plan.heads:
        rows["Blocks with regrouped heads"] = _list(tuple(plan.heads))
    if (found := plan.calibration) is not None:
        count = len(plan.dropped)
        rows["Calibration data (fingerprint)"] = f"`{found.data}`"
        rows["Perplexity on it, every sync in place"] = f"{found.perplexities[0]:.4g}"
        if set(found.order[:count]) == set(plan.dropped):
            rows["Perplexity on it, dropped as they are"] = f"{found.perplexities[count]:.4g}"
        rows["Made with"] = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    if (checked := plan.verified) is not None:
        rows["Held-out data (fingerprint, tokens scored)"] = f"`{checked.data}`, {checked.tokens:,}"
        rows["Perplexity on held-out data, every sync in place"] = f"{checked.dense:.4g}"
        rows["Perplexity on held-out data, dropped as they are"] = f"{checked.zero_shot:.4g}"
        rows["Perplexity on held-out data, as this checkpoint runs"] = f"{checked.planned:.4g} ({checked.loss:+.2%})"
        rows["KL divergence from the dense model, nats a token"] = f"{checked.kl:.3g}"
        rows["Increase of perplexity that was predicted"] = f"{checked.predicted:+.2%}"
        if checked.recovery is not None and not plan.original_weights:
            rows["Recovered of what dropping lost"] = f"{checked.recovery:.0%}"
    rows |= results
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    made = "" if command is None else f"\nMade by:\n\n    {command}\n"
    weights = (
        "The weights are those of the original model: plain `from_pretrained` gives that model, every sync in place."
        if plan.original_weights
        else "The weights belong to this plan and this number of ranks. Without the plan they give wrong results, so "
        "transformers' Auto classes, and serving engines without elision, refuse the checkpoint."
    )
    return f"""---
library_name: elision
tags: [tensor-parallelism, sync-point-drop]
---

# {architecture} with fewer synchronisations

This checkpoint is to be served on {plan.ranks} tensor-parallel ranks, with the all-reduce after attention left out in
{len(plan.dropped)} of its blocks (SPD: Kim et al., "SPD: Sync-Point Drop for Efficient Tensor Parallelism of Large
Language Models", PMLR 267, https://proceedings.mlr.press/v267/kim25g.html). {weights}

| | |
| --- | --- |
{table}
{made}
In one process, computing what the ranks would:

    model = elision.spd.load("path/to/this/directory")
"""


def _list(blocks: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, blocks)) or "none"
