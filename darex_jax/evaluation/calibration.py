"""Statistics over calibration data, in one compiled pass: of linear layers' inputs, and of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial, reduce
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from darex_jax.core.errors import DarexError, FileError
from darex_jax.core.tree import flatten_names
from darex_jax.files.safetensors import SafetensorsFile, write_tensors
from darex_jax.models import DecoderConfig, Model
from darex_jax.models.layers import Embedding
from darex_jax.tasks.batching import Batch, model_inputs, real_parts

Params = Any
FORMAT = "darex-statistics-1"


class InputStatistics(NamedTuple):
    """Moments of a linear layer's inputs x [D] over all tokens but padding; float32.

    Attributes:
      tokens: their number; after a pooler, the number of rows.
      mean: E[x], [D].
      square: E[x^2], [D]; times `tokens`, the squares of WANDA's norms.
      second_moment: E[x x^T], [D, D], or None if not requested.
    """

    tokens: jax.Array
    mean: jax.Array
    square: jax.Array
    second_moment: jax.Array | None


def input_statistics(
    model: Model,
    params: Params,
    batches: Iterable[Batch],
    second_moments: Callable[[str], bool] = lambda name: False,
) -> dict[str, InputStatistics]:
    """Input statistics of every linear layer, by weight name.

    Sums are accumulated in float32 over batches: over 100 batches of 256 tokens, means and squares were
    within 1e-5 of float64, relative to the root mean square.

    Args:
      params: sharded or not; the sums follow the activations.
      batches: with input_ids, attention_mask and the model's other inputs; padding, and rows whose `weight`
        is 0, are excluded.
      second_moments: for which weights to compute the D x D matrix; pass the same function every time (it is
        a static argument).
    Raises: ValueError without a batch.
    """
    total = summed(_sums(model, second_moments, params, batch) for batch in batches)
    return {
        name: InputStatistics(count, x / count, square / count, None if outer is None else outer / count)
        for name, (count, x, square, outer) in total.items()
    }


def linear_layers(model: Model, params: Params, batch: Batch) -> frozenset[str]:
    """The names of the weights of linear layers; nothing is computed."""
    return frozenset(jax.eval_shape(partial(_sums, model, lambda name: False), params, batch))


def save_statistics(
    path: str | PathLike[str], statistics: Mapping[str, InputStatistics], made_from: Mapping[str, str]
) -> None:
    """Writes statistics as safetensors, atomically: `NAME/mean`, `NAME/square`, ...

    Args: made_from: digests of the model and the data, which `load_statistics` compares.
    """
    tensors = {
        f"{name}/{field}": array
        for name, layer in statistics.items()
        for field, array in layer._asdict().items()
        if array is not None
    }
    write_tensors(path, tensors, {"format": FORMAT, **made_from})


def load_statistics(path: str | PathLike[str], made_from: Mapping[str, str]) -> dict[str, InputStatistics]:
    """Reads what `save_statistics` wrote.

    Raises: FileError if the file is damaged, is not a statistics file, or was made from other inputs.
    """
    with SafetensorsFile(path) as file:
        if file.metadata.get("format") != FORMAT:
            raise FileError(f"{path}: is not a file of activation statistics.")
        other = [name for name, digest in made_from.items() if file.metadata.get(name) != digest]
        if other:
            raise FileError(f"{path}: was made from another {' and another '.join(other)}; write a new one.")
        arrays = {name: jnp.asarray(file.read(name)) for name in file.tensors}
    try:
        return {
            name: InputStatistics(
                arrays[f"{name}/tokens"],
                arrays[f"{name}/mean"],
                arrays[f"{name}/square"],
                arrays.get(f"{name}/second_moment"),
            )
            for name in sorted({entry.rpartition("/")[0] for entry in arrays})
        }
    except KeyError as error:
        raise FileError(f"{path}: lacks {error}.") from error


def squared_influences(
    model: Model, params: Params, delta: Params, batches: Iterable[Batch]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """E[Q] and E[S^2] of each row's influences over all tokens but padding, [O] float32 each, by weight name.

    Q = sum_j (delta_W[i, j] x_j)^2, S = (delta_W x)_i: the inputs of `closed_form_q`.

    Args: delta: nested dict with the deltas of linear layers' weights; others are ignored.
    """
    total = summed(_influence_sums(model, params, delta, batch) for batch in batches)
    return {name: (energy / count, square / count) for name, (count, energy, square) in total.items()}


def token_counts(model: Model, params: Params, batches: Iterable[Batch]) -> dict[str, jax.Array]:
    """How often each token occurs, without padding: float32 [vocabulary], by the name of its table.

    Tables of positions and of types are left out: texts shorter than those that the model will see would say
    that later positions do not occur. So is a table that is the head as well: every row of it takes part in
    every output.

    Args: batches: as for `input_statistics`.
    Raises: ValueError without a batch.
    """
    vocabulary = model.config.vocab_size
    total = summed(_counts(vocabulary, batch) for batch in batches)
    if isinstance(model.config, DecoderConfig) and model.config.tie_word_embeddings:
        return {}
    tables = [
        path
        for path, layer in nnx.iter_modules(model.module(params))
        if isinstance(layer, Embedding) and len(layer.weight[...]) == vocabulary
        if not str(path[-1]).startswith(("position", "token_type"))  # with as many rows by chance
    ]
    return {".".join(map(str, (*path, "weight"))): total["tokens"] for path in tables}


def summed(sums: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the batches, leaf by leaf. Raises: DarexError if there are none."""
    total = reduce(_added, sums, None)
    if total is None:
        raise DarexError("calibration needs at least one batch, got none.")
    return total


