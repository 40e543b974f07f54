"""Ways to choose q at given drop rates: the metric of the pruned model over several masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from darex_jax.choosing.choice import Choice
from darex_jax.choosing.choose import choose_q
from darex_jax.choosing.pair import Pair, load_pair, split_in_scope
from darex_jax.study.fine_tunes import Place, obtain
from darex_jax.study.measures.tested import about, open_tested, spread, texts_of
from darex_jax.study.plan import FineTune, Plan


def begin(
    plan: Plan, fine_tunes: Sequence[FineTune], place: Place
) -> tuple[dict[str, Any], Callable[..., Any]]:
    """A way is the options of `Choice`, `limit` of the examples, or none: DARE.

    `walk = true`: the authors' walk in steps of 1 - p (at 0.9 half of it) up to 10 (at 0.9 five) times that.
    `slow = true`: a learning rate of a tenth of the density.
    Returns: as `methods.begin`.
    """
    (fine_tune,) = fine_tunes
    base, fine = obtain(fine_tune, place)
    tested = open_tested(fine_tune, fine, place, plan.test_examples)
    model, params, in_scope = load_pair(base, fine)
    start, delta = split_in_scope(params, in_scope)

    def measured(way: str, told: Mapping[str, Any], at: float) -> dict[str, Any]:
        pair, options = Pair(model, params, start, delta, at, range(plan.masks)), dict(told)
        found: dict[str, Any] = {"q": pair.density, "evaluations": 0, "labels": 0}
        if options:
            if options.pop("walk", False):
                options["grid"] = authors_grid(pair.density)
            if options.pop("slow", False):
                options["learning_rate"] = pair.density / 10
            limit = options.pop("limit", None)
            source = texts_of(fine_tune, place, limit)
            found = choose_q(base, fine, at, Choice(**options), source)
            found = {name: found[name] for name in KEPT if name in found}
        scores = [tested.values(model, pruned(found["q"])) for pruned in pair.models]
        return found | spread(scores)

    head = {**spread([tested.values(tested.model, tested.params)]), **about(tested)}
    return head | {"no_delta": tested.score(start)}, measured


KEPT = ("q", "evaluations", "examples", "labels", "curve", "value_name", "warning")


def authors_grid(density: float) -> tuple[float, float, float]:
    """Low, high and step of the walk in the authors' code."""
    return (density, 5 * density, density / 2) if density >= 0.05 else (density, 10 * density, density)
