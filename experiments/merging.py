"""MiniLM fine-tuned on several tasks, merged: every task's metric by each method, DARE against DAREx-q.

    python experiments/adamr_glue.py --data-dir DIR --tasks sst2 mrpc stsb --optimizers adamw --train-only
    python experiments/merging.py --data-dir DIR

Pairs of fine-tunes and all three. Each delta has the weight 1 / number of deltas where they are summed, 1
where signs are elected. q of DAREx is chosen in two points, for each delta alone, on 50 of its task's
training texts without labels. A row of `results/merging.jsonl` is not run again; rows of other fine-tunes are
dropped. `results/merging.md` is the table.
"""

import argparse
import json
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import numpy as np
from adamr_common import machine

import darex_jax as dx
from darex_jax.choosing.choice import Choice
from darex_jax.choosing.choose import choose_q
from darex_jax.choosing.pair import load_pair, split_in_scope
from darex_jax.core.tree import flatten_names
from darex_jax.evaluation.classification import predict
from darex_jax.files.manifest import params_digest
from darex_jax.merging.table import MERGES
from darex_jax.runs.demo import demo_weights
from darex_jax.tasks import load_task
from darex_jax.tasks.batching import encode, evaluation_batches, load_tokenizer
from darex_jax.tasks.source import Source

RESULTS = Path(__file__).parent / "results"
TASKS = ("sst2", "mrpc", "stsb")
SEEDS = (0, 1, 2, 3)
WAYS: dict[str, tuple[str, dict[str, Any]]] = {  # what a row is called -> method, its options
    "task arithmetic": ("linear", {}),
    "TIES, 0.8": ("ties", {"drop_rate": 0.8}),
    "Breadcrumbs, 0.8": ("breadcrumbs", {"drop_rate": 0.8}),
    "DELLA, 0.8": ("della", {"drop_rate": 0.8}),
    **{
        f"{name}{' + ' + how if how != 'linear' else ''}, {rate}": (f"dare-{how}", {"drop_rate": rate} | q)
        for rate in (0.9, 0.99)
        for how in ("linear", "ties")
        for name, q in (("DARE", {}), ("DAREx-q", {"q": "two-point"}))
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with a folder of parquet files per task")
    parser.add_argument("--runs", type=Path, default=Path("runs/adamr_glue"))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--table", action="store_true", help="write the table from what is there")
    options = parser.parse_args()
    if not options.table:
        run(options.data_dir, options.runs, options.ways)
    write_table()


def run(data_dir: Path | None, runs: Path, ways: list[str]) -> None:
    base, loaded, digests = demo_weights(), {}, {}
    for name in TASKS:
        fine = runs / f"{name}_adamw" / "fine-tuned"
        task, (model, params, in_base) = load_task(name, data_dir), load_pair(base, fine)
        test = encode(load_tokenizer(fine), task.test.select(slice(500)))
        start, delta = split_in_scope(params, in_base)
        loaded[name] = (fine, task, model, start, delta, test, evaluation_batches(test))
        digests[name] = params_digest(params)
    rows = [row for row in read() if all(digests[name] == row["digests"][name] for name in row["tasks"])]
    done = {(row["way"], tuple(row["tasks"])) for row in rows}
    known: dict[tuple[str, float], float] = {}

    def q_of(name: str, drop_rate: float) -> float:
        if (name, drop_rate) not in known:
            source = Source(task=name, data_dir=data_dir, limit=50)
            found = choose_q(base, loaded[name][0], drop_rate, Choice(objective="two-point"), source)
            known[name, drop_rate] = found["q"]
        return known[name, drop_rate]

    def metrics(names: tuple[str, ...], merged: Any) -> dict[str, float]:
        found = {}
        for name in names:
            _, task, model, start, _, test, batches = loaded[name]
            params = dx.apply_delta(start, flatten_names(merged))
            found[name] = task.metric(predict(model, params, batches), test.labels)
        return found

    for names in (*((name,) for name in TASKS), *combinations(TASKS, 2), TASKS):
        for way in ways if len(names) > 1 else ["task arithmetic"]:
            if (way, names) in done:
                continue
            begun, (method, told) = time.monotonic(), WAYS[way]
            own = dict(told)
            if own.pop("q", None):
                own["q"] = [q_of(name, own["drop_rate"]) for name in names]
            weight = 1.0 if MERGES[method].elects else 1.0 / len(names)
            deltas = [loaded[name][4] for name in names]
            seen = []
            for seed in SEEDS if "key" in MERGES[method].takes else (0,):
                key = {"key": jax.random.key(seed)} if "key" in MERGES[method].takes else {}
                merged = dx.merge(deltas, method, weights=[weight] * len(names), **own, **key)
                seen.append(metrics(names, merged))
            rows.append({
                "way": way, "tasks": list(names), "q": own.get("q"), "weight": weight,
                "metrics": {name: [s[name] for s in seen] for name in names},
                "digests": {name: digests[name] for name in names},
                "seconds": round(time.monotonic() - begun, 1), **machine(),
            })  # fmt: skip
            (RESULTS / "merging.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            said = ", ".join(f"{n} {np.mean(v):.3f}" for n, v in rows[-1]["metrics"].items())
            print(f"{time.strftime('%H:%M:%S')} {way}: {said}", flush=True)
            write_table()


def read() -> list[dict[str, Any]]:
    file = RESULTS / "merging.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_table() -> None:
    rows = read()
    alone = {
        row["tasks"][0]: np.mean(row["metrics"][row["tasks"][0]]) for row in rows if len(row["tasks"]) == 1
    }
    lines = [
        "# Merging fine-tunes",
        "",
        "MiniLM-L6 fine-tuned with AdamW on each task, merged, each task evaluated with its own head: SST-2",
        "accuracy, MRPC the mean of accuracy and F1, STS-B that of Pearson and Spearman, on the first 500",
        "examples of the official validation split (MRPC: 408); random ways mean ± standard deviation over",
        "four masks. `kept` is the mean over tasks of the metric as a share of the fine-tuned model's own.",
        "The number after a way is its drop rate. Weights: 1 / number of deltas where they are summed,",
        "1 where signs are elected. q in two points on 50 training texts a task, without labels. Made by",
        "`python experiments/merging.py --data-dir DIR`. What is not there was not run.",
        "",
    ]
    for names in (*combinations(TASKS, 2), TASKS):
        own = [row for row in rows if row["tasks"] == list(names)]
        if not own:
            continue
        lines += [
            f"## {' + '.join(names)}",
            "",
            "| way | " + " | ".join(names) + " | kept | q |",
            "|" + " --- |" * (len(names) + 3),
            "| (each alone) | " + " | ".join(f"{alone[n]:.3f}" for n in names) + " | 1 | |",
        ]
        for row in own:
            cells = [cell(row["metrics"][name]) for name in names]
            kept = np.mean([np.mean(row["metrics"][name]) / alone[name] for name in names])
            q = ", ".join(f"{value:.3g}" for value in row["q"]) if row["q"] else ""
            lines.append(f"| {row['way']} | " + " | ".join(cells) + f" | {kept:.3f} | {q} |")
        lines.append("")
    (RESULTS / "merging.md").write_text("\n".join(lines))


def cell(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