@jax.jit
def _added(total: Any, sums: Any) -> Any:
    return sums if total is None else jax.tree.map(jnp.add, total, sums)


@partial(jax.jit, static_argnums=(0, 1))
def _sums(
    model: Model, second_moments: Callable[[str], bool], params: Params, batch: Batch
) -> dict[str, tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]]:
    found = {}

    def observe(name: str, x: jax.Array) -> None:
        x, real = _real(x, batch)
        outer = None
        if second_moments(name):
            outer = jnp.einsum("ND,NE->DE", x, x, precision=jax.lax.Precision.HIGHEST)
        found[name] = (jnp.sum(real), jnp.sum(x, axis=0), jnp.sum(jnp.square(x), axis=0), outer)

    model(params, **model_inputs(batch), observe=observe)
    return found


@partial(jax.jit, static_argnums=0)
def _counts(vocabulary: int, batch: Batch) -> dict[str, jax.Array]:
    _, real = real_parts(batch)
    return {"tokens": jnp.zeros(vocabulary, jnp.float32).at[batch["input_ids"]].add(real, mode="drop")}


@partial(jax.jit, static_argnums=0)
def _influence_sums(
    model: Model, params: Params, delta: Params, batch: Batch
) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    deltas, found = flatten_names(delta), {}

    def observe(name: str, x: jax.Array) -> None:
        if name in deltas:
            x, real = _real(x, batch)
            highest = jax.lax.Precision.HIGHEST
            moved = jnp.einsum("ND,OD->NO", x, deltas[name], precision=highest)
            energy = jnp.einsum(
                "D,OD->O", jnp.sum(jnp.square(x), axis=0), jnp.square(deltas[name]), precision=highest
            )
            found[name] = (jnp.sum(real), energy, jnp.sum(jnp.square(moved), axis=0))

    model(params, **model_inputs(batch), observe=observe)
    return found


def _real(x: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The inputs [N, D] in float32, zero for padding, and their weights (1, padding 0): float32 [N]."""
    rows, tokens = real_parts(batch)
    real = rows if x.ndim == 2 else tokens
    return (x * real[..., None]).astype(jnp.float32).reshape(-1, x.shape[-1]), real.reshape(-1)
