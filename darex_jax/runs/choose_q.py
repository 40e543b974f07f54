"""Choosing q for a fine-tuned model and its base: what `darex find-q` and `darex prune --q auto` do."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from darex_jax.core.delta import prune
from darex_jax.core.errors import DarexError
from darex_jax.core.scope import DECODERS, choose_scope
from darex_jax.core.tree import flatten_names
from darex_jax.evaluation.calibration import (
    input_statistics,
    load_statistics,
    save_statistics,
    squared_influences,
)
from darex_jax.evaluation.find_q import (
    CALIBRATION_SIZE,
    Q,
    eta_grid,
    find_q,
    layer_rule,
    load_pair,
    pruned_models,
    q_grid,
    same,
    split_in_scope,
    two_point,
)
from darex_jax.evaluation.learned_q import LEARNING_RATE, learn_q
from darex_jax.evaluation.objectives import (
    Objective,
    answer_objective,
    label_objective,
    output_objective,
    prediction_objective,
)
from darex_jax.files.checkpoint import Checkpoint, read_config
from darex_jax.files.manifest import run_manifest, weights_digest
from darex_jax.models import BertConfig, Model, read_model_config
from darex_jax.q.analytic import Rule
from darex_jax.q.closed_form import closed_form
from darex_jax.q.per_layer import spread_q
from darex_jax.q.search import SearchResult, authors_walk, check_bounds, search_q
from darex_jax.runs.source import Material, Source, read_material
from darex_jax.tasks import Task
from darex_jax.tasks.batching import Batch, row_count
from darex_jax.training.checkpoints import Checkpoints
from darex_jax.training.record import save_figure

OBJECTIVES = {  # and at most so many examples of each, where nothing else is said
    "labels": None,
    "predictions": 500,
    "outputs": CALIBRATION_SIZE,
    "learned": 200,
    "two-point": CALIBRATION_SIZE,
    "closed-form": CALIBRATION_SIZE,
}
SEARCHED = ("labels", "predictions", "outputs")
Params = dict[str, Any]


def choose_q(
    base: Path,
    fine: Path,
    drop_rate: float,
    *,
    objective: str,
    scope: str = "model",
    rule: Rule = "published",
    task: str | None = None,
    data_dir: Path | None = None,
    difficulty: int = 3,
    text: Path | None = None,
    limit: int | None = None,
    masks: int | None = None,
    grid: tuple[float, float, float] | None = None,
    statistics: Path | None = None,
    learning_rate: float = LEARNING_RATE,
    checkpoints: Path | None = None,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    ignore_config_fields: tuple[str, ...] = (),
    seed: int = 0,
    on_value: Callable[[float, float], None] = lambda point, value: None,
) -> dict[str, Any]:
    """Chooses q, one for the model or one for each linear layer; the same arguments give the same q.

    Args:
      base, fine: Hugging Face directories.
      objective: one of `OBJECTIVES`, or "auto": labels where a task is named, else predictions, or for an
        encoder that predicts no classes two-point (by layer, outputs).
        labels: the metric on held-out examples (q_v), the only one that looks at labels; it asks for a task.
        predictions: agreement with the fine-tuned model's own predictions on held-out examples.
        outputs: the output change (q_e). learned: the same by gradient, of each layer.
        closed-form: the least expected squared error of linear layers' outputs. two-point: that of the
        model's output, from the changes of the base and of DARE.
      scope: "model", or "layer": Algorithm 3 for what is searched; not for two-point.
      rule: how Algorithm 3 minimises, see `analytic_q`: "exact" is what it says and moves q to near 1/2,
        "published" is what the paper's numbers come from.
      task: where the examples come from: a GLUE task or opinions for encoders, gsm8k or word-problems for
        decoders; None is the family's generated task. data_dir: of the task's files. difficulty: of generated
        word problems.
      text: a file with one text a line, instead of a task.
      limit: at most so many examples; None is what `OBJECTIVES` says.
      masks: how many, of the seeds from `seed` on; None is 1 for labels, predictions and learned, else 4.
      grid: low, high and step of the authors' walk; None is a wider grid, which is visited whole.
      statistics: a file for the statistics of the layers' inputs: read where it exists, else written.
      learning_rate: with learned, see `learn_q`.
      checkpoints: a folder where learning goes on after a stop; each of several has its place in it.
      ignore_config_fields: of the fine-tuned model's, see `read_model_config`.
      on_value: called with every (q or eta, value); while learning with every (epoch, held-out change).
    Returns: what the q file holds, ready for strict JSON: q, value, objective, scope, curve (of q, of eta
      with rule, or of epochs; None for a value that is not finite), plateau, what it cost (evaluations of so
      many examples, labels looked at), manifest. Where there is a `warning`, the examples tell nothing, and q
      is 1 - p, DARE's (the smallest visited with finite outputs, where some were not).
    Raises: ValueError for what does not fit; FileError for a damaged file.
    """
    if objective == "auto":
        objective = "labels" if task is not None else without_labels(fine, scope, ignore_config_fields)
    _check(objective, scope, task, text, masks, grid, drop_rate)
    chosen = choose_scope(read_config(fine).get("model_type"), include, exclude)
    limit = OBJECTIVES[objective] if limit is None else limit
    held_out = objective in ("labels", "predictions")
    source = Source(task=task, data_dir=data_dir, difficulty=difficulty, text=text, limit=limit)
    material = read_material(fine, source, held_out=held_out)  # before a weight is read
    if objective == "learned" and len(material.encoded) < 2:
        raise DarexError("learned takes two examples or more: to learn from, and to be held out.")
    model, params, base_params = load_pair(base, fine, chosen, ignore_config_fields)
    start, delta = split_in_scope(params, base_params)
    del base_params
    count = masks or (1 if objective in ("labels", "predictions", "learned") else 4)
    seeds = [] if objective == "closed-form" else [seed + i for i in range(count)]
    models = pruned_models(start, delta, drop_rate, seeds)
    names = list(flatten_names(delta))
    density = round(1.0 - drop_rate, 12)
    dare: Q = dict.fromkeys(names, density) if scope == "layer" else density
    with Checkpoint(base) as b, Checkpoint(fine) as f:
        digests = {"base_weights": weights_digest(b), "fine_weights": weights_digest(f)}
    data_digest = material.encoded.digest()
    made_from = {"model": digests["fine_weights"], "data": data_digest}
    batches = material.batches()
    found: dict[str, Any]
    if objective in SEARCHED:
        goal = _objective(objective, model, params, material.task, batches)
        q_of: Callable[[float], Q] = same
        points = q_grid(drop_rate)
        if scope == "layer":
            seen = _statistics(model, params, batches, statistics, made_from)
            points, q_of = eta_grid(), layer_rule(seen, delta, drop_rate, rule)
        found = {"examples": goal.examples, "labels": goal.labels}
        if goal.blind is not None:
            found |= {"q": dare, "warning": _untold(goal.blind), "evaluations": 0}
        else:
            search = search_q if grid is None else authors_walk
            result = find_q(goal, models, grid or points, q_of=q_of, search=search, on_value=on_value)
            found |= _searched(result, goal.name, dare, q_of, scope)
            found["evaluations"] = len(result.curve) * count
        if scope == "layer":
            found["rule"] = rule
    elif objective == "learned":
        if checkpoints is not None:  # what was learnt from other models, data or masks is no beginning
            made_from |= {"base": digests["base_weights"], "mask": f"{drop_rate} {seeds}"}
            made_from |= {"rate": str(learning_rate), "scope": json.dumps([include, exclude])}
            checkpoints /= hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
        # One mask and no other use of the delta: masked once, in its own place.
        masked = prune(jax.random.key(seed), delta, drop_rate, 1.0, donate=True)
        found = _learned(
            model, params, start, masked, seed, drop_rate, material, learning_rate, checkpoints, on_value
        )
    elif objective == "closed-form":
        form = closed_form(squared_influences(model, params, delta, batches), drop_rate)
        found = {"layers": form.layers, "evaluations": 1, "examples": row_count(batches)}
        if not 1.0 - drop_rate < form.q < math.inf:
            found |= {"q": dare, "warning": _untold("the delta changes no layer's output")}
        else:
            found["q"] = form.q if scope == "model" else spread_q(form.layers, names)
    else:
        q, visited = two_point(model, params, start, models, batches, drop_rate, on_value=on_value)
        found = {
            "q": q, "change_without_delta": visited[0][1], "changes": [list(point) for point in visited[1:]],
            "evaluations": 1 + count * len(visited[1:]), "examples": row_count(batches),
        }  # fmt: skip
        if len(visited) == 1:
            found["warning"] = _untold("the base gives the fine-tuned model's outputs")
    options = {
        "drop_rate": drop_rate, "objective": objective, "scope": scope, "rule": rule, "task": task,
        "data_dir": data_dir, "difficulty": difficulty, "text": text, "limit": limit, "masks": masks,
        "grid": grid, "learning_rate": learning_rate, "include": include, "exclude": exclude, "seed": seed,
    }  # fmt: skip
    head = {
        "objective": objective, "scope": scope, "drop_rate": drop_rate, "mask_seeds": seeds,
        "data": material.source, "labels": 0,
    }  # fmt: skip
    inputs = {**digests, "data": data_digest}
    return _strict(head | found | {"manifest": run_manifest("find-q", options, inputs, {})})


def _searched(
    result: SearchResult, value_name: str, dare: Q, q_of: Callable[[float], Q], scope: str
) -> dict[str, Any]:
    """What a search found; where it found nothing, DARE's q, unless outputs were not finite somewhere."""
    found: dict[str, Any] = {
        "q": q_of(result.q), "value": result.value, "value_name": value_name,
        "plateau": list(result.plateau), "curve": [list(point) for point in result.curve],
    }  # fmt: skip
    if scope == "layer":
        found["eta"] = result.q
    if result.flat and all(math.isfinite(value) for _, value in result.curve):
        found |= {"q": dare, "warning": _untold(f"the {value_name} is the same at every point")}
        found.pop("eta", None)
    elif result.flat:
        kept = "the smallest with finite outputs is kept"
        found["warning"] = _untold(f"the {value_name} is the same wherever it is finite", kept)
    return found


