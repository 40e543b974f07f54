"""Running a study: row by row, resumed after a stop, never measuring again what is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import groupby
from typing import Any, NamedTuple

from darex_jax.core.errors import FileError
from darex_jax.core.memory import release_programs
from darex_jax.files.atomic import only_one
from darex_jax.files.manifest import run_manifest
from darex_jax.study.fine_tunes import Place
from darex_jax.study.plan import FineTune, Plan
from darex_jax.study.rows import Cell, Row, cell_of, digest_of, read_rows, seconds_left, write_rows
from darex_jax.tasks.splits import edition

FINE_TUNED = "fine-tuned"  # the way of the row that a group begins with


class Group(NamedTuple):
    """Fine-tuned models that are measured together: one, or those that are merged."""

    name: str
    fine_tunes: tuple[FineTune, ...]


class Progress(NamedTuple):
    """Attributes: row: the last one measured; done, total: rows; left: estimated seconds, None if unknown."""

    row: Row
    done: int
    total: int
    left: float | None


def groups(plan: Plan) -> list[Group]:
    """What the rows of a study are about."""
    if not plan.sets:
        return [Group(each.name, (each,)) for each in plan.fine_tunes]
    found = []
    for names in plan.sets:
        ordered = sorted(plan.fine_tunes, key=lambda each: (each.optimizer, each.seed))
        for (optimizer, seed), among in groupby(ordered, lambda each: (each.optimizer, each.seed)):
            by_name = {each.training: each for each in among}
            if missing := [name for name in names if name not in by_name]:
                raise FileError(f"{plan.name}: a set names {', '.join(missing)}, which train lacks.")
            members = tuple(by_name[name] for name in names)
            found.append(Group(f"{'+'.join(names)}/{optimizer}/{seed}", members))
    return found


def columns(plan: Plan, way: str) -> Sequence[float | None]:
    """The columns of a way: those of the study, or `at` of its own, or none."""
    return plan.ways[way].get("at", plan.at or (None,))


def cells(plan: Plan, group: Group, only: str | None = None) -> list[Cell]:
    """Every row of a group but the first. Args: only: what the name of a way or of the group contains."""
    everything = only is None or only in group.name
    return [
        (group.name, way, at)
        for way in plan.ways
        if everything or (only is not None and only in way)
        for at in columns(plan, way)
    ]


def made(plan: Plan, group: Group, way: str, at: float | None) -> str:
    """The digest of all that a row is declared by."""
    trained = [_declared(each) for each in group.fine_tunes]
    options = {name: value for name, value in plan.ways.get(way, {}).items() if name != "at"}
    return digest_of([plan.measure, plan.axis, trained, options, at, plan.masks, plan.test_examples])


def _declared(fine_tune: FineTune) -> dict[str, Any]:
    begun = {} if fine_tune.start is None else {"start": _declared(fine_tune.start)}
    told: dict[str, Any] = {
        "model": fine_tune.model,
        "source": dict(fine_tune.source),
        "task": fine_tune.task,
    }
    told |= {"seed": fine_tune.seed, **edition(fine_tune.task)}
    return told | {"options": dict(fine_tune.options)} | begun


def missing_cells(plan: Plan, rows: Sequence[Row], only: str | None = None) -> list[tuple[Group, list[Cell]]]:
    """What has no row yet, by group."""
    there = {(*cell_of(row), row["made"]) for row in rows}
    found = []
    for group in groups(plan):
        wanted = cells(plan, group, only)
        head = (group.name, FINE_TUNED, None)
        wanted = [head, *wanted] if wanted else []
        lacks = [cell for cell in wanted if (*cell, made(plan, group, cell[1], cell[2])) not in there]
        if lacks:
            found.append((group, lacks))
    return found


def current_rows(plan: Plan, rows: Sequence[Row]) -> list[Row]:
    """The rows of cells that the study has, measured with its settings."""
    by_name = {group.name: group for group in groups(plan)}
    known = {cell for group in by_name.values() for cell in cells(plan, group)}
    return [
        row
        for row in rows
        if (group := by_name.get(row["fine_tune"])) is not None
        and (row["way"] == FINE_TUNED or cell_of(row) in known)
        and row["made"] == made(plan, group, row["way"], row.get("at"))
    ]


def known_rows(plan: Plan) -> list[Row]:
    """The rows of a study: its own, and what it lacks from another study of the same scale, measured with the
    same settings on the same weights; of one group all from one study."""
    rows = read_rows(plan.file)
    others = [read_rows(file) for file in sorted(plan.file.parent.glob("*.jsonl")) if file != plan.file]
    for group, lacks in missing_cells(plan, rows):
        wanted = {(*cell, made(plan, group, cell[1], cell[2])) for cell in lacks}
        own = {row["weights"] for row in current_rows(plan, rows) if row["fine_tune"] == group.name}
        offered = []
        for other in others:
            found = [row for row in other if (*cell_of(row), row["made"]) in wanted]
            weights = own or {row["weights"] for row in found if row["way"] == FINE_TUNED}
            offered.append([row for row in found if row["weights"] in weights])
        taken = max(offered, key=len, default=[])
        cells_taken = {cell_of(row) for row in taken}
        rows = [row for row in rows if cell_of(row) not in cells_taken] + taken
    return ordered(plan, rows)


def run_study(
    plan: Plan,
    place: Place,
    *,
    only: str | None = None,
    on_row: Callable[[Progress], None] = lambda progress: None,
) -> list[Row]:
    """Measures what has no row yet and returns all rows.

    A fine-tuned model is trained, and read, only if a row of it is missing. Rows of other weights, or of
    other settings, are replaced.

    Raises: as `obtain` and the measures; FileError while another process runs this study.
    """
    measure = import_module(f"darex_jax.study.measures.{plan.measure}")
    plan.file.parent.mkdir(parents=True, exist_ok=True)
    with only_one(plan.file.with_suffix(".lock"), f"another process runs {plan.name}; wait for it."):
        rows = known_rows(plan)
        if rows:
            write_rows(plan.file, rows)
        todo = missing_cells(plan, rows, only)
        left = [cell for _, lacks in todo for cell in lacks]
        total, done = len(left), 0
        for group, lacks in todo:
            head, measured = measure.begin(plan, group.fine_tunes, place)
            begun = time.monotonic()
            own = [row for row in rows if row["fine_tune"] == group.name]
            if stale := [row for row in own if row["weights"] != head["weights"]]:
                place.say(f"{group.name}: {len(stale)} rows are of other weights and are measured again")
                rows = [row for row in rows if row not in stale]
                lacks = [
                    cell for found, some in missing_cells(plan, rows, only) if found == group for cell in some
                ]
                total += len(lacks) - sum(cell[0] == group.name for cell in left)
            for cell in lacks:
                _, way, at = cell
                if way == FINE_TUNED:
                    inputs = {"fine_weights": head["weights"]}
                    values = head | {"manifest": run_manifest("experiment", {"study": plan.name}, inputs, {})}
                else:
                    options = {name: value for name, value in plan.ways[way].items() if name != "at"}
                    values = measured(way, options, at)
                row = {
                    "fine_tune": group.name, "way": way, "at": at, "made": made(plan, group, way, at),
                    **values, "weights": head["weights"], "seconds": round(time.monotonic() - begun, 1),
                }  # fmt: skip
                rows = [other for other in rows if cell_of(other) != cell] + [row]
                release_programs(share=1 / 8)  # a row seldom shares programs with the one before
                write_rows(plan.file, ordered(plan, rows))
                begun, done = time.monotonic(), done + 1
                rest = [other for _, some in missing_cells(plan, rows, only) for other in some]
                on_row(Progress(row, done, total, seconds_left(rest, rows)))
    return ordered(plan, rows)


def ordered(plan: Plan, rows: Sequence[Row]) -> list[Row]:
    """The rows in the order in which the study declares them."""
    names = {group.name: i for i, group in enumerate(groups(plan))}
    ways = {way: i for i, way in enumerate([FINE_TUNED, *plan.ways])}
    last = len(names), len(ways)

    def place(row: Row) -> Any:
        name, way, at = cell_of(row)
        return names.get(name, last[0]), ways.get(way, last[1]), -(at or 0.0)

    return sorted(rows, key=place)
