"""`darex find-q`: chooses the divisor q for a pair of models."""

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from darex_jax.choosing.table import WAYS, curve_axis
from darex_jax.cli.options import (
    DATA_DIR,
    DIFFICULTY,
    EXCLUDE,
    IGNORE,
    INCLUDE,
    JSON,
    LIMIT,
    RATE,
    SEED,
    TEXT,
    check_data_dir,
    check_difficulty,
    given_files,
    own_examples,
    take_table,
)
from darex_jax.cli.show import point_bar, print_table, q_text, say_if_large
from darex_jax.cli.stores import HERE, PATH, as_given


@click.command("find-q")
@click.argument("base", type=PATH)
@click.argument("fine", type=PATH)
@RATE
@click.option("--objective", default="auto", show_default=True, type=click.Choice(["auto", *WAYS]),
              help="auto: labels with --task, else predictions, or two-point for an encoder without classes; "
              + "; ".join(f"{name}: {way.what}" for name, way in WAYS.items()) + ".")  # fmt: skip
@click.option("--scope", default="model", show_default=True, type=click.Choice(["model", "layer"]),
              help="One q for the model, or one per linear layer.")  # fmt: skip
@click.option("--rule", default="published", show_default=True, type=click.Choice(["published", "exact"]),
              help="With --scope layer: the authors' float16 scan, or Algorithm 3's minimiser, which shrinks "
              "the delta to almost zero.")  # fmt: skip
@click.option("--task", help="Source of the examples: opinions (generated), cola, sst2, mrpc, stsb; "
              "word-problems (generated), gsm8k. Default: a generated one, without its labels.")  # fmt: skip
@DATA_DIR
@DIFFICULTY
@TEXT
@own_examples
@click.option("--out", type=HERE, default="q.json", show_default=True,
              help="The q file, for darex prune --q; a plot is written beside it.")  # fmt: skip
@LIMIT
@click.option("--masks", type=click.IntRange(1),
              help="Number of masks. Default: 1 for labels, predictions and learned, else 4.")  # fmt: skip
@click.option("--grid", nargs=3, type=float, metavar="LOW HIGH STEP",
              help="Search like the authors' code: in steps, which may end beyond HIGH, until more than "
              "3 bring no improvement, then in tenths of a step around the best.")  # fmt: skip
@click.option("--statistics", type=HERE, help="With --scope layer: file to cache input statistics.")
@click.option("--learning-rate", default=1e-2, show_default=True, type=click.FloatRange(0, min_open=True),
              help="For learned. A tenth of the density, 1 - drop rate, suits small deltas.")  # fmt: skip
@click.option("--checkpoints", type=HERE, help="For learned: folder of checkpoints to resume from.")
@click.option("--one-copy", is_flag=True,
              help="Hold one copy of the model and the survivors of each mask: the same q in less than half "
              "of the memory. For one q for the model; not for learned and closed-form.")  # fmt: skip
@INCLUDE
@EXCLUDE
@IGNORE
@SEED
@JSON
def find_q(
    base: Path, fine: Path, drop_rate: float, objective: str, out: Path, as_json: bool, **options: Any
) -> None:
    """Choose the q that survivors are divided by.

    Writes it to a file for `darex prune --q`.
    """
    from darex_jax.choosing.choice import Choice
    from darex_jax.choosing.choose import choose_q
    from darex_jax.files.atomic import write_whole
    from darex_jax.files.paths import check_output
    from darex_jax.files.stream import keep_inputs
    from darex_jax.runs.figures import plot_curve
    from darex_jax.tasks.source import Source

    if out.suffix == ".png":
        raise click.BadParameter(f"{out} cannot be the q file: it is a picture.", param_hint="--out")
    picture = out.with_suffix(".png")
    for written in (out, picture):
        check_output(written)
        keep_inputs(written, base, fine, *given_files(options["text"], options["data"]))
    check_data_dir(options["task"], options["data_dir"])
    options["table"] = take_table(options)
    generated = all(options[name] is None for name in ("task", "text", "table"))
    check_difficulty("word-problems" if generated else options["task"])
    places = [field.name for field in fields(Source) if field.name != "seed"]  # that is of trainings
    source = Source(**{name: options.pop(name) for name in places})
    choice = Choice(objective=objective, **options)
    say_if_large("find-q --one-copy" if choice.one_copy else "find-q", fine)
    with point_bar(objective, as_json) as on_value:
        report = choose_q(base, fine, drop_rate, choice, source, on_value)
    write_whole(out, json.dumps(report, indent=2, allow_nan=False) + "\n")
    drawn = plot_curve(report, picture)
    if as_json:
        click.echo(json.dumps(report, allow_nan=False))
        return
    _print_report(report, out, picture if drawn else None)
    again: list[Any] = ["--seed", choice.seed] if choice.seed else []
    for name, patterns in (("include", choice.include), ("exclude", choice.exclude)):
        again += [part for pattern in patterns for part in (f"--{name}", pattern)]
    use = ["darex", "prune", base, fine, "OUT", "--drop-rate", drop_rate, "--q", out, *again]
    click.echo(f"Use it: {as_given(shlex.join(map(str, use)))}")


def _print_report(report: dict[str, Any], out: Path, picture: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    searched = report.get("value_name")
    if searched is not None:
        axis = curve_axis(report["objective"], report["scope"])
        taken = report.get(axis)
        table = Table(title=f"{searched} by {axis}")
        table.add_column(axis, justify="right")
        table.add_column(searched, justify="right")
        for point, value in report["curve"]:
            here = point == taken or (axis == "epoch" and value == report["value"])
            shown = "not finite" if value is None else f"{value:.5f}"
            table.add_row(f"{point:.6g}", shown, style="bold green" if here else None)
        Console().print(table)
    density = 1 - report["drop_rate"]
    rows = [("q", f"{q_text(report['q'])} (DARE: {density:.4g})")]
    if searched is not None:
        rows.append((searched, f"{report['value']:.5f}"))
        first, last = report.get("plateau", (0, 0))
        if first != last:
            rows.append(("plateau", f"equal values from {first:.6g} to {last:.6g}"))
    if "changes" in report:
        changes = [
            f"{'not finite' if change is None else f'{change:.5g}'} at {q:.4g}"
            for q, change in report["changes"]
        ]
        without = f"{report['change_without_delta']:.5g} without the delta"
        rows.append(("squared output change", ", ".join([without, *changes])))
    if "layers" in report:
        known = {name: q for name, q in report["layers"].items() if q is not None}
        if known:
            rows.append(("by layer", q_text(known)))
        if len(known) < len(report["layers"]):
            rows.append(("no output", f"{len(report['layers']) - len(known)} layers without any output"))
    if not isinstance(report["q"], dict) and report["q"] > 1:
        rows.append(("note", "q is above 1: survivors are shrunk, not enlarged"))
    if "warning" in report:
        rows.append(("warning", report["warning"]))
    used = f"{report['labels']} labels" if report["labels"] else "no labels"
    cost = f"{report['evaluations']} passes over {report['examples']} examples, {used}"
    rows += [("examples", report["data"]), ("cost", cost)]
    if picture is not None:
        rows.append(("picture", str(picture)))
    print_table(str(out), rows)
