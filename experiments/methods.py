"""Every method at the same bytes: the metric of restored models against the size of the file on disk.

    python experiments/adamr_glue.py --data-dir DIR --tasks sst2 mrpc stsb --train-only    # the fine-tunes
    python experiments/methods.py --data-dir DIR

Bytes are those of the whole file: parts, task head, configuration, fingerprint, recipe. Each finished cell, a
fine-tune, method and budget, is a line of `results/methods/TASK_OPTIMIZER.jsonl` and is not run again; lines
of another fine-tune (training on another kind of processor ends at other bits) are dropped.
`results/methods.md` is the table, `results/methods.png` the picture. Random methods: four masks (seeds 0-3),
mean and standard deviation.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from adamr_common import machine
from adamr_glue import BUDGETS, OPTIMIZERS, run_name

from darex_jax.choosing.choice import Choice
from darex_jax.choosing.choose import choose_q
from darex_jax.core.errors import DarexError
from darex_jax.core.scope import choose_scope
from darex_jax.evaluation.classification import predict
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.manifest import params_digest
from darex_jax.files.match import match_checkpoints
from darex_jax.files.model import load_model
from darex_jax.files.prune import Job
from darex_jax.methods.budget import Budget
from darex_jax.methods.table import METHODS
from darex_jax.runs.demo import demo_weights
from darex_jax.runs.evidence import gather
from darex_jax.runs.prune import prune_by
from darex_jax.tasks import load_task
from darex_jax.tasks.batching import encode, evaluation_batches, load_tokenizer
from darex_jax.tasks.source import Source

RESULTS = Path(__file__).parent / "results" / "methods"
BYTES = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)  # a parameter
RIVALS = Path(__file__).parent / "results" / "rivals"
SEEDS = (0, 1, 2, 3)
CALIBRATION = 50  # training texts for statistics of inputs and for q
TRAINING, STEPS = 10_000, 300  # at most so many training texts, of 16 a step, for distilled
WAYS = {  # what a row is called -> method of the table, its options
    "DARE": ("dare", {"dtype": "bfloat16"}),
    "DAREx-q": ("dare", {"dtype": "bfloat16", "q": "two-point"}),
    "DARE, 4 bits": ("dare", {"bits": 4, "q": "two-point"}),
    "DARE, signs": ("dare", {"bits": 1, "q": "two-point"}),
    "MP": ("magnitude", {}),
    "MP, 4 bits": ("magnitude", {"bits": 4}),
    "WANDA": ("wanda", {}),
    "re-solved": ("resolved", {}),
    "structural": ("structured", {}),
    "sign": ("sign", {}),
    "sign, then SVD": ("sign-svd", {}),
    "SVD": ("svd", {}),
    "SVD, 4 bits": ("svd", {"bits": 4}),
    "distilled": ("distilled", {"bits": 4}),
    "allocated, 4 bits": ("allocated", {"bits": 4}),
    "distilled, allocated": ("distilled", {"bits": 4, "support": "allocated"}),
    "distilled, largest": ("distilled", {"bits": 4, "support": "largest"}),
    "distilled, random": ("distilled", {"bits": 4, "support": "random"}),
}

FRONTIER = (  # of these, the ones that are shown at few bytes
    "DARE", "DAREx-q", "DARE, 4 bits", "re-solved", "SVD, 4 bits", "allocated, 4 bits", "distilled",
    "distilled, allocated", "distilled, largest", "distilled, random",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with a folder of parquet files per task")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "mrpc", "stsb"], choices=list(BUDGETS))
    names = ["adamw", "adamr-l2-0.01", "adamr-l1-0.00002"]
    parser.add_argument("--optimizers", nargs="+", default=names, choices=list(OPTIMIZERS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--bytes", nargs="+", type=float, default=BYTES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the trainings")
    parser.add_argument("--runs", type=Path, default=Path("runs/adamr_glue"))
    parser.add_argument("--table", action="store_true", help="write table and picture from what is there")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not options.table:
        for optimizer in options.optimizers:
            for task in options.tasks:
                for seed in options.seeds:
                    fine = options.runs / run_name(task, optimizer, seed) / "fine-tuned"
                    file = RESULTS / f"{run_name(task, optimizer, seed)}.jsonl"
                    run(task, optimizer, options.data_dir, fine, file, options.ways, options.bytes)
    write_table()
    plot()


def run(
    task_name: str,
    optimizer: str,
    data_dir: Path | None,
    fine: Path,
    file: Path,
    ways: list[str],
    sizes: list[float],
) -> None:
    base = demo_weights()
    task = load_task(task_name, data_dir)
    test = encode(load_tokenizer(fine), task.test.select(slice(500)))
    batches = evaluation_batches(test)
    model, params = load_model(fine)
    digest = params_digest(params)
    rows = [row for row in read(file) if row["digest"] == digest]
    reference = predict(model, params, batches)

    def measured(path: Path) -> dict[str, float]:
        logits = predict(*load_model(base, delta=path), batches)
        return {"metric": task.metric(logits, test.labels), "agreement": agreement(logits, reference)}

    def note(row: dict) -> None:
        rows.append({"task": task_name, "optimizer": optimizer, "digest": digest, **row})
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        seen = f"{row['mean']:.3f} ± {row['std']:.3f}" if "mean" in row else row.get("why", "")
        print(
            f"{time.strftime('%H:%M:%S')} {task_name} {optimizer} {row.get('bytes', '')} "
            f"{row['way']}: {seen}",
            flush=True,
        )

    if not rows:
        note({
            "way": "fine-tuned", "mean": task.metric(reference, test.labels), "std": 0.0,
            "metric_name": task.metric_name, "test_examples": len(test), **machine(),
        })  # fmt: skip
    done = {(row["way"], row.get("bytes")) for row in rows}
    source = Source(task=task_name, data_dir=data_dir, limit=CALIBRATION)
    known: dict[tuple[str, ...], Any] = {}
    scope = choose_scope("bert")
    with Checkpoint(base) as b, Checkpoint(fine) as f:
        match = match_checkpoints(b, f, scope)
        entries = sum(f.tensors[name].info.size for name in match.pruned)
        for size in sizes:
            for way in ways:
                if (way, size) in done:
                    continue
                name, told = WAYS[way]
                begun, method = time.monotonic(), METHODS[name]
                options = dict(told)
                needs = method.needs_with(options.get("support"))
                if needs not in known:
                    texts = TRAINING if method.trains else CALIBRATION
                    some = Source(task=task_name, data_dir=data_dir, limit=texts)
                    known[needs] = gather(base, fine, some, needs, steps=STEPS)
                gathered = known[needs]
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "delta.safetensors"

                    job = Job(b, f, path, scope)
                    write = partial(prune_by, job, name, gathered=gathered, options=options)
                    way_of_q = options.pop("q", None)
                    choose = partial(chosen, base, fine, source, way_of_q) if way_of_q else None
                    try:
                        first = write(round(size * entries), seed=0, choose=choose)
                    except DarexError as error:
                        note({"way": way, "bytes": size, "why": str(error)})
                        continue
                    budget, options["q"] = Budget(**first.recipe.budget), first.recipe.options.get("q")
                    seen = [measured(path)]
                    for seed in SEEDS[1:] if method.random and not method.trains else ():
                        write(budget, seed=seed)
                        seen.append(measured(path))
                metrics = [s["metric"] for s in seen]
                note({
                    "way": way, "bytes": size, "file_bytes": first.file_bytes,
                    "mean": float(np.mean(metrics)), "metrics": metrics,
                    "std": float(np.std(metrics, ddof=1)) if len(metrics) > 1 else 0.0,
                    "agreement": float(np.mean([s["agreement"] for s in seen])),
                    "q": options["q"], "seconds": round(time.monotonic() - begun, 1),
                })  # fmt: skip
                write_table()


def chosen(base: Path, fine: Path, source: Source, objective: str, drop_rate: float) -> float:
    return choose_q(base, fine, drop_rate, Choice(objective=objective), source)["q"]


def agreement(logits: np.ndarray, reference: np.ndarray) -> float:
    """The share of equal predictions; with one output, the correlation of the scores."""
    if logits.shape[1] > 1:
        return float(np.mean(logits.argmax(-1) == reference.argmax(-1)))
    return float(np.corrcoef(logits[:, 0], reference[:, 0])[0, 1]) if np.std(logits) > 0 else 0.0


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def finished() -> list[tuple[str, str, list[dict]]]:
    found = []
    for optimizer in OPTIMIZERS:
        for task in BUDGETS:
            if rows := read(RESULTS / f"{task}_{optimizer}.jsonl"):
                found.append((task, optimizer, rows))
    return found


def write_table() -> None:
    lines = [
        "# Every method at the same bytes",
        "",
        "The metric of the model restored from the file, MiniLM-L6, on the first 500 examples of the",
        "official validation split, and in brackets its agreement with the fine-tuned model (the",
        "correlation of scores); random methods over four masks (seeds 0-3). The columns are bytes of",
        "the whole file divided by the parameters in scope; a file has at most that and, but for signs,",
        "at least 96 % of it. What is not there was not run. q is chosen in two points, statistics of",
        "inputs are seen, on 50 training texts without labels; distilled is trained on at most",
        f"{TRAINING:,} of them, without labels, {STEPS} steps of 16. Below 0.125 bytes a parameter signs",
        "do not fit. Made by `python experiments/methods.py --data-dir DIR`; every number, seconds,",
        "machine and versions stand in the JSON lines under `methods/`.",
        "",
    ]
    lines += [*frontier(), *winners(), *importance()]
    for task, optimizer, rows in finished():
        head = next(row for row in rows if row["way"] == "fine-tuned")
        title = f"## {task}, {optimizer}: {head['metric_name']} on {head['test_examples']}"
        cells = {(row["way"], row.get("bytes")): row for row in rows if "bytes" in row}
        sizes = [size for size in BYTES if any(s == size for _, s in cells)]
        lines += [
            f"{title}, fine-tuned {head['mean']:.3f}",
            "",
            "| method | " + " | ".join(f"{size:g}" for size in sizes) + " |",
            "|" + " --- |" * (len(sizes) + 1),
        ]
        best = {
            size: max((c["mean"] for (_, s), c in cells.items() if s == size and "mean" in c), default=0.0)
            for size in sizes
        }
        for way in [way for way in WAYS if any(w == way for w, _ in cells)]:
            texts = []
            for size in sizes:
                cell = cells.get((way, size))
                if cell is None or "mean" not in cell:
                    texts.append("" if cell is None else "-")
                    continue
                text = told(cell)
                text = f"**{text}**" if cell["mean"] >= best[size] - 1e-9 else text
                texts.append(f"{text} ({cell['agreement']:.3f})")
            lines.append(f"| {way} | " + " | ".join(texts) + " |")
        lines.append("")
    (RESULTS.parent / "methods.md").write_text("\n".join(lines))


def told(cell: dict) -> str:
    """The mean, and where there are several masks the deviation."""
    return f"{cell['mean']:.3f}" + (f" ± {cell['std']:.3f}" if len(cell["metrics"]) > 1 else "")


def frontier() -> list[str]:
    """How much of the metric is kept at few bytes, over the fine-tunes of each task by AdamW."""
    lines = [
        "## How few bytes",
        "",
        "Of the fine-tuned model's metric the share that is kept, AdamW's fine-tunes; where there are",
        "several, of different seeds, mean ± standard deviation over them (and their number). `labels`: as",
        "many bytes trained from the base on all labels (`python experiments/rivals.py`): LoRA of rank 1 on",
        "every linear layer, the values of a random subspace.",
        "",
    ]
    sizes = (0.02, 0.01, 0.005, 0.002, 0.001, 0.0005)
    shown = [way for way in WAYS if way in FRONTIER]
    for task in BUDGETS:
        kept: dict[tuple[str, float], list[float]] = {}
        for file in sorted(RESULTS.glob(f"{task}_adamw*.jsonl")):
            rows = read(file)
            whole = next(row["mean"] for row in rows if row["way"] == "fine-tuned")
            for row in rows:
                if "mean" in row and "bytes" in row:
                    kept.setdefault((row["way"], row["bytes"]), []).append(row["mean"] / whole)
        for row in read(RIVALS / f"{task}.jsonl"):
            whole = next(r["mean"] for r in read(RESULTS / f"{task}_adamw.jsonl") if r["way"] == "fine-tuned")
            per = row["file_bytes"] / row["entries"]
            size = min(sizes, key=lambda s: abs(np.log(s / per)))
            way = row["way"] + ("" if row["size"] else f", {row['bits'] or 16} bits")
            kept.setdefault((f"{way} ({row['file_bytes'] / 1000:.0f} kB)", size), []).append(
                row["mean"] / whole
            )
        if not kept:
            continue
        ways = [way for way in shown if any(w == way for w, _ in kept)]
        ways += [way for way, _ in kept if way.startswith("labels") and way not in ways]
        lines += [f"| {task} | " + " | ".join(f"{size:g}" for size in sizes) + " |", "|" + " --- |" * 7]
        for way in ways:
            cells = [kept.get((way, size)) for size in sizes]
            lines.append(f"| {way} | " + " | ".join("" if c is None else share(c) for c in cells) + " |")
        lines.append("")
    return lines


def share(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1%}"
    return f"{np.mean(values):.1%} ± {np.std(values, ddof=1):.1%} ({len(values)})"


def winners() -> list[str]:
    """Which untrained way is best where, and which are within a deviation or 0.005 of it."""
    lines = [
        "## Who wins",
        "",
        "Of the ways without training the best, and in brackets those within 0.005 or one",
    ]
    lines += ["standard deviation of it.", ""]
    lines += ["| fine-tune | " + " | ".join(f"{size:g}" for size in BYTES[:6]) + " |", "|" + " --- |" * 7]
    for task, optimizer, rows in finished():
        texts = []
        for size in BYTES[:6]:
            cells = [r for r in rows if r.get("bytes") == size and "mean" in r]
            cells = [r for r in cells if not METHODS[WAYS[r["way"]][0]].trains]
            if not cells:
                texts.append("")
                continue
            top = max(cells, key=lambda r: r["mean"])
            near = [
                r["way"] for r in cells
                if r is not top and r["mean"] >= top["mean"] - max(0.005, top["std"], r["std"])
            ]  # fmt: skip
            texts.append(f"{top['way']} {top['mean']:.3f}" + (f" ({'; '.join(near)})" if near else ""))
        lines.append(f"| {task}, {optimizer} | " + " | ".join(texts) + " |")
    return [*lines, ""]


def importance() -> list[str]:
    """AdamR-L1 with importance-based pruning beside DAREx-q, which Table 6 of the paper does not have."""
    ways, sizes = ("DARE", "DAREx-q", "MP", "WANDA"), (0.1, 0.02, 0.01)
    lines = ["## AdamR-L1: importance and DAREx-q", ""]
    lines += ["The paper trains with L1 for importance-based pruning (its Table 6) and does not say what"]
    lines += ["DAREx-q does there. Beside AdamW, at three sizes:", ""]
    lines += [
        "| fine-tune | bytes a parameter | " + " | ".join(ways) + " |",
        "|" + " --- |" * (len(ways) + 2),
    ]
    for task, optimizer, rows in finished():
        if optimizer not in ("adamw", "adamr-l1-0.00002"):
            continue
        cells = {(r["way"], r.get("bytes")): r for r in rows if "mean" in r}
        for size in sizes:
            found = [cells.get((way, size)) for way in ways]
            if any(found):
                texts = ["" if c is None else told(c) for c in found]
                lines.append(f"| {task}, {optimizer} | {size:g} | " + " | ".join(texts) + " |")
    return [*lines, ""]


def plot() -> None:
    """A picture a fine-tune: the metric against bytes a parameter."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = finished()
    if not found:
        return
    tasks = list(dict.fromkeys(task for task, _, _ in found))
    optimizers = list(dict.fromkeys(optimizer for _, optimizer, _ in found))
    figure = Figure(figsize=(4.6 * len(tasks), 3.6 * len(optimizers)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(optimizers), len(tasks), squeeze=False)
    lines = {}
    for task, optimizer, rows in found:
        axes = grid[optimizers.index(optimizer)][tasks.index(task)]
        for i, way in enumerate(WAYS):
            own = [row for row in rows if row["way"] == way and "mean" in row]
            if own:
                x, y, e = zip(*sorted((r["bytes"], r["mean"], r["std"]) for r in own), strict=True)
                lines[way] = axes.errorbar(x, y, e, marker="o", markersize=3, capsize=2, color=f"C{i}")
        head = next(row for row in rows if row["way"] == "fine-tuned")
        axes.axhline(head["mean"], color="black", linestyle=":")
        axes.set(xscale="log", title=f"{task}, {optimizer}", xlabel="bytes a parameter, whole file")
        axes.set_ylabel(head["metric_name"].replace("_", " "))
        axes.grid(alpha=0.3)
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(RESULTS.parent / "methods.png", dpi=110)


if __name__ == "__main__":
    main()
