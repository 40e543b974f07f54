"""Host memory of loading and saving a sharded model, above the parameters themselves.

    python benchmarks/load.py --folder /some/scratch

A Llama-shaped checkpoint of 0.47 B float32 parameters is loaded over 8 simulated CPU devices and saved
again. The devices' memory is host memory here, so the size of the parameters is subtracted from the peak to
get the overhead. For comparison: the whole file as NumPy arrays, then `jax.device_put`, and the whole model
back to NumPy arrays to save it. Memory is private (anonymous resident pages), sampled from /proc; each
variant has its own process.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file
from stream import make_models

import darex_jax as dx
from darex_jax.core.tree import flatten_names, unflatten_names

WAYS = ("darex", "darex, one device", "whole model on the host")


def private_memory() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status: Linux 4.5 or later is needed.")


def peak_of(function: Callable[[], Any]) -> tuple[Any, float, int]:
    """The result, its seconds and the peak private memory."""
    peak, done = private_memory(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, private_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    begun = time.perf_counter()
    result = jax.block_until_ready(function())
    seconds = time.perf_counter() - begun
    done.set()
    thread.join()
    return result, seconds, peak


def load(way: str, path: Path, dtype: Any) -> Any:
    if way == "darex":
        return dx.load_params(path, dtype, mesh=dx.make_mesh())
    if way == "darex, one device":
        return dx.load_params(path, dtype)
    whole = {
        name: leaf if dtype is None else leaf.astype(dtype)
        for name, leaf in load_file(path / "model.safetensors").items()
    }
    params = unflatten_names(whole)
    return jax.device_put(params, dx.param_shardings(dx.make_mesh(), params))


def save(way: str, path: Path, params: Any) -> None:
    if way.startswith("darex"):
        dx.save_params(path, params, overwrite=True)
    else:
        path.mkdir(exist_ok=True)
        whole = {name: np.asarray(leaf) for name, leaf in flatten_names(params).items()}
        save_file(whole, path / "model.safetensors")


def measure(way: str, folder: Path, dtype: Any) -> dict[str, float]:
    """Measures one variant in this process."""
    jax.block_until_ready([jax.device_put(np.zeros(8), device) for device in jax.devices()])
    before = private_memory()
    params, load_seconds, load_peak = peak_of(lambda: load(way, folder / "base", dtype))
    own = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    resting = private_memory()
    _, save_seconds, save_peak = peak_of(lambda: save(way, folder / "saved", params))
    return {
        "parameters_mb": own / 1e6,
        "load_overhead_mb": (load_peak - before - own) / 1e6,
        "load_seconds": load_seconds,
        "save_overhead_mb": (save_peak - resting) / 1e6,
        "save_seconds": save_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--measure", nargs=2, help=argparse.SUPPRESS
    )  # variant and dtype, in a separate process
    options = parser.parse_args()
    folder = options.folder / "float32"
    if options.measure:
        way, dtype = options.measure
        print(json.dumps(measure(way, folder, None if dtype == "float32" else dtype)))
        return
    if not (folder / "fine/config.json").exists():
        make_models(folder, np.dtype(np.float32))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    cases = [(way, dtype) for way in WAYS for dtype in ("float32", "bfloat16")]
    results: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            command = [sys.executable, __file__, "--folder", str(options.folder), "--measure", *case]
            process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            results[case].append(json.loads(process.stdout))
    print(f"a float32 file loaded as it is or as bfloat16; the highest of {options.rounds} rounds")
    rows = []
    for (way, dtype), rounds in results.items():
        row = {name: max(r[name] for r in rounds) for name in rounds[0]}
        rows.append({"way": way, "dtype": dtype, "rounds": options.rounds, **row})
        print(
            f"{way:24} {dtype:9} {row['parameters_mb']:6.0f} MB of parameters; above them "
            f"{row['load_overhead_mb']:6.0f} MB to load ({row['load_seconds']:.1f} s), "
            f"{row['save_overhead_mb']:6.0f} MB to save ({row['save_seconds']:.1f} s)"
        )
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "safetensors")}
    report = {"machine": platform.machine(), "python": platform.python_version(), "versions": versions}
    if options.out:
        options.out.write_text(json.dumps(report | {"devices": 8, "ways": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
