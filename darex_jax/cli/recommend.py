"""`darex recommend`: measures which method loses least at a file size."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from darex_jax.cli.options import (
    BYTES_PER_PARAMETER,
    DATA_DIR,
    DIFFICULTY,
    EXCLUDE,
    IGNORE,
    INCLUDE,
    JSON,
    LIMIT,
    SEED,
    TEXT,
    Ratio,
    check_data_dir,
    check_difficulty,
    own_examples,
    take_table,
    typed,
)
from darex_jax.cli.prune import TRAINING_TEXTS
from darex_jax.cli.show import bytes_text, family_of, print_table, tried_bar, warned
from darex_jax.cli.stores import PATH, as_given

if TYPE_CHECKING:
    from darex_jax.runs.recommend import Advice, Tried

LARGE = 0.5  # share of predictions lost by DARE from which on the delta counts as too large
TAILED = 0.5  # share of the squared norm in the largest 1 % of entries


@click.command()
@click.argument("base", type=PATH)
@click.argument("fine", type=PATH)
@click.option("--size", type=Ratio(), help="File size: this many times smaller than the fine-tuned model. "
              "Default: 100x.")  # fmt: skip
@BYTES_PER_PARAMETER
@click.option("--task", help="Source of texts (labels are not used); or pass --text.")
@DATA_DIR
@DIFFICULTY
@TEXT
@own_examples
@LIMIT
@SEED
@click.option("--steps", default=60, show_default=True, type=click.IntRange(3),
              help="Steps of the trial training.")  # fmt: skip
@click.option("--can-retrain", is_flag=True, help="The fine-tuning can be repeated.")
@INCLUDE
@EXCLUDE
@IGNORE
@JSON
def recommend(
    base: Path,
    fine: Path,
    size: float | None,
    bytes_per_parameter: float | None,
    task: str | None,
    data_dir: Path | None,
    difficulty: int,
    text: Path | None,
    limit: int | None,
    seed: int,
    steps: int,
    can_retrain: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    ignore_config_fields: tuple[str, ...],
    as_json: bool,
    **own: Any,
) -> None:
    """Find the method that loses least at a file size. The command that runs it is printed.

    Tries dare, dare with --q two-point, magnitude, wanda, svd, allocated and distilled, if there are texts
    for them: each writes a temporary file of that size; with --text, --task or --data each is measured by its
    agreement with the fine-tuned model on held-out texts.
    """
    from darex_jax.core.memory import keep_freed_memory
    from darex_jax.core.scope import choose_scope
    from darex_jax.files.checkpoint import Checkpoint
    from darex_jax.files.prune import Job
    from darex_jax.methods.table import METHODS
    from darex_jax.runs.prune import wanted_bytes
    from darex_jax.runs.recommend import recommend as advise
    from darex_jax.tasks.source import Source

    check_difficulty(task)
    check_data_dir(task, data_dir)
    if size is not None and bytes_per_parameter is not None:
        raise click.UsageError("pass only one of --size and --bytes-per-parameter.")
    source = None
    options = {**own, "text": text}
    table = take_table(options)
    has_texts = any(given is not None for given in (task, text, table))
    if not has_texts and limit is not None:
        raise click.UsageError("--limit is for texts: pass --task, --text or --data.")
    if has_texts:
        keep_freed_memory()
        source = Source(
            task=task, data_dir=data_dir, difficulty=difficulty, text=options["text"], table=table,
            limit=limit or TRAINING_TEXTS, seed=seed,
        )  # fmt: skip
    with Checkpoint(base) as b, Checkpoint(fine) as f:
        job = Job(b, f, Path("unwritten"), choose_scope(family_of(f, b), include, exclude, f.shapes))
        fine_bytes, size = f.nbytes, 100.0 if size is None else size
        file_bytes = wanted_bytes(job, size, bytes_per_parameter)
        with tried_bar(as_json) as on_try:
            advice = advise(
                job, file_bytes, source, steps=steps, seed=seed, ignore_config_fields=ignore_config_fields,
                on_try=on_try,
            )  # fmt: skip
    budget = {"size": f"{size:g}x"}
    if bytes_per_parameter is not None:
        budget = {"bytes-per-parameter": str(bytes_per_parameter)}
    scope = {"include": include, "exclude": exclude, "ignore-config-field": ignore_config_fields}
    always = _options({**budget, **scope, "seed": seed or None})
    texts = {"task": task, "data-dir": data_dir, "text": text, "limit": limit, **own}
    texts["difficulty"] = difficulty if typed("difficulty") else None
    if METHODS[advice.chosen.method].needs and not advice.chosen.steps:
        texts["limit"] = advice.calibration
    command = _command(advice.chosen, base, fine, always, _options(texts))
    command = as_given(command)
    sentences = _sentences(advice, file_bytes, source is not None, can_retrain)
    if as_json:
        report = asdict(advice) | {"facts": advice.facts._asdict(), "chosen": advice.chosen._asdict()}
        report["tried"] = [each._asdict() for each in advice.tried]
        report |= {"file_bytes": file_bytes, "because": sentences, "command": command, "warnings": warned()}
        click.echo(json.dumps(report, indent=2, default=dict))
        return
    _print_tried(advice)
    for way, reason in advice.failed.items():
        click.echo(f"{way}: {reason}")
    facts = advice.facts
    rows = [
        ("delta", f"{facts.entries:,} entries, {facts.relative:.2%} of the base's norm"),
        ("stable rank", f"{facts.stable_rank:.1f} of {facts.rank:.0f}, median over the matrices"),
        ("tail", f"the largest 1 % of the entries have {facts.tail:.0%} of the squared norm"),
        ("size", f"{bytes_text(file_bytes)}, {fine_bytes / file_bytes:.0f} times smaller"),
    ]
    print_table("delta and size", rows)
    for sentence in sentences:
        click.echo(sentence)
    click.echo(f"Run it: {command}")


def _options(values: dict[str, Any]) -> list[str]:
    """Command-line options from values; tuples are repeated, None is omitted."""
    given = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}
    return [
        p for name, values in given.items() for v in values if v is not None for p in (f"--{name}", str(v))
    ]


def _sentences(advice: "Advice", file_bytes: int, has_texts: bool, can_retrain: bool) -> list[str]:
    """The findings and conclusions, as sentences."""
    chosen, facts = advice.chosen, advice.facts
    sentences = []
    dare = next((t for t in advice.tried if t.method == "dare" and not t.options), None)
    if advice.measure is None:
        why = "Without texts" if not has_texts else "For a model without a head of one class or score"
        sentences.append(
            f"{why} the loss of predictions cannot be measured, only the error of the stored delta: "
            f"{chosen.name} leaves out {chosen.error:.0%} of its squared norm."
        )
        if not has_texts:
            sentences.append(
                "A few hundred lines of --text, without labels, allow both measuring it and training."
            )
    else:
        loss = f"{chosen.loss:.1%}" if chosen.loss is not None else "nothing"
        sentences.append(
            f"In {bytes_text(file_bytes)} {chosen.name} loses least: {loss} of the {advice.measure} with "
            f"the fine-tuned model, on {advice.held_out} held-out texts (the base alone loses "
            f"{advice.without_delta:.1%})."
        )
        told_apart = 1 / max(advice.held_out, 1)
        equal = [
            t for t in advice.tried
            if t is not chosen and t.loss is not None and t.loss - (chosen.loss or 0.0) < told_apart
        ]  # fmt: skip
        if equal:
            also = "another method loses" if len(equal) == 1 else f"{len(equal)} other methods lose"
            sentences.append(
                f"As far as so many texts can tell, {also} as little; of these the stored delta decides."
            )
        if chosen.loss is not None and (advice.without_delta or 0.0) - chosen.loss < told_apart:
            sentences.append(
                "The base alone loses no more: these texts do not tell the two models apart, so take others."
            )
        if chosen.steps:
            sentences.append(
                f"This is after {chosen.steps} steps of training; the command trains for longer."
            )
        least = LARGE * (advice.without_delta or 0.0)
        if chosen.method != "dare" and dare is not None and dare.loss is not None and dare.loss > least:
            sentences.append(
                f"The delta is too large for random dropping at this size: dare loses {dare.loss:.1%}."
            )
    if facts.tail > TAILED:
        sentences.append("Few entries hold most of the delta, which favours keeping the largest.")
    elif 0 < facts.stable_rank < facts.rank / 20:
        sentences.append("A few directions hold most of the delta, which favours low-rank factors.")
    if can_retrain:
        sentences.append(
            "Since it can be trained again: darex train ... --optimizer adamr keeps the delta small, so "
            "every method loses less; run this command on its result."
        )
    return sentences


def _command(chosen: "Tried", base: Path, fine: Path, options: list[Any], texts: list[Any]) -> str:
    from darex_jax.methods.table import METHODS

    method = METHODS[chosen.method]
    own = [] if method.bits == chosen.options.get("bits") else _options(dict(chosen.options))
    needed = texts if method.needs or "q" in chosen.options else []
    line = ["darex", "prune", base, fine, "OUT", "--method", chosen.method, *own, *options, *needed]
    return shlex.join(map(str, line))


def _print_tried(advice: "Advice") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="methods in a file of this size")
    table.add_column("method")
    for heading in ("bytes", "error of the delta", "loss", "seconds"):
        table.add_column(heading, justify="right")
    for t in advice.tried:
        loss = "" if t.loss is None else f"{t.loss:.1%}"
        name = t.name + (f", {t.steps} steps" if t.steps else "")
        style = "bold green" if t is advice.chosen else None
        table.add_row(name, f"{t.file_bytes:,}", f"{t.error:.3g}", loss, f"{t.seconds:.0f}", style=style)
    Console().print(table)
