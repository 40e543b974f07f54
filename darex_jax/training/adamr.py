"""AdamR: Adam whose decay pulls towards the pretrained weights, so that deltas stay small."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from darex_jax.core.errors import DarexError
from darex_jax.core.tree import PyTree, flatten_names, map_named

Norm = Literal["l2", "l1"]


class ScaleByAdamRState(NamedTuple):
    """Adam's state and one number more.

    Attributes:
      count: int32 scalar, steps taken; it saturates.
      mu, nu: first and second moments, float32 trees like the parameters.
      nu_mean: float32 scalar, the mean of all entries of `nu`.
      nu_max: with amsgrad the running maximum of `nu`, else None.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name for it; a tuple has a method count
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
      b1, b2, eps: Adam's.
      weight_decay: strength of the pull; 0 is `optax.adam`, to the bit.
      norm: "l2" pulls each entry in proportion to its delta, "l1" by the same amount whatever its delta;
        "l1" goes with importance-based pruning.
      amsgrad: divide by the running maximum of the second moment (before the bias correction, as PyTorch).
      mask: which parameters are pulled: a tree of booleans like the parameters or a prefix of it, or a
        function from parameters to one. None: all that have a pretrained value.
    Returns: a transformation whose `update` takes, beyond gradients, state and parameters:
      pretrained: the pretrained values by name, a tree like the parameters; it may lack some, which are
        then not pulled (a fresh head), or have others beside. Any floating dtype, any sharding; never copied.
      gradient_norm: the global norm of the gradients it is given, where it is known: whoever clips has it,
        and a pass over the gradients is spared.
      Moments and updates are float32 whatever the parameters' dtype.
    Raises: ValueError for another norm or amsgrad of another kind; from `update`, without `params` or
      `pretrained`, or where these have no name in common or another shape.
    Source: DAREx, arXiv:2410.09344, Algorithm 1, with the decay of arXiv:2011.11152. Unlike the authors' code
      the mean of the second moment is carried as one number, and the pretrained weights are not copied.
    """
    return optax.chain(
        scale_by_adamr(b1, b2, eps, weight_decay, norm, amsgrad, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_adamr(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 1e-4,
    norm: Norm = "l2",
    amsgrad: bool = False,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`adamr` without the learning rate: Adam's direction plus the pull, to be subtracted."""
    if norm not in ("l2", "l1"):
        raise DarexError(f"norm is 'l2' or 'l1', got {norm!r}.")
    pulls = not (isinstance(weight_decay, int | float) and weight_decay == 0)

    def init(params: PyTree) -> ScaleByAdamRState:
        def zeros() -> PyTree:
            return optax.tree.zeros_like(params, dtype=jnp.float32)

        zero = jnp.zeros((), jnp.float32)
        return ScaleByAdamRState(
            jnp.zeros((), jnp.int32), zeros(), zeros(), zero, zeros() if amsgrad else None
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
        grads = optax.tree.cast(updates, jnp.float32)
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
        nu_max = None if state.nu_max is None else jax.tree.map(jnp.maximum, state.nu_max, nu)
        mu_hat = optax.tree.bias_correction(mu, b1, count)
        nu_hat = optax.tree.bias_correction(nu if nu_max is None else nu_max, b2, count)
        direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
        if not pulls:
            return direction, ScaleByAdamRState(count, mu, nu, state.nu_mean, nu_max)

        # nu decays linearly, so its mean follows from the mean square of the gradients, without another pass.
        # The barrier hides from the compiler that nu squares the gradients too: it would store the squares.
        if gradient_norm is None:
            square = optax.tree.norm(jax.lax.optimization_barrier(grads), squared=True)
        else:
            square = jnp.square(gradient_norm)
        size = float(sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(grads)))  # beyond int32
        nu_mean = b2 * state.nu_mean + (1 - b2) * square / size
        mean = nu_mean if nu_max is None else optax.tree.sum(nu_max) / size
        scale = jnp.sqrt(optax.tree.bias_correction(mean, b2, count))
        strength = weight_decay / jnp.where(scale == 0, 1.0, scale)

        if params is None or pretrained is None:
            missing = "params" if params is None else "pretrained"
            raise DarexError(
                f"adamr pulls towards the pretrained weights and was given no {missing}: "
                "call update(grads, state, params, pretrained=...)."
            )
        references = _references(params, pretrained, mask)

        def pull(name: str, step: jax.Array, param: jax.Array) -> jax.Array:
            if name not in references:
                return step
            delta = jnp.asarray(param, jnp.float32) - jnp.asarray(references[name], jnp.float32)
            return step + strength * (delta if norm == "l2" else jnp.sign(delta))

        return map_named(pull, direction, params), ScaleByAdamRState(count, mu, nu, nu_mean, nu_max)

    return optax.GradientTransformationExtraArgs(init, update)


def _references(params: PyTree, pretrained: PyTree, mask: Any) -> dict[str, Any]:
    """The pretrained value of every parameter that is pulled, by name."""
    named = flatten_names(params)
    known = {name: leaf for name, leaf in flatten_names(pretrained).items() if name in named}
    if named and not known:
        given = list(flatten_names(pretrained))[:2]
        raise DarexError(
            "no parameter has a pretrained value: the parameters are called "
            f"{', '.join(list(named)[:2])}, ..., the pretrained ones {', '.join(given)}, ..."
        )
    for name, leaf in known.items():
        if jnp.shape(leaf) != jnp.shape(named[name]):
            raise DarexError(
                f"'{name}' is {jnp.shape(named[name])}, its pretrained value {jnp.shape(leaf)}; "
                "leave it out of `pretrained` if it is not to be pulled."
            )
    if mask is None:
        return known
    chosen = jax.tree.broadcast(mask(params) if callable(mask) else mask, params)
    wanted = flatten_names(chosen)
    return {name: leaf for name, leaf in known.items() if wanted[name]}
