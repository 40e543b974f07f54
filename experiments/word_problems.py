"""A tiny Llama taught word problems from nothing, then its delta pruned: accuracy before and after.

    python experiments/word_problems.py            # some minutes on 2 cores

The base is the model as it was initialised, so the delta is all it learnt. Writes
`results/word_problems.json`; the models, the artifacts and every answer lie under --runs.
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import jax

import darex_jax as dx
from darex_jax.core.scope import choose_scope
from darex_jax.evaluation.gsm8k import evaluate_gsm8k
from darex_jax.evaluation.text import complete
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.manifest import params_digest
from darex_jax.files.prune import Job, prune_checkpoints
from darex_jax.models import init_model, read_model_config
from darex_jax.tasks.answers import encode_problems
from darex_jax.tasks.word_problems import word_problem_tokenizer, word_problems
from darex_jax.training.causal_lm import train_answers
from darex_jax.training.loop import Recipe

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/word_problems"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--difficulty", type=int, default=1, help="most steps of a problem")
    parser.add_argument("--limit", type=int, default=200, help="test problems")
    options = parser.parse_args()
    tokenizer = word_problem_tokenizer()
    problems = word_problems(seed=0, max_steps=options.difficulty)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": len(tokenizer),
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 512,
        "initializer_range": 0.05, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    model, fresh = init_model(read_model_config(config), jax.random.key(0))
    base, fine = options.runs / "base", options.runs / "fine-tuned"
    begun = time.monotonic()
    if not fine.exists():
        dx.save_params(base, fresh, model.config.to_hf(), overwrite=True)
        tokenizer.save_pretrained(base)
        examples = encode_problems(tokenizer, problems.train)
        params, _ = train_answers(
            model,
            fresh,
            examples,
            Recipe(learning_rate=2e-3, batch_size=32, steps=options.steps),
            key=jax.random.key(1),
            on_step=lambda r: print(r.step, f"{r.loss:.4f}", flush=True) if r.step % 50 == 0 else None,
        )
        dx.save_params(fine, params, model.config.to_hf(), companions_from=base)
    seconds = time.monotonic() - begun

    def accuracy(name: str, path: Path, delta: Path | None = None) -> dict[str, float]:
        loaded, params = dx.load_model(path, delta=delta)
        result = evaluate_gsm8k(
            problems.test[: options.limit],
            lambda prompts: complete(
                loaded, params, tokenizer, prompts, max_new_tokens=96,
                eos_token_id=tokenizer.eos_token_id, batch_size=50,
            ),
            options.runs / f"{name}.jsonl",
            {"model": params_digest(params)},
            batch_size=50,
        )  # fmt: skip
        print(name, result, flush=True)
        return {key: result[key] for key in ("metric", "standard_error", "n")}

    results = {
        "steps": options.steps, "difficulty": options.difficulty, "training_seconds": round(seconds, 1),
        "parameters": sum(x.size for x in jax.tree.leaves(fresh)),
        "base": accuracy("base", base), "fine_tuned": accuracy("fine-tuned", fine), "pruned": {},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {p: version(p) for p in ("jax", "flax", "optax", "numpy")},
    }  # fmt: skip
    for drop_rate in (0.1, 0.5, 0.9):
        delta = options.runs / f"delta-{drop_rate}.safetensors"
        with Checkpoint(base) as b, Checkpoint(fine) as f:
            prune_checkpoints(Job(b, f, delta, choose_scope("llama")), key=(0, 0), drop_rate=drop_rate)
        results["pruned"][str(drop_rate)] = accuracy(f"dare-{drop_rate}", base, delta)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "word_problems.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
