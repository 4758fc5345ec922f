"""What dropped syncs cost in quality, and how much each treatment wins back: `python benchmarks/spd_quality.py MODEL`.

With every sync after attention dropped, at each number of ranks: as it is (zero-shot), with each correction of the
local MLP input, with the paper's distillation (teacher inputs), with ours (student inputs), with ours on top of a
correction, and with the syncs sent in int8 instead. Then how many blocks, in the order of sensitivity, can be dropped
below +1% and +3%, zero-shot and with the healed weights. Then how well the fast orders agree with the exact one.

Calibration and scoring never share text: by default the two splits of the standard library's sources, else the files
given. The recipe is spd_quality.json beside this file, fixed before the measurement. A killed run, started again with
the same --out, goes on. The last line is JSON.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from elision import files
from elision.blocks import decoder
from elision.data import text_batches
from elision.loading import load_model, load_texts
from elision.reference_model.corpus import library_texts
from elision.spd import Recipe, SyncPlan, Treated, correct, heal, scores, sensitivity, simulate
from elision.spd.plan import CORRECTIONS
from elision.spd.streams import IGNORED, fingerprint, next_tokens

RECIPE = Path(__file__).with_suffix(".json")
FAST = ("single", "fisher", "output_error")


@torch.no_grad()
def quality(model: Any, plan: SyncPlan, batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Perplexity and next-token accuracy of what the plan's ranks would compute."""
    loss = right = count = 0.0
    with simulate(model.eval(), plan):
        for batch in batches:
            target = next_tokens(batch).to(model.device)
            logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits[:, :-1].float()
            loss += F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
            right += (logits.argmax(-1) == target).sum().item()
            count += (target != IGNORED).sum().item()
    return {"perplexity": float(torch.tensor(loss / count, dtype=torch.float64).exp()), "accuracy": right / count}


