"""The rows of a study: JSON lines, one a finished measurement, so that a study resumes where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from darex_jax.core.errors import FileError
from darex_jax.files.atomic import write_whole
from darex_jax.files.paths import read_text

Row = dict[
    str, Any
]  # fine_tune, way, at (None where there is one cell a way), made, weights, seconds, values
Cell = tuple[str, str, float | None]  # fine_tune, way, at


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; none if there is no file. Raises: FileError for a damaged line."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines() if path.exists() else [], 1):
        try:
            row = json.loads(line)
            _ = cell_of(row), row["made"], row["weights"]
        except (ValueError, KeyError, TypeError) as error:
            raise FileError(f"{path}: line {number} is not a row of a study.") from error
        rows.append(row)
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes all rows, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def cell_of(row: Row) -> Cell:
    """What a row is a measurement of."""
    return row["fine_tune"], row["way"], row.get("at")


def split_name(name: str) -> tuple[str, str, str]:
    """Training, optimizer and seed of a fine-tune's name."""
    training, optimizer, seed = name.split("/")
    return training, optimizer, seed


def floor_of(head: Mapping[str, Any]) -> float:
    """The metric without anything learnt, of the row "fine-tuned": the best constant answer's, or the base's
    if that is better; 0 if neither was measured."""
    return max(head.get("constant") or 0.0, head.get("no_delta") or 0.0)


def digest_of(made_from: Any) -> str:
    """12 hexadecimal digits for what JSON holds: a setting that changed is another digest."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]


def seconds_left(missing: Sequence[Cell], rows: Sequence[Row]) -> float | None:
    """An estimate of the time for `missing` from rows like them: the same way and column, else the same way,
    else all. None while nothing was measured.

    Args: rows: with `seconds`; of other fine-tunes, too.
    """
    seen: dict[Any, list[float]] = {}
    for row in rows:
        if (seconds := row.get("seconds")) is not None:
            _, way, at = cell_of(row)
            for key in ((way, at), way, None):
                seen.setdefault(key, []).append(seconds)
    if not seen:
        return None
    means: Mapping[Any, float] = {key: fmean(values) for key, values in seen.items()}
    return sum(means.get((way, at), means.get(way, means[None])) for _, way, at in missing)
