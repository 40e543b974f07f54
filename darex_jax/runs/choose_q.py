"""Choosing q for a fine-tuned model and its base: what `darex find-q` and `darex prune --q auto` do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.core.scope import choose_scope
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
    masked_deltas,
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
from darex_jax.files.checkpoint import read_config
from darex_jax.files.manifest import params_digest, run_manifest
from darex_jax.models import BertConfig, DecoderConfig, Model, read_model_config
from darex_jax.q.analytic import Rule
from darex_jax.q.closed_form import closed_form
from darex_jax.q.per_layer import spread_q
from darex_jax.q.search import linear_grid
from darex_jax.tasks import Examples, Task, load_task
from darex_jax.tasks.answers import (
    PROBLEM_TASKS,
    answer_batches,
    encode_problems,
    encode_texts,
    load_problems,
)
from darex_jax.tasks.batching import (
    EVALUATION_ROWS,
    Batch,
    encode,
    evaluation_batches,
    load_tokenizer,
    row_count,
)
from darex_jax.tasks.lines import read_lines
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


class Material(NamedTuple):
    """Examples as a model gets them.

    Attributes:
      batches: a decoder's of 8 rows.
      task: what the labels mean, of a classifier's; None of plain texts and of a decoder's answers.
      digest: SHA-256 of the tokens.
    """

    batches: list[Batch]
    task: Task | None
    digest: str


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
      objective: one of `OBJECTIVES`, or "auto": labels where a task is named, else predictions, or two-point
        for an encoder that predicts no classes.
        labels: the metric on held-out examples (q_v), the only one that looks at labels.
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
      grid: low, high and step of a coarse grid with the authors' stopping rule; None is a wider one, which
        is visited whole.
      statistics: a file for the statistics of the layers' inputs: read where it exists, else written.
      learning_rate: with learned, see `learn_q`.
      checkpoints: a folder where learning goes on after a stop; each of several has its place in it.
      ignore_config_fields: of the fine-tuned model's, see `read_model_config`.
      on_value: called with every (q or eta, value); while learning with every (epoch, held-out change).
    Returns: what the q file holds: q, value, objective, scope, curve (of q, of eta with rule, or of epochs),
      plateau, what it cost (evaluations of so many examples, labels looked at), manifest.
    Raises: ValueError for what does not fit; FileError for a damaged file.
    """
    if objective == "auto":
        config = read_model_config(read_config(fine), ignore_config_fields)
        no_classes = isinstance(config, BertConfig) and (config.headless or config.num_labels == 1)
        objective = "labels" if task is not None else "two-point" if no_classes else "predictions"
    _check(objective, scope, task, text, masks, drop_rate)
    chosen = choose_scope(read_config(fine).get("model_type"), include, exclude)
    model, params, base_params = load_pair(base, fine, chosen, ignore_config_fields)
    start, delta = split_in_scope(params, base_params)
    limit = OBJECTIVES[objective] if limit is None else limit
    held_out = objective in ("labels", "predictions")
    rows = CALIBRATION_SIZE if objective == "learned" else EVALUATION_ROWS  # a step of learning takes more
    material = _read(model, fine, task, data_dir, difficulty, text, held_out, rows, limit)
    count = masks or (1 if objective in ("labels", "predictions", "learned") else 4)
    seeds = [seed + i for i in range(count)]
    masked = [] if objective == "closed-form" else masked_deltas(delta, drop_rate, seeds)
    names = list(flatten_names(delta))
    made_from = {"model": params_digest(params), "data": material.digest}
    base_digest = params_digest(base_params)
    found: dict[str, Any]
    if objective in SEARCHED:
        goal = _objective(objective, model, params, material)
        coarse = q_grid(drop_rate)
        q_of: Callable[[float], Q] = same
        if scope == "layer":
            seen = _statistics(model, params, material.batches, statistics, made_from)
            coarse, q_of = eta_grid(), layer_rule(seen, delta, drop_rate, rule)
        coarse = linear_grid(*grid) if grid else coarse
        result = find_q(goal, start, masked, coarse, q_of=q_of, whole=grid is None, on_value=on_value)
        found = {
            "q": q_of(result.q), "value": result.value, "value_name": goal.name,
            "plateau": list(result.plateau), "curve": [list(point) for point in result.curve],
            "evaluations": len(result.curve) * count, "examples": goal.examples, "labels": goal.labels,
        }  # fmt: skip
        if scope == "layer":
            found |= {"eta": result.q, "rule": rule}
    elif objective == "learned":
        if checkpoints is not None:  # what was learnt from other models, data or masks is no beginning
            made_from |= {"base": base_digest, "mask": f"{drop_rate} {seeds}", "rate": str(learning_rate)}
            checkpoints /= hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
        found = _learned(
            model, params, start, masked, drop_rate, material.batches, learning_rate, checkpoints, on_value
        )
    elif objective == "closed-form":
        form = closed_form(squared_influences(model, params, delta, material.batches), drop_rate)
        q = form.q if scope == "model" else spread_q(form.layers, names)
        found = {"q": q, "layers": form.layers, "evaluations": 1, "examples": row_count(material.batches)}
    else:
        q, visited = two_point(model, params, start, masked, material.batches, drop_rate)
        found = {
            "q": q, "change_without_delta": visited[0][1], "changes": [list(point) for point in visited[1:]],
            "evaluations": 1 + count * len(visited[1:]), "examples": row_count(material.batches),
        }  # fmt: skip
    options = {
        "drop_rate": drop_rate, "objective": objective, "scope": scope, "rule": rule, "task": task,
        "data_dir": data_dir, "difficulty": difficulty, "text": text, "limit": limit, "masks": masks,
        "grid": grid, "learning_rate": learning_rate, "include": include, "exclude": exclude, "seed": seed,
    }  # fmt: skip
    head = {"objective": objective, "scope": scope, "drop_rate": drop_rate, "mask_seeds": seeds, "labels": 0}
    inputs = {"base": base_digest, "fine": made_from["model"], "data": material.digest}
    return head | found | {"manifest": run_manifest("find-q", options, inputs, {})}


