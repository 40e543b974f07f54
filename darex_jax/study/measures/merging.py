"""Several fine-tunes of one base made one: each task's metric of the merged model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from darex_jax.choosing.choice import Choice
from darex_jax.choosing.choose import choose_q
from darex_jax.choosing.pair import load_pair, split_in_scope
from darex_jax.core.delta import apply_delta
from darex_jax.core.errors import DarexError
from darex_jax.core.tree import flatten_names, seed_key
from darex_jax.merging.merge import merge
from darex_jax.merging.table import MERGES
from darex_jax.study.fine_tunes import Place, obtain
from darex_jax.study.measures.tested import CALIBRATION, open_tested, texts_of
from darex_jax.study.plan import FineTune, Plan


def begin(
    plan: Plan, fine_tunes: Sequence[FineTune], place: Place
) -> tuple[dict[str, Any], Callable[..., Any]]:
    """A way is a method of `MERGES` and its options; `q`, an objective, is chosen for each delta alone.

    Weights are 1 where signs are elected, else 1 / number of deltas. The head of each task stays its own.
    Returns: as `methods.begin`; metrics are by training, and `kept` is the mean of their shares of the
      fine-tuned models' own.
    """
    models = [(each, *obtain(each, place)) for each in fine_tunes]
    tests = [open_tested(each, fine, place, plan.test_examples) for each, _, fine in models]
    pairs = [split_in_scope(params, base) for _, params, base in (load_pair(b, f) for _, b, f in models)]
    alone = [test.score(test.params) for test in tests]
    if nothing := [each.name for each, score in zip(fine_tunes, alone, strict=True) if score == 0.0]:
        raise DarexError(f"{nothing[0]} scores 0: there is no share of its metric to keep.")

    def chosen(objective: str, drop_rate: float) -> list[float]:
        found = []
        for each, base, fine in models:
            source = texts_of(each, place, CALIBRATION)
            found.append(choose_q(base, fine, drop_rate, Choice(objective=objective), source)["q"])
        return found

    def measured(way: str, told: Mapping[str, Any], at: float | None) -> dict[str, Any]:
        options = dict(told)
        method, objective = options.pop("method"), options.pop("q", None)
        if objective is not None:
            options["q"] = chosen(objective, options["drop_rate"])
        weight = 1.0 if MERGES[method].elects else 1.0 / len(models)
        random = "key" in MERGES[method].takes
        metrics: dict[str, list[float]] = {each.training: [] for each in fine_tunes}
        for seed in range(plan.masks if random else 1):
            key = {"key": seed_key(seed)} if random else {}
            merged = merge(
                [delta for _, delta in pairs], method, weights=[weight] * len(pairs), **options, **key
            )
            for each, test, (start, _) in zip(fine_tunes, tests, pairs, strict=True):
                metrics[each.training].append(test.score(apply_delta(start, flatten_names(merged))))
        shares = np.array([metrics[e.training] for e in fine_tunes]) / np.array(alone)[:, None]
        kept = shares.mean(axis=0)
        std = float(np.std(kept, ddof=1)) if len(kept) > 1 else 0.0
        return {"mean": float(kept.mean()), "std": std, "metrics": metrics, "q": options.get("q")}

    own = {each.training: score for each, score in zip(fine_tunes, alone, strict=True)}
    digest = "+".join(test.weights for test in tests)
    return {"mean": 1.0, "std": 0.0, "metrics": own, "weights": digest}, measured
