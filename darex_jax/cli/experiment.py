"""The command that runs a declared study: experiment."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from darex_jax.cli.options import DATA_DIR, JSON
from darex_jax.cli.show import training_bar
from darex_jax.cli.stores import HERE

ROWS = "{n_fmt} of {total_fmt} rows, {elapsed}{postfix}"  # tqdm's own estimate counts trainings as rows


@click.command()
@click.argument("name", required=False)
@click.option("--scale", default="small", show_default=True, type=click.Choice(["small", "paper"]),
              help="small: real MiniLM and a small Llama, two cores. paper: the paper's models.")  # fmt: skip
@click.option("--only", metavar="TEXT", help="Only the rows whose fine-tune or way contains this.")
@click.option("--folder", type=HERE, default="experiments", show_default=True, help="Where the studies are.")
@click.option("--runs", type=HERE, default="runs/fine-tunes", show_default=True,
              help="Where fine-tuned models are kept, by the digest of what made them.")  # fmt: skip
@click.option(
    "--models", type=HERE, help="Folder of Hugging Face directories of the models that a study names."
)
@DATA_DIR
@click.option("--dry-run", is_flag=True, help="Say what would be measured, and how long it may take.")
@click.option("--first-step", is_flag=True,
              help="Of every model one training step, with random weights of the true shapes: computed where "
              "it fits in memory, else compiled ahead of time.")  # fmt: skip
@click.option("--table", is_flag=True, help="Write tables and figures from the rows that are there.")
@JSON
def experiment(
    name: str | None,
    scale: str,
    only: str | None,
    folder: Path,
    runs: Path,
    models: Path | None,
    data_dir: Path | None,
    dry_run: bool,
    first_step: bool,
    table: bool,
    as_json: bool,
) -> None:
    """Run a declared study, row by row. It resumes where it stopped; without NAME the studies are listed.

    Rows are JSON lines in FOLDER/results/SCALE/NAME.jsonl; tables and figures are written beside them.
    """
    from darex_jax.study.plan import chosen, find_studies, read_plan
    from darex_jax.study.run import known_rows, missing_cells

    if name is None:
        _list(folder, find_studies(folder), scale, as_json)
        return
    plan = read_plan(folder, name.removesuffix(".toml"), scale)
    if first_step:
        _first_steps(plan, only, as_json)
        return
    chosen(plan, only)
    rows = known_rows(plan)
    if dry_run:
        _say_missing(missing_cells(plan, rows, only), rows, as_json)
        return
    if not table:
        from darex_jax.core.memory import keep_freed_memory
        from darex_jax.study.fine_tunes import Place
        from darex_jax.study.run import run_study

        keep_freed_memory()
        with _bars(as_json) as (say, on_step, on_row):
            place = Place(runs, models, data_dir, say, on_step)
            rows = run_study(plan, place, only=only, on_row=on_row)
    _write(plan, rows, as_json)


def _list(folder: Path, names: list[str], scale: str, as_json: bool) -> None:
    from darex_jax.cli.show import print_table
    from darex_jax.core.errors import DarexError, FileError
    from darex_jax.study.plan import read_plan
    from darex_jax.study.run import known_rows, missing_cells

    if not names:
        raise FileError(f"{folder}: has no studies; they are TOML files, see --folder.")
    found = {}
    for name in names:
        try:
            plan = read_plan(folder, name, scale)
        except DarexError as error:
            found[name] = str(error)
            continue
        rows = known_rows(plan)
        lacks = sum(len(cells) for _, cells in missing_cells(plan, rows))
        found[name] = f"{plan.title}: {len(rows)} rows" + (f", {lacks} missing" if lacks else "")
    if as_json:
        click.echo(json.dumps(found))
    else:
        print_table(f"{folder}, {scale}", list(found.items()))


def _say_missing(todo: list[Any], rows: list[Any], as_json: bool) -> None:
    from darex_jax.cli.show import print_table
    from darex_jax.study.rows import seconds_left

    lacks = [cell for _, cells in todo for cell in cells]
    left = seconds_left(lacks, rows)
    if as_json:
        click.echo(
            json.dumps({"rows": len(rows), "missing": [list(cell) for cell in lacks], "seconds": left})
        )
        return
    title = f"{len(rows)} rows, {len(lacks)} missing"
    if not lacks:
        click.echo(title)
    else:
        print_table(title, [(group.name, f"{len(cells)} rows") for group, cells in todo])
        click.echo(f"Estimated time, trainings not counted: {time_text(left)}.")


def time_text(seconds: float | None) -> str:
    """A duration in the unit that fits; None is unknown."""
    if seconds is None:
        return "unknown, nothing like it was measured yet"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def _bars(quiet: bool) -> Iterator[tuple[Any, Any, Any]]:
    """What a running study says: lines, a bar of the training under way, a bar of rows with the time left."""
    from tqdm import tqdm

    training: list[Any] = []
    with ExitStack() as stack:
        rows = stack.enter_context(tqdm(bar_format=ROWS, disable=quiet, dynamic_ncols=True, leave=False))

        def say(line: str) -> None:
            if not quiet:
                tqdm.write(line, file=sys.stderr)

        def on_step(steps: int, line: Any) -> None:
            if not training:
                training.append(stack.enter_context(training_bar("training", quiet)))
            training[0](steps, line)
            if line["step"] + 1 == steps:
                training.clear()

        def on_row(progress: Any) -> None:
            row = progress.row
            at = "" if row["at"] is None else f" at {row['at']:g}"
            value = f": {row['mean']:.3f}" if "mean" in row else f": {row['why']}" if "why" in row else ""
            say(f"{row['fine_tune']}, {row['way']}{at}{value}")
            rows.total, rows.n = progress.total, progress.done
            rows.set_postfix_str(f"about {time_text(progress.left)} left")

        yield say, on_step, on_row


def _write(plan: Any, rows: list[Any], as_json: bool) -> None:
    from darex_jax.core.errors import DarexError
    from darex_jax.study.tables import section
    from darex_jax.study.written import print_section, write_section

    if not rows:
        raise DarexError(f"{plan.file}: has no rows yet.")
    shown = section(plan, rows, f"darex experiment {plan.name} --scale {plan.scale}")
    written = write_section(shown, plan.file.with_suffix(""))
    if as_json:
        click.echo(json.dumps({"rows": rows, "written": [str(path) for path in written]}))
        return
    print_section(shown)
    click.echo(f"Written: {', '.join(map(str, written))}")


def _first_steps(plan: Any, only: str | None, as_json: bool) -> None:
    from darex_jax.cli.show import bytes_text, print_table
    from darex_jax.study.first_step import first_step
    from darex_jax.study.plan import chosen

    found = []
    for each in {(e.model, e.optimizer): e for e in chosen(plan, only)}.values():
        if not as_json:
            click.echo(f"{each.model}, {each.optimizer} ...", err=True)
        found.append(first_step(each))
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = []
    for step in found:
        told = f"loss {step['loss']:.3f}" if "loss" in step else bytes_text(step.get("program_bytes", 0))
        rows.append((f"{step['model']}, {step['optimizer']}",
                     f"{step['parameters']:,} parameters, batch {step['batch']}: {step['how']} in "
                     f"{step['seconds']} s, {told}"))  # fmt: skip
    print_table(f"{plan.name}, {plan.scale}: one training step", rows)
