"""AdamW against AdamR on GLUE with MiniLM: the same budget each, then DARE and DAREx-q on each delta.

    python experiments/adamr_glue.py --data-dir DIR --tasks sst2 mrpc

Each finished pair of task and optimizer leaves `results/adamr_glue/TASK_OPTIMIZER.json` and is not run again,
and a training under way goes on from its last checkpoint: a stop loses some minutes. The fine-tuned models
stay under `runs/adamr_glue/TASK_OPTIMIZER/fine-tuned`. `results/adamr_glue.md` is the table of all results.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np
from adamr_common import DROP_RATES, HEADINGS, authors_search, machine, optimizers, scored_row, table_rows

from darex_jax.choosing.pair import Pair, load_pair, split_in_scope
from darex_jax.choosing.table import CALIBRATION_SIZE
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.evaluation.classification import predict
from darex_jax.evaluation.objectives import label_objective, output_objective
from darex_jax.files.checkpoint import save_params
from darex_jax.files.manifest import params_digest
from darex_jax.files.model import load_model
from darex_jax.runs.demo import demo_weights
from darex_jax.tasks import load_task
from darex_jax.tasks.batching import encode, evaluation_batches, load_tokenizer
from darex_jax.training.checkpoints import Checkpoints
from darex_jax.training.fine_tune import classifier_for, fine_tune
from darex_jax.training.loop import Recipe, delta_size

RESULTS = Path(__file__).parent / "results" / "adamr_glue"
BUDGETS = {"sst2": (800, 3e-4), "mrpc": (345, 2e-4), "stsb": (540, 2e-4), "cola": (800, 2e-4)}
OPTIMIZERS = optimizers(l1="0.00002")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with a folder of parquet files per task")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "mrpc"], choices=list(BUDGETS))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--runs", type=Path, default=Path("runs/adamr_glue"))
    parser.add_argument("--train-only", action="store_true", help="leave the fine-tuned models, no result")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="with --train-only, of trainings")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for task in options.tasks:
        for name in options.optimizers:
            file = RESULTS / f"{task}_{name}.json"
            if options.train_only:
                for seed in options.seeds:
                    fine_tuned(task, name, options.data_dir, options.runs / run_name(task, name, seed), seed)
            elif not file.exists():
                results = run(task, name, options.data_dir, options.runs / f"{task}_{name}")
                file.write_text(json.dumps(results, indent=2) + "\n")
                write_table()


def run_name(task: str, optimizer: str, seed: int = 0) -> str:
    """What a fine-tune's folder and results are called."""
    return f"{task}_{optimizer}" + (f"_{seed}" if seed else "")


def fine_tuned(task_name: str, name: str, data_dir: Path | None, runs: Path, seed: int = 0) -> Path:
    """The directory of the fine-tuned model, trained if it is not there; goes on after a stop."""
    out = runs / "fine-tuned"
    if (out / "config.json").exists():
        return out
    steps, learning_rate = BUDGETS[task_name]
    recipe = Recipe(learning_rate=learning_rate, steps=steps, **OPTIMIZERS[name])
    task = load_task(task_name, data_dir)
    train = encode(load_tokenizer(demo_weights()), task.train)
    body, base = load_model(demo_weights())
    key = jax.random.key(seed)
    model, fresh = classifier_for(task, body, base, jax.random.fold_in(key, 0))
    pretrained = {n: x for n, x in flatten_names(fresh).items() if not n.startswith("classifier.")}

    def on_step(record) -> None:
        if record.step % 50 == 0 or record.step + 1 == steps:
            size = f"loss {record.loss:.4f} delta rms {record.delta_rms:.3e}"
            print(f"{time.strftime('%H:%M:%S')} {task_name} {name}: step {record.step} {size}", flush=True)

    fine, _ = fine_tune(
        model,
        fresh,
        train,
        recipe,
        key=jax.random.fold_in(key, 1),
        pretrained=unflatten_names(pretrained),
        checkpoints=Checkpoints(runs, every=100, keep=1),
        on_step=on_step,
    )
    save_params(out, fine, model.config.to_hf(), companions_from=demo_weights(), overwrite=True)
    return out


