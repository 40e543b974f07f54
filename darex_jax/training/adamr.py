"""AdamR: Adam with weight decay towards the pretrained weights, which keeps deltas small."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from darex_jax.core.errors import DarexError
from darex_jax.core.tree import PyTree, flatten_names, map_named, working_dtype

Norm = Literal["l2", "l1"]


class ScaleByAdamRState(NamedTuple):
    """Adam's state and the mean of its second moment.

    Attributes:
      count: int32 scalar, steps taken; it saturates.
      mu, nu: first and second moments, trees like the parameters: float32 (float64 for float64 parameters).
      nu_mean: scalar of that dtype, the mean of all entries of `nu`.
      nu_max: with amsgrad the running maximum of `nu`, else None.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name; conflicts with tuple.count
    mu: PyTree
    nu: PyTree
    nu_mean: jax.Array
    nu_max: PyTree | None


def adamr(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 1e-4,
    norm: Norm = "l2",
    amsgrad: bool = False,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with stable weight decay towards the pretrained weights. For DAREx-L2 train with it, then prune.

        updates, state = adamr(1e-4).update(grads, state, params, pretrained=pretrained)

    Args:
      learning_rate: a number or an optax schedule.
      b1, b2, eps: as for Adam.
      weight_decay: strength of the pull; 0 is `optax.adam`, bit for bit where parameters have the moments'
        dtype.
      norm: "l2" pulls each entry in proportion to its delta, "l1" by the same amount whatever its delta;
        use "l1" with importance-based pruning.
      amsgrad: divide by the running maximum of the second moment (before the bias correction, as PyTorch).
      mask: which parameters are pulled: a tree of booleans like the parameters or a prefix of it, or a
        function from parameters to such a tree. None: all that have a pretrained value.
    Returns: a transformation whose `update` accepts, beside gradients, state and parameters:
      pretrained: the pretrained values by name, a tree like the parameters; parameters that are missing (a
        new head) are not pulled, additional ones are ignored. Any floating dtype, any sharding; never copied.
      gradient_norm: the global norm of the gradients that this transformation gets, if already known (from
        clipping), which saves a pass over them. Not to be passed through `optax.MultiSteps`, which gives it
        other gradients; ignored within `optax.partition` and `optax.masked`, which give it some.
      Moments and arithmetic are float32 (float64 for float64 parameters); updates are rounded once, to the
      parameter's dtype. A bfloat16 parameter loses updates smaller than 2**-9 of its value, a float16 one
      those below 2**-12: keep float32 parameters for the optimizer and cast a copy for the model, see
      `docs/adamr.md`.
    Raises: ValueError for an unknown norm; from `update`, without `params` or `pretrained`, or if their
      shapes differ or they have no name in common; for complex parameters. Within `optax.partition` or
      `optax.masked` a group of parameters without pretrained values is not pulled, and the mean of the second
      moment is that of the group.
    Source: DAREx, arXiv:2410.09344, Algorithm 1, with the decay of arXiv:2011.11152. Unlike the authors'
      code, the mean of the second moment is tracked as one number, and the pretrained weights are not copied.
    """
    inner = optax.chain(
        scale_by_adamr(b1, b2, eps, weight_decay, norm, amsgrad, mask),
        optax.scale_by_learning_rate(learning_rate),
    )

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        steps, state = inner.update(updates, state, params, **extra_args)
        return _cast_like(steps, updates if params is None else params), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def scale_by_adamr(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 1e-4,
    norm: Norm = "l2",
    amsgrad: bool = False,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`adamr` without the learning rate: Adam's direction plus the pull, not negated.

    Unlike those of `adamr`, its updates have the dtypes of the moments.
    """
    if norm not in ("l2", "l1"):
        raise DarexError(f"norm is 'l2' or 'l1', got {norm!r}.")
    pulls = not (isinstance(weight_decay, int | float) and weight_decay == 0)

    def init(params: PyTree) -> ScaleByAdamRState:
        for name, leaf in flatten_names(params).items():
            if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
                raise DarexError(f"'{name}' is complex: train its real and imaginary parts.")

        def zeros() -> PyTree:
            return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, _moment_dtype(leaf)), params)

        mean = jnp.zeros((), _moment_dtype(*jax.tree.leaves(params)))
        return ScaleByAdamRState(
            jnp.zeros((), jnp.int32), zeros(), zeros(), mean, zeros() if amsgrad else None
        )

    def update(
        updates: PyTree,
        state: ScaleByAdamRState,
        params: PyTree | None = None,
        *,
        pretrained: PyTree | None = None,
        gradient_norm: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByAdamRState]:
        del extra_args
        grads = _cast_like(updates, state.mu)
        count = optax.safe_increment(state.count)
        # Hyperparameters that are arrays may have a wider dtype than the moments.
        mu = _cast_like(optax.tree.update_moment(grads, state.mu, b1, 1), state.mu)
        nu = _cast_like(optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2), state.nu)
        nu_max = None if state.nu_max is None else jax.tree.map(jnp.maximum, state.nu_max, nu)
        mu_hat = optax.tree.bias_correction(mu, b1, count)
        nu_hat = optax.tree.bias_correction(nu if nu_max is None else nu_max, b2, count)
        direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
        if not pulls:
            return direction, ScaleByAdamRState(count, mu, nu, state.nu_mean, nu_max)

        # nu decays linearly, so its mean follows from the mean square of the gradients, without another pass.
        # The barrier keeps the compiler from sharing the squared gradients with nu, which would store them.
        if gradient_norm is None or _hidden(grads):
            square = optax.tree.norm(jax.lax.optimization_barrier(grads), squared=True)
        else:
            square = jnp.square(jnp.asarray(gradient_norm, state.nu_mean.dtype))
        size = float(sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(grads)))  # beyond int32
        nu_mean = (b2 * state.nu_mean + (1 - b2) * square / size).astype(state.nu_mean.dtype)
        mean = nu_mean if nu_max is None else optax.tree.sum(nu_max) / size
        scale = jnp.sqrt(optax.tree.bias_correction(mean, b2, count))
        strength = weight_decay / jnp.where(scale == 0, 1.0, scale)

        if params is None or pretrained is None:
            missing = "params" if params is None else "pretrained"
            raise DarexError(
                f"adamr pulls towards the pretrained weights and needs {missing}: "
                "call update(grads, state, params, pretrained=...)."
            )
        references = _references(params, pretrained, mask)

        def pull(name: str, step: jax.Array, param: jax.Array) -> jax.Array:
            if name not in references:
                return step
            delta = jnp.asarray(param, step.dtype) - jnp.asarray(references[name], step.dtype)
            return step + strength.astype(step.dtype) * (delta if norm == "l2" else jnp.sign(delta))

        return map_named(pull, direction, params), ScaleByAdamRState(count, mu, nu, nu_mean, nu_max)

    return optax.GradientTransformationExtraArgs(init, update)


