"""Commands that evaluate models: eval, demo."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from darex_jax.cli.options import (
    ALLOW_CHANGED_FILES,
    BATCH_SIZE,
    BESIDE,
    DATA_DIR,
    DELTAS,
    DIFFICULTY,
    DTYPE,
    IGNORE,
    JSON,
    LEARNING_RATE,
    LIMIT,
    PARAMS,
    SEED,
    TASK,
    TEXT_COLUMN,
    check_data_dir,
    check_difficulty,
    has_files,
    own_examples,
    take_only_table,
    typed,
    with_params,
)
from darex_jax.cli.show import bytes_text, plain, print_table, problem_bar, say_if_large, step_bar
from darex_jax.cli.stores import HERE, PATH, as_given
from darex_jax.core.errors import DarexError

if TYPE_CHECKING:
    from darex_jax.tasks.opening import Opened


@click.command("eval")
@click.argument("model", type=PATH)
@click.option("--task", "task_names", default=("opinions",), show_default=True, multiple=True,
              help="opinions (generated), cola, sst2, mrpc, stsb; gsm8k, word-problems. With several deltas "
              "one for all or one per delta.")  # fmt: skip
@DELTAS
@BESIDE
@ALLOW_CHANGED_FILES
@DATA_DIR
@own_examples
@TEXT_COLUMN
@click.option("--split", default="test", show_default=True, type=click.Choice(["validation", "test"]))
@LIMIT
@click.option("--batch-size", type=click.IntRange(1), help="Default: 16 examples, 8 problems.")
@click.option("--max-new-tokens", default=1024, show_default=True, type=click.IntRange(1),
              help="Maximum length of an answer to a problem, in tokens.")  # fmt: skip
@click.option("--marker", default="The answer is: ", show_default=True,
              help="What an answer to a problem comes after; Abel models write ####.")  # fmt: skip
@click.option("--records", type=HERE, help="File for the answers to problems. Default: under runs/.")
@DIFFICULTY
@DTYPE
@PARAMS
@IGNORE
@SEED
@JSON
def evaluate(
    model: Path,
    task_names: tuple[str, ...],
    deltas: tuple[Path, ...],
    beside: bool,
    allow_changed_files: bool,
    data_dir: Path | None,
    split: str,
    limit: int | None,
    batch_size: int | None,
    max_new_tokens: int,
    marker: str,
    records: Path | None,
    difficulty: int,
    dtype: str | None,
    params: str | None,
    ignore_config_fields: tuple[str, ...],
    seed: int,
    as_json: bool,
    **own: Any,
) -> None:
    """Evaluate a fine-tuned MODEL on a task, or on --data.

    With --delta, MODEL is the base and the delta is applied in memory; several classifiers' deltas are
    evaluated in the same batches. Answers to problems (gsm8k, word-problems) are recorded in a file, from
    which an interrupted run resumes. If --data has no split of that name, it is the tenth of the training
    rows that darex train holds out, always the same.
    """
    from darex_jax.cli.text import open_text_model
    from darex_jax.files.checkpoint import Checkpoint
    from darex_jax.files.manifest import run_manifest, weights_digest
    from darex_jax.tasks.answers import PROBLEM_TASKS, load_problems
    from darex_jax.tasks.opening import open_model

    (model,) = with_params(params, model)
    table = take_only_table(own, "task_names")
    if table is not None and typed("seed"):
        raise click.UsageError("--seed is of generated tasks: the rows of --data are split without it.")
    if not marker:
        raise click.UsageError("--marker is what an answer comes after, not nothing.")
    if table is not None or not set(task_names) & set(PROBLEM_TASKS):
        for option in filter(typed, ("records", "max_new_tokens", "marker")):
            raise click.UsageError(
                f"--{option.replace('_', '-')} is for problems: pass --task {' or '.join(PROBLEM_TASKS)}."
            )
    check_difficulty(None if table is not None else task_names[0])
    check_data_dir(next(filter(has_files, task_names), None) if table is None else None, data_dir)
    say_if_large("eval", model)
    if beside and not deltas:
        raise click.UsageError("--beside needs --delta.")
    if len(deltas) > 1 or beside:
        if dtype or records or table:
            one = "--dtype" if dtype else "--records" if records else "--data"
            raise DarexError(f"{one} supports only one --delta, without --beside.")
        found = _many_rows(
            model, deltas, task_names, data_dir, split, limit, seed, batch_size,
            allow_changed_files=allow_changed_files, ignore_config_fields=ignore_config_fields,
        )  # fmt: skip
        if as_json:
            settings = {
                "task": task_names,
                "data_dir": data_dir,
                "split": split,
                "limit": limit,
                "seed": seed,
                "model": model,
                "delta": [str(delta) for delta in deltas],
            }
            with Checkpoint(model) as checkpoint:
                inputs = {"base_weights": weights_digest(checkpoint)}
            inputs |= {f"delta {row['name']}": row["digest"] for row in found}
            inputs |= {f"data {row['name']}": row["data"] for row in found}
            manifest = run_manifest("eval", settings, inputs, {})
            report = {"model": str(model), "split": split, "deltas": found, "manifest": manifest}
            click.echo(as_given(json.dumps(report)))
        else:
            _print_many(model, found)
        return
    if len(task_names) > 1:
        raise DarexError("several --task need as many --delta.")
    (task_name,), delta = task_names, next(iter(deltas), None)
    options: dict[str, Any] = {
        "task": task_name, "data_dir": data_dir, "split": split, "limit": limit, "seed": seed, "dtype": dtype,
    }  # fmt: skip
    opening: dict[str, Any] = {
        "delta": delta,
        "allow_changed_files": allow_changed_files,
        "ignore_config_fields": ignore_config_fields,
    }
    if table is not None:
        task_name = options["task"] = table.name
        options["table"] = vars(table)
        if table.label is not None:
            _refuse_decoder(model, "classification (--label)")
        opened = open_model(model, dtype, **opening)
        score = _complete_examples if table.prompt is not None else _classify_table
        result, inputs = score(opened, table, split, limit, batch_size)
        text = f"{result['metric']:.4f} on {result['n']} examples"
    elif task_name in PROBLEM_TASKS:
        problems = load_problems(task_name, split, data_dir, difficulty, seed)[:limit]
        if task_name == "word-problems":
            options["difficulty"] = difficulty
        options |= {"marker": marker, "max_new_tokens": max_new_tokens}
        result, inputs = _answer_problems(
            open_text_model(model, dtype, **opening),
            dtype,
            task_name,
            problems,
            batch_size or 8,
            max_new_tokens,
            marker,
            records,
            as_json,
        )
        text = (
            f"{result['metric']:.4f} ± {result['standard_error']:.4f} on {result['n']} problems, "
            f"{result['unanswered']} without a number"
        )
    else:
        _refuse_decoder(model, task_name)
        result, inputs = _classify_examples(
            open_model(model, dtype, **opening),
            task_name,
            data_dir,
            split,
            limit,
            seed,
            batch_size,
        )
        text = f"{result['metric']:.4f} on {result['n']} examples"
    if as_json:
        head = {"model": str(model), "delta": delta and str(delta), "task": task_name, "split": split}
        report = head | result | {"manifest": run_manifest("eval", options, inputs, {})}
        click.echo(as_given(json.dumps(report)))
    else:
        rows = [(f"{task_name} {split} {result['metric_name']}", text)]
        rows += [("answers", result["records"])] if "records" in result else []
        print_table(f"{model} with {delta}" if delta else str(model), rows)


def _refuse_decoder(model: Path, what: str) -> None:
    """Raises: DarexError for a model that has no classes, before its weights are read."""
    from darex_jax.core.scope import DECODERS
    from darex_jax.files.checkpoint import read_config

    if (family := read_config(model).get("model_type")) in DECODERS:
        raise DarexError(
            f"{what} is for encoders, but {model} is a {family}: pass --task gsm8k, for example."
        )


def _many_rows(
    base: Path,
    deltas: tuple[Path, ...],
    task_names: tuple[str, ...],
    data_dir: Path | None,
    split: str,
    limit: int | None,
    seed: int,
    batch_size: int | None,
    **opening: Any,
) -> list[dict[str, Any]]:
    """The results of `eval` for several deltas."""
    from darex_jax.files.artifact import DeltaFile
    from darex_jax.runs.many import evaluate_many, open_many
    from darex_jax.tasks import load_task
    from darex_jax.tasks.answers import PROBLEM_TASKS

    if len(task_names) not in (1, len(deltas)):
        raise DarexError(
            f"{len(task_names)} tasks for {len(deltas)} deltas: give one for all or one per delta."
        )

    if answered := [name for name in task_names if name in PROBLEM_TASKS]:
        raise DarexError(f"{answered[0]} is for decoders, whose deltas are evaluated one at a time.")

    def delta_digest(path: Path) -> str:
        with DeltaFile(path) as file:
            return file.recipe.digest()

    loaded = {name: load_task(name, data_dir, seed) for name in dict.fromkeys(task_names)}
    many = open_many(base, deltas, **opening)
    of_delta = dict(zip(many.bank.names, task_names * (len(deltas) // len(task_names)), strict=True))
    tasks = {name: loaded[task] for name, task in of_delta.items()}
    examples = {name: getattr(task, split).select(slice(limit)) for name, task in tasks.items()}
    results = evaluate_many(many, tasks, examples, batch_size)
    return [
        {"name": name, "delta": str(delta), "bytes": delta.stat().st_size, "task": task.name, **results[name]}
        | {"digest": delta_digest(delta), "data": examples[name].digest()}
        for delta, (name, task) in zip(deltas, tasks.items(), strict=True)
    ]


def _print_many(base: Path, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{len(rows)} deltas on {plain(as_given(str(base)))}", title_justify="left")
    for heading in ("delta", "size", "task", "metric", "examples"):
        table.add_column(
            heading, justify="right" if heading in ("size", "examples") else "left", overflow="fold"
        )
    for row in rows:
        metric = f"{row['metric_name']} {row['metric']:.4f}"
        cells = (plain(row["name"]), bytes_text(row["bytes"]), row["task"], metric, f"{row['n']:,}")
        table.add_row(*map(Text, cells))
    Console().print(table)


def _answer_problems(
    opened: "Opened",
    dtype: str | None,
    task_name: str,
    problems: Any,
    batch_size: int,
    max_new_tokens: int,
    marker: str,
    records: Path | None,
    quiet: bool,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The result, and digests of its inputs."""
    from darex_jax.evaluation.gsm8k import evaluate_gsm8k
    from darex_jax.evaluation.text import complete
    from darex_jax.files.manifest import params_digest
    from darex_jax.models.generate import end_tokens

    loaded, params, tokenizer, ends = opened
    digest = params_digest(params)
    settings = {
        "model": digest,
        "dtype": dtype,
        "max_new_tokens": max_new_tokens,
        "decoding": "greedy",
        "eos_token_id": sorted(end_tokens(ends)),
    }
    records = records or Path("runs") / f"records-{task_name}-{digest[:12]}.jsonl"

    def answers(prompts: list[str]) -> list[str]:
        return complete(
            loaded,
            params,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            batch_size=batch_size,
        )

    with problem_bar(task_name, len(problems), quiet) as on_batch:
        result = evaluate_gsm8k(
            problems, answers, records, settings, batch_size=batch_size, marker=marker, on_batch=on_batch
        )
    return result | {"records": str(records)}, {"model": digest}


