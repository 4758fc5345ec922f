"""What dropped syncs cost in quality, and how much each treatment wins back.

    python benchmarks/spd_quality.py reference runs/second_models/opt/model runs/second_models/qwen2/model

For each model, seed (which calibration text) and number of ranks, with every sync after attention dropped: as it is
(zero-shot), with each training-free correction, with the paper's distillation (B2B) and with its head grouping before
it (HG + B2B), with students fed by the student's stream, with our best recipe, and with the syncs in int8 instead. Then
how many blocks, in the order of sensitivity, can be dropped below +1% and +3% perplexity, and how well the fast orders
agree with the exact one.

Text that is scored is never calibrated on: the two splits of the standard library's sources, and WikiText-2's
validation part where the data folder has it. The recipe is spd_quality.json beside this file, fixed before the
measurement. Every number is kept in --out as soon as it is known: a killed run, started again, goes on, on another
machine too where the files went with it, and one process a model may share one --out. `spd_quality_report.py` turns it
into docs/results/spd_quality.md, also at the end of every run. The last line is JSON.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from spd_quality_report import CURVES, FAST, JOURNALS, load, page, summary
from torch.nn import functional as F

from elision import files
from elision.blocks import decoder
from elision.data import shared_folder, text_batches
from elision.layerwise import fingerprint
from elision.loading import load_model, load_texts
from elision.reference_model.corpus import library_texts
from elision.spd import Recipe, SyncPlan, Treated, correct, heal, regroup, scores, sensitivity, simulate
from elision.spd.streams import IGNORED, next_tokens

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path(__file__).with_suffix(".json")

Batches = list[dict[str, torch.Tensor]]


@torch.no_grad()
def quality(model: Any, plan: SyncPlan, batches: Batches) -> dict[str, float]:
    """Perplexity and next-token accuracy of what the plan's ranks would compute."""
    loss = right = count = 0.0
    with simulate(model.eval(), plan):
        for batch in batches:
            target = next_tokens(batch).to(model.device)
            logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits[:, :-1].float()
            loss += F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
            right += (logits.argmax(-1) == target).sum().item()
            count += (target != IGNORED).sum().item()
    return {"perplexity": math.exp(loss / count), "accuracy": right / count}


class Journal:
    """What is known of one model, seed and number of ranks: a file of its own, written after every number."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.known: dict[str, Any] = files.read_json(path, "journal") if path.exists() else {"about": about}

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        """`name`'s value, computed and saved where it is not there yet."""
        if name not in self.known:
            self.known[name] = compute()
            files.write_json(self.path, self.known)
            print(f"{self.path.name}: {name}", flush=True)
        return self.known[name]


def exact(model: Any, batches: Batches, ranks: int) -> dict[str, list[float]]:
    """The sequential sensitivities in shares of the dense perplexity, and their standard errors over the batches."""
    logs = torch.tensor([sensitivity(model, [batch], ranks, quiet=True).perplexities for batch in batches]).double()
    logs = logs.log()  # (batches, L + 1), all batches of the same number of tokens
    perplexities = logs.mean(0).exp() / logs.mean(0).exp()[-1]
    errors = (logs[:, :-1] - logs[:, 1:]).std(0) / len(batches) ** 0.5 * perplexities[:-1]
    return {"sensitivities": (perplexities[:-1] - perplexities[1:]).tolist(), "errors": errors.tolist()}


