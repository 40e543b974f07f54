"""How a model lies on several devices: one mesh with two axes, and a rule on Hugging Face names.

Each half of a layer is split so that it needs one sum over devices, at its end: the first matrix by its
outputs, the second by its inputs (Shoeybi et al., arXiv:1909.08053). Everything of `core/` works entry by
entry, so pruning needs no communication at all, under this rule or any other.
"""

import re
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from darex_jax.core.errors import DarexError
from darex_jax.core.tree import PyTree, map_named, shape_of

DATA, MODEL = "data", "model"  # the mesh's axes: rows of a batch, parts of a matrix

# The first pattern found in a name decides; what none matches (norms, the biases of row-parallel matrices,
# position tables, a classifier) is on every device. Weights are [out, in], embeddings [vocabulary, features].
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
    """A mesh with the axes "data" and "model", which the compiler partitions along on its own.

    Args:
      data: parts that a batch is split into.
      model: parts that matrices are split into; None takes the devices that `data` leaves.
      devices: None is all of them, those of other processes included.
    Raises: ValueError if the parts are not as many as the devices.
    """
    devices = jax.devices() if devices is None else devices
    model = len(devices) // max(data, 1) if model is None else model
    if data * model != len(devices):
        raise DarexError(f"a mesh of {data} x {model} (data x model) does not fit {len(devices)} devices.")
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=devices)


def param_sharding(mesh: Mesh, name: str, shape: Sequence[int]) -> NamedSharding:
    """Where the parameter of this name and shape lies; on every device where its length does not divide.

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
      params: nested dict under Hugging Face names, of arrays or `jax.ShapeDtypeStruct`s.
    Returns: a tree of `NamedSharding`s with the same names.
    """
    return map_named(lambda name, leaf: param_sharding(mesh, name, shape_of(name, leaf)), params)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch lies: its rows, the first axis, split along "data"."""
    return NamedSharding(mesh, PartitionSpec(DATA))
