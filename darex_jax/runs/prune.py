"""Pruning two checkpoints by any method, to a drop rate or to the size of a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.core.scope import Scope
from darex_jax.files.atomic import write_whole
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.match import match_checkpoints
from darex_jax.files.prune import PruneSummary, prune_parts
from darex_jax.files.stream import Progress, keep_inputs
from darex_jax.methods.budget import Budget
from darex_jax.methods.evidence import Evidence
from darex_jax.methods.table import METHODS

CLOSE = 0.98  # of the size asked for: near enough
ATTEMPTS = 8


def prune_by(
    base: Checkpoint,
    fine: Checkpoint,
    out: str | os.PathLike[str],
    *,
    method: str,
    drop_rate: float | None = None,
    file_bytes: int | None = None,
    budget: Mapping[str, float] | None = None,
    seed: int = 0,
    evidence: Evidence | None = None,
    digests: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    scope: Scope,
    scope_text: str = "default",
    allow_nonfinite: bool = False,
    progress: Progress = lambda _: None,
) -> PruneSummary:
    """Prunes `fine - base` by a method of `METHODS` and writes the artifact.

    Args:
      drop_rate, file_bytes, budget: how much may be kept, one of the three: at the method's own drop rate; so
        that the whole file has at most so many bytes and, where the method allows it, 98 % of them; or what
        the recipe of another file says.
      seed: of random methods, `jax.random.key(seed)`.
      evidence: what the method needs to know; digests: of what it was gathered from, for the file.
      options: of the method: bits, q, ...
    Raises: DarexError for a method that lacks evidence, or a size out of its reach; else as `prune_parts`.
    """
    chosen, known = METHODS[method], evidence or Evidence()
    for need in chosen.needs:
        if not getattr(known, need):
            raise DarexError(f"{method} has to know {need.replace('_', ' ')}: give texts (--text, --task).")
    told = {name: value for name, value in (options or {}).items() if value is not None}
    key = {"key": jax.random.key(seed)} if chosen.random else {}

    def write(budget: Budget, path: str | os.PathLike[str]) -> PruneSummary:
        def make_parts(deltas: dict[str, np.ndarray]) -> Any:
            return chosen.prune(deltas, budget, known, **key, **told)

        spent: Mapping[str, Any] = {
            "drop_rate": budget.drop_rate,
            "bytes_per_parameter": budget.bytes_per_parameter,
        }
        return prune_parts(
            base,
            fine,
            path,
            method=method,
            make_parts=make_parts,
            leafwise=chosen.leafwise,
            key=(0, seed),
            budget={name: value for name, value in spent.items() if value is not None},
            options=told,
            evidence=digests or {},
            scope=scope,
            scope_text=scope_text,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )

    if file_bytes is None:
        stated: dict[str, Any] = {"drop_rate": drop_rate} if budget is None else dict(budget)
        return write(Budget(**stated), out)
    entries = pruned_entries(base, fine, scope)
    keep_inputs(out, base, fine)
    with tempfile.TemporaryDirectory() as folder:
        summary, path = fit_to_size(partial(_to_size, write, entries), file_bytes, Path(folder))
        write_whole(out, path.read_bytes())
    return summary


def pruned_entries(base: Checkpoint, fine: Checkpoint, scope: Scope) -> int:
    """How many entries are pruned. Raises: FileError if the models do not fit together."""
    match = match_checkpoints(base, fine, scope)
    match.raise_if_faulty()
    return sum(base.tensors[match.base_names[name]].info.size for name in match.pruned)


def _to_size(
    write: Callable[[Budget, Path], PruneSummary], entries: int, part_bytes: float, path: Path
) -> PruneSummary:
    return write(Budget(bytes_per_parameter=part_bytes / entries), path)


def fit_to_size(
    write: Callable[[float, Path], PruneSummary], file_bytes: int, folder: Path
) -> tuple[PruneSummary, Path]:
    """Writes files until one has nearly `file_bytes` and no more: the largest of those that fit.

    Args: write: the bytes that parts may take, before they are coded, and a path -> what was written there.
    Raises: DarexError if none fits.
    """
    best: tuple[PruneSummary, Path] | None = None
    least: int | None = None
    room = 0.9 * file_bytes
    low, high = 0.0, float("inf")  # rooms that fitted, and did not
    for attempt in range(ATTEMPTS):
        path = folder / str(attempt)
        summary = write(room, path)
        size = summary.file_bytes
        least = size if least is None else min(least, size)
        coded = sum(block["bytes"] for block in summary.recipe.blocks or ())
        if size <= file_bytes:
            same = best is not None and size == best[0].file_bytes
            if best is None or size >= best[0].file_bytes:
                best = summary, path
            low = max(low, room)
            if size >= CLOSE * file_bytes or same:
                break
        else:
            high = min(high, room)
        wanted = 0.5 * (1 + CLOSE) * file_bytes - (size - coded)  # all but the parts stays about as it is
        room = room * wanted / max(coded, 1) if wanted > 0 else room / 4
        if not low < room < high:
            room = (low + high) / 2 if np.isfinite(high) else 2 * low
    if best is None:
        raise DarexError(
            f"the file would have {least:,} bytes at least, {file_bytes:,} were asked for: the head, the "
            "base's fingerprint and the recipe take their part; ask for more, or choose another method."
        )
    return best