def _moment_dtype(*leaves: Any) -> Any:
    return working_dtype(*(jnp.result_type(leaf) for leaf in leaves))


def _cast_like(tree: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, like: leaf.astype(jnp.result_type(like)), tree, other)


def _references(params: PyTree, pretrained: PyTree, mask: Any) -> dict[str, Any]:
    """The pretrained value of every parameter that is pulled, by name."""
    named = flatten_names(params)
    values = flatten_names(pretrained)
    known = {name: leaf for name, leaf in values.items() if name in named}
    if named and not known and not _elsewhere(params, values):
        given = list(values)[:2]
        raise DarexError(
            "no parameter has a pretrained value: the parameters are named "
            f"{', '.join(list(named)[:2])}, ..., the pretrained ones {', '.join(given)}, ..."
        )
    for name, leaf in known.items():
        if jnp.shape(leaf) != jnp.shape(named[name]):
            raise DarexError(
                f"'{name}' is {jnp.shape(named[name])}, its pretrained value {jnp.shape(leaf)}; "
                "remove it from `pretrained` if it should not be pulled."
            )
    if mask is None:
        return known
    chosen = jax.tree.broadcast(mask(params) if callable(mask) else mask, params)
    is_pulled = flatten_names(chosen)
    return {name: leaf for name, leaf in known.items() if is_pulled[name]}


def _elsewhere(params: PyTree, values: dict[str, Any]) -> bool:
    """Whether pretrained values belong to parameters that optax masks out for this transformation."""
    return any(value == name or value.startswith(f"{name}.") for value in values for name in _hidden(params))


def _hidden(tree: PyTree) -> list[str]:
    """The names of the branches that optax masks out."""
    masked = jax.tree.map(
        lambda leaf: isinstance(leaf, optax.MaskedNode),
        tree,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    return [name for name, is_hidden in flatten_names(masked).items() if is_hidden]
