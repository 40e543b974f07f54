"""Costs of a bank of deltas: switching against loading and PEFT, mixed batches against alternatives.

    python benchmarks/bank.py [--json benchmarks/results/bank.json]

The base is MiniLM-L6, the deltas are of four synthetic fine-tuned models (seeded noise of rank 12 and of full
rank, and a head), pruned to 0.01 bytes per parameter; beyond four the same files are added under several
names. A batch has 32 rows of 64 tokens. Times are medians of ROUNDS interleaved rounds; ratios are medians of
the ratios per round. PEFT (from the test extra) uses the low-rank deltas exported by `darex export`. The
table is written beside the JSON.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import darex_jax as dx
from darex_jax.cli import main as darex
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.models import classifier_from_pretrained
from darex_jax.runs.demo import demo_weights

ROWS, TOKENS, ROUNDS = 32, 64, 9
COUNTS = (1, 4, 16, 32)
METHODS = {"low rank": ["svd", "--bits", "4"], "sparse": ["magnitude", "--bits", "4"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = make_deltas(Path(folder))
        report = {
            "rows": ROWS, "tokens": TOKENS, "rounds": ROUNDS,
            "switch": {name: switches(paths, Path(folder)) for name, paths in files.items()},
            "batch": {name: batches(paths) for name, paths in files.items()},
            "peft": with_peft(files["low rank"], Path(folder)),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {p: version(p) for p in ("jax", "numpy", "torch", "peft", "transformers")},
        }  # fmt: skip
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(table(report))


def make_deltas(folder: Path) -> dict[str, list[Path]]:
    body, params = dx.load_model(demo_weights())
    found: dict[str, list[Path]] = {name: [] for name in METHODS}
    for seed in range(4):
        rng = np.random.default_rng(seed)
        model, start = classifier_from_pretrained(body, params, 2, jax.random.key(seed))

        def moved(x: jax.Array, rng: np.random.Generator = rng) -> np.ndarray:
            noise = rng.normal(size=x.shape).astype(np.float32)
            if x.ndim == 2 and min(x.shape) > 12:
                left, right = (
                    rng.normal(size=s).astype(np.float32) for s in ((len(x), 12), (12, x.shape[1]))
                )
                noise = 0.3 * noise + left @ right / 12**0.5
            return np.asarray(x) + 2e-3 * noise

        named = {name: moved(x) for name, x in flatten_names(start).items()}
        dx.save_params(folder / f"fine{seed}", unflatten_names(named), model.config.to_hf())
        for name, options in METHODS.items():
            out = folder / f"{name.replace(' ', '-')}{seed}.safetensors"
            arguments = ["--method", options[0], *options[1:], "--bytes-per-parameter", "0.01"]
            run_quietly("prune", demo_weights(), folder / f"fine{seed}", out, *arguments)
            found[name].append(out)
    return found


def run_quietly(*arguments: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        darex([*map(str, arguments)], standalone_mode=False)


def switches(files: list[Path], folder: Path) -> dict:
    """Seconds of activating a delta, and of loading the same model from a checkpoint."""
    bank = dx.DeltaBank(*dx.load_model(demo_weights()))
    for i, file in enumerate(files):
        bank.add(str(i), file)
    model = folder / f"{files[0].stem}-model"
    run_quietly("apply", demo_weights(), files[0], model)

    def load() -> None:
        jax.block_until_ready(dx.load_model(model)[1])

    turn = iter(range(10**6))

    def switch() -> None:
        jax.block_until_ready(bank.activate(str(next(turn) % len(files))))

    seconds = in_turn({"load": load, "switch": switch})
    return seconds | {
        "bytes": [bank.nbytes(name) for name in bank.names],
        "file_bytes": [file.stat().st_size for file in files],
    }


def batches(files: list[Path]) -> list[dict]:
    """Seconds per batch: the merged model alone, one model per delta in turn, and mixed."""
    run = jax.jit(lambda model, params, ids: model(params, ids).logits, static_argnums=0)
    ids = jax.random.randint(jax.random.key(0), (ROWS, TOKENS), 1000, 20000)
    rows = []
    for count in COUNTS:
        bank = dx.DeltaBank(*dx.load_model(demo_weights()))
        for i in range(count):
            bank.add(str(i), files[i % len(files)])
        own, merged = dx.load_model(demo_weights(), delta=files[0])
        mixed = bank.mixed([str(i % count) for i in range(ROWS)])
        parts = jnp.split(ids, count)

        def each(own=own, merged=merged, parts=parts) -> None:
            jax.block_until_ready([run(own, merged, part) for part in parts])

        seconds = in_turn({
            "alone": lambda own=own, merged=merged: run(own, merged, ids).block_until_ready(),
            "one_model_a_delta": each,
            "mixed": lambda bank=bank, mixed=mixed: run(bank.model, mixed, ids).block_until_ready(),
        })  # fmt: skip
        rows.append({"deltas": count, **seconds})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def with_peft(files: list[Path], folder: Path) -> dict:
    """The same in PyTorch: PEFT's switch, its mixed batch, and its model without an adapter."""
    import peft
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    adapters = []
    for file in files:
        adapters.append(folder / f"{file.stem}-adapter")
        run_quietly("export", file, adapters[-1], "--to", "peft", "--base", demo_weights())
        # In a mixed batch PEFT supports neither modules saved whole nor position embeddings, whose batch has
        # one row: these are the base's here.
        config = json.loads((adapters[-1] / "adapter_config.json").read_text())
        layers = [name for name in config["target_modules"] if "embeddings" not in name]
        config |= {"modules_to_save": None, "task_type": None, "target_modules": layers}
        (adapters[-1] / "adapter_config.json").write_text(json.dumps(config))
    ids = torch.randint(1000, 20000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    rows = []
    for count in COUNTS:
        body = transformers.AutoModelForSequenceClassification.from_pretrained(demo_weights()).eval()
        wrapped = peft.PeftModel.from_pretrained(body, adapters[0], adapter_name="0")
        for i in range(1, count):
            wrapped.load_adapter(adapters[i % len(files)], adapter_name=str(i))
        wrapped.eval()
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(demo_weights()).eval()
        names = [str(i % count) for i in range(ROWS)]
        turn = iter(range(10**6))

        def run(model=plain, **more) -> None:
            with torch.no_grad():
                model(input_ids=ids, **more)

        seconds = in_turn({
            "alone": run,
            "mixed": lambda run=run, wrapped=wrapped, names=names: run(wrapped, adapter_names=names),
            "switch": lambda w=wrapped, turn=turn, n=count: w.set_adapter(str(next(turn) % n)),
        })  # fmt: skip
        rows.append({"deltas": count, **seconds})
        print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows, "threads": torch.get_num_threads()}


