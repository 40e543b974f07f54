"""One process of a multi-host run on this machine: `python -m tests.multihost ADDRESS PROCESSES ID FOLDER`.

Loads FOLDER/base and FOLDER/fine over the devices of all processes, prunes, compares its own shards with
FOLDER/pruned, which was made by a single process, and counts the surviving entries over all processes. All
write the pruned model as an orbax checkpoint, each its own shards, and read them again.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint

import darex_jax as dx
from darex_jax.core.tree import flatten_names


def main(address: str, processes: int, process: int, folder: Path) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)  # per process
    jax.distributed.initialize(
        address, num_processes=processes, process_id=process, initialization_timeout=60
    )
    assert len(jax.devices()) == 2 * processes and len(jax.local_devices()) == 2
    mesh = dx.make_mesh()
    base, fine = (dx.load_params(folder / name, mesh=mesh) for name in ("base", "fine"))
    key = jax.random.key(0)
    apart = dx.apply_delta(base, dx.prune(key, dx.compute_delta(fine, base), 0.9, 0.2))
    together = jax.jit(lambda f, b: dx.apply_delta(b, dx.prune(key, dx.compute_delta(f, b), 0.9, 0.2)))
    expected = flatten_names(dx.load_params(folder / "pruned"))
    split = 0
    for tree in (apart, together(fine, base)):
        for name, leaf in flatten_names(tree).items():
            split += not leaf.is_fully_addressable and not leaf.is_fully_replicated
            for shard in leaf.addressable_shards:
                part = np.asarray(expected[name])[shard.index]
                np.testing.assert_array_equal(
                    np.asarray(shard.data).view(np.uint8), part.view(np.uint8), name
                )
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", apart)
    again = flatten_names(dx.load_params(folder / "orbax", mesh=mesh))
    for name, leaf in flatten_names(apart).items():
        pairs = zip(leaf.addressable_shards, again[name].addressable_shards, strict=True)
        assert all(np.array_equal(np.asarray(a.data), np.asarray(b.data)) for a, b in pairs), name
    mask = dx.random_mask(key, base, 0.9)
    survivors = jax.jit(lambda tree: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree)))(mask)
    print(f"split parameters with the same bits: {split}; survivors: {survivors}")
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
