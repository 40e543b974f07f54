"""Prunes, applies and generates with real decoder weights: SmolLM2-135M with an artificial delta, at 0.9.

    python experiments/smollm2.py SMOLLM2
    python experiments/smollm2_delta.py SMOLLM2

The "fine-tuned" model is the base plus noise of 2 % of each matrix's standard deviation. Every step runs the
`darex` command. Writes `results/smollm2_delta.json`: sizes, seconds and the texts.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import darex_jax as dx
from darex_jax.core.scope import family_scope
from darex_jax.core.tree import leaf_key, map_named
from darex_jax.files.checkpoint import read_config

PROMPT = "Explain in one sentence why the sky is blue."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2_delta"))
    options = parser.parse_args()
    base, fine = options.model, options.runs / "fine-tuned"
    delta, restored = options.runs / "delta.safetensors", options.runs / "restored"
    in_scope = family_scope("llama")

    def moved(name: str, leaf: jax.Array) -> jax.Array:
        if not in_scope(name):
            return leaf
        noise = jax.random.normal(leaf_key(jax.random.key(7), name), leaf.shape)
        return leaf + 0.02 * leaf.std() * noise

    params = map_named(moved, dx.load_params(base))
    dx.save_params(fine, params, read_config(base), companions_from=base, overwrite=True)

    def darex(*arguments: Any) -> dict[str, Any]:
        begun = time.monotonic()
        command = [sys.executable, "-m", "darex_jax", *map(str, arguments), "--json"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        return json.loads(done.stdout) | {"seconds": round(time.monotonic() - begun, 2)}

    text = (PROMPT, "--chat", "--max-new-tokens", 60)
    pruned = darex("prune", base, fine, delta, "--drop-rate", 0.9)
    applied = darex("apply", base, delta, restored, "--overwrite")
    texts = {
        "base": darex("generate", base, *text)["text"],
        "fine_tuned": darex("generate", fine, *text)["text"],
        "base_with_delta": darex("generate", base, *text, "--delta", delta)["text"],
        "restored": darex("generate", restored, *text)["text"],
    }
    results = {
        "prompt": PROMPT, "drop_rate": 0.9, "bytes": pruned["bytes"], "fine_bytes": pruned["fine_bytes"],
        "prune_seconds": pruned["seconds"], "apply_seconds": applied["seconds"], "texts": texts,
        "restored_is_base_with_delta": texts["restored"] == texts["base_with_delta"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {p: version(p) for p in ("jax", "flax", "transformers", "numpy")},
    }  # fmt: skip
    out = Path(__file__).parent / "results" / "smollm2_delta.json"
    out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
