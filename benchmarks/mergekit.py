"""The same merges by mergekit: agreement of the results, and times.

    python benchmarks/mergekit.py [--json benchmarks/results/mergekit.json]

mergekit is installed into its own environment (`.venv/mergekit`, created by the first run). A Llama of 59
million parameters and three fine-tuned models (seeded noise) in float32 are merged by both commands with
weights of 1; times are of the whole command, interleaved, the median of ROUNDS. `apart` is the root mean
square difference of the two results relative to that of the merge's change. Random methods draw different
masks, so only their times are comparable.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

import darex_jax as dx
from darex_jax.models import init_model, read_model_config

ROUNDS = 3
ENVIRONMENT = Path(".venv/mergekit")
REQUIREMENTS = ("torch==2.13.0", "mergekit==0.1.5")
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 16384, "hidden_size": 512,
    "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 8,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02, "max_position_embeddings": 512,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
METHODS = {  # our name -> mergekit's; drop rate
    "linear": ("task_arithmetic", None),
    "ties": ("ties", 0.8),
    "dare-linear": ("dare_linear", 0.9),
    "dare-ties": ("dare_ties", 0.9),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    options = parser.parse_args()
    install()
    with tempfile.TemporaryDirectory() as folder:
        base, *fine = make_models(Path(folder))
        rows = [compare(Path(folder), base, fine, method) for method in METHODS]
    report = {
        "rounds": ROUNDS, "rows": rows, "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {p: version(p) for p in ("jax", "numpy")} | dict(r.split("==") for r in REQUIREMENTS),
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def install() -> None:
    if (ENVIRONMENT / "bin" / "mergekit-yaml").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
    for requirement in REQUIREMENTS:
        subprocess.run([ENVIRONMENT / "bin" / "pip", "install", "-q", requirement], check=True)


def make_models(folder: Path) -> list[Path]:
    model, params = init_model(read_model_config(CONFIG), jax.random.key(0))
    found = []
    for i, name in enumerate(("base", "a", "b", "c")):
        rng = np.random.default_rng(i)
        noise = 0.0 if name == "base" else 1e-3
        own = jax.tree.map(
            lambda x, rng=rng, noise=noise: (
                np.asarray(x) + np.float32(noise) * rng.standard_normal(x.shape, np.float32)
            ),
            params,
        )
        dx.save_params(folder / name, own, model.config.to_hf())
        found.append(folder / name)
    return found


def compare(folder: Path, base: Path, fine: list[Path], method: str) -> dict:
    theirs, drop_rate = METHODS[method]
    dense = {} if drop_rate is None else {"density": 1.0 - drop_rate}
    config = {
        "merge_method": theirs, "base_model": str(base), "dtype": "float32",
        "parameters": {"normalize": theirs.endswith("ties")},
        "models": [{"model": str(path), "parameters": {"weight": 1.0, **dense}} for path in fine],
    }  # fmt: skip
    (folder / "config.yml").write_text(json.dumps(config))
    commands = {
        "darex": [
            sys.executable, "-m", "darex_jax", "merge", base, *fine, folder / "darex", "--method", method,
            "--json", *(["--drop-rate", drop_rate] if drop_rate else []),
        ],
        "mergekit": [
            ENVIRONMENT / "bin" / "mergekit-yaml", folder / "config.yml", folder / "mergekit",
            "--no-copy-tokenizer", "--random-seed", 0,
        ],
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            shutil.rmtree(folder / name, ignore_errors=True)
            begun = time.perf_counter()
            run = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
            seconds[name].append(time.perf_counter() - begun)
            if run.returncode:
                sys.exit(f"{name}: {run.stderr}")
    ours, other, start = (tensors(folder / name) for name in ("darex", "mergekit", "base"))
    assert ours.keys() == other.keys() == start.keys()
    apart, changed = (
        sum(float(np.sum(np.square((x[n] - y[n]).astype(np.float64)))) for n in start)
        for x, y in ((ours, other), (ours, start))
    )
    row = {
        "method": method, "mergekit": theirs, "drop_rate": drop_rate,
        "apart": float(f"{(apart / changed) ** 0.5:.2e}"),
        **{f"{name}_s": round(statistics.median(times), 2) for name, times in seconds.items()},
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


if __name__ == "__main__":
    main()
