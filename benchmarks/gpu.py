"""On a GPU: pruning against a device copy, and AdamR against `optax.adamw`.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json      # or make test-gpu, with the tests

Rounds are interleaved; the median over rounds is reported, with the fastest and the slowest. A copy reads and
writes each byte once; drop, rescale and add reads base and delta and writes the sum.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import darex_jax as dx

SIZE, ROUNDS = 1 << 27, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit(f"skipped: there is no GPU, JAX runs on {jax.default_backend()}")
    report = {
        "device": jax.devices()[0].device_kind, "parameters": SIZE, "rounds": ROUNDS,
        "versions": {p: version(p) for p in ("jax", "optax")}, "methods": {},
    }  # fmt: skip
    for dtype in (jnp.float32, jnp.bfloat16):
        seen = measure(methods(dtype))
        for name, times in seen.items():
            row = {
                "ns_a_parameter": statistics.median(times) / SIZE * 1e9,
                "min": min(times) / SIZE * 1e9, "max": max(times) / SIZE * 1e9,
                "times_the_copy": statistics.median(times) / statistics.median(seen["copy"]),
            }  # fmt: skip
            report["methods"][f"{name}, {jnp.dtype(dtype).name}"] = row
            print(f"{name:20} {jnp.dtype(dtype).name:9}", *(f"{k} {v:.3f}" for k, v in row.items()))
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def methods(dtype) -> dict[str, Callable[[], object]]:
    key = jax.random.key(0)
    base = {"w": jnp.ones(SIZE, dtype)}
    delta = {"w": jax.random.normal(jax.random.key(1), (SIZE,)).astype(dtype)}
    copy = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree))
    prune = jax.jit(lambda k, b, d: dx.apply_delta(b, dx.prune(k, d, 0.99)))
    found = {"copy": lambda: copy(base), "prune and add": lambda: prune(key, base, delta)}
    for name, transform in (("optax.adamw", optax.adamw(1e-4)), ("adamr", dx.adamr(1e-4, weight_decay=0.01))):
        optimizer = optax.with_extra_args_support(transform)
        state = optimizer.init(base)
        step = jax.jit(lambda g, s, p, o=optimizer: o.update(g, s, p, pretrained=p))
        found[name] = lambda step=step, state=state: step(delta, state, base)
    return found


def measure(found: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in found}
    for number in range(ROUNDS + 2):
        for name, method in found.items():
            begun = time.perf_counter()
            jax.block_until_ready(method())
            if number > 1:  # the first rounds compile
                times[name].append(time.perf_counter() - begun)
    return times


if __name__ == "__main__":
    main()
