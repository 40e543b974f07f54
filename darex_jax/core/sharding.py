"""Sharding a model over several devices: a mesh with two axes, and partitioning rules by Hugging Face name.

Tensor parallelism as in Megatron-LM (Shoeybi et al., arXiv:1909.08053): the first matrix of a block is split
by outputs, the second by inputs, so that each block ends in one all-reduce. Pruning is elementwise, so it
needs no communication under these rules or any other.
"""

import re
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from darex_jax.core.errors import DarexError
from darex_jax.core.tree import PyTree, map_named, shape_of

DATA, MODEL = "data", "model"  # the mesh's axes: rows of a batch, parts of a matrix

# The first matching pattern decides; parameters that match none (norms, biases of row-parallel matrices,
# position tables, a classifier) are replicated. Weights are [out, in], embeddings [vocabulary, features].
RULES = tuple(
    (re.compile(pattern), spec)
    for pattern, spec in (
        (r"(^|\.)(word_embeddings|embed_tokens|lm_head)\.weight$", PartitionSpec(MODEL, None)),
        (r"\.(q|k|v|gate|up)_proj\.weight$", PartitionSpec(MODEL, None)),
        (r"\.(q|k|v|gate|up)_proj\.bias$", PartitionSpec(MODEL)),
        (r"\.(o|down)_proj\.weight$", PartitionSpec(None, MODEL)),
        (r"\.(query|key|value|intermediate\.dense)\.weight$", PartitionSpec(MODEL, None)),
        (r"\.(query|key|value|intermediate\.dense)\.bias$", PartitionSpec(MODEL)),
        (r"\.output\.dense\.weight$", PartitionSpec(None, MODEL)),
    )
)


def make_mesh(data: int = 1, model: int | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes "data" and "model", with automatic partitioning.

    Args:
      data: number of shards of a batch.
      model: number of shards of a matrix; None is the number of devices divided by `data`.
      devices: None is all devices, those of other processes included.
    Raises: ValueError if data * model is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    model = len(devices) // max(data, 1) if model is None else model
    if data * model != len(devices):
        raise DarexError(f"a mesh of {data} x {model} (data x model) does not fit {len(devices)} devices.")
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=devices)


def param_sharding(mesh: Mesh, name: str, shape: Sequence[int]) -> NamedSharding:
    """The sharding of a parameter by name and shape; replicated if an axis length is not divisible.

    Args: mesh: with an axis "model", from `make_mesh`.
    """
    spec = next((spec for pattern, spec in RULES if pattern.search(name)), PartitionSpec())
    fits = len(spec) == len(shape) and not any(
        length % mesh.shape[axis] for length, axis in zip(shape, spec, strict=True) if axis is not None
    )
    return NamedSharding(mesh, spec if fits else PartitionSpec())


def param_shardings(mesh: Mesh, params: PyTree) -> PyTree:
    """`param_sharding` of every leaf, for `jax.device_put` or `jax.jit`.

    Args:
      mesh: from `make_mesh`.
      params: nested dict by Hugging Face name, of arrays or `jax.ShapeDtypeStruct`s.
    Returns: a tree of `NamedSharding`s with the same names.
    """
    return map_named(lambda name, leaf: param_sharding(mesh, name, shape_of(name, leaf)), params)


def explicit_sharding(array: jax.Array) -> NamedSharding | None:
    """The sharding that is part of an array's type, as on a mesh with the default axes of `jax.make_mesh`, on
    which not every operation is allowed; None on any other."""
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def placed_like(array: jax.Array, other: jax.Array) -> jax.Array:
    """The array with the sharding of another of its shape, if that is part of the other's type."""
    sharding = explicit_sharding(other)
    if sharding is None:
        return array
    traced = isinstance(array, jax.core.Tracer) or isinstance(other, jax.core.Tracer)
    return jax.sharding.reshard(array, sharding) if traced else jax.device_put(array, other.sharding)


def sharded_like(array: jax.Array, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`function(array)`, of the array's shape, sharded as the array is; the compiler partitions it."""
    sharding = explicit_sharding(array)
    if sharding is None:
        return function(array)
    return jax.sharding.auto_axes(function, out_sharding=sharding)(array)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis is split along "data"."""
    return NamedSharding(mesh, PartitionSpec(DATA))
