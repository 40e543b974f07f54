"""Peak memory of each command on a Llama of about a billion parameters with random weights.

    python benchmarks/memory.py --folder /some/scratch --out benchmarks/results/memory.json

A base, a fine-tuned model and an adapter are created in the folder: bfloat16, in files of at most half a
gigabyte, with a byte tokenizer. Each command is then run once in its own process, whose memory is sampled
from /proc: private memory (anonymous resident pages) and all resident pages. Commands that run the model can
use a smaller one (`--running-layers`), and one that exceeds `--limit` is stopped and reported as such.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from darex_jax.files.checkpoint import INDEX
from darex_jax.files.safetensors import write_tensors

SHARD = 500_000_000  # bytes per file
NOISE = np.random.default_rng(0).standard_normal(1 << 22, np.float32)


def config_of(layers: int) -> dict[str, Any]:
    """TinyLlama's shape (arXiv:2401.02385), which has 22 layers: 1.1 billion parameters."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048,
        "vocab_size": 32000, "intermediate_size": 5632, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "initializer_range": 0.02, "max_position_embeddings": 2048, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": 2,
    }  # fmt: skip


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    size, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    keys = size // heads * config["num_key_value_heads"]
    table = (config["vocab_size"], size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (size, size) for n in "qo"}
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (keys, size) for n in "kv"}
        shapes |= {f"{layer}mlp.{n}_proj.weight": (inner, size) for n in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (size, inner)}
        shapes |= {f"{layer}{n}_layernorm.weight": (size,) for n in ("input", "post_attention")}
    return {**shapes, "model.norm.weight": (size,), "lm_head.weight": table}


def noise(shape: tuple[int, ...], shift: int) -> np.ndarray:
    return np.resize(np.roll(NOISE, shift), int(np.prod(shape))).reshape(shape)


def shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        if names and size + nbytes > SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def make_model(path: Path, layers: int, step: float) -> None:
    """Writes a sharded bfloat16 model; `step` is the standard deviation of the delta."""
    path.mkdir(parents=True)
    config = config_of(layers)
    shapes = shapes_of(config)
    groups = list(shards(shapes))
    weight_map = {}
    for i, names in enumerate(groups):
        file = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        tensors = {}
        for name in names:
            seed = hash_of(name)
            leaf = 0.02 * noise(shapes[name], seed) if len(shapes[name]) > 1 else np.ones(shapes[name])
            if step and "_proj" in name:
                leaf = leaf + step * noise(shapes[name], seed + 1)
            tensors[name] = leaf.astype(ml_dtypes.bfloat16)
            weight_map[name] = file
        write_tensors(path / file, tensors, {"format": "pt"})
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config))
    make_tokenizer(path)


def hash_of(name: str) -> int:
    return sum(map(ord, name)) * 7919 % (1 << 22)


def make_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)


def make_adapter(path: Path, layers: int) -> None:
    """Rank 16 on every query and value projection."""
    path.mkdir(parents=True)
    shapes = shapes_of(config_of(layers))
    tensors = {}
    for name, (outer, inner) in ((n, s) for n, s in shapes.items() if ".q_proj" in n or ".v_proj" in n):
        layer = "base_model.model." + name.removesuffix(".weight")
        tensors[f"{layer}.lora_A.weight"] = 0.01 * noise((16, inner), hash_of(name))
        tensors[f"{layer}.lora_B.weight"] = 0.01 * noise((outer, 16), hash_of(name) + 1)
    stated = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(stated))
    write_tensors(path / "adapter_model.safetensors", tensors, {"format": "pt"})


