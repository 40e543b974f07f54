"""`darex prune` and `darex apply` end to end on a 0.5 B-parameter checkpoint, against a floor and peers.

    python benchmarks/stream.py --folder /some/scratch --peers

The floor reads both models through a small reused buffer and writes one. Peers get their own environment
under the folder (mergekit 0.1.5 and its dependencies). Rounds are interleaved: each runs every method once.
Memory is the peak of private memory (anonymous resident pages), sampled from /proc.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from darex_jax.files.safetensors import write_tensors

FLOOR = """
import os, sys
buffer = memoryview(bytearray(4 << 20))
out = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
for i, path in enumerate(sys.argv[1:3]):
    file = os.open(path, os.O_RDONLY)
    while (n := os.readv(file, [buffer])):
        if i == 0: os.write(out, buffer[:n])
"""
TORCH = """
import sys, torch
from safetensors.torch import load_file, save_file
base, fine, out = (load_file(p) if i < 2 else p for i, p in enumerate(sys.argv[1:4]))
merged = {}
for name, b in base.items():
    delta = fine[name] - b
    keep = torch.bernoulli(torch.full_like(delta, 0.01))
    merged[name] = b + delta * keep / 0.01
save_file(merged, out)
"""


def make_models(folder: Path, dtype: np.dtype) -> None:
    """Writes a Llama-shaped pair: 24 layers of width 1024, 468 M parameters in all."""
    rng = np.random.default_rng(0)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024,
        "vocab_size": 32000,
        "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
        "torch_dtype": str(dtype),
    }  # fmt: skip
    shapes = {
        "model.embed_tokens.weight": (32000, 1024),
        "lm_head.weight": (32000, 1024),
        "model.norm.weight": (1024,),
    }
    for i in range(24):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (1024, 1024) for n in "qkvo"}
        shapes |= {f"{layer}mlp.{n}_proj.weight": (4096, 1024) for n in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (1024, 4096)}
        shapes |= {f"{layer}{n}_layernorm.weight": (1024,) for n in ("input", "post_attention")}
    noise = rng.standard_normal(1 << 22, np.float32)
    base, fine = {}, {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        leaf = 0.02 * np.resize(np.roll(noise, rng.integers(1 << 22)), size).reshape(shape)
        step = 1e-4 * np.resize(np.roll(noise, rng.integers(1 << 22)), size).reshape(shape)
        base[name] = leaf.astype(dtype)
        fine[name] = (leaf + step).astype(dtype) if "layers" in name else base[name]
    for kind, tensors in (("base", base), ("fine", fine)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        write_tensors(folder / kind / "model.safetensors", tensors, {"format": "pt"})
        (folder / kind / "config.json").write_text(json.dumps(config))


def private_memory(pid: int) -> int:
    total = 0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total = int(line.split()[1]) * 1024
        return total + sum(private_memory(int(child)) for child in children)
    except (OSError, ValueError):
        return total


def measure(command: list[str]) -> tuple[float, int]:
    """Wall seconds and peak private memory of a command."""
    peak, begun = 0, time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    watching = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not watching.wait(0.01):
            peak = max(peak, private_memory(process.pid))

    thread = threading.Thread(target=watch)
    thread.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - begun
    watching.set()
    thread.join()
    if process.returncode:
        raise RuntimeError(f"{command[:4]}: {errors.decode()[-2000:]}")
    return seconds, peak


def peer_environment(folder: Path) -> Path:
    environment = folder / "peers"
    if not (environment / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [environment / "bin/python", "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "torch==2.13.0", "numpy", "safetensors"], check=True)
        subprocess.run([*pip, "mergekit==0.1.5"], check=True)
        (environment / "ready").touch()
    return environment / "bin"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", action="store_true", help="also mergekit and plain PyTorch")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.folder / options.dtype
    dtype = np.dtype(ml_dtypes.bfloat16 if options.dtype == "bfloat16" else np.float32)
    if not (folder / "fine/config.json").exists():
        make_models(folder, dtype)
    base, fine = folder / "base", folder / "fine"
    files = [str(p / "model.safetensors") for p in (base, fine)]
    darex, again = [sys.executable, "-m", "darex_jax"], ["--overwrite", "--json"]
    commands = {
        "floor: read both, write one": [sys.executable, "-c", FLOOR, *files, str(folder / "floor")],
        "darex prune": [*darex, "prune", str(base), str(fine), str(folder / "delta"), "-p", "0.99", "--json"],
        "darex apply": [*darex, "apply", str(base), str(folder / "delta"), str(folder / "out"), *again],
        "darex prune --method magnitude": [
            *darex, "prune", str(base), str(fine), str(folder / "largest"), "-p", "0.99", "--method",
            "magnitude", "--json",
        ],
    }  # fmt: skip
    if options.peers:
        bin_folder = peer_environment(options.folder)
        recipe = {
            "merge_method": "dare_linear", "base_model": str(base), "dtype": options.dtype,
            "models": [{"model": str(fine), "parameters": {"weight": 1.0, "density": 0.01}}],
        }  # fmt: skip
        (folder / "mergekit.yml").write_text(json.dumps(recipe))
        merged = [str(folder / "mergekit.yml"), str(folder / "merged"), "--no-copy-tokenizer"]
        commands["mergekit dare_linear"] = [str(bin_folder / "mergekit-yaml"), *merged]
        commands["PyTorch load, subtract, drop, save"] = [
            str(bin_folder / "python"), "-c", TORCH, *files, str(folder / "torch.safetensors"),
        ]  # fmt: skip
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, command in commands.items():
            results[name].append(measure(command))
    floor = statistics.median(seconds for seconds, _ in results["floor: read both, write one"])
    size = os.path.getsize(files[0])
    artifact = os.path.getsize(folder / "delta")
    print(f"2 x {size / 1e9:.2f} GB of {options.dtype}, {options.rounds} rounds; seconds: median (min, max)")
    report = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(),
              "model_bytes": size, "artifact_bytes": artifact, "dtype": options.dtype,
              "methods": {}}  # fmt: skip
    for name, rows in results.items():
        seconds = [row[0] for row in rows]
        memory = max(row[1] for row in rows) / 1e6
        median = statistics.median(seconds)
        report["methods"][name] = {
            "median": median,
            "min": min(seconds),
            "max": max(seconds),
            "private_mb": memory,
        }
        spread = f"({min(seconds):.2f}, {max(seconds):.2f})"
        print(
            f"  {name:36} {median:7.2f} {spread:16} {median / floor:5.1f} x floor  {memory:8.0f} MB private"
        )
    print(f"  artifact: {artifact:,} bytes")
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    shutil.rmtree(folder / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
