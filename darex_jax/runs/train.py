"""Training from a base directory to a fine-tuned one: `darex train`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tomli_w

from darex_jax.core.errors import DarexError
from darex_jax.core.lora import LoraConfig, adapter_delta, is_factor
from darex_jax.core.sharding import make_mesh, param_shardings
from darex_jax.core.tree import combine, flatten_names, seed_key, unflatten_names
from darex_jax.evaluation.classification import evaluate, predict
from darex_jax.files.adapter import check_savable, save_adapter
from darex_jax.files.atomic import only_one, write_whole
from darex_jax.files.checkpoint import read_config, read_json, save_params
from darex_jax.files.manifest import params_digest, run_manifest
from darex_jax.files.model import load_model
from darex_jax.models import DecoderConfig, Model
from darex_jax.models.encoder import class_names
from darex_jax.models.lora import add_adapters
from darex_jax.tasks import TASKS, Task, load_task
from darex_jax.tasks.answers import (
    PROBLEM_TASKS,
    EncodedAnswers,
    answer_batches,
    encode_answers,
    encode_problems,
    load_problems,
)
from darex_jax.tasks.batching import encode, evaluation_batches, load_tokenizer
from darex_jax.tasks.table import Table, is_unnamed, read_completions, read_task, share_of_right
from darex_jax.training.causal_lm import answer_scores, train_answers
from darex_jax.training.checkpoints import Checkpoints
from darex_jax.training.fine_tune import classifier_for, fine_tune
from darex_jax.training.loop import Recipe, delta_size
from darex_jax.training.record import metrics_file, plot_metrics, read_metrics

ALL_TASKS = (*TASKS, *PROBLEM_TASKS)
LORA_TARGETS = ("query", "value", "q_proj", "v_proj")  # those of arXiv:2106.09685, section 7.1
Params = dict[str, Any]


class Start(NamedTuple):
    """The initial state of a training.

    Attributes:
      params: trained parameters.
      frozen: all other parameters.
      pretrained: pretrained values of those in `params` that have one; an adapter's is zero.
      measure: `params` -> the size of the delta, as for `train`; for an adapter, of its merged delta.
    """

    model: Model
    params: Params
    frozen: Params
    pretrained: Params
    measure: Callable[[Params], Any] | None


class Lesson(NamedTuple):
    """The training task, as functions of the trained parameters.

    Attributes:
      train: `fine_tune` or `train_answers`, of the arguments of the loop.
      examples: number of training examples.
      digests: of the tokenised training and held-out examples.
      validate: the metric on held-out examples, larger is better.
      test: the final report.
    """

    train: Callable[..., Any]
    examples: int
    digests: dict[str, str]
    metric_name: str
    validate: Callable[[Params], float]
    test: Callable[[Params], dict[str, Any]]


def train_run(
    base: Path,
    out: Path,
    recipe: Recipe,
    *,
    task: str = "opinions",
    table: Table | None = None,
    data_dir: Path | None = None,
    difficulty: int = 3,
    limit: int | None = None,
    validation_limit: int = 500,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_targets: tuple[str, ...] = LORA_TARGETS,
    rslora: bool = False,
    checkpoint_every: int | None = None,
    keep: int = 2,
    best: bool = False,
    mesh: str | None = None,
    ignore_config_fields: tuple[str, ...] = (),
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    on_step: Callable[[int, dict[str, Any]], None] = lambda steps, line: None,
) -> dict[str, Any]:
    """Trains `base` on a task and writes the result to `out`, with a manifest to repeat it.

    The folder `out.run` has the resolved options (train.toml), every step's metrics (metrics.jsonl,
    curves.png) and the checkpoints. An interrupted run resumes when it is started again with the same
    arguments, and gives the same bits.

    Args:
      base: a Hugging Face directory; an encoder for the GLUE tasks, a decoder for the problem tasks.
      task: one of `ALL_TASKS`; data_dir, difficulty: see `load_task`, `load_gsm8k`, `word_problems`.
      table: the user's own examples, instead of a task.
      limit: number of training examples to use, the first ones.
      validation_limit: number of held-out examples evaluated at every checkpoint.
      lora_rank: train low-rank adapters (and a classifier's head) instead of all parameters; `out` is then an
        adapter in PEFT's format. lora_alpha: None is twice the rank. lora_targets, rslora: see `LoraConfig`.
      checkpoint_every: steps; None is a tenth of the run.
      keep: number of newest checkpoints to keep, beside the best.
      best: write the checkpoint with the best validation metric instead of the last step.
      mesh: "DATAxMODEL", numbers of shards of a batch and of the parameters, over all devices.
      ignore_config_fields: for the base, see `read_model_config`.
      say: called with progress messages.
      on_step: called with the number of steps and every line of metrics.jsonl.
    Returns: a report: out, run, task, steps, step_taken, loss, delta_rms, delta_max, digest,
      metric_name, validation and the task's test results.
    Raises: ValueError for invalid arguments, or an interrupted run with other arguments or data;
      FloatingPointError if the training diverges; FileError if another training is writing `out`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DarexError(f"{out}: already exists; choose another path.")
    own: dict[str, Any] = {field.name: None for field in dataclasses.fields(Table)}
    if table is not None:
        own, task = dict(vars(table)), table.name
        if Path(table.data).exists():
            own["data"] = str(Path(table.data).resolve())
    elif task not in ALL_TASKS:
        raise DarexError(f"unknown task {task!r}; the tasks are {', '.join(ALL_TASKS)}.")
    base, data_dir = base.resolve(), data_dir and data_dir.resolve()
    if out.resolve().is_relative_to(base):
        raise DarexError(f"{out} is inside the base {base}; choose another path.")
    options = dataclasses.asdict(recipe) | {
        "base": str(base), "task": None if table else task, **own, "data_dir": data_dir and str(data_dir),
        "difficulty": difficulty,
        "limit": limit, "validation_limit": validation_limit, "lora_rank": lora_rank,
        "lora_alpha": lora_alpha, "lora_targets": list(lora_targets), "rslora": rslora,
        "checkpoint_every": checkpoint_every, "keep": keep, "best": best, "mesh": mesh,
        "ignore_config_fields": list(ignore_config_fields), "seed": seed,
    }  # fmt: skip
    lora = None
    if lora_rank is not None:
        alpha = 2.0 * lora_rank if lora_alpha is None else lora_alpha
        lora = LoraConfig(lora_rank, alpha, lora_targets, rslora)
    parts = _mesh_of(mesh, recipe)
    key = seed_key(seed)
    decoding = task in PROBLEM_TASKS if table is None else table.prompt is not None
    sizes = {"train": limit, "validation": validation_limit}
    if decoding:
        model, known = load_model(base, mesh=parts, ignore_config_fields=ignore_config_fields)
        if not isinstance(model.config, DecoderConfig):
            raise DarexError(f"{task} is for decoders, but {base} is a {model.config.model_type}.")
        tokenizer = load_tokenizer(base)
        if table is None:
            train, others = (
                encode_problems(tokenizer, load_problems(task, split, data_dir, difficulty, seed)[:most])
                for split, most in sizes.items()
            )
        else:
            splits = read_completions(table, sizes)
            train, others = (
                encode_answers(tokenizer, *(column[:most] for column in splits[split]))
                for split, most in sizes.items()
            )
        start = _start(model, known, known, lora, key, parts)
        lesson = _answering(start, train, others, recipe, key, None if table is None else table.metric)
    else:
        classes = _classes(base)
        if table is None:
            examples = load_task(task, data_dir, seed)
        else:
            examples = read_task(table, sizes, classes, fixed=False)
        body, known = load_model(base, mesh=parts, ignore_config_fields=ignore_config_fields)
        renamed = len(classes) == examples.num_labels and classes != examples.label_names
        if renamed and not is_unnamed(classes):
            say(f"the head of {base} is kept: {', '.join(classes)} become {', '.join(examples.label_names)}")
        model, params = classifier_for(examples, body, known, jax.random.fold_in(key, 0))
        start = _start(model, params, known, lora, key, parts)
        lesson = _classifying(start, base, examples, limit, validation_limit, recipe, key)
    steps = recipe.total_steps(lesson.examples)
    inputs = {
        "base": params_digest(known),
        "config": _json_digest(start.model.config.to_hf()),
        **lesson.digests,
    }
    run = out.with_name(out.name + ".run")
    checkpoints = Checkpoints(run / "checkpoints", checkpoint_every or max(1, steps // 10), keep, warn=say)
    with only_one(run / "lock", f"another training is writing {out}; wait for it, or choose another OUT."):
        _begin(run, run_manifest("train", options, inputs, {}), bool(checkpoints.steps()), say)
        with metrics_file(run / "metrics.jsonl", recipe.batch_size) as write:
            params, _ = lesson.train(
                frozen=start.frozen,
                pretrained=start.pretrained,
                mesh=parts,
                checkpoints=checkpoints,
                validate=lesson.validate,
                measure=start.measure,
                best=best,
                on_step=lambda record: on_step(steps, write(record)),
            )
        lines = read_metrics(run / "metrics.jsonl")
        plot_metrics(lines, lesson.metric_name, run / "curves.png")
        digest = params_digest(params)
        manifest = run_manifest("train", options, inputs, {"adapter" if lora else "model": digest})
        if lora is None:
            save_params(out, params, start.model.config.to_hf(), companions_from=base, manifest=manifest)
        else:
            kind = "CAUSAL_LM" if decoding else "SEQ_CLS"
            adapter, dense = _split(params, is_factor)
            save_adapter(
                out, lora, adapter, dense, task_type=kind, base=str(base), manifest=manifest,
                model_config=None if decoding else start.model.config.to_hf(),
            )  # fmt: skip
    taken = lines[-1]
    if best:
        kept = set(checkpoints.steps())
        validated = [line for line in lines if "validation" in line and line["step"] + 1 in kept]
        taken = max(validated, key=lambda line: (line["validation"], line["step"]))
    return {
        "out": str(out), "run": str(run), "task": task, "steps": steps, "step_taken": taken["step"] + 1,
        "loss": taken["loss"], "delta_rms": taken["delta_rms"], "delta_max": taken["delta_max"],
        "digest": digest, "metric_name": lesson.metric_name, "validation": taken["validation"],
    } | lesson.test(params)  # fmt: skip


def _classes(base: Path) -> tuple[str, ...]:
    """The class names of a classifier, () of another model; no weight is read."""
    config = read_config(base)
    return class_names(config) if "ForSequenceClassification" in str(config.get("architectures")) else ()


def _json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _mesh_of(text: str | None, recipe: Recipe) -> Any:
    if text is None:
        return None
    data, _, model = text.partition("x")
    if not (data.isdecimal() and model.isdecimal()):
        raise DarexError(f"mesh must be DATAxMODEL, such as 4x2, got {text!r}.")
    if not int(data) or not int(model):
        raise DarexError(f"mesh {text}: both numbers must be positive.")
    if recipe.batch_size // recipe.accumulate % int(data):
        part = recipe.batch_size // recipe.accumulate
        raise DarexError(f"mesh {text}: {part} examples per micro-batch are not divisible by {data}.")
    return make_mesh(int(data), int(model))


def _begin(run: Path, manifest: Mapping[str, Any], goes_on: bool, say: Callable[[str], None]) -> None:
    """Records the arguments of a new run; when resuming, compares them with the recorded ones."""
    file = run / "manifest.json"
    if not goes_on:
        kept = {name: value for name, value in manifest["options"].items() if value is not None}
        write_whole(run / "train.toml", tomli_w.dumps(kept))
        write_whole(file, json.dumps(manifest, indent=2) + "\n")
        return
    before = read_json(file)
    for part in ("options", "inputs"):
        for name in {**before[part], **manifest[part]}:
            there, here = before[part].get(name), manifest[part].get(name)
            if there != here:
                raise DarexError(
                    f"{run} is an interrupted run with another {name} ({there!r} there, {here!r} here). "
                    "Resume that one, delete the folder, or choose another OUT."
                )
    for part in ("versions", "platform"):
        for name, there in before[part].items():
            if there != manifest[part].get(name):
                say(f"{name} was {there} when this run started and is {manifest[part].get(name)} now")
    say(f"resuming the run in {run}")


def _start(
    model: Model, params: Params, known: Params, lora: LoraConfig | None, key: jax.Array, mesh: Any
) -> Start:
    """Args: known: the base's parameters; those in `params` are the same arrays, or new ones."""
    old = {id(leaf) for leaf in jax.tree.leaves(known)}
    new = {name for name, leaf in flatten_names(params).items() if id(leaf) not in old}
    if mesh is not None:
        params = jax.device_put(params, param_shardings(mesh, params))
    if lora is None:
        _, pretrained = _split(params, lambda name: name in new)
        return Start(model, params, {}, pretrained, None)
    model, adapter = add_adapters(model, lora, jax.random.fold_in(key, 2))
    along, frozen = _split(params, lambda name: name in new or name.startswith("classifier."))
    _, kept_head = _split(along, lambda name: name in new)
    check_savable(lora, adapter, along, "SEQ_CLS" if along else "CAUSAL_LM")
    pretrained = combine(jax.tree.map(jnp.zeros_like, adapter), kept_head)
    scales = lora.scales(adapter)

    def measure(params: Params) -> Any:
        factors, others = _split(params, is_factor)
        merged = adapter_delta(factors, scales)
        return delta_size(combine(merged, others), combine(jax.tree.map(lambda _: 0.0, merged), kept_head))

    return Start(model, combine(adapter, along), frozen, pretrained, measure)


def _split(tree: Params, chosen: Callable[[str], bool]) -> tuple[Params, Params]:
    """Splits a tree into the leaves with chosen names and the others."""
    named = flatten_names(tree)
    return (
        unflatten_names({name: leaf for name, leaf in named.items() if chosen(name)}),
        unflatten_names({name: leaf for name, leaf in named.items() if not chosen(name)}),
    )


def _classifying(
    start: Start,
    base: Path,
    task: Task,
    limit: int | None,
    validation_limit: int,
    recipe: Recipe,
    key: jax.Array,
) -> Lesson:
    """The training task of a classifier or regressor."""
    model, params, frozen, *_ = start
    tokenizer = load_tokenizer(base)
    train = encode(tokenizer, task.train.select(slice(limit)))
    held_out = encode(tokenizer, task.validation.select(slice(validation_limit)))
    batches = evaluation_batches(held_out)

    def test(params: Params) -> dict[str, Any]:
        result = evaluate(model, combine(frozen, params), encode(tokenizer, task.test), task)
        return {"test": result["metric"], "test_examples": result["n"]}

    return Lesson(
        lambda **loop: fine_tune(model, params, train, recipe, key=jax.random.fold_in(key, 1), **loop),
        len(train),
        {"train": train.digest(), "held_out": held_out.digest()},
        task.metric_name,
        lambda params: task.metric(predict(model, combine(frozen, params), batches), held_out.labels),
        test,
    )


def _answering(
    start: Start,
    train: EncodedAnswers,
    others: EncodedAnswers,
    recipe: Recipe,
    key: jax.Array,
    metric: str | None,
) -> Lesson:
    """The training task of a causal language model, validated by a share of right tokens or answers."""
    model, params, frozen, *_ = start
    name = share_of_right(metric or "token_accuracy")
    batches = list(answer_batches(others, recipe.batch_size, 0, 0))

    def test(params: Params) -> dict[str, Any]:
        scores = answer_scores(model, combine(frozen, params), batches)
        return {"validation_loss": scores.loss, "validation_answers": scores.answers}

    return Lesson(
        lambda **loop: train_answers(model, params, train, recipe, key=jax.random.fold_in(key, 1), **loop),
        len(train),
        {"train": train.digest(), "held_out": others.digest()},
        name.replace("_", " "),
        lambda params: answer_scores(model, combine(frozen, params), batches).named()[name],
        test,
    )