def memory_of(pid: int) -> tuple[int, int]:
    """Private and all resident bytes of a process; zeros once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {name: int(rest.split()[0]) * 1024 for name, _, rest in (x.partition(":") for x in lines)
             if name in ("RssAnon", "VmRSS")}  # fmt: skip
    return found.get("RssAnon", 0), found.get("VmRSS", 0)


def measure(command: list[str], limit: int) -> dict[str, Any]:
    """The peaks of a command, in bytes."""
    peaks = (0, 0)
    stopped = False
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            private, resident = memory_of(process.pid)
            peaks = max(peaks[0], private), max(peaks[1], resident)
            if private > limit:
                process.kill()
                stopped = True
            time.sleep(0.01)
        errors.seek(0)
        if process.returncode and not stopped:
            raise RuntimeError(f"{command[2:6]}: {errors.read().decode()[-2000:]}")
    return {"private_bytes": peaks[0], "resident_bytes": peaks[1], "stopped": stopped}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--running-layers", type=int, help="layers of the model for commands that run it")
    parser.add_argument("--limit", type=float, default=8.0, help="gigabytes at which a command is stopped")
    parser.add_argument("--only", nargs="*", help="commands to measure")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    whole, running = options.layers, options.running_layers or options.layers
    for layers in {whole, running}:
        for kind, step in (("base", 0.0), ("fine", 1e-3)):
            if not (options.folder / str(layers) / kind / "config.json").exists():
                make_model(options.folder / str(layers) / kind, layers, step)
        if not (options.folder / str(layers) / "adapter").exists():
            make_adapter(options.folder / str(layers) / "adapter", layers)
    text = options.folder / "text"
    text.write_text(
        "A day by the sea is worth a week in the city, as everybody knows who has been to both.\n"
    )
    darex = [sys.executable, "-m", "darex_jax"]
    rows = []

    def run(name: str, layers: int, *arguments: Any) -> None:
        if options.only and name not in options.only:
            return
        size = sum(f.stat().st_size for f in (options.folder / str(layers) / "base").glob("*.safetensors"))
        found = measure([*darex, *map(str, arguments)], int(options.limit * 1e9))
        row = {"command": name, "layers": layers, "model_bytes": size, **found}
        rows.append(row)
        share = (
            "stopped at the limit" if found["stopped"] else f"{found['private_bytes'] / size:5.2f} x model"
        )
        print(
            f"{name:26} {size / 1e9:5.2f} GB  private {found['private_bytes'] / 1e9:6.2f} GB  "
            f"resident {found['resident_bytes'] / 1e9:6.2f} GB  {share}",
            flush=True,
        )

    folder = options.folder / str(whole)
    base, fine, delta, out = (folder / name for name in ("base", "fine", "delta", "out"))
    run("--version", whole, "--version")
    run("check", whole, "check", base, fine, "--json")
    run("prune", whole, "prune", base, fine, delta, "-p", 0.99, "--json")
    run("prune at 0.5", whole, "prune", base, fine, folder / "half", "-p", 0.5, "--json")
    run("inspect", whole, "inspect", delta, "--json")
    run("verify", whole, "verify", delta, "--json")
    run("verify --base", whole, "verify", delta, "--base", base, "--json")
    run("apply", whole, "apply", base, delta, out, "--overwrite", "--json")
    run("merge-adapter", whole, "merge-adapter", base, folder / "adapter", folder / "merged", "--overwrite",
        "--json")  # fmt: skip
    folder = options.folder / str(running)
    base, fine, delta = (folder / name for name in ("base", "fine", "delta"))
    if not delta.exists():
        command = [*darex, "prune", base, fine, delta, "-p", "0.99", "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    few = ("Once upon a time", "--max-new-tokens", 4, "--json")
    run("generate", running, "generate", fine, *few)
    run("generate --delta", running, "generate", base, *few, "--delta", delta)
    run("eval", running, "eval", fine, "--task", "word-problems", "--limit", 2, "--batch-size", 2,
        "--max-new-tokens", 4, "--records", folder / f"records-{os.getpid()}", "--json")  # fmt: skip
    run("find-q two-point, 1 mask", running, "find-q", base, fine, "-p", 0.99, "--objective", "two-point",
        "--masks", 1, "--text", text, "--out", folder / "q.json", "--json")  # fmt: skip
    run("find-q two-point, 1 mask, --one-copy", running, "find-q", base, fine, "-p", 0.99, "--objective",
        "two-point", "--masks", 1, "--text", text, "--out", folder / "q.json", "--one-copy",
        "--json")  # fmt: skip
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "safetensors")}
    report = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(),
              "versions": versions, "dtype": "bfloat16", "commands": rows}  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
