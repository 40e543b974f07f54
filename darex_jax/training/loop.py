"""The training loop: AdamW or AdamR on any batch loss, resumable bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from darex_jax.core.errors import DarexError
from darex_jax.core.sharding import batch_sharding, param_shardings
from darex_jax.core.tree import combine, flatten_names
from darex_jax.models import Model as ModelOfLayers
from darex_jax.tasks.batching import Batch
from darex_jax.training.adamr import Norm, adamr
from darex_jax.training.checkpoints import Checkpoints

Params = Any  # nested dict of float arrays, as `load_params` returns it
Model = Callable[..., Any]
# (model, params, batch, dropout key) -> the sum over the batch's examples or tokens, and their number.
Loss = Callable[[Model, Params, Batch, jax.Array | None], tuple[jax.Array, jax.Array]]
MEASURE_EVERY = 10  # steps between measurements of the delta's size
CHOICES = {"optimizer": ("adamw", "adamr"), "norm": ("l2", "l1"), "dtype": ("float32", "bfloat16")}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyperparameters of a training.

    Attributes:
      learning_rate: the peak of a linear warm-up over `warmup_ratio` of the steps and a linear decay to 0.
      steps, epochs: length; exactly one of the two is set.
      batch_size: examples per step, processed in `accumulate` micro-batches.
      optimizer: "adamw", whose `weight_decay` pulls matrices towards 0; or "adamr", whose `weight_decay`
        pulls parameters with a pretrained value towards it, by the `norm` "l2" or "l1".
      clip_norm: gradients are scaled down to at most this global norm.
      dtype: compute dtype of the model; parameters and optimizer are float32.
      dropout: whether to use the dropout of the model's config.
      remat: recompute the inside of each layer in the backward pass, see `Model`: less memory, more time.
    Raises: ValueError for anything out of range.
    """

    learning_rate: float
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    accumulate: int = 1
    optimizer: Literal["adamw", "adamr"] = "adamw"
    weight_decay: float = 0.01
    norm: Norm = "l2"
    warmup_ratio: float = 0.1
    clip_norm: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    dropout: bool = True
    remat: bool = False

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise DarexError("give either steps or epochs.")
        for name in ("learning_rate", "steps", "epochs", "batch_size", "accumulate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise DarexError(f"{name} must be positive, got {value}.")
        if self.batch_size % self.accumulate:
            raise DarexError(
                f"batch_size {self.batch_size} is not divisible by accumulate = {self.accumulate}."
            )
        if not 0.0 <= self.warmup_ratio < 1.0:
            raise DarexError(f"warmup_ratio must be in [0, 1), got {self.warmup_ratio}.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise DarexError(f"weight_decay must be finite and non-negative, got {self.weight_decay}.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise DarexError(f"{name} is {' or '.join(choices)}, got {getattr(self, name)!r}.")

    def total_steps(self, examples: int) -> int:
        """The number of steps of a training on `examples` examples. Raises: ValueError if there are none."""
        if not examples:
            raise DarexError("there are no examples to train on.")
        if self.steps is not None:
            return self.steps
        return max(1, round((self.epochs or 0.0) * -(-examples // self.batch_size)))


class StepRecord(NamedTuple):
    """One step, counted from 0.

    Attributes:
      loss, gradient_norm: at the step's initial parameters, before clipping.
      delta_rms, delta_max: root mean square and largest magnitude of the delta after the step, over all
        parameters with a pretrained value; measured every `MEASURE_EVERY` steps and at the last, else None.
      validation: the validation metric after the step, if it was computed.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    delta_rms: float | None = None
    delta_max: float | None = None
    validation: float | None = None


def warmup_linear(learning_rate: float, steps: int, warmup_ratio: float = 0.1) -> Callable[[int], float]:
    """Linear warm-up over the first `warmup_ratio` of `steps`, then linear decay to 0 after the last step.

    Computed on the host: reading a device value would wait for all queued steps.

    Returns: step -> learning rate, a float32 value; the peak is at step `int(warmup_ratio * steps)`, and no
      step has rate 0.
    """
    if steps < 1 or not 0.0 <= warmup_ratio < 1.0:
        raise DarexError(f"need steps >= 1 and warmup_ratio in [0, 1), got {steps} and {warmup_ratio}.")
    warmup = int(warmup_ratio * steps)

    def schedule(step: int) -> float:
        share = min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))
        return float(np.float32(learning_rate) * np.float32(share))

    return schedule


def decay_mask(params: Params) -> Params:
    """True for the leaves that AdamW decays: the matrices. Biases and LayerNorm parameters are vectors."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def train(
    loss: Loss,
    model: Model,
    params: Params,
    batches: Callable[[int], Iterable[Batch]],
    recipe: Recipe,
    *,
    steps: int,
    dropout_key: jax.Array | None,
    frozen: Params | None = None,
    pretrained: Params | None = None,
    mesh: Mesh | None = None,
    checkpoints: Checkpoints | None = None,
    validate: Callable[[Params], float] | None = None,
    measure: Callable[[Params], tuple[jax.Array, jax.Array]] | None = None,
    best: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
) -> tuple[Params, list[StepRecord]]:
    """Minimises a loss over `params`; the same arguments give the same bits on the same platform.

    With `checkpoints` the state is saved periodically, and training resumes from the newest checkpoint: the
    result is bit for bit that of an uninterrupted training.

    Args:
      loss: a pure function; it is a static argument of the compiled step, so pass the same function every
        time, not a new lambda.
      params: trained parameters; not modified (training uses a float32 copy with the same sharding).
      batches: epoch number, from 0 -> its batches, with as few different shapes as possible.
      steps: number of steps, from the recipe's `total_steps`.
      dropout_key: scalar key, folded with the step for the loss; None passes None to the loss.
      frozen: further parameters of the model, which are not trained.
      pretrained: pretrained values by name, possibly of some parameters only: AdamR pulls towards them and
        the delta is relative to them; None is `params`. Never copied.
      mesh: from `make_mesh`: each batch's rows are split over it, and `params` get their `param_sharding`;
        the caller shards `frozen` and `pretrained`.
      validate: params -> a metric, larger is better; called at every checkpoint and at the end.
      measure: params -> the delta's root mean square and largest magnitude; None is `delta_size` from
        `pretrained`.
      best: return the checkpoint with the best validation metric instead of the last step's parameters.
      on_step: called with every step's record, in order; after resuming, from the first new step on.
    Returns: the float32 parameters, and the records of the steps done in this call.
    Raises: ValueError for arguments out of range; FloatingPointError once a loss or gradient is not finite.
    """
    if recipe.remat:
        model = replace(cast(ModelOfLayers, model), remat=True)
    schedule = warmup_linear(recipe.learning_rate, steps, recipe.warmup_ratio)
    pretrained = params if pretrained is None else pretrained
    measure = partial(delta_size, pretrained=pretrained) if measure is None else measure
    # A copy, because `_update` donates its arguments and must not invalidate the caller's tree.
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)
    state = _optimizer(recipe.optimizer, recipe.norm, 0.0, 0.0).init(params)
    if mesh is not None:  # moments have their parameters' names as suffixes, and the same shardings
        params, state = (jax.device_put(tree, param_shardings(mesh, tree)) for tree in (params, state))
    history: list[StepRecord] = []
    first = 0
    if checkpoints is not None and (found := checkpoints.restore((params, state))) is not None:
        first, (params, state) = found

    def read(step: int, rate: float, numbers: tuple[Any, ...]) -> StepRecord:
        value, norm, *size = map(float, numbers)
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise FloatingPointError(
                f"training diverged at step {step} of {steps} (loss {value}, gradient norm {norm}); "
                f"try a lower learning rate than {recipe.learning_rate:g}."
            )
        return StepRecord(step, value, norm, rate, *size)

    def emit(record: StepRecord) -> None:
        history.append(record)
        if on_step is not None:
            on_step(record)

    # One step runs while the results of the one before are read, so that devices never wait for the host.
    waiting: tuple[int, float, tuple[Any, ...]] | None = None
    stream = islice(chain.from_iterable(map(batches, count())), first, steps)
    for step, batch in zip(range(first, steps), stream, strict=False):
        rate = schedule(step)
        step_key = None if dropout_key is None else jax.random.fold_in(dropout_key, step)
        placed = batch if mesh is None else jax.device_put(batch, batch_sharding(mesh))
        numbers = (rate, recipe.weight_decay, recipe.clip_norm)
        params, state, *results = _update(
            loss, model, recipe.optimizer, recipe.norm, recipe.accumulate, recipe.dtype,
            params, state, frozen, pretrained, placed, step_key, numbers,
        )  # fmt: skip
        last = step + 1 == steps
        stops = last or (checkpoints is not None and (step + 1) % checkpoints.every == 0)
        if stops or step % MEASURE_EVERY == 0:
            results += measure(params)
        if waiting is not None:
            emit(read(*waiting))
        waiting = (step, rate, tuple(results))
        if stops:
            record = read(*waiting)
            if validate is not None:
                record = record._replace(validation=validate(params))
            emit(record)
            waiting = None
            if checkpoints is not None:
                checkpoints.save(step + 1, (params, state), record.validation)
    if best and checkpoints is not None and (found := checkpoints.best((params, state))) is not None:
        _, (params, _) = found
    return params, history


@jax.jit
def delta_size(params: Params, pretrained: Params) -> tuple[jax.Array, jax.Array]:
    """Root mean square and largest magnitude of `params - pretrained`, over all names they share."""
    known = flatten_names(pretrained)
    deltas = [
        leaf.astype(jnp.float32) - jnp.asarray(known[name], jnp.float32)
        for name, leaf in flatten_names(params).items()
        if name in known
    ]
    if not deltas:
        return jnp.float32(0), jnp.float32(0)
    size = float(sum(leaf.size for leaf in deltas))  # may exceed int32
    rms = jnp.sqrt(optax.tree.norm(deltas, squared=True) / size)
    return rms, jnp.stack([jnp.abs(leaf).max() for leaf in deltas]).max()


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5), donate_argnums=(6, 7))
def _update(
    loss: Loss,
    model: Model,
    optimizer: str,
    norm: Norm,
    accumulate: int,
    dtype: str,
    params: Params,
    state: Any,
    frozen: Params | None,
    pretrained: Params,
    batch: Batch,
    key: jax.Array | None,
    numbers: tuple[float, float, float],
) -> tuple[Params, Any, jax.Array, jax.Array]:
    """One step: new params and state, loss and gradient norm. Compiled once per model and shape.

    Hyperparameters (learning rate, decay, clip) are traced, so that other values do not recompile.
    """
    learning_rate, weight_decay, clip_norm = numbers

    def summed(params: Params, part: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        whole = jax.tree.map(lambda leaf: leaf.astype(dtype), combine(frozen or {}, params))
        return loss(model, whole, part, key)

    differentiate = jax.value_and_grad(summed, has_aux=True)
    if accumulate == 1:
        (total, weight), grads = differentiate(params, batch, key)
    else:
        # Micro-batch i has every accumulate-th row from i, so that each device has its share of every one.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        keys = None if key is None else jax.random.split(key, accumulate)

        def add(sums: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, differentiate(params, *part)), None

        zero = jnp.zeros((), jnp.float32)
        start = ((zero, zero), jax.tree.map(jnp.zeros_like, params))
        ((total, weight), grads), _ = jax.lax.scan(add, start, (parts, keys))
    gradient_norm = optax.tree.norm(grads) / weight
    scale = jnp.minimum(1.0, clip_norm / gradient_norm)
    grads = jax.tree.map(lambda leaf: leaf * (scale / weight), grads)
    updates, state = _optimizer(optimizer, norm, learning_rate, weight_decay).update(
        grads, state, params, pretrained=pretrained, gradient_norm=scale * gradient_norm
    )
    return optax.apply_updates(params, updates), state, total / weight, gradient_norm


def step_program(
    loss: Loss, model: Model, recipe: Recipe, params: Params, batch: Batch, dropout_key: jax.Array | None
) -> jax.stages.Lowered:
    """The lowered program of one training step of `train`, of arrays or of their shapes alone.

    Args: as for `train`; params, batch: of arrays or `jax.ShapeDtypeStruct`, the params float32.
    """
    if recipe.remat:
        model = replace(cast(ModelOfLayers, model), remat=True)
    state = jax.eval_shape(_optimizer(recipe.optimizer, recipe.norm, 0.0, 0.0).init, params)
    numbers = (recipe.learning_rate, recipe.weight_decay, recipe.clip_norm)
    return _update.lower(
        loss, model, recipe.optimizer, recipe.norm, recipe.accumulate, recipe.dtype,
        params, state, None, params, batch, dropout_key, numbers,
    )  # fmt: skip


def _optimizer(
    name: str, norm: Norm, learning_rate: Any, weight_decay: Any
) -> optax.GradientTransformationExtraArgs:
    if name == "adamr":
        return adamr(learning_rate, weight_decay=weight_decay, norm=norm)
    return optax.with_extra_args_support(
        optax.adamw(learning_rate, weight_decay=weight_decay, mask=decay_mask)
    )
