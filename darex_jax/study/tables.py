"""The rows of a study as tables and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from darex_jax.study.claims import findings
from darex_jax.study.plan import Plan
from darex_jax.study.rows import Row, floor_of, split_name
from darex_jax.study.run import FINE_TUNED, current_rows, missing_cells
from darex_jax.study.shown import Figure, Section, Series, Table

AXES = {"bytes": "bytes per parameter, whole file", "drop_rates": "density, 1 - drop rate"}
NEAR = 1e-9
OURS = "this project"  # the source of a study or a claim that is not the paper's


def by_models(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each training and optimizer, all seeds together."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault(split_name(row["fine_tune"])[:2], []).append(row)
    return found


def shares(rows: Sequence[Row]) -> dict[tuple[str, float | None], dict[str, float]]:
    """By way and column, of each fine-tune the share of its metric that is kept."""
    whole = {row["fine_tune"]: row["mean"] for row in rows if row["way"] == FINE_TUNED and "mean" in row}
    found: dict[tuple[str, float | None], dict[str, float]] = {}
    for row in rows:
        if row["way"] != FINE_TUNED and "mean" in row and whole.get(row["fine_tune"]):
            share = row["mean"] / whole[row["fine_tune"]]
            found.setdefault((row["way"], row["at"]), {})[row["fine_tune"]] = share
    return found


def tables(plan: Plan, rows: Sequence[Row]) -> list[Table]:
    """What a study shows in tables: over all fine-tunes, each training and optimizer, and the seconds."""
    if plan.measure in ("delta", "lora"):
        return _statistics(plan, rows)
    if plan.measure == "merging":
        return _merged(rows)
    found = []
    models = by_models(rows)
    if len(models) > 1:
        found.append(_kept(plan, rows))
    for (training, optimizer), own in models.items():
        found.append(_of_model(plan, training, optimizer, own))
    return found + _seconds(plan, rows)


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
                    error = _deviation(values) if len(values) > 1 else spreads[0] or math.nan
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
    """A study as a part of a page. Rows of other settings than the declared ones are left out."""
    rows = current_rows(plan, rows)
    text = [part.replace("\n", " ").strip() for part in plan.text.split("\n\n") if part.strip()]
    if plan.source and plan.source != OURS:
        text.append(f"Reproduces: {plan.source}.")
    lacks = sum(len(cells) for _, cells in missing_cells(plan, rows))
    if lacks:
        text.append(f"Not measured yet: {lacks} of {len(rows) + lacks} rows.")
    return Section(plan.title, text, figures(plan, rows), tables(plan, rows), findings(plan, rows), command)


def best_of(values: Mapping[str, Mapping[str, float]]) -> set[str]:
    """The best of several ways, compared on the fine-tunes that they share.

    Args: values: by way, by fine-tune. A way with less than half as many fine-tunes as another is left out.
    Returns: the best, several if they are equal; none without two ways to compare.
    """
    most = max((len(own) for own in values.values()), default=0)
    able = {way: own for way, own in values.items() if 2 * len(own) >= most and own}
    common = set.intersection(*(set(own) for own in able.values())) if able else set()
    if len(able) < 2 or not common:
        return set()
    means = {way: float(np.mean([own[name] for name in common])) for way, own in able.items()}
    top = max(means.values())
    return {way for way, mean in means.items() if mean >= top - NEAR}


def _measured(plan: Plan, rows: Sequence[Row]) -> list[float]:
    """The columns that have a row."""
    return [at for at in plan.at if any(row["at"] == at for row in rows)]


def column_name(at: float | None) -> str:
    return "" if at is None else f"{at:g}"


def cell_text(rows: Sequence[Row], most: int = 1) -> str:
    """Mean ± deviation, over seeds of the training if there are several, else over masks; then the agreement.

    Args: most: how many seeds the best measured cell has; fewer are marked by their number.
    """
    good = [row for row in rows if "mean" in row]
    if not good:
        return "-" if rows else ""
    means = [row["mean"] for row in good]
    if len(good) > 1:
        text = f"{np.mean(means):.3f} ± {_deviation(means):.3f}"
    elif good[0].get("std") or len(good[0].get("metrics") or ()) > 1:
        text = f"{means[0]:.3f} ± {good[0]['std']:.3f}"
    else:
        text = f"{means[0]:.3f}"
    if all(row.get("agreement") is not None for row in good):
        text += f" ({np.mean([row['agreement'] for row in good]):.3f})"
    return text + (f" [{len(good)}]" if most > 1 and len(good) < most else "")


def _of_model(plan: Plan, training: str, optimizer: str, rows: Sequence[Row]) -> Table:
    columns = _measured(plan, rows)
    ways = [way for way in plan.ways if any(row["way"] == way for row in rows)]
    cells = {
        (way, at): [row for row in rows if row["way"] == way and row["at"] == at]
        for way in ways for at in columns
    }  # fmt: skip
    most = max((len(found) for found in cells.values()), default=1)
    body = [[way, *(cell_text(cells[way, at], most) for at in columns)] for way in ways]
    best = set()
    for j, at in enumerate(columns):
        values = {way: {r["fine_tune"]: r["mean"] for r in cells[way, at] if "mean" in r} for way in ways}
        best |= {(ways.index(way), j + 1) for way in best_of(values)}
    heads = [row for row in rows if row["way"] == FINE_TUNED and "mean" in row]
    note = _about(heads) if heads else ""
    seeds = sorted({split_name(row["fine_tune"])[2] for row in rows})
    if len(seeds) > 1:
        note += (
            f" Mean ± deviation over trainings of the seeds {', '.join(seeds)}, in square brackets how many"
        )
        note += " of them where fewer; of a single one, over masks."
    title = f"{training}, {optimizer}"
    return Table(title, ["", *(column_name(at) for at in columns)], body, note, frozenset(best))


def _seconds(plan: Plan, rows: Sequence[Row]) -> list[Table]:
    """What a row of each way took."""
    columns = _measured(plan, rows)
    taken: dict[tuple[str, float | None], list[float]] = {}
    for row in rows:
        if row.get("seconds") and "mean" in row:
            taken.setdefault((row["way"], row["at"]), []).append(row["seconds"])
    ways = [way for way in plan.ways if any(own == way for own, _ in taken)]
    if not ways:
        return []
    body = [
        [way, *(f"{np.median(own):,.0f}" if (own := taken.get((way, at))) else "" for at in columns)]
        for way in ways
    ]
    note = (
        "To prune, restore and evaluate, for all masks, with compilation: medians over fine-tunes, on the "
        "machine of each and beside what else ran on it."
    )
    return [Table("Seconds", ["", *(column_name(at) for at in columns)], body, note)]


def _about(heads: Sequence[Row]) -> str:
    head, means = heads[0], [row["mean"] for row in heads]
    name = str(head.get("metric_name", "metric")).replace("_", " ")
    count = f" on {head['test_examples']} examples" if "test_examples" in head else ""
    spread = f" ± {_deviation(means):.3f}" if len(means) > 1 else ""
    note = f"{name[0].upper()}{name[1:]}{count}; fine-tuned {np.mean(means):.3f}{spread}"
    if (constant := head.get("constant")) is not None:
        note += f", a constant answer {constant:.3f}"
    if (no_delta := head.get("no_delta")) is not None:
        note += f", without the delta {no_delta:.3f}"
    return f"{note}."


def _kept(plan: Plan, rows: Sequence[Row]) -> Table:
    """The share of the fine-tuned metric that is kept, the mean over the fine-tunes of each optimizer."""
    optimizers = list(dict.fromkeys(split_name(row["fine_tune"])[1] for row in rows))
    columns = _measured(plan, rows)
    body: list[list[str]] = []
    best: set[tuple[int, int]] = set()
    for optimizer in optimizers:
        own = [row for row in rows if split_name(row["fine_tune"])[1] == optimizer]
        heads = [row for row in own if row["way"] == FINE_TUNED and row.get("mean")]
        found = shares(own)
        most = len(heads)
        prefix = "" if len(optimizers) == 1 else f"{optimizer}: "
        floor = _share_text([floor_of(head) / head["mean"] for head in heads], most)
        body.append([f"{prefix}(nothing learnt)", *[floor] * len(columns)])
        ways = [way for way in plan.ways if any(w == way for w, _ in found)]
        first = len(body)
        for way in ways:
            cells = [list(found.get((way, at), {}).values()) for at in columns]
            body.append([f"{prefix}{way}", *(_share_text(values, most) for values in cells)])
        for j, at in enumerate(columns):
            winners = best_of({way: found.get((way, at), {}) for way in ways})
            best |= {(first + ways.index(way), j + 1) for way in winners}
    note = (
        "The share of the fine-tuned model's metric that is kept: mean ± standard deviation over fine-tunes "
        "of all tasks, in square brackets their number where some are missing. Nothing learnt: the best "
        "constant answer, or the base without a delta if that is better. The best is marked by the "
        "fine-tunes that ways share."
    )
    return Table("All fine-tunes", ["", *(column_name(at) for at in columns)], body, note, frozenset(best))


def _share_text(values: Sequence[float], most: int) -> str:
    if not values:
        return ""
    spread = f" ± {_deviation(values):.1%}" if len(values) > 1 else ""
    return f"{np.mean(values):.1%}{spread}" + (f" [{len(values)}]" if len(values) < most else "")


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1))


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


def _merged(rows: Sequence[Row]) -> list[Table]:
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
    return f"{np.mean(values):.3f}" + (f" ± {_deviation(values):.3f}" if len(values) > 1 else "")
