"""MiniLM on real GLUE tasks: fine-tune, prune with DARE and DAREx-q at 0.9, 0.99, 0.999, four masks.

    python experiments/glue_minilm.py --data-dir DIR --tasks sst2 mrpc cola

Each finished task leaves `results/glue_minilm_TASK.json`, and a task that has one is not run again: a stop
loses at most the task under way. `results/glue_minilm.md` is the table of all that are there.
"""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np

from darex_jax.runs.demo import demo_weights, run_demo
from darex_jax.tasks import load_task

RESULTS = Path(__file__).parent / "results"
# Steps of 32 examples and learning rate: about what 2 slow cores do in the better part of an hour each.
RECIPES = {"sst2": (1500, 3e-4), "mrpc": (345, 2e-4), "cola": (800, 2e-4), "stsb": (540, 2e-4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with a folder of parquet files per task")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "mrpc", "cola"], choices=list(RECIPES))
    parser.add_argument("--runs", type=Path, default=Path("runs/glue_minilm"))
    options = parser.parse_args()
    for task in options.tasks:
        file = RESULTS / f"glue_minilm_{task}.json"
        if file.exists():
            add_constant(file, options.data_dir)
            continue
        steps, learning_rate = RECIPES[task]
        results = run_demo(
            demo_weights(),
            options.runs / task,
            task_name=task,
            data_dir=options.data_dir,
            steps=steps,
            learning_rate=learning_rate,
            batch_size=32,
            seed=0,
            limit=1500,
            drop_rates=(0.9, 0.99, 0.999),
            say=lambda line, task=task: print(f"{task}: {line}", flush=True),
            on_step=lambda r: print(f"  {r.step} {r.loss:.4f}", flush=True) if r.step % 50 == 0 else None,
        )
        results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
        results["versions"] = {p: version(p) for p in ("jax", "flax", "optax", "numpy")}
        for row in results["rates"]:  # the paths are of the machine it ran on
            row.pop("artifact")
            row.pop("restored")
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(results, indent=2) + "\n")
        add_constant(file, options.data_dir)
    write_table()


def add_constant(file: Path, data_dir: Path | None) -> None:
    """What the best constant answer scores on the test set: the metric of a model that learnt nothing."""
    results = json.loads(file.read_text())
    task = load_task(results["task"], data_dir)
    labels = task.test.labels[: results["test_examples"]]
    answers = np.eye(task.num_labels)[:, None].repeat(len(labels), axis=1)
    results["constant"] = max(task.metric(logits, labels) for logits in answers)
    file.write_text(json.dumps(results, indent=2) + "\n")


def write_table() -> None:
    lines = [
        "# MiniLM-L6 on GLUE: DARE and DAREx-q",
        "",
        "Mean ± standard deviation over four masks (seeds 0-3) on the official validation split (at most",
        "1,500 rows); q by labels is searched on a tenth of the training split with one mask, q by outputs",
        "on 50 training sentences with four. Steps are of 32 examples; `constant` is what the best constant",
        "answer scores. Made by `python experiments/glue_minilm.py --data-dir DIR`.",
        "",
        "| task, metric | steps, rate | fine-tuned | constant | drop rate | DARE | q by labels "
        "| q by outputs | size |",
        "|" + " --- |" * 9,
    ]
    for file in sorted(RESULTS.glob("glue_minilm_*.json")):
        r = json.loads(file.read_text())
        run = [
            f"{r['task']}, {r['metric']}",
            f"{r['steps']}, {r['learning_rate']:g}",
            f"{r['fine_tuned']:.3f}",
            f"{r['constant']:.3f}",
        ]
        for row in r["rates"]:
            cells = [row[method] for method in ("dare", "q_v", "q_e")]
            cells = [f"{c['mean']:.3f} ± {c['std']:.3f} (q {c['q']:.4g})" for c in cells]
            size = f"1/{r['fine_bytes'] / row['artifact_bytes']:.0f}"
            lines.append(f"| {' | '.join([*run, str(row['drop_rate']), *cells, size])} |")
    lines += ["", "Machine and versions stand in the JSON files beside this one.", ""]
    (RESULTS / "glue_minilm.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
