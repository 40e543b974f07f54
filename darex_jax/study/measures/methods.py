"""Methods of pruning at equal bytes of the whole file or at equal drop rates: the restored model's metric."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from darex_jax.choosing.choice import Choice
from darex_jax.choosing.choose import choose_q
from darex_jax.core.errors import DarexError
from darex_jax.core.scope import choose_scope
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.model import load_model
from darex_jax.files.prune import Job
from darex_jax.methods.budget import Budget
from darex_jax.methods.table import METHODS
from darex_jax.runs.evidence import gather
from darex_jax.runs.prune import TooSmall, prune_by, pruned_entries
from darex_jax.study.fine_tunes import Place, obtain
from darex_jax.study.measures.labels import rivals
from darex_jax.study.measures.tested import open_tested
from darex_jax.study.plan import FineTune, Plan
from darex_jax.tasks.source import Source

CALIBRATION = 50  # training texts, without labels, for statistics of inputs and for q
TEXTS, STEPS = 10_000, 300  # at most so many training texts, and steps of 16, for methods that train


def begin(
    plan: Plan, fine_tunes: Sequence[FineTune], place: Place
) -> tuple[dict[str, Any], Callable[..., Any]]:
    """A way is a method of `METHODS` and its options, `q` among them an objective of `choose_q`; or
    the method `labels` and the options of `rivals`.

    Returns: values of the row "fine-tuned"; a function from way, options and column to a row's values.
    """
    (fine_tune,) = fine_tunes
    base, fine = obtain(fine_tune, place)
    tested = open_tested(fine_tune, fine, place, plan.test_examples)
    source = Source(task=fine_tune.task, data_dir=place.data_dir, difficulty=difficulty(fine_tune))
    rival = rivals(fine_tune, base, fine, place)
    known: dict[tuple[str, ...], Any] = {}

    def evidence(method: str, support: str | None) -> Any:
        needs = METHODS[method].needs_with(support)
        if needs not in known:
            limit = TEXTS if METHODS[method].trains else CALIBRATION
            known[needs] = gather(base, fine, replace(source, limit=limit), needs, steps=STEPS)
        return known[needs]

    def measured(way: str, told: Mapping[str, Any], at: float) -> dict[str, Any]:
        options = dict(told)
        name, objective = options.pop("method"), options.pop("q", None)
        with ExitStack() as stack:
            b, f = (stack.enter_context(Checkpoint(path)) for path in (base, fine))
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            path = Path(folder) / "delta.safetensors"
            job = Job(b, f, path, choose_scope(f.config.get("model_type"), shapes=f.shapes))
            if name == "labels":
                allowed = round(at * pruned_entries(job)) if plan.axis == "bytes" else None
                try:
                    written = rival(options, allowed, path)
                except TooSmall as error:
                    return {"why": str(error)}
                seen = [tested.values(*load_model(base, delta=path))]
                return {**spread(seen), "q": None, "file_bytes": written.file_bytes}
            method, q = METHODS[name], None
            choose = (
                partial(_q, base, fine, replace(source, limit=CALIBRATION), objective) if objective else None
            )
            gathered = evidence(name, options.get("support"))
            write = partial(prune_by, job, name, gathered=gathered)
            if plan.axis == "bytes":
                budget: Budget | int = round(at * pruned_entries(job))
            else:
                budget = Budget(drop_rate=at)
                if choose is not None:
                    options["q"] = choose(at)
            try:
                first = write(
                    budget, options=options, seed=0, choose=choose if plan.axis == "bytes" else None
                )
            except DarexError as error:
                return {"why": str(error)}
            spent, q = Budget(**(first.recipe.budget or {})), (first.recipe.options or {}).get("q")
            seen = [tested.values(*load_model(base, delta=path))]
            for seed in range(1, plan.masks if method.random and not method.trains else 1):
                write(spent, options=options | ({} if q is None else {"q": q}), seed=seed)
                seen.append(tested.values(*load_model(base, delta=path)))
        return {**spread(seen), "q": q, "file_bytes": first.file_bytes}

    return {**spread([tested.values(tested.model, tested.params)]), **about(tested)}, measured


def about(tested: Any) -> dict[str, Any]:
    """What a fine-tuned model's row says of the test."""
    return {
        "metric_name": tested.metric_name, "test_examples": tested.examples, "weights": tested.weights,
        "constant": tested.constant,
    }  # fmt: skip


def spread(seen: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean and sample standard deviation of the metric over masks; means of what else was measured."""
    metrics = [each["metric"] for each in seen]
    others = {name: float(np.mean([each[name] for each in seen])) for name in seen[0] if name != "metric"}
    std = float(np.std(metrics, ddof=1)) if len(metrics) > 1 else 0.0
    return {"mean": float(np.mean(metrics)), "std": std, "metrics": metrics, **others}


def difficulty(fine_tune: FineTune) -> int:
    return int(fine_tune.options.get("difficulty", 3))


def _q(base: Path, fine: Path, source: Source, objective: str, drop_rate: float) -> float:
    found = choose_q(base, fine, drop_rate, Choice(objective=objective), source)
    return float(found["q"])
