"""A fine-tuned model, its base, and pruned models as functions of q.

q is a traced argument: a sweep over values and masks does not recompile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.delta import compute_delta
from darex_jax.core.errors import DarexError
from darex_jax.core.scope import Scope, choose_scope
from darex_jax.core.tree import combine, flatten_names, seed_key, unflatten_names
from darex_jax.evaluation.classification import pruned_params
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.match import match_checkpoints
from darex_jax.files.model import load_model
from darex_jax.models import Model

Params = dict[str, Any]
Q = float | Mapping[str, float]
PrunedModel = Callable[[Q], Params]  # from q to the params of a model pruned with one mask
MASK_SEEDS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Pair:
    """A base and its fine-tuned model, pruned at one rate with several masks, for choosing q.

    Attributes:
      model, params: the fine-tuned model.
      start, delta: the base parameters and the delta, see `split_in_scope`.
      drop_rate: p, in (0, 1).
      seeds: of the masks, `jax.random.key(seed)` each.
    """

    model: Model
    params: Params
    start: Params
    delta: Params
    drop_rate: float
    seeds: Sequence[int] = MASK_SEEDS

    @property
    def density(self) -> float:
        """DARE's q."""
        return dare_q(self.drop_rate)

    @property
    def models(self) -> list[PrunedModel]:
        """For each mask the params of the pruned model as a function of q: see `pruned_params`."""
        keys = map(seed_key, self.seeds)
        return [partial(pruned_params, self.start, self.delta, key, self.drop_rate) for key in keys]

    def dare(self, scope: str) -> Q:
        """DARE's q: a number, or with the scope "layer" the same for every name of the delta."""
        return dict.fromkeys(flatten_names(self.delta), self.density) if scope == "layer" else self.density


def dare_q(drop_rate: float) -> float:
    """1 - p, without the rounding error of the difference: 0.01 at 0.99."""
    return round(1.0 - drop_rate, 12)


def open_pair(
    base: str | os.PathLike[str],
    fine: str | os.PathLike[str],
    drop_rate: float,
    seeds: Sequence[int] = MASK_SEEDS,
    scope: Scope | None = None,
    ignore_config_fields: Collection[str] = (),
) -> Pair:
    """Reads a pair: see `load_pair`."""
    model, params, base_params = load_pair(base, fine, scope, ignore_config_fields)
    return Pair(model, params, *split_in_scope(params, base_params), drop_rate, seeds)


def load_pair(
    base: str | os.PathLike[str],
    fine: str | os.PathLike[str],
    scope: Scope | None = None,
    ignore_config_fields: Collection[str] = (),
) -> tuple[Model, Params, Params]:
    """Loads a fine-tuned model and the base's parameters in scope; dtypes as in `load_fine`, `base_leaf`.

    Returns: the fine-tuned model and its params; the base's values of the parameters in scope, a nested dict
      with the fine-tuned names.
    Raises: ValueError if the two do not match.
    """
    model, params, in_scope = load_fine(base, fine, scope, ignore_config_fields)
    loaded = flatten_names(params)
    with Checkpoint(base) as b:
        named = {name: base_leaf(b, stored, loaded[name].dtype) for name, stored in in_scope.items()}
    return model, params, unflatten_names(named)


def load_fine(
    base: str | os.PathLike[str],
    fine: str | os.PathLike[str],
    scope: Scope | None = None,
    ignore_config_fields: Collection[str] = (),
) -> tuple[Model, Params, dict[str, str]]:
    """Loads the fine-tuned model of a pair, after checking that the two match.

    Dtypes are those of its file, but float16 is loaded as float32: a small q overflows float16, and XLA's CPU
    backend does not support all of a float16 model.

    Returns: the model; its params; fine-tuned name -> base name of those in scope.
    Raises: ValueError if the two do not match.
    """
    with Checkpoint(base) as b, Checkpoint(fine) as f:
        match = match_checkpoints(b, f, scope or choose_scope(f.config.get("model_type"), shapes=f.shapes))
        match.raise_if_faulty()
        extra = [name for name in match.pruned if name in match.extra_rows]
        if extra:
            raise DarexError(
                f"rows of a larger vocabulary ({', '.join(extra)}) have no base, so the model cannot be run: "
                "exclude these parameters with --exclude."
            )
        half = any(tensor.info.dtype == np.float16 for tensor in f.tensors.values())
        model, params = load_model(
            fine, dtype=np.float32 if half else None, ignore_config_fields=ignore_config_fields
        )
        loaded = flatten_names(params)  # without what the model does not read
        in_scope = {name: match.base_names[name] for name in match.pruned if name in loaded}
        if not in_scope and match.pruned:
            raise DarexError(
                f"{fine}: the model has no '{match.pruned[0]}' or any other pruned parameter; "
                "to leave out a pretraining head, save the body alone."
            )
    return model, params, in_scope


def base_leaf(base: Checkpoint, name: str, fine_dtype: Any) -> jax.Array:
    """A parameter of the base, in the wider dtype of the two models."""
    leaf = base.tensors[name].read()
    return jnp.asarray(leaf, jnp.promote_types(leaf.dtype, fine_dtype))


def split_in_scope(fine: Params, base: Params) -> tuple[Params, Params]:
    """The starting parameters of a search, and the delta to prune.

    Args: fine: all parameters; base: those in scope, the same names.
    Returns: `fine` with the base's values for parameters that it has (a new head stays fine-tuned); the
      float32 delta of the parameters in scope.
    """
    fine_named = flatten_names(fine)
    in_scope = unflatten_names({name: fine_named[name] for name in flatten_names(base)})
    return combine(fine, base), compute_delta(in_scope, base)


def scored(score: Callable[[Params], float], models: Sequence[PrunedModel], q: Q) -> dict[str, Any]:
    """The scores of the models pruned with each mask: `scores`, their `mean`, their sample `std`."""
    scores = [score(model(q)) for model in models]
    return {"mean": float(np.mean(scores)), "std": float(np.std(scores, ddof=1)), "scores": scores}