def recall(known: dict[str, Any], save: Callable[[], Any], name: str, compute: Callable[[], Any]) -> Any:
    """known[name], computed and saved where it is not there yet."""
    if name not in known:
        known[name] = compute()
        save()
    return known[name]


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, of values without ties."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def measure(
    model: Any,
    ranks: int,
    seed: int,
    recipe: dict[str, Any],
    calibration: list[dict[str, torch.Tensor]],
    held_out: list[dict[str, torch.Tensor]],
    remember: Callable[[str, Callable[[], Any]], Any],
    state: Path,
) -> dict[str, Any]:
    """Everything for one number of ranks and one seed; `remember(name, compute)` computes once per --out."""
    layers = tuple(range(model.config.num_hidden_layers))
    bare = SyncPlan(ranks, layers)
    few = calibration[: -(-recipe["sensitivity_rows"] // recipe["batch"])]
    training = Recipe(epochs=recipe["epochs"], lr=recipe["lr"], seed=seed)
    paper = Recipe(epochs=recipe["epochs"], lr=recipe["lr"], seed=seed, teacher_inputs=True)

    def corrected(kind: str) -> Treated:
        return correct(copy.deepcopy(model), bare, calibration, kind)

    def healed(how: Recipe, kind: str | None = None) -> Treated:
        start = Treated(copy.deepcopy(model), bare) if kind is None else corrected(kind)
        return heal(start.model, start.plan, calibration, recipe=how, state=state)

    ways: dict[str, Callable[[], Treated]] = {
        "zero-shot": lambda: Treated(model, bare),
        **{f"corrected, {kind}": lambda kind=kind: corrected(kind) for kind in CORRECTIONS},
        "B2B (paper)": lambda: healed(paper),
        "B2B, student inputs": lambda: healed(training),
        f"{recipe['correction']} + B2B, student inputs": lambda: healed(training, recipe["correction"]),
        "int8 syncs": lambda: Treated(model, SyncPlan(ranks, int8=layers)),
    }
    found: dict[str, Any] = {"dense": remember("dense", lambda: quality(model, SyncPlan(ranks), held_out))}
    for name, make in ways.items():
        found[name] = remember(name, lambda make=make: quality(*make(), held_out))

    exact = remember("sequential", lambda: list(sensitivity(model, few, ranks).blocks))
    found["order"] = sorted(layers, key=exact.__getitem__)
    for method in FAST:
        fast = remember(method, lambda method=method: list(scores(model, few, ranks, method)))
        found[f"rank correlation, {method}"] = rank_correlation(exact, fast)

    def curve(treated: Treated) -> list[float]:
        """Perplexity with the first k blocks dropped; blocks that keep their sync keep the original's weights too."""
        mixed = copy.deepcopy(model)
        losses = [quality(mixed, SyncPlan(ranks), held_out)["perplexity"]]
        for k, index in enumerate(found["order"], 1):
            source, target = (decoder(each).blocks[index].layer for each in (treated.model, mixed))
            target.load_state_dict(source.state_dict())
            losses.append(quality(mixed, SyncPlan(ranks, tuple(found["order"][:k])), held_out)["perplexity"])
        return losses

    for name, way in (("zero-shot", "zero-shot"), ("B2B, student inputs", "B2B, student inputs")):
        losses = remember(f"curve, {name}", lambda way=way: curve(ways[way]()))
        for limit in recipe["limits"]:
            within = [k for k, loss in enumerate(losses) if loss <= losses[0] * (1 + limit)]
            found[f"droppable below +{limit:.0%}, {name}"] = max(within)
    return found


def main(
    model: Annotated[str, typer.Argument(help="Model directory, Hugging Face id or 'reference'.")],
    out: Annotated[Path, typer.Option(help="Working directory; a rerun there resumes.")] = Path("runs/spd_quality"),
    text: Annotated[list[Path] | None, typer.Option(help="Text to calibrate on.")] = None,
    held_out: Annotated[list[Path] | None, typer.Option(help="Other text, to score on.")] = None,
    recipe: Annotated[Path, typer.Option(help="The recipe.")] = RECIPE,
) -> None:
    """Measure what dropped syncs cost, and what each treatment wins back."""
    settings = files.read_json(recipe, "recipe")
    loaded, tokenizer = load_model(model)
    length, batch = settings["length"], settings["batch"]
    texts = load_texts(text) if text else library_texts("train")
    scored = load_texts(held_out) if held_out else library_texts("test")
    judged = text_batches(tokenizer, scored, length, batch, settings["held_out_rows"])
    journal_path = out / "journal.json"
    journal = files.read_json(journal_path, "journal") if journal_path.exists() else {}
    weights = hashlib.sha256()
    for tensor in loaded.state_dict().values():
        weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    results: dict[str, Any] = {}
    for seed in settings["seeds"]:
        shuffled = [texts[i] for i in torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))]
        calibration = text_batches(tokenizer, shuffled, length, batch, settings["rows"])
        for ranks in settings["ranks"]:
            facts = [weights.hexdigest(), fingerprint(calibration), fingerprint(judged), settings, seed, ranks]
            key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

            remember = partial(recall, journal.setdefault(key, {}), lambda: files.write_json(journal_path, journal))
            found = measure(loaded, ranks, seed, settings, calibration, judged, remember, out / "state")
            results[f"seed {seed}, {ranks} ranks"] = found
            show(f"{ranks} ranks, seed {seed}", found)
    print(json.dumps({"recipe": settings, "model": model, "results": results}))


def show(title: str, found: dict[str, Any]) -> None:
    """One table: every treatment's loss, what it won back, accuracy; the other numbers below."""
    table = Table("", "perplexity", "loss", "won back", "accuracy", title=title)
    dense, zero_shot = found["dense"]["perplexity"], found["zero-shot"]["perplexity"]
    for name, value in found.items():
        if isinstance(value, dict):
            loss = value["perplexity"] / dense - 1
            won = (zero_shot - value["perplexity"]) / (zero_shot - dense)
            shown = "" if name in ("dense", "zero-shot", "int8 syncs") else f"{won:.1%}"
            table.add_row(name, f"{value['perplexity']:.4f}", f"{loss:+.3%}", shown, f"{value['accuracy']:.3%}")
    console = Console(width=120)
    console.print(table)
    for name, value in found.items():
        if not isinstance(value, dict):
            console.print(f"{name}: {value if not isinstance(value, float) else round(value, 3)}")


if __name__ == "__main__":
    typer.run(main)