def _untold(why: str, kept: str = "q stays at DARE's 1 - drop rate") -> str:
    return f"{why}: these examples do not tell one q from another, and {kept}"


def _strict(value: Any) -> Any:
    """The same with None for every number that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _strict(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def without_labels(fine: Path, scope: str, ignore_config_fields: Collection[str] = ()) -> str:
    """The objective for a model whose task is not known."""
    hf = read_config(fine)
    if hf.get("model_type") in DECODERS:
        return "predictions"
    if "ForSequenceClassification" in str(hf.get("architectures")):
        config = read_model_config(hf, ignore_config_fields)
        if isinstance(config, BertConfig) and config.num_labels > 1:
            return "predictions"
    return "outputs" if scope == "layer" else "two-point"


def _check(
    objective: str,
    scope: str,
    task: str | None,
    text: Path | None,
    masks: int | None,
    grid: tuple[float, float, float] | None,
    drop_rate: float,
) -> None:
    if objective not in OBJECTIVES or scope not in ("model", "layer"):
        raise DarexError(f"objective is one of {', '.join(OBJECTIVES)}, scope model or layer.")
    if not 0.0 < drop_rate < 1.0:
        raise DarexError(f"at a drop rate of {drop_rate} there is no q to choose.")
    if objective == "learned" and scope == "model":
        raise DarexError("learned finds one q a layer; say --scope layer.")
    if objective == "two-point" and scope == "layer":
        raise DarexError("two-point finds one q for the model; say --scope model.")
    if objective == "labels" and text is not None:
        raise DarexError("texts have no labels; choose another objective, or a task.")
    if objective == "labels" and task is None:
        raise DarexError(
            "labels are those of the model's own task: name it (--task), or choose another objective."
        )
    if objective == "learned" and masks not in (None, 1):
        raise DarexError("learned takes one mask.")
    if grid is not None:
        check_bounds(*grid)
        if objective not in SEARCHED:
            raise DarexError(f"{objective} searches no grid; a grid is for {', '.join(SEARCHED)}.")


def _objective(
    name: str, model: Model, fine: Params, task: Task | None, batches: Sequence[Batch]
) -> Objective:
    if name == "outputs":
        return output_objective(model, fine, batches)
    if name == "predictions":
        return prediction_objective(model, fine, batches, None if task is None else task.metric)
    if task is None:
        return answer_objective(model, batches)
    return label_objective(model, task, batches)


def _statistics(
    model: Model, fine: Params, batches: Sequence[Batch], file: Path | None, made_from: dict[str, str]
) -> Any:
    if file is not None and file.exists():
        return load_statistics(file, made_from)
    seen = input_statistics(model, fine, batches)
    if file is not None:
        save_statistics(file, seen, made_from)
    return seen


def _learned(
    model: Model,
    fine: Params,
    start: Params,
    masked: Params,
    seed: int,
    drop_rate: float,
    material: Material,
    learning_rate: float,
    checkpoints: Path | None,
    on_value: Callable[[float, float], None],
) -> dict[str, Any]:
    order, quarter = hold_out_quarter(len(material.encoded), seed)
    rest, held_out = (material.select(rows).batches(CALIBRATION_SIZE) for rows in (order, quarter))
    inputs = input_statistics(model, fine, rest[:1])
    layers = [name for name in flatten_names(masked) if name in inputs]
    learned = learn_q(
        model,
        fine,
        start,
        masked,
        drop_rate,
        layers,
        rest,
        held_out,
        learning_rate=learning_rate,
        checkpoints=None if checkpoints is None else Checkpoints(checkpoints, every=1),
        on_epoch=lambda epoch, _, change: on_value(epoch, change),
    )
    epochs = len(learned.history) - 1
    # The held-out examples once at the start; an epoch sends the others through forwards and backwards, which
    # counts as two more, and the held-out ones once.
    passes = len(quarter) + epochs * (3 * len(order) + len(quarter))
    found = {
        "q": learned.q, "value": learned.change, "value_name": "held-out output change",
        "curve": [[epoch, change] for epoch, (_, change) in enumerate(learned.history)],
        "evaluations": round(passes / len(material.encoded), 2), "examples": len(material.encoded),
    }  # fmt: skip
    if learned.change == learned.history[0][1]:
        found["warning"] = _untold("no epoch was better than the first q")
    return found


def hold_out_quarter(count: int, seed: int) -> tuple[NDArray, NDArray]:
    """Row numbers to learn from, and the quarter (at least one) that decides when to stop; both ascending."""
    order, quarter = np.random.default_rng(seed).permutation(count), max(1, count // 4)
    return np.sort(order[quarter:]), np.sort(order[:quarter])


def log_ticks(axes: Any) -> None:
    """A logarithmic x axis that says 0.01, 0.03, 0.1; matplotlib's own labels collide within a decade."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(LogLocator(subs=(3,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")


