"""What a delta is like, and how far Theorem 3.1 is from what pruning does to the outputs of linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from darex_jax.choosing.pair import load_pair, split_in_scope
from darex_jax.core.bound import output_error_bound
from darex_jax.core.delta import prune
from darex_jax.core.tree import flatten_names, seed_key
from darex_jax.evaluation.calibration import input_statistics
from darex_jax.files.manifest import params_digest
from darex_jax.study.fine_tunes import Place, obtain
from darex_jax.study.measures.tested import CALIBRATION, texts_of
from darex_jax.study.plan import FineTune, Plan
from darex_jax.tasks.source import read_material

GAMMA = 0.05  # the bound holds with probability 1 - gamma


def begin(
    plan: Plan, fine_tunes: Sequence[FineTune], place: Place
) -> tuple[dict[str, Any], Callable[..., Any]]:
    """Ways: `statistics`, whose column is None; `bound`, at a drop rate, with q = 1 - p.

    Returns: as `methods.begin`.
    """
    (fine_tune,) = fine_tunes
    base, fine = obtain(fine_tune, place)
    model, params, in_scope = load_pair(base, fine)
    _, delta = split_in_scope(params, in_scope)
    deltas = {name: np.asarray(leaf) for name, leaf in flatten_names(delta).items()}

    def measured(way: str, told: Mapping[str, Any], at: float | None) -> dict[str, Any]:
        if at is None:
            return statistics(deltas)
        source = texts_of(fine_tune, place, CALIBRATION)
        batches = read_material(fine, source, "train").batches()
        means = {name: np.asarray(s.mean) for name, s in input_statistics(model, params, batches).items()}
        return against_bound(deltas, means, at, plan.masks)

    return {"weights": params_digest(params)}, measured


def statistics(deltas: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean, root mean square, largest magnitude, share of entries beyond five deviations, kurtosis; of the
    matrices the mean stable rank ||D||_F^2 / ||D||_2^2 and its share of the full rank."""
    flat = np.concatenate([x.reshape(-1) for x in deltas.values()]).astype(np.float64)
    rms = float(np.sqrt(np.mean(flat**2)))
    found = {"mean": float(flat.mean()), "rms": rms, "largest": float(np.abs(flat).max())}
    found["beyond_5_rms"] = float(np.mean(np.abs(flat) > 5 * rms)) if rms else 0.0
    found["kurtosis"] = float(np.mean(flat**4) / rms**4) if rms else 0.0
    ranks = [_stable_rank(x) for x in deltas.values() if x.ndim == 2 and np.any(x)]
    return found | {"stable_rank": float(np.mean(ranks)) if ranks else 0.0}


def _stable_rank(matrix: np.ndarray) -> float:
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    return float(np.sum(matrix.astype(np.float64) ** 2) / np.linalg.eigvalsh(gram)[-1])


def against_bound(
    deltas: Mapping[str, np.ndarray], means: Mapping[str, np.ndarray], drop_rate: float, masks: int
) -> dict[str, float]:
    """Outputs of linear layers on the mean input: the error of DARE against its bound.

    Args: means: of the inputs, by the weight's name.
    Returns: the share of outputs within the bound, the mean of error / bound, the largest.
    """
    ratios = []
    for name, mean in means.items():
        if name not in deltas:
            continue
        influence = jnp.asarray(deltas[name]) * mean[None]
        bound = output_error_bound(influence, drop_rate, 1.0 - drop_rate, GAMMA)
        for seed in range(masks):
            pruned = prune(seed_key(seed), {name: jnp.asarray(deltas[name])}, drop_rate)[name]
            error = jnp.abs((pruned - deltas[name]) @ mean)
            ratios.append(np.asarray(jnp.where(bound > 0, error / bound, 0.0)))
    seen = np.concatenate(ratios)
    return {"within": float(np.mean(seen <= 1)), "error_to_bound": float(seen.mean()),
            "largest_to_bound": float(seen.max()), "outputs": len(seen)}  # fmt: skip
