"""Fine-tunes SmolLM2 on GSM8K with LoRA and prunes it both ways: the merged delta, and the factors A and B.

    python experiments/smollm2.py SMOLLM2
    python experiments/smollm2_lora.py SMOLLM2 --data-dir DIR     # less than an hour on 2 cores

200 training problems once, rank 8. A model of this size solves hardly any problems, so the results are the
loss of held-out solutions, the share of their tokens ranked first, and the output change. Writes
`results/smollm2_lora.json` and `.md`; an interrupted training resumes.
"""

import argparse
import json
import os
import platform
import textwrap
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

import darex_jax as dx
from darex_jax.evaluation.outputs import output_change, reference_outputs
from darex_jax.runs.train import train_run
from darex_jax.tasks import hold_out_tenth
from darex_jax.tasks.answers import answer_batches, encode_problems
from darex_jax.tasks.batching import load_tokenizer
from darex_jax.tasks.gsm8k import load_gsm8k
from darex_jax.training.causal_lm import answer_scores
from darex_jax.training.loop import Recipe
from darex_jax.training.record import read_metrics

RESULTS = Path(__file__).parent / "results"
RECIPE = Recipe(learning_rate=1e-3, epochs=1.0, batch_size=8)
OPTIONS = {"task": "gsm8k", "limit": 200, "validation_limit": 16, "lora_rank": 8, "checkpoint_every": 5}
DROP_RATES, SEEDS = (0.5, 0.9, 0.99), (0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2_lora"))
    options = parser.parse_args()
    out = options.runs / "adapter"
    if not out.exists():
        train_run(
            options.base,
            out,
            RECIPE,
            **OPTIONS,
            data_dir=options.data_dir,
            say=print,
            on_step=lambda n, line: print(line, flush=True),
        )
    config, adapter, _ = dx.load_adapter(out)
    scales = config.scales(adapter)
    model, base = dx.load_model(options.base)
    tokenizer = load_tokenizer(options.base)
    problems = load_gsm8k("train", options.data_dir)
    held_out = [problems[i] for i in hold_out_tenth(len(problems))[1][:16]]
    encoded = encode_problems(tokenizer, held_out)
    batches = list(answer_batches(encoded, 8, 0, 0))
    delta = dx.adapter_delta(adapter, scales)
    references = reference_outputs(model, dx.apply_delta(base, delta), batches)

    def measured(name: str, params) -> dict[str, float]:
        scores = answer_scores(model, params, batches)
        change = output_change(model, params, batches, references)
        print(f"{name}: loss {scores.loss:.4f}, tokens {scores.tokens:.4f}, change {change:.4f}", flush=True)
        return {"loss": scores.loss, "tokens": scores.tokens, "change": change}

    lines = read_metrics(out.with_name("adapter.run") / "metrics.jsonl")
    results = {
        "steps": len(lines),
        "losses": [line["loss"] for line in lines],
        "delta_rms": lines[-1]["delta_rms"],
        "delta_max": lines[-1]["delta_max"],
        "adapter_bytes": (out / "adapter_model.safetensors").stat().st_size,
        "base": measured("base", base),
        "fine_tuned": measured("fine-tuned", dx.apply_delta(base, delta)),
        "pruned": [],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {p: version(p) for p in ("jax", "flax", "optax", "numpy")},
    }
    for drop_rate in DROP_RATES:
        for seed in SEEDS:
            key = jax.random.key(seed)
            ways = {
                "merged delta": dx.prune(key, delta, drop_rate),
                "factors": dx.adapter_delta(dx.prune(key, adapter, drop_rate), scales),
            }
            for way, pruned in ways.items():
                row = measured(f"{way}, {drop_rate}, seed {seed}", dx.apply_delta(base, pruned))
                results["pruned"].append({"way": way, "drop_rate": drop_rate, "seed": seed} | row)
    (RESULTS / "smollm2_lora.json").write_text(json.dumps(results, indent=2) + "\n")
    write_table(results)


def write_table(results) -> None:
    losses = results["losses"]
    text = (
        f"Rank 8 on q_proj and v_proj, 200 problems once in {results['steps']} steps of 8; training loss "
        f"{np.mean(losses[:5]):.3f} over the first five steps, {np.mean(losses[-5:]):.3f} over the last. "
        f"Delta: root mean square {results['delta_rms']:.2e}, largest {results['delta_max']:.2e}. On 16 "
        "held-out problems: loss of a solution's tokens, share of them ranked first, mean squared change of "
        "the fine-tuned model's top five logits; DARE, the mean of two masks. Made by "
        "`python experiments/smollm2_lora.py SMOLLM2 --data-dir DIR`; machine and versions stand in the JSON "
        "file beside this one."
    )
    lines = [
        "# A LoRA fine-tune of SmolLM2-135M on GSM8K, pruned both ways",
        "",
        *textwrap.wrap(text, 108),
        "",
        "| model | loss | tokens ranked first | output change |",
        "| --- | --- | --- | --- |",
    ]
    rows = [("base", [results["base"]]), ("fine-tuned", [results["fine_tuned"]])]
    for way in ("merged delta", "factors"):
        for drop_rate in DROP_RATES:
            found = [r for r in results["pruned"] if (r["way"], r["drop_rate"]) == (way, drop_rate)]
            rows.append((f"{way} pruned at {drop_rate}", found))
    for name, found in rows:
        means = [np.mean([r[key] for r in found]) for key in ("loss", "tokens", "change")]
        lines.append(f"| {name} | {means[0]:.4f} | {means[1]:.4f} | {means[2]:.4f} |")
    (RESULTS / "smollm2_lora.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