def run(task_name: str, name: str, data_dir: Path | None, runs: Path) -> dict[str, object]:
    steps, learning_rate = BUDGETS[task_name]
    task = load_task(task_name, data_dir)
    tokenizer = load_tokenizer(demo_weights())
    validation = encode(tokenizer, task.validation.select(slice(200)))
    test = encode(tokenizer, task.test.select(slice(500)))
    some = encode(tokenizer, task.train.select(slice(CALIBRATION_SIZE)))
    batches = evaluation_batches(test)
    begun = time.monotonic()
    model, fine, pretrained = load_pair(demo_weights(), fine_tuned(task_name, name, data_dir, runs))
    seconds = time.monotonic() - begun

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {task_name} {name}: {text}", flush=True)

    def score(params) -> float:
        return task.metric(predict(model, params, batches), test.labels)

    rms, largest = map(float, delta_size(fine, pretrained))
    results = {
        "task": task_name, "metric": task.metric_name, "optimizer": name, "recipe": OPTIMIZERS[name],
        "steps": steps, "batch_size": Recipe.batch_size, "learning_rate": learning_rate,
        "test_examples": len(test), "validation_examples": len(validation), "fine_tuned": score(fine),
        "constant": constant(task, test.labels), "delta_rms": rms, "delta_max": largest,
        "digest": params_digest(fine), "seconds_of_the_last_part": round(seconds, 1), "rates": [],
        **machine(),
    }  # fmt: skip
    say(f"test {task.metric_name} {results['fine_tuned']:.4f}, delta rms {rms:.3e}, largest {largest:.3e}")
    start, delta = split_in_scope(fine, pretrained)
    by_labels = label_objective(model, task, evaluation_batches(validation))
    by_outputs = output_objective(model, fine, evaluation_batches(some))
    for drop_rate in DROP_RATES:
        pair = Pair(model, fine, start, delta, drop_rate)
        q_v = authors_search(by_labels, pair, pair.models[:1])
        q_e = authors_search(by_outputs, pair, pair.models)
        row = scored_row(pair, q_v.q, q_e.q, score)
        results["rates"].append(row)
        say(", ".join(f"{m} {row[m]['mean']:.3f}" for m in ("dare", "q_v", "q_e")) + f" at {drop_rate}")
    return results


def constant(task, labels) -> float:
    """What the best constant answer scores: the metric of a model that learnt nothing."""
    if task.kind == "regression":
        return 0.0
    answers = np.eye(task.num_labels)[:, None].repeat(len(labels), axis=1)
    return max(task.metric(logits, labels) for logits in answers)


def write_table() -> None:
    lines = [
        "# AdamW and AdamR on GLUE with MiniLM-L6, then DARE and DAREx-q",
        "",
        "The same steps of 32 examples, learning rate and seed for each optimizer of a task. Mean ± standard",
        "deviation over four masks (seeds 0-3) on the official validation split (its first 500 rows); q by",
        "labels is searched on 200 rows of a tenth of the training split with one mask, q by outputs",
        "on 50 training sentences with four. `constant` is what the best constant answer scores. A row is",
        "made by `python experiments/adamr_glue.py --data-dir DIR --tasks TASK --optimizers OPTIMIZER`;",
        "machine, versions and recipes stand in the JSON files under `adamr_glue/`. `gain kept`: of what the",
        "fine-tuned model gains over the constant answer, what DARE keeps, and what the better q keeps.",
        "",
    ]
    for task in BUDGETS:
        found = [RESULTS / f"{task}_{name}.json" for name in OPTIMIZERS]
        results = [json.loads(file.read_text()) for file in found if file.exists()]
        if not results:
            continue
        first = results[0]
        lines += [
            f"## {task}: {first['metric']}, {first['steps']} steps, "
            f"learning rate {first['learning_rate']:g}, constant {first['constant']:.3f}",
            "",
            *HEADINGS,
            *table_rows(results, "constant"),
        ]
        lines.append("")
    (RESULTS.parent / "adamr_glue.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
