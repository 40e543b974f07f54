"""Nanoseconds per parameter of the mask, of drop + rescale, and of the whole prune, compared with peers.

    taskset -c 0 python benchmarks/mask.py

Buffers are reused (donated) if a method supports it; every round runs every method once, so that machine
noise affects all alike; the median over rounds is reported, with the fastest and the slowest.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

import darex_jax as dx

DTYPES = {
    "float32": (jnp.float32, np.dtype(np.float32), torch.float32),
    "bfloat16": (jnp.bfloat16, np.dtype(ml_dtypes.bfloat16), torch.bfloat16),
}


def methods(size: int, dtype: str) -> dict[str, Callable[[], object]]:
    jax_dtype, numpy_dtype, torch_dtype = DTYPES[dtype]
    key, q = jax.random.key(0), 0.01
    delta = jax.random.normal(jax.random.key(1), (size,)).astype(jax_dtype)
    shape = {"w": jax.ShapeDtypeStruct((size,), jax_dtype)}
    held = {"w": delta + 0}
    mask = dx.random_mask(key, shape, 0.99)["w"]
    bernoulli = jax.jit(lambda k: jax.random.bernoulli(k, 0.01, (size,)))
    bernoulli_prune = jax.jit(
        lambda d, k: jnp.where(jax.random.bernoulli(k, 0.01, d.shape), d * (1 / q), 0).astype(d.dtype),
        donate_argnums=0,
    )
    drop_rescale = jax.jit(lambda d, m: dx.rescale(dx.drop({"w": m}, {"w": d}), q)["w"], donate_argnums=0)
    buffers = {"drop": delta + 0, "bernoulli": delta + 0}
    source = np.ones(size, numpy_dtype)
    target = np.empty_like(source)
    tensor = torch.ones(size, dtype=torch_dtype)

    def whole() -> None:
        held["w"] = dx.prune(key, held, 0.99, q, donate=True)["w"].block_until_ready()

    def drop_and_rescale() -> None:
        buffers["drop"] = drop_rescale(buffers["drop"], mask).block_until_ready()

    def jax_bernoulli_prune() -> None:
        buffers["bernoulli"] = bernoulli_prune(buffers["bernoulli"], key).block_until_ready()

    def torch_prune() -> None:  # as in the published code, from a tensor filled with the rate
        keep = torch.bernoulli(torch.full_like(tensor, 0.01))
        torch.mul(tensor, keep).div_(q)

    return {
        "mask": lambda: jax.block_until_ready(dx.random_mask(key, shape, 0.99)),
        "drop + rescale, in place": drop_and_rescale,
        "whole prune, in place": whole,
        "jax.random.bernoulli, mask": lambda: jax.block_until_ready(bernoulli(key)),
        "jax.random.bernoulli, prune": jax_bernoulli_prune,
        "torch.bernoulli, prune": torch_prune,
        "copy, buffer reused": lambda: np.copyto(target, source),
        "copy, fresh": lambda: source.copy() is None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1 << 24)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", help="also write the results as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, object] = {
        "machine": platform.processor() or platform.machine(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "size": options.size,
        "rounds": options.rounds,
        "ns_per_parameter": {},
    }
    for dtype in DTYPES:
        table = methods(options.size, dtype)
        seconds: dict[str, list[float]] = {name: [] for name in table}
        for run in range(options.rounds + 1):
            for name, method in table.items():
                begun = time.perf_counter()
                method()
                if run:  # the first round compiles
                    seconds[name].append(time.perf_counter() - begun)
        print(f"{dtype}, {options.size:,} parameters: ns a parameter, median (fastest, slowest)")
        for name, times in seconds.items():
            ns = [1e9 * t / options.size for t in times]
            row = {"median": statistics.median(ns), "min": min(ns), "max": max(ns)}
            report["ns_per_parameter"][f"{dtype}, {name}"] = row  # type: ignore[index]
            print(f"  {name:30} {row['median']:7.2f}  ({row['min']:.2f}, {row['max']:.2f})")
    if options.out:
        with open(options.out, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