def _classify_examples(
    opened: "Opened",
    task_name: str,
    data_dir: Path | None,
    split: str,
    limit: int | None,
    seed: int,
    batch_size: int | None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The result, and digests of its inputs."""
    from darex_jax.tasks import load_task

    return _classify(opened, load_task(task_name, data_dir, seed), split, limit, batch_size)


def _classify_table(
    opened: "Opened", table: Any, split: str, limit: int | None, batch_size: int | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """As `_classify_examples`; classes are the model's, by name."""
    from darex_jax.models.encoder import class_names
    from darex_jax.tasks.table import read_task

    names = class_names(opened.model.config.to_hf())
    return _classify(opened, read_task(table, (split,), names), split, limit, batch_size)


def _complete_examples(
    opened: "Opened", table: Any, split: str, limit: int | None, batch_size: int | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Scores of a decoder on completions: loss, token accuracy and exact match of greedy decoding."""
    from darex_jax.files.manifest import params_digest
    from darex_jax.models import DecoderConfig
    from darex_jax.tasks.answers import answer_batches, encode_answers
    from darex_jax.tasks.table import read_completions
    from darex_jax.training.causal_lm import answer_scores

    if not isinstance(opened.model.config, DecoderConfig):
        family = opened.model.config.model_type
        raise DarexError(f"--prompt and --completion are for decoders, but this is a {family}.")
    columns = (column[:limit] for column in read_completions(table, (split,))[split])
    encoded = encode_answers(opened.tokenizer, *columns)
    scores = answer_scores(opened.model, opened.params, list(answer_batches(encoded, batch_size or 8, 0, 0)))
    if not math.isfinite(scores.loss):
        raise DarexError(f"the model's outputs are NaN or infinite: its loss is {scores.loss}.")
    found = scores.named()
    metric = table.metric or "exact_match"
    result = {"metric": found[metric], "metric_name": metric, "n": len(encoded), **found}
    return result, {"model": params_digest(opened.params), "data": encoded.digest()}


def _classify(
    opened: "Opened", task: Any, split: str, limit: int | None, batch_size: int | None
) -> tuple[dict[str, Any], dict[str, str]]:
    from darex_jax.evaluation.classification import evaluate
    from darex_jax.files.manifest import params_digest
    from darex_jax.tasks.batching import encode

    data = getattr(task, split).select(slice(limit))
    result = evaluate(opened.model, opened.params, encode(opened.tokenizer, data), task, batch_size)
    return result, {"model": params_digest(opened.params), "data": data.digest()}


@click.command()
@click.option("--base", type=PATH, help="Directory of a pretrained BERT. Default: MiniLM from its package.")
@click.option("--out", type=HERE, default="runs/demo", show_default=True)
@TASK
@DATA_DIR
@click.option("--drop-rate", "-p", "drop_rates", multiple=True, type=click.FloatRange(0, 1, True, True),
              default=(0.9, 0.99, 0.999), show_default=True, help="May be given several times.")  # fmt: skip
@click.option("--steps", default=250, show_default=True, type=click.IntRange(1))
@LEARNING_RATE
@BATCH_SIZE
@LIMIT
@SEED
@JSON
def demo(
    base: Path | None,
    out: Path,
    task_name: str,
    data_dir: Path | None,
    drop_rates: tuple[float, ...],
    steps: int,
    learning_rate: float,
    batch_size: int,
    limit: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Run an end-to-end demo on real weights.

    Fine-tunes an encoder, prunes its delta with DARE and DAREx-q, stores it, restores
    the model from it and evaluates.
    """
    from darex_jax.core.memory import keep_freed_memory
    from darex_jax.runs.demo import demo_weights, run_demo

    check_data_dir(task_name, data_dir)
    keep_freed_memory()
    base = base or demo_weights()
    with step_bar("fine-tuning", steps, as_json) as on_step:
        results = run_demo(
            base,
            out,
            task_name=task_name,
            data_dir=data_dir,
            steps=steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            limit=limit or 1000,
            drop_rates=drop_rates,
            say=lambda line: None if as_json else click.echo(line, err=True),
            on_step=on_step,
        )
    if as_json:
        click.echo(json.dumps(results))
        return
    _print_demo(results)
    click.echo(f"Plot: {out / 'metric_by_q.png'}; results: {out / 'results.json'}")


def _print_demo(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{results['task']}, test {results['metric']}: fine-tuned {results['fine_tuned']:.3f}"
    table = Table(title=title, caption="mean ± standard deviation over 4 masks; size of the q_v artifact")
    for heading in ("rate", "DARE", "q by labels", "q by outputs", "size", "restored"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results["rates"]:
        cells = [f"{row[m]['mean']:.3f} ±{row[m]['std']:.3f}" for m in ("dare", "q_v", "q_e")]
        for i, method in ((1, "q_v"), (2, "q_e")):
            cells[i] += f"\nq {row[method]['q']:.4g}"
        ratio = results["fine_bytes"] / row["artifact_bytes"]
        bits = "exact" if row["restored_bit_identical"] else "DIFFERS"
        table.add_row(
            str(row["drop_rate"]), *cells, f"{bytes_text(row['artifact_bytes'])}\n1/{ratio:.0f}", bits
        )
    Console().print(table)