def plot_curve(report: dict[str, Any], path: Path) -> bool:
    """The curve that was searched, and every layer's q where they differ; False if there is neither."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = (
        {n: q for n, q in report["q"].items() if n.endswith("weight")}
        if isinstance(report["q"], dict)
        else {}
    )
    different = len(set(layers.values())) > 1
    panels = [panel for panel, there in (("curve", "curve" in report), ("layers", different)) if there]
    if not panels:
        return False
    figure = Figure(figsize=(5.5 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.grid(alpha=0.3)
        if panel == "curve":
            finite = [point for point in report["curve"] if point[1] is not None]
            axes.plot(*zip(*finite, strict=True), "o-", markersize=3)
            learned = report["objective"] == "learned"
            axis = "epoch" if learned else "eta" if report["scope"] == "layer" else "q"
            axes.set(xlabel=axis, ylabel=report["value_name"])
            if not learned:
                log_ticks(axes)
                taken = report.get("eta") if report["scope"] == "layer" else report["q"]
                if taken is not None:
                    axes.axvline(taken, color="tab:red", linestyle="--", label=f"{axis} {taken:.4g}")
                    axes.legend()
        else:
            axes.plot(list(layers.values()), "o", markersize=3)
            axes.axhline(1.0 - report["drop_rate"], color="tab:red", linestyle="--", label="DARE")
            axes.set(xlabel="weight, from input to output", ylabel="q", yscale="log")
            axes.legend()
    save_figure(figure, path)
    return True
