"""lm-evaluation-harness on a model at hand: its `hf` backend, our interval around every number.

    found = harness.run(model, tokenizer, ["elision_word_problems", "arc_easy"], limit=200)
    harness.difference(found[0], of_the_baseline[0])

The model is whatever is in memory: dense, with an adapter, or computing what an SPD plan's ranks would. Task names are
the harness's own, those of `elision.tasks`, which need no network, or of the .yaml files of a directory. Needs the
extra: pip install "elision[eval]".
"""

from __future__ import annotations

import importlib
import logging
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elision.errors import InputError
from elision.evaluate import Interval, Z, accuracy, check_tokens, evaluating, paired_difference

OURS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class Score:
    """One metric of one task. `samples`: its value on every document, where the metric is their mean."""

    task: str
    metric: str
    value: Interval  # nan as bounds where the harness states no error
    samples: tuple[float, ...]
    higher_is_better: bool
    count: int  # documents


def run(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch: int = 8,
    shots: int | None = None,
    include: Path | None = None,
) -> list[Score]:
    """Evaluate `model` on `tasks`.

    Args:
        model: a transformers causal LM, on any device, with whatever has been applied to it.
        tokenizer: the model's.
        tasks: names of tasks or groups.
        limit: documents a task, from the first on; None for all.
        batch: documents at once.
        shots: solved examples before each document; None leaves it to the task.
        include: a directory with task files of yours.

    Raises:
        InputError: lm-evaluation-harness is not installed, a task does not exist or lacks its data, or the
            tokenizer is of another model.
    """
    evaluator, manager = _harness(tasks, include)
    backend = importlib.import_module("lm_eval.models.huggingface").HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch, device=str(model.device)
    )
    with evaluating(model), _no_commit(evaluator), _own_tokens(model):
        try:
            found = evaluator.simple_evaluate(
                backend, tasks=list(tasks), limit=limit, num_fewshot=shots, task_manager=manager, bootstrap_iters=1000
            )
        except (FileNotFoundError, ConnectionError, KeyError) as error:  # what `datasets` raises where data is missing
            line = " ".join(str(error).split())[:200]
            raise InputError(f"tasks {', '.join(tasks)} cannot be read ({line}): download their data first") from error
    return [score for task in found["samples"] for score in _scores(task, found)]


@contextmanager
def _no_commit(evaluator: Any) -> Iterator[None]:
    """Inside, the harness does not ask git for the commit of the current directory, of which git may complain aloud."""
    name = "get_git_commit_hash"
    own = getattr(evaluator, name, None)
    setattr(evaluator, name, lambda: None)  # what `found` would say of it is not read here
    try:
        yield
    finally:
        setattr(evaluator, name, own) if own is not None else delattr(evaluator, name)


@contextmanager
def _own_tokens(model: Any) -> Iterator[None]:
    """Inside, a token outside the vocabulary is refused by name, where the embeddings would end in an IndexError."""

    def check(embeddings: Any, given: tuple[Any, ...]) -> None:
        check_tokens(embeddings.num_embeddings, torch.stack(given[0].aminmax()).tolist(), "the tasks' documents")

    hook = model.get_input_embeddings().register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def difference(score: Score, baseline: Score) -> Interval | None:
    """`score` minus `baseline`, paired by document; None where the metric is no mean over documents."""
    if len(score.samples) < 2 or len(score.samples) != len(baseline.samples):
        return None
    return paired_difference(score.samples, baseline.samples)


def _harness(tasks: Sequence[str], include: Path | None) -> tuple[Any, Any]:
    try:
        evaluator = importlib.import_module("lm_eval.evaluator")
        managers = importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise InputError(f'--tasks needs lm-evaluation-harness ({error}): pip install "elision[eval]"') from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include is not None and not include.is_dir():
        raise InputError(f"tasks {include} is no directory: give one with lm-evaluation-harness's .yaml files")
    places = [str(OURS), *([] if include is None else [str(include)])]
    manager = managers.TaskManager(include_path=places, include_defaults=False)
    if any(task not in manager.all_tasks for task in tasks):  # thousands of files: read only where they are asked for
        manager = managers.TaskManager(include_path=places, include_defaults=True)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        ours = ", ".join(sorted(path.stem for path in OURS.glob("*.yaml")))
        raise InputError(f"task {unknown[0]!r} is not known: use one of lm-evaluation-harness's, or of {ours}")
    return evaluator, manager


def _scores(task: str, found: dict[str, Any]) -> list[Score]:
    documents = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    better = found["higher_is_better"][task]
    scores = []
    for name, value in found["results"][task].items():
        metric, _, kind = name.partition(",")
        if metric.endswith("_stderr") or metric in ("alias", "sample_len") or not isinstance(value, (int, float)):
            continue
        kept = [sample for sample in documents if sample["filter"] == kind]
        values = [sample.get(metric) for sample in kept]
        samples = (
            tuple(float(each) for each in values) if all(isinstance(each, (int, float)) for each in values) else ()
        )
        if samples and not math.isclose(statistics.fmean(samples), value, abs_tol=1e-9):
            samples = ()  # some other aggregate of them
        error = found["results"][task].get(f"{metric}_stderr,{kind}")
        label = metric if kind in ("none", "") else f"{metric}, {kind}"
        interval, higher = _interval(value, samples, error), bool(better.get(metric, True))
        scores.append(Score(task, label, interval, samples, higher, len(kept)))
    return scores


def _interval(value: float, samples: tuple[float, ...], error: Any) -> Interval:
    if samples and set(samples) <= {0.0, 1.0}:
        return accuracy([int(sample) for sample in samples])
    half = Z * error if isinstance(error, (int, float)) else math.nan
    return Interval(value, value - half, value + half)
