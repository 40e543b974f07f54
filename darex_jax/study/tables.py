"""The rows of a study as tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from darex_jax.study.plan import Plan
from darex_jax.study.rows import Row
from darex_jax.study.run import FINE_TUNED
from darex_jax.study.shown import Figure, Section, Series, Table

AXES = {"bytes": "bytes per parameter, whole file", "drop_rates": "density, 1 - drop rate"}
NEAR = 1e-9
OURS = "this project"  # the source of a study or a claim that is not the paper's


def split_name(name: str) -> tuple[str, str, str]:
    """Training, optimizer and seed of a fine-tune's name."""
    training, optimizer, seed = name.split("/")
    return training, optimizer, seed


def by_models(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each training and optimizer, all seeds together."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault(split_name(row["fine_tune"])[:2], []).append(row)
    return found


def shares(rows: Sequence[Row]) -> dict[tuple[str, float | None], list[float]]:
    """By way and column, of each fine-tune the share of its metric that is kept."""
    whole = {row["fine_tune"]: row["mean"] for row in rows if row["way"] == FINE_TUNED and "mean" in row}
    found: dict[tuple[str, float | None], list[float]] = {}
    for row in rows:
        if row["way"] != FINE_TUNED and "mean" in row and whole.get(row["fine_tune"]):
            found.setdefault((row["way"], row["at"]), []).append(row["mean"] / whole[row["fine_tune"]])
    return found


def tables(plan: Plan, rows: Sequence[Row]) -> list[Table]:
    """What a study shows in tables: a first one over all fine-tunes, then one a training and optimizer."""
    if plan.measure in ("delta", "lora"):
        return _statistics(plan, rows)
    if plan.measure == "merging":
        return _merged(plan, rows)
    found = []
    models = by_models(rows)
    if len(models) > 1:
        found.append(_kept(plan, rows))
    for (training, optimizer), own in models.items():
        found.append(_of_model(plan, training, optimizer, own))
    return found


def figures(plan: Plan, rows: Sequence[Row]) -> list[Figure]:
    """A figure a training and optimizer: the metric against bytes or density, a line a way."""
    if plan.measure not in ("methods", "q") or len(plan.at) < 2:
        return []
    found = []
    for (training, optimizer), own in by_models(rows).items():
        series = []
        for way in plan.ways:
            points = []
            for at in plan.at:
                values = [
                    row["mean"] for row in own if row["way"] == way and row["at"] == at and "mean" in row
                ]
                spreads = [
                    row["std"] for row in own if row["way"] == way and row["at"] == at and "mean" in row
                ]
                if values:
                    error = float(np.std(values, ddof=1)) if len(values) > 1 else spreads[0]
                    x = at if plan.axis == "bytes" else 1.0 - at
                    points.append((x, float(np.mean(values)), error))
            if points:
                x, y, error = zip(*sorted(points), strict=True)
                series.append(Series(way, x, y, error))
        head = [row for row in own if row["way"] == FINE_TUNED]
        if series and head:
            levels = [("fine-tuned", float(np.mean([row["mean"] for row in head])))]
            if (constant := head[0].get("constant")) is not None:
                levels.append(("constant answer", constant))
            metric = head[0].get("metric_name", "metric").replace("_", " ")
            title = f"{training}, {optimizer}"
            found.append(Figure(title, AXES[plan.axis], metric, series, log_x=True, levels=levels))
    return found


def section(plan: Plan, rows: Sequence[Row], command: str) -> Section:
    """A study as a part of a page."""
    from darex_jax.study.claims import findings

    text = [part.replace("\n", " ").strip() for part in plan.text.split("\n\n") if part.strip()]
    if plan.source and plan.source != OURS:
        text.append(f"Reproduces: {plan.source}.")
    return Section(plan.title, text, figures(plan, rows), tables(plan, rows), findings(plan, rows), command)


def column_name(plan: Plan, at: float | None) -> str:
    return "" if at is None else f"{at:g}"


def cell_text(rows: Sequence[Row], brackets: bool = True) -> str:
    """Mean ± deviation over seeds or, of one seed, over masks; a dash where a row says why there is none."""
    good = [row for row in rows if "mean" in row]
    if not good:
        return "-" if rows else ""
    means = [row["mean"] for row in good]
    if len(good) > 1:
        text = f"{np.mean(means):.3f} ± {np.std(means, ddof=1):.3f}"
    elif good[0].get("std") or len(good[0].get("metrics") or ()) > 1:
        text = f"{means[0]:.3f} ± {good[0]['std']:.3f}"
    else:
        text = f"{means[0]:.3f}"
    if brackets and all(row.get("agreement") is not None for row in good):
        text += f" ({np.mean([row['agreement'] for row in good]):.3f})"
    return text


def _of_model(plan: Plan, training: str, optimizer: str, rows: Sequence[Row]) -> Table:
    columns = [at for at in plan.at if any(row["at"] == at for row in rows)]
    heads = [row for row in rows if row["way"] == FINE_TUNED]
    body, best = [], set()
    ways = [way for way in plan.ways if any(row["way"] == way for row in rows)]
    means = {
        (way, at): float(np.mean(values))
        for way in ways for at in columns
        if (values := [r["mean"] for r in rows if r["way"] == way and r["at"] == at and "mean" in r])
    }  # fmt: skip
    for i, way in enumerate(ways):
        cells = [[row for row in rows if row["way"] == way and row["at"] == at] for at in columns]
        body.append([way, *map(cell_text, cells)])
        for j, at in enumerate(columns):
            top = max((value for (_, other), value in means.items() if other == at), default=None)
            if top is not None and means.get((way, at), -np.inf) >= top - NEAR:
                best.add((i, j + 1))
    seeds = sorted({split_name(row["fine_tune"])[2] for row in rows})
    note = ""
    if heads:
        name, count = heads[0].get("metric_name", "metric").replace("_", " "), heads[0].get("test_examples")
        note = f"{name} on {count} examples; fine-tuned {cell_text(heads, brackets=False)}"
        if (constant := heads[0].get("constant")) is not None:
            note += f", a constant answer {constant:.3f}"
        if (no_delta := heads[0].get("no_delta")) is not None:
            note += f", without the delta {no_delta:.3f}"
    note += f". Seeds of the training: {', '.join(seeds)}."
    title = f"{training}, {optimizer}"
    return Table(title, ["", *(column_name(plan, at) for at in columns)], body, note, frozenset(best))


def _kept(plan: Plan, rows: Sequence[Row]) -> Table:
    """The share of the fine-tuned metric that is kept, the mean over the fine-tunes of each optimizer."""
    optimizers = list(dict.fromkeys(split_name(row["fine_tune"])[1] for row in rows))
    columns = [at for at in plan.at if any(row["at"] == at for row in rows)]
    body: list[list[str]] = []
    best: set[tuple[int, int]] = set()
    for optimizer in optimizers:
        own = shares([row for row in rows if split_name(row["fine_tune"])[1] == optimizer])
        most = max((len(values) for values in own.values()), default=0)
        first = len(body)
        tops: dict[int, tuple[float, int]] = {}
        for way in [way for way in plan.ways if any(w == way for w, _ in own)]:
            name = way if len(optimizers) == 1 else f"{optimizer}: {way}"
            cells = []
            for j, at in enumerate(columns):
                values = own.get((way, at), [])
                if not values:
                    cells.append("")
                    continue
                mean = float(np.mean(values))
                spread = f" ± {np.std(values, ddof=1):.1%}" if len(values) > 1 else ""
                cells.append(f"{mean:.1%}{spread}" + (f" ({len(values)})" if len(values) < most else ""))
                if len(values) == most and mean > tops.get(j, (0.0, 0))[0]:
                    tops[j] = (mean, len(body))
            body.append([name, *cells])
        best |= {(row, j + 1) for j, (_, row) in tops.items() if row >= first}
    note = (
        "The share of the fine-tuned model's metric that is kept: mean ± standard deviation over fine-tunes; "
        "in brackets their number where some are missing, which then do not compete."
    )
    return Table(
        "All fine-tunes", ["", *(column_name(plan, at) for at in columns)], body, note, frozenset(best)
    )


def _statistics(plan: Plan, rows: Sequence[Row]) -> list[Table]:
    found = []
    for way in (FINE_TUNED, *plan.ways):
        own = [row for row in rows if row["way"] == way]
        fixed = {"fine_tune", "way", "at", "made", "weights", "seconds", "why", "manifest"}
        names = list(dict.fromkeys(name for row in own for name in row if name not in fixed))
        if names:
            body = [[_label(row), *(_number(row.get(name)) for name in names)] for row in own]
            columns = ["", *(name.replace("_", " ") for name in names)]
            found.append(Table(way, columns, body))
    return found


def _label(row: Mapping[str, Any]) -> str:
    return row["fine_tune"] + ("" if row["at"] is None else f" at {row['at']:g}")


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _merged(plan: Plan, rows: Sequence[Row]) -> list[Table]:
    found = []
    for name in dict.fromkeys(row["fine_tune"] for row in rows):
        own = [row for row in rows if row["fine_tune"] == name]
        tasks = list(own[0]["metrics"])
        body = []
        for row in own:
            way = "each alone" if row["way"] == FINE_TUNED else row["way"]
            q = ", ".join(f"{value:.3g}" for value in row.get("q") or ())
            cells = [_spread(row["metrics"][task]) for task in tasks]
            body.append(
                [way, *cells, f"{row['mean']:.3f}" + (f" ± {row['std']:.3f}" if row["std"] else ""), q]
            )
        kept = [row["mean"] if row["way"] != FINE_TUNED else 0.0 for row in own]
        best = frozenset({(int(np.argmax(kept)), len(tasks) + 1)}) if len(own) > 1 else frozenset()
        found.append(Table(name, ["", *tasks, "kept", "q"], body, best=best))
    return found


def _spread(values: Any) -> str:
    if not isinstance(values, list):
        return f"{values:.3f}"
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")
