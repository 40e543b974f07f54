"""Greedy decoding: time to first token and tokens per second, compared with `transformers` in PyTorch.

    python benchmarks/decode.py --model SMOLLM2      # see experiments/smollm2.py

Same weights, prompts, batch and number of tokens; rounds are interleaved; both give the same tokens. Without
--model: random weights of SmolLM2-135M's shape. Compilation and the first run are excluded.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

import darex_jax as dx
from darex_jax.models import init_model, read_model_config

SMOLLM2 = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "hidden_act": "silu", "max_position_embeddings": 8192, "initializer_range": 0.02, "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0, "tie_word_embeddings": True,
}  # fmt: skip


def seconds_of(function: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face directory")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    options = parser.parse_args()
    path = options.model
    if path is None:
        path = Path(tempfile.mkdtemp())
        fresh, weights = init_model(read_model_config(SMOLLM2), jax.random.key(0))
        dx.save_params(path, weights, fresh.config.to_hf(), overwrite=True)
    model, params = dx.load_model(path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rows: dict[str, dict[str, float]] = {}
    for batch in options.batches:
        ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (batch, options.prompt))
        mask = np.ones_like(ids)
        arguments = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        fixed = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

        def ours(new: int, ids: Any = ids, mask: Any = mask) -> Any:
            return dx.generate(model, params, ids, mask, max_new_tokens=new)

        def theirs(new: int, arguments: Any = arguments, fixed: Any = fixed) -> Any:
            with torch.inference_mode():
                return peer.generate(**arguments, max_new_tokens=new, min_new_tokens=new, **fixed)

        same = (np.asarray(ours(options.new)) == theirs(options.new)[:, options.prompt :].numpy()).mean()
        ours(1)
        timed: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for name, run in (("darex_jax", ours), ("transformers", theirs)):
                first = seconds_of(lambda run=run: run(1))
                whole = seconds_of(lambda run=run: run(options.new))
                timed.setdefault(f"{name}, first token, s", []).append(first)
                speed = batch * (options.new - 1) / max(whole - first, 1e-9)
                timed.setdefault(f"{name}, tokens/s", []).append(speed)
        print(f"batch {batch}: {options.prompt} prompt tokens, {options.new} new; {same:.1%} of tokens alike")
        for name, values in timed.items():
            row = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            rows[f"batch {batch}, {name}"] = row
            print(f"  {name:28} {row['median']:8.2f}  ({row['min']:.2f}, {row['max']:.2f})")
        rows[f"batch {batch}, tokens alike"] = {"share": float(same)}
    if options.out:
        report = {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "versions": {"jax": jax.__version__, "torch": torch.__version__,
                         "transformers": transformers.__version__},
            "model": "random weights" if options.model is None else options.model.name,
            "prompt": options.prompt, "new": options.new, "rounds": options.rounds, "rows": rows,
        }  # fmt: skip
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