def measure(
    model: Any, ranks: int, seed: int, recipe: dict[str, Any], calibration: Batches, scored: dict[str, Batches],
    journal: Journal, state: Path,
) -> None:  # fmt: skip
    """Everything for one model, seed and number of ranks, into its journal."""
    layers = tuple(range(model.config.num_hidden_layers))
    bare = SyncPlan(ranks, layers)
    few = calibration[: -(-recipe["sensitivity_rows"] // recipe["batch"])]

    def copied() -> Any:
        return copy.deepcopy(model)

    def healed(how: str, plan: SyncPlan = bare, grouped: bool = False) -> Treated:
        values = dict(recipe[how])
        grouped = values.pop("heads", grouped)  # "heads": true in a recipe stands for head grouping before it
        start = regroup(copied(), plan, few, quiet=True) if grouped else Treated(copied(), plan)
        return heal(*start, calibration, recipe=Recipe(seed=seed, **values), state=state, quiet=True)

    ways: dict[str, Callable[[], Treated]] = {
        "zero-shot": lambda: Treated(copied(), bare),
        **{f"{kind} corrected": lambda kind=kind: correct(copied(), bare, calibration, kind, quiet=True)
           for kind in recipe["corrections"]},
        "HG": lambda: regroup(copied(), bare, few, quiet=True),
        "B2B (paper)": lambda: healed("paper"),
        "HG + B2B (paper)": lambda: healed("paper", grouped=True),
        "B2B, student inputs": lambda: healed("student"),
        "ours": lambda: healed("ours"),
        "int8 syncs": lambda: Treated(copied(), SyncPlan(ranks, int8=layers)),
    }  # fmt: skip
    for text, batches in scored.items():
        journal(f"dense | {text}", partial(quality, model, SyncPlan(ranks), batches))
    measured = journal("exact", partial(exact, model, few, ranks))
    order = sorted(layers, key=measured["sensitivities"].__getitem__)
    dense = journal.known["dense | library"]["perplexity"]
    for method in FAST:
        journal(f"fast | {method}", lambda method=method: list(scores(model, few, ranks, method, quiet=True)))
    for name, make in ways.items():
        wanted = [f"{name} | {text}" for text in scored] + [f"curve | {name}"] * (name in CURVES)
        if all(each in journal.known for each in wanted):
            continue
        treated = make()
        for text, batches in scored.items():
            journal(f"{name} | {text}", partial(quality, *treated, batches))
        if name in CURVES:

            def at(k: int, name: str = name, treated: Treated = treated) -> Treated:
                """Blocks that learned from the teacher's stream are alike whatever else is dropped; ours are not."""
                kept = tuple(order[:k])
                if name == "ours" and 0 < k < len(layers):
                    return healed("ours", SyncPlan(ranks, kept))
                return treated if k == len(layers) else only(model, treated if k else Treated(copied(), bare), kept)

            ceiling = dense * (1 + min(recipe["limits"]))
            journal(wanted[-1], partial(curve, at, len(layers), scored["library"], ceiling))


def curve(at: Callable[[int], Treated], layers: int, batches: Batches, ceiling: float) -> dict[str, Any]:
    """Quality with the first k blocks of the order dropped, from all of them down to where perplexity is in bounds."""
    found: dict[str, Any] = {}
    for k in range(layers, -1, -1):
        found[str(k)] = quality(*at(k), batches)
        if found[str(k)]["perplexity"] <= ceiling:
            break
    return found


def only(model: Any, treated: Treated, kept: tuple[int, ...]) -> Treated:
    """`treated` with blocks `kept` dropped alone: the others have their sync and the original's weights."""
    mixed = copy.deepcopy(treated.model)
    for index in set(treated.plan.dropped) - set(kept):
        own = decoder(model).blocks[index].layer.state_dict()
        decoder(mixed).blocks[index].layer.load_state_dict(own)
    return Treated(mixed, SyncPlan(treated.plan.ranks, kept))


def main(
    models: Annotated[list[str], typer.Argument(help="Model directories, Hugging Face ids or 'reference'.")],
    out: Annotated[Path, typer.Option(help="Directory of the journals; a rerun there resumes.")] = JOURNALS,
    state: Annotated[Path, typer.Option(help="Directory of what is half done.")] = Path("runs/spd_quality"),
    text: Annotated[list[Path] | None, typer.Option(help="Text to calibrate on.")] = None,
    held_out: Annotated[list[Path] | None, typer.Option(help="Other text, to score on.")] = None,
    recipe: Annotated[Path, typer.Option(help="The recipe.")] = RECIPE,
    report: Annotated[Path, typer.Option(help="Page to write.")] = ROOT / "docs/results/spd_quality.md",
) -> None:
    """Measure what dropped syncs cost, and what each treatment wins back."""
    settings = files.read_json(recipe, "recipe")
    length, batch = settings["length"], settings["batch"]
    texts = load_texts(text) if text else library_texts("train")
    held = {"library": load_texts(held_out) if held_out else library_texts("test")}
    folder = shared_folder()
    if folder is not None and (folder / "wikitext2_valid.txt").exists():
        held["wikitext2"] = [(folder / "wikitext2_valid.txt").read_text(encoding="utf-8")]
    for name in models:
        model, tokenizer = load_model(name)
        weights = hashlib.sha256()
        for tensor in model.state_dict().values():
            weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        scored = {
            which: text_batches(tokenizer, each, length, batch, settings["held_out_rows"])
            for which, each in held.items()
        }
        for seed in settings["seeds"]:
            shuffled = [texts[i] for i in torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))]
            calibration = text_batches(tokenizer, shuffled, length, batch, settings["rows"])
            for ranks in settings["ranks"]:
                about = {
                    "model": model.config.model_type,
                    "weights": weights.hexdigest()[:16],
                    "parameters": sum(parameter.numel() for parameter in model.parameters()),
                    "layers": model.config.num_hidden_layers,
                    "seed": seed,
                    "ranks": ranks,
                    "calibration": fingerprint(calibration),
                    "scored": {which: fingerprint(batches) for which, batches in scored.items()},
                    "recipe": settings,
                }
                key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
                path = out / f"{model.config.model_type}-{seed}-{ranks}-{key}.json"
                journal = Journal(path, about)
                measure(model, ranks, seed, settings, calibration, scored, journal, state)
                journal("done", lambda: True)
    journals = load(out, settings)
    files.write_text(report, page(journals, settings))
    print(json.dumps(summary(journals, settings)))


if __name__ == "__main__":
    typer.run(main)
