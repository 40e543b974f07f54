"""`darex prune`, `verify` and `apply` on a pair of models of Llama-2-7B's size: 13.5 GB each, sharded.

    python benchmarks/seven_b.py --folder /some/scratch        # 41 GB of disk, some minutes

Weights are random, in bfloat16, in three files with an index, as Llama 2 is published. The floor reads both
models through a small reused buffer and writes one. Memory is the peak of private memory, as in `stream.py`.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from stream import FLOOR, measure

from darex_jax.files.safetensors import write_tensors

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "vocab_size": 32000,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "torch_dtype": "bfloat16", "hidden_act": "silu",
    "initializer_range": 0.02, "tie_word_embeddings": False,
}  # fmt: skip
FILES = 3


def shapes() -> list[tuple[str, tuple[int, ...]]]:
    size, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    found = [("model.embed_tokens.weight", (CONFIG["vocab_size"], size))]
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        found += [(f"{layer}self_attn.{n}_proj.weight", (size, size)) for n in "qkvo"]
        found += [(f"{layer}mlp.{n}_proj.weight", (inner, size)) for n in ("gate", "up")]
        found += [(f"{layer}mlp.down_proj.weight", (size, inner))]
        found += [(f"{layer}{n}_layernorm.weight", (size,)) for n in ("input", "post_attention")]
    return [*found, ("model.norm.weight", (size,)), ("lm_head.weight", (CONFIG["vocab_size"], size))]


def make(folder: Path) -> None:
    """Writes both models, one file at a time."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(1 << 22, np.float32)
    every = shapes()
    per_file = -(-len(every) // FILES)
    index: dict[str, str] = {}
    for kind in ("base", "fine"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(FILES):
        file = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        base, fine = {}, {}
        for name, shape in every[number * per_file : (number + 1) * per_file]:
            size, index[name] = int(np.prod(shape)), file
            leaf = 0.02 * np.resize(np.roll(noise, rng.integers(1 << 22)), size)
            base[name] = leaf.astype(ml_dtypes.bfloat16).reshape(shape)
            if "layers" in name:
                leaf += 1e-3 * np.resize(np.roll(noise, rng.integers(1 << 22)), size)
            fine[name] = leaf.astype(ml_dtypes.bfloat16).reshape(shape)
        for kind, tensors in (("base", base), ("fine", fine)):
            write_tensors(folder / kind / file, tensors, {"format": "pt"})
    total = sum(2 * int(np.prod(shape)) for _, shape in every)
    for kind in ("base", "fine"):
        listed = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / kind / "model.safetensors.index.json").write_text(json.dumps(listed))
        (folder / kind / "config.json").write_text(json.dumps(CONFIG))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "seven_b.json")
    options = parser.parse_args()
    folder = options.folder
    if not (folder / "fine/config.json").exists():
        make(folder)
    base, fine, delta, out = (folder / name for name in ("base", "fine", "delta.safetensors", "out"))
    files = [p for kind in (base, fine) for p in sorted(kind.glob("*.safetensors"))]
    size = sum(p.stat().st_size for p in files) // 2
    darex = [sys.executable, "-m", "darex_jax"]
    commands = {
        "floor: read both, write one": [
            "sh", "-c", " && ".join(
                f"{sys.executable} -c '{FLOOR}' {base / p.name} {fine / p.name} {folder / 'floor'}"
                for p in files[:FILES]
            ),
        ],
        "prune -p 0.99": [*darex, "prune", str(base), str(fine), str(delta), "-p", "0.99", "--json"],
        "verify --base": [*darex, "verify", str(delta), "--base", str(base), "--json"],
        "apply": [*darex, "apply", str(base), str(delta), str(out), "--json"],
    }  # fmt: skip
    report = {
        "machine": platform.machine(), "cores": os.cpu_count(), "model_bytes": size, "commands": {},
    }  # fmt: skip
    for name, command in commands.items():
        seconds, memory = measure(command)
        (folder / "floor").unlink(missing_ok=True)
        shutil.rmtree(out, ignore_errors=True)
        report["commands"][name] = {"seconds": round(seconds, 1), "private_mb": round(memory / 1e6)}
        print(f"{name:30} {seconds:7.1f} s {memory / 1e6:7.0f} MB private", flush=True)
    report["artifact_bytes"] = delta.stat().st_size
    seen = subprocess.run(
        [*darex, "inspect", str(delta), "--json"], capture_output=True, check=True, text=True
    )
    report["survivors"] = json.loads(seen.stdout).get("survivors")
    print(
        f"artifact {report['artifact_bytes']:,} bytes, 1/{size / report['artifact_bytes']:.0f} of the model"
    )
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
