"""Costs of parts: bytes against entropy, writing and reading against a copy, matmul against a dense one.

    python benchmarks/parts.py [--json benchmarks/results/parts.json]

One matrix of 4096 x 11008 with normal entries. Times are medians of five rounds, in nanoseconds per entry
of the matrix; the floor of writing and reading is a float32 copy (`numpy.copyto`). Entropy is that of the
mask, log2 of the number of ways to choose as many indices, plus that of the values as symbols of their dtype
(float32 values, all different, count with their size).
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.files.blocks import pack, unpack
from darex_jax.methods.budget import Budget, entropy
from darex_jax.methods.dare import dare
from darex_jax.methods.magnitude import magnitude
from darex_jax.methods.sign import sign
from darex_jax.methods.structured import structured
from darex_jax.methods.svd import low_rank
from darex_jax.parts.total import Parts

SHAPE = (4096, 11008)
NAME = "layer.weight"
ROUNDS = 5
ROWS = 32  # inputs of a matmul
SIZE = SHAPE[0] * SHAPE[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    options = parser.parse_args()
    delta = np.random.default_rng(0).normal(0, 1e-3, SHAPE).astype(np.float32)
    copy = np.empty_like(delta)
    floor = timed(lambda: np.copyto(copy, delta))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, SHAPE[1])), jnp.float32)
    dense = jax.jit(lambda w, x: jnp.einsum("ND,OD->NO", x, w))
    weight = jnp.asarray(delta)
    dense_time = timed(lambda: dense(weight, x).block_until_ready())
    rows = [{"part": "dense product, float32", "matmul_ms": round(dense_time * SIZE / 1e6, 2)}]
    for what, parts in made(delta):
        entry, data = pack({NAME: parts})
        product = partial(jax.jit(lambda p, x: p.matmul(x)), jax.tree.map(jnp.asarray, parts), x)
        row = {
            "part": what,
            "bytes_per_parameter": round(len(data) / SIZE, 6),
            "over_entropy": round(len(data) / least(parts) - 1, 4),
            "write_ns": round(timed(lambda: pack({NAME: parts})), 3),  # noqa: B023
            "read_ns": round(timed(lambda: unpack(entry, data, {NAME: SHAPE}, (0, 0))), 3),  # noqa: B023
            "decode_ns": round(timed(lambda: [0 for _ in parts.chunks(1 << 20)]), 3),  # noqa: B023
            "matmul_ms": round(timed(lambda: product().block_until_ready()) * SIZE / 1e6, 2),  # noqa: B023
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    report = {
        "shape": SHAPE, "input_rows": ROWS, "copy_ns": round(floor, 3), "rows": rows,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {p: version(p) for p in ("jax", "numpy", "pcodec", "zstandard")},
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def made(delta: np.ndarray):
    """Yields named parts."""
    tree = {NAME: delta}
    key = jax.random.key(0)
    for drop_rate in (0.9, 0.99, 0.999):
        budget = Budget(drop_rate=drop_rate)
        random = dare(tree, budget, key=key, dtype=jnp.bfloat16)[NAME]
        yield f"random {drop_rate}, bfloat16", random
        located = Parts(tuple(part.located() for part in random.parts), SHAPE)
        yield f"random {drop_rate}, bfloat16, located", located
        yield f"sparse {drop_rate}, float32", magnitude(tree, budget, dtype=jnp.float32)[NAME]
        yield f"sparse {drop_rate}, bfloat16", magnitude(tree, budget)[NAME]
        yield f"sparse {drop_rate}, 4 bits", magnitude(tree, budget, bits=4)[NAME]
        yield f"sparse {drop_rate}, signs", magnitude(tree, budget, bits=1)[NAME]
    yield "columns 0.99, bfloat16", structured(tree, Budget(drop_rate=0.99), key=key)[NAME]
    rng = np.random.default_rng(2)
    factors = (rng.normal(size=(SHAPE[0], 8)), np.ones(8), rng.normal(size=(8, SHAPE[1])))
    from darex_jax.methods.svd import Factors

    yield "low rank 8, bfloat16", Parts((low_rank(Factors(*factors), 8, None),), SHAPE)
    yield "signs, one scale", sign(tree, Budget(drop_rate=0.5))[NAME]


def least(parts: Parts) -> float:
    """Bytes: the entropy of indices and values."""
    bits = 0.0
    for part in parts.parts:
        for name, array in part.arrays().items():
            if name in ("positions", "columns"):
                size = SIZE if name == "positions" else SHAPE[1]
                bits += size * entropy(array.size / size)
            elif array.dtype == np.float32:
                bits += 32 * array.size
            elif name.endswith("signs"):
                bits += SIZE
            else:
                symbols = array.view(np.uint16) if array.dtype.itemsize == 2 else array
                counts = np.unique(symbols, return_counts=True)[1] / max(1, array.size)
                bits -= array.size * float(np.sum(counts * np.log2(counts)))
    return max(1.0, math.ceil(bits / 8))


def timed(run) -> float:
    """Nanoseconds per entry of the matrix, the median of the rounds, after a warm-up."""
    run()
    seconds = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds) / SIZE * 1e9


if __name__ == "__main__":
    main()