def _check(
    objective: str, scope: str, task: str | None, text: Path | None, masks: int | None, drop_rate: float
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
    if task is not None and text is not None:
        raise DarexError("examples come from a task or from a text file, not from both.")
    if objective == "learned" and masks not in (None, 1):
        raise DarexError("learned takes one mask.")


def _read(
    model: Model,
    fine: Path,
    task: str | None,
    data_dir: Path | None,
    difficulty: int,
    text: Path | None,
    held_out: bool,
    rows: int,
    limit: int | None,
) -> Material:
    """The first `limit` examples: of the held-out ones, or of those that train."""
    tokenizer = load_tokenizer(fine)
    decoder = isinstance(model.config, DecoderConfig)
    if text is not None:
        lines = read_lines(text)[:limit]
        if decoder:
            answers = encode_texts(tokenizer, lines)
            return Material(list(answer_batches(answers, 8, 0, 0)), None, answers.digest())
        examples = encode(tokenizer, Examples(tuple(lines), None, np.zeros(len(lines), np.int32)))
        return Material(evaluation_batches(examples, rows), None, examples.digest())
    task = task or ("word-problems" if decoder else "opinions")
    if decoder != (task in PROBLEM_TASKS):
        kind = "decoders" if task in PROBLEM_TASKS else "encoders"
        raise DarexError(f"{task} is for {kind}, {fine} is a {model.config.model_type}.")
    if decoder:
        problems = load_problems(task, data_dir, difficulty)[held_out][:limit]
        answers = encode_problems(tokenizer, problems)
        return Material(list(answer_batches(answers, 8, 0, 0)), None, answers.digest())
    loaded = load_task(task, data_dir)
    examples = encode(tokenizer, (loaded.validation if held_out else loaded.train).select(slice(limit)))
    return Material(evaluation_batches(examples, rows), loaded, examples.digest())


def _objective(name: str, model: Model, fine: Params, material: Material) -> Objective:
    if name == "outputs":
        return output_objective(model, fine, material.batches)
    if name == "predictions":
        metric = None if material.task is None else material.task.metric
        return prediction_objective(model, fine, material.batches, metric)
    if material.task is None:
        return answer_objective(model, material.batches)
    return label_objective(model, material.task, material.batches)


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
    masked: Sequence[Params],
    drop_rate: float,
    batches: list[Batch],
    learning_rate: float,
    checkpoints: Path | None,
    on_value: Callable[[float, float], None],
) -> dict[str, Any]:
    # Batches are sorted by length: every fourth is held out, so that both parts have all lengths.
    held_out = batches[::4]
    rest = [batch for i, batch in enumerate(batches) if i % 4] or batches
    inputs = input_statistics(model, fine, batches[:1])
    layers = [name for name in flatten_names(masked[0]) if name in inputs]
    learned = learn_q(
        model,
        fine,
        start,
        masked[0],
        layers,
        drop_rate,
        rest,
        held_out,
        learning_rate=learning_rate,
        checkpoints=None if checkpoints is None else Checkpoints(checkpoints, every=1),
        on_epoch=lambda epoch, _, change: on_value(epoch, change),
    )
    epochs = len(learned.history) - 1
    return {
        "q": learned.q, "value": learned.change, "value_name": "held-out output change",
        "curve": [[epoch, change] for epoch, (_, change) in enumerate(learned.history)],
        # A backward pass counts as two.
        "evaluations": 1 + epochs * 4, "examples": row_count(batches),
    }  # fmt: skip


def log_ticks(axes: Any) -> None:
    """A logarithmic x axis that says 0.01, 0.03, 0.1; matplotlib's own labels collide within a decade."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(LogLocator(subs=(3,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")


def plot_curve(report: dict[str, Any], path: Path) -> None:
    """The curve that was searched, and where q by layer was chosen, every layer's q."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = (
        {n: q for n, q in report["q"].items() if n.endswith("weight")}
        if isinstance(report["q"], dict)
        else {}
    )
    panels = [panel for panel, there in (("curve", "curve" in report), ("layers", layers)) if there]
    figure = Figure(figsize=(5.5 * max(1, len(panels)), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False):
        axes.grid(alpha=0.3)
        if panel == "curve":
            axes.plot(*zip(*report["curve"], strict=True), "o-", markersize=3)
            learned = report["objective"] == "learned"
            axis = "epoch" if learned else "eta" if report["scope"] == "layer" else "q"
            axes.set(xlabel=axis, ylabel=report["value_name"])
            if not learned:
                log_ticks(axes)
                taken = report["eta"] if report["scope"] == "layer" else report["q"]
                axes.axvline(taken, color="tab:red", linestyle="--", label=f"{axis} {taken:.4g}")
                axes.legend()
        else:
            axes.plot(list(layers.values()), "o", markersize=3)
            axes.axhline(1.0 - report["drop_rate"], color="tab:red", linestyle="--", label="DARE")
            axes.set(xlabel="weight, from input to output", ylabel="q", yscale="log")
            axes.legend()
    save_figure(figure, path)