def in_turn(runs: dict) -> dict:
    """Median seconds of each, and median ratios to the first, over rounds that run all."""
    for run in runs.values():
        run()
        run()
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            seen[name].append(time.perf_counter() - begun)
    first = next(iter(runs))
    found: dict = {name: round(statistics.median(times), 5) for name, times in seen.items()}
    for name in list(runs)[1:]:
        ratios = [own / of for own, of in zip(seen[name], seen[first], strict=True)]
        found[f"{name}/{first}"] = [round(f(ratios), 4) for f in (statistics.median, min, max)]
    return found


def table(report: dict) -> str:
    peft = {row["deltas"]: row for row in report["peft"]["rows"]}
    lines = [
        "# A bank of deltas",
        "",
        f"MiniLM-L6, deltas of 0.01 bytes per parameter, batches of {ROWS} rows of {TOKENS} tokens.",
        f"{report['machine']}; {', '.join(f'{k} {v}' for k, v in report['versions'].items())}.",
        f"Medians of {ROUNDS} rounds, in brackets the least and the largest. Made by",
        "`python benchmarks/bank.py --json benchmarks/results/bank.json`.",
        "",
        "| switch | to load | to switch | switch / load | bytes a delta in memory | on disk |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in report["switch"].items():
        held, stored = (statistics.mean(row[k]) / 1e3 for k in ("bytes", "file_bytes"))
        lines.append(
            f"| {name} | {1e3 * row['load']:.0f} ms | {1e3 * row['switch']:.0f} ms "
            f"| {ratio(row['switch/load'])} | {held:.0f} kB | {stored:.0f} kB |"
        )
    switch = 1e3 * peft[4]["switch"]
    lines += [
        "",
        f"PEFT's `set_adapter` between four takes {switch:.1f} ms; it changes no weight, and every",
        "later call pays for the adapter.",
        "",
        "| batch | deltas | merged model alone | mixed | a model a delta | PEFT: mixed / base |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, rows in report["batch"].items():
        for row in rows:
            theirs = ratio(peft[row["deltas"]]["mixed/alone"]) if name == "low rank" else ""
            lines.append(
                f"| {name} | {row['deltas']} | {1e3 * row['alone']:.0f} ms | {ratio(row['mixed/alone'])} "
                f"| {ratio(row['one_model_a_delta/alone'])} | {theirs} |"
            )
    return "\n".join([*lines, ""])


def ratio(of: list[float]) -> str:
    return f"{of[0]:.2f} ({of[1]:.2f}-{of[2]:.2f})"


if __name__ == "__main__":
    main()
