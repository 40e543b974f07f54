"""Where parameters live: one mesh with the axes `data` and `model`, and a sharding by rule on names."""

import re
from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from darex_jax.core.tree import PyTree, map_named

Sharding = jax.sharding.Sharding
Place = Callable[[str, tuple[int, ...]], Sharding]  # of a parameter's name and shape

# What comes in is split over its outputs, what goes out over its inputs: one sum a half layer crosses devices
# (Shoeybi et al., arXiv:1909.08053). Vocabularies are split over rows; the rest is on every device.
SPLIT_ROWS = re.compile(
    r"(^|\.)(q_proj|k_proj|v_proj|gate_proj|up_proj|query|key|value|intermediate\.dense|embed_tokens"
    r"|word_embeddings|lm_head)\.(weight|bias)$"
)
SPLIT_COLUMNS = re.compile(r"(^|\.)(o_proj|down_proj|output\.dense)\.weight$")


def make_mesh(data: int = 1, model: int | None = None) -> Mesh:
    """A mesh over all devices.

    Args:
      data: how many copies of the model; the rows of a batch are split over them.
      model: how many ways each copy is split; None takes all devices that `data` leaves.
    Raises: ValueError if data * model is not the number of devices.
    """
    devices = jax.device_count()
    if model is None:
        model = max(1, devices // data)
    if data * model != devices:
        raise ValueError(f"data={data} times model={model} is {data * model}, there are {devices} devices.")
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def param_sharding(mesh: Mesh) -> Place:
    """The rule for parameters on a mesh; an axis that does not divide evenly stays whole."""

    def place(name: str, shape: tuple[int, ...]) -> Sharding:
        parts = mesh.shape["model"]
        if SPLIT_ROWS.search(name) and shape[0] % parts == 0:
            return NamedSharding(mesh, PartitionSpec("model", *[None] * (len(shape) - 1)))
        if SPLIT_COLUMNS.search(name) and shape[-1] % parts == 0:
            return NamedSharding(mesh, PartitionSpec(None, "model"))
        return NamedSharding(mesh, PartitionSpec())

    return place


def shard_params(params: PyTree, mesh: Mesh) -> PyTree:
    """The tree with every parameter where the rule puts it."""
    place = param_sharding(mesh)
    return map_named(lambda name, leaf: jax.device_put(leaf, place(name, leaf.shape)), params)


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Arrays with the rows of a batch on their first axis, split over the mesh's `data` axis."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
