"""A training from a base directory to a fine-tuned one: what `darex train` does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tomli_w

from darex_jax.core.sharding import make_mesh, param_shardings
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.evaluation.classification import evaluate, predict
from darex_jax.files.checkpoint import read_json, save_params
from darex_jax.files.manifest import params_digest, run_manifest
from darex_jax.files.model import load_model
from darex_jax.models import Model
from darex_jax.tasks import TASKS, load_task
from darex_jax.tasks.answers import answer_batches, encode_answers
from darex_jax.tasks.batching import encode, evaluation_batches, load_tokenizer
from darex_jax.tasks.gsm8k import Problem, gsm8k_prompt, load_gsm8k, metamath_solution
from darex_jax.tasks.word_problems import word_problems
from darex_jax.training.causal_lm import answer_scores, train_answers
from darex_jax.training.checkpoints import Checkpoints
from darex_jax.training.fine_tune import classifier_for, fine_tune
from darex_jax.training.loop import Recipe
from darex_jax.training.record import metrics_file, plot_metrics, read_metrics

PROBLEM_TASKS = ("gsm8k", "word-problems")
ALL_TASKS = (*TASKS, *PROBLEM_TASKS)
Params = dict[str, Any]


class Job(NamedTuple):
    """A task made ready for a model.

    Attributes:
      pretrained: the parameters that have a pretrained value, with it.
      train: `fine_tune` or `train_answers` of everything but its loop's arguments.
      validate: params -> the validation metric, larger is better.
      test: params -> what is reported in the end.
    """

    model: Model
    pretrained: Params
    examples: int
    digest: str
    metric_name: str
    train: Callable[..., Any]
    validate: Callable[[Params], float]
    test: Callable[[Params], dict[str, Any]]


def train_run(
    base: Path,
    out: Path,
    recipe: Recipe,
    *,
    task: str = "opinions",
    data_dir: Path | None = None,
    difficulty: int = 3,
    limit: int | None = None,
    validation_limit: int = 500,
    checkpoint_every: int | None = None,
    keep: int = 2,
    best: bool = False,
    mesh: str | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    on_step: Callable[[int, dict[str, Any]], None] = lambda steps, line: None,
) -> dict[str, Any]:
    """Trains `base` on a task and writes the model to `out`, with a manifest from which it can be repeated.

    Beside `out` lies `out.run`: the resolved options (train.toml), every step's numbers (metrics.jsonl,
    curves.png) and the checkpoints. A run that was interrupted goes on when it is started again with the same
    arguments, and ends with the same bits.

    Args:
      base: a Hugging Face directory; an encoder for the GLUE tasks, a decoder for the problem tasks.
      task: one of `ALL_TASKS`; data_dir, difficulty: see `load_task`, `load_gsm8k`, `word_problems`.
      limit: train on the first so many examples.
      validation_limit: validation examples looked at, at every checkpoint.
      checkpoint_every: steps; None is a tenth of the run.
      keep: how many of the newest checkpoints are kept, beside the best.
      best: write the checkpoint with the best validation metric instead of the last step.
      mesh: "DATAxMODEL", the parts that a batch and the parameters are split into, over all devices.
      say: called with a line for the person who waits.
      on_step: called with the number of steps and every line of metrics.jsonl.
    Returns: what there is to report: out, run, task, steps, loss, delta_rms, delta_max, digest, the validation
      metric and the task's test metric.
    Raises: ValueError for what does not fit, also for an interrupted run of other arguments or data;
      FloatingPointError if the training diverges.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: already exists; choose another place.")
    if task not in ALL_TASKS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(ALL_TASKS)}.")
    parts = _mesh_of(mesh)
    prepare = _problem_job if task in PROBLEM_TASKS else _example_job
    job = prepare(base, recipe, task, data_dir, difficulty, limit, validation_limit, seed, parts)
    steps = recipe.total_steps(job.examples)
    every = checkpoint_every or max(1, steps // 10)
    options = dataclasses.asdict(recipe) | {
        "base": str(base), "task": task, "data_dir": data_dir and str(data_dir), "difficulty": difficulty,
        "limit": limit, "validation_limit": validation_limit, "checkpoint_every": checkpoint_every,
        "keep": keep, "best": best, "mesh": mesh, "seed": seed,
    }  # fmt: skip
    inputs = {"base": params_digest(job.pretrained), "data": job.digest}
    run = out.with_name(out.name + ".run")
    _begin(run, run_manifest("train", options, inputs, {}), say)
    checkpoints = Checkpoints(run / "checkpoints", every, keep)
    with metrics_file(run / "metrics.jsonl", recipe.batch_size) as write:
        params, _ = job.train(
            mesh=parts,
            pretrained=job.pretrained,
            checkpoints=checkpoints,
            validate=job.validate,
            best=best,
            on_step=lambda record: on_step(steps, write(record)),
        )
    lines = read_metrics(run / "metrics.jsonl")
    plot_metrics(lines, job.metric_name, run / "curves.png")
    digest = params_digest(params)
    manifest = run_manifest("train", options, inputs, {"model": digest})
    save_params(out, params, job.model.config.to_hf(), companions_from=base, manifest=manifest)
    last = lines[-1]
    return {
        "out": str(out), "run": str(run), "task": task, "steps": steps, "step_taken": checkpoints.best_step if best else steps,
        "loss": last["loss"], "delta_rms": last["delta_rms"], "delta_max": last["delta_max"],
        "validation": last["validation"], "digest": digest, "metric_name": job.metric_name,
    } | job.test(params)  # fmt: skip


def _mesh_of(text: str | None) -> Any:
    if text is None:
        return None
    data, _, model = text.partition("x")
    if not (data.isdigit() and model.isdigit()):
        raise ValueError(f"mesh is DATAxMODEL, 4x2 say, got {text!r}.")
    return make_mesh(int(data), int(model))


def _begin(run: Path, manifest: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Writes what a run is begun with, or holds it against what it was begun with."""
    file = run / "manifest.json"
    if not file.exists():
        run.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in manifest["options"].items() if value is not None}
        (run / "train.toml").write_text(tomli_w.dumps(kept), encoding="utf-8")
        file.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        return
    before = read_json(file)
    for part in ("options", "inputs"):
        for name in {**before[part], **manifest[part]}:
            there, here = before[part].get(name), manifest[part].get(name)
            if there != here:
                raise ValueError(
                    f"{run} is an interrupted run with another {name} ({there!r} there, {here!r} here). "
                    "Go on with that one, delete the folder, or choose another OUT."
                )
    for part in ("versions", "platform"):
        for name, there in before[part].items():
            if there != manifest[part].get(name):
                say(f"{name} was {there} when this run began and is {manifest[part].get(name)} now")
    say(f"going on with the run in {run}")


def _example_job(
    base: Path,
    recipe: Recipe,
    task_name: str,
    data_dir: Path | None,
    difficulty: int,
    limit: int | None,
    validation_limit: int,
    seed: int,
    mesh: Any,
) -> Job:
    """A classification or a regression."""
    key = jax.random.key(seed)
    task = load_task(task_name, data_dir, seed)
    tokenizer = load_tokenizer(base)
    rows = task.train.select(slice(limit))
    train = encode(tokenizer, rows)
    held_out = encode(tokenizer, task.validation.select(slice(validation_limit)))
    batches = evaluation_batches(held_out)
    body, known = load_model(base, mesh=mesh)
    model, params = classifier_for(task, body, known, jax.random.fold_in(key, 0))
    # Arrays are shared with the base's: what is not one of them is fresh.
    old = {id(leaf) for leaf in jax.tree.leaves(known)}
    pretrained = {name: leaf for name, leaf in flatten_names(params).items() if id(leaf) in old}
    if mesh is not None:
        params = jax.device_put(params, param_shardings(mesh, params))
    return Job(
        model,
        unflatten_names(pretrained),
        len(train),
        rows.digest(),
        task.metric_name,
        lambda **loop: fine_tune(model, params, train, recipe, key=jax.random.fold_in(key, 1), **loop),
        lambda params: task.metric(predict(model, params, batches), held_out.labels),
        lambda params: {
            f"test_{name}": value
            for name, value in evaluate(model, params, encode(tokenizer, task.test), task).items()
            if name != "metric_name"
        },
    )


def _problem_job(
    base: Path,
    recipe: Recipe,
    task_name: str,
    data_dir: Path | None,
    difficulty: int,
    limit: int | None,
    validation_limit: int,
    seed: int,
    mesh: Any,
) -> Job:
    """A causal language model that is to answer problems."""
    problems, held_out = _problems(task_name, data_dir, difficulty, seed)
    problems, held_out = problems[:limit], held_out[:validation_limit]
    tokenizer = load_tokenizer(base)
    model, params = load_model(base, mesh=mesh)

    def encoded(some: tuple[Problem, ...]) -> Any:
        prompts = [gsm8k_prompt(problem.question) for problem in some]
        return encode_answers(tokenizer, prompts, [metamath_solution(problem.solution) for problem in some])

    train = encoded(problems)
    batches = list(answer_batches(encoded(held_out), recipe.batch_size, 0, 0))
    return Job(
        model,
        params,
        len(train),
        train.digest(),
        "share of answer tokens ranked first",
        lambda **loop: train_answers(model, params, train, recipe, key=jax.random.key(seed), **loop),
        lambda params: answer_scores(model, params, batches)[1],
        lambda params: {"validation_loss": answer_scores(model, params, batches)[0]},
    )


def _problems(
    task_name: str, data_dir: Path | None, difficulty: int, seed: int
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """The problems to train on, and those held out. A tenth of GSM8K's training split."""
    if task_name == "word-problems":
        generated = word_problems(seed, difficulty)
        return generated.train, generated.validation
    every = load_gsm8k("train", data_dir)
    order, tenth = np.random.RandomState(0).permutation(len(every)), len(every) // 10
    return tuple(every[i] for i in order[tenth:]), tuple(every[i] for i in order[:tenth])
