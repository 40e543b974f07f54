"""Prunes two checkpoints by any method, to a drop rate, a file size or a loss."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.core.tree import seed_key
from darex_jax.files.atomic import write_whole
from darex_jax.files.prune import Job, PruneSummary, prune_parts
from darex_jax.files.stream import keep_inputs
from darex_jax.methods.budget import Budget, TooSmall
from darex_jax.methods.evidence import Evidence
from darex_jax.methods.table import METHODS
from darex_jax.runs.evidence import Trainer

CLOSE = 0.98  # of the requested size: close enough
ATTEMPTS = 8
SIZES, PLACES = (0.0003, 0.03), 15  # bytes per parameter beside the fixed overhead, and number of sizes tried
PROBE = 1 / 3  # share of a training's steps for trying a size
ROUNDING = 1e-9  # 1 - 190 / 200 is above 0.05


def prune_by(
    job: Job,
    method: str,
    budget: Budget | int,
    *,
    seed: int = 0,
    gathered: tuple[Evidence, Mapping[str, str]] = (Evidence(), {}),
    options: Mapping[str, Any] | None = None,
    choose: Callable[[float], Any] | None = None,
) -> PruneSummary:
    """Prunes `fine - base` by a method of `METHODS` and writes the artifact.

    Args:
      budget: a `Budget`, or an int: the maximum size of the whole file in bytes, of which at least 98 % are
        used if the method allows it (96 % if values are trained).
      seed: of random methods, `jax.random.key(seed)`.
      gathered: the method's evidence and digests of its sources, from `gather`.
      options: of the method: bits, q, ...
      choose: for dare with a size, drop rate -> q.
    Raises: DarexError for missing evidence, or an unreachable size; otherwise as `prune_parts`.
    """
    chosen, (known, digests) = METHODS[method], gathered
    for need in chosen.needs:
        if not getattr(known, need):
            raise DarexError(f"{method} needs {need.replace('_', ' ')}: pass texts (--text, --task).")
    given = {name: value for name, value in (options or {}).items() if value is not None}
    key = {"key": seed_key(seed)} if chosen.random else {}
    trained = {"steps": known.train.steps} if isinstance(known.train, Trainer) else {}

    def write(job: Job, budget: Budget, known: Evidence = known) -> PruneSummary:
        spent = {name: value for name, value in vars(budget).items() if value is not None}
        made_by = {
            "method": method, "key": (0, seed), "budget": spent, "options": given | trained,
            "evidence": dict(digests),
        }  # fmt: skip

        def make_parts(deltas: dict[str, np.ndarray]) -> Any:
            return chosen.prune(deltas, budget, known, **key, **given)

        return prune_parts(job, make_parts, leafwise=chosen.leafwise, made_by=made_by)

    if isinstance(budget, Budget):
        return write(job, budget)
    entries = pruned_entries(job)
    # Training is slow and hardly changes the size: sizes are tried without it, with a small margin.
    quick = replace(known, train=None)
    target = round(CLOSE * budget) if chosen.trains else budget
    silent = replace(job, progress=lambda _: None)  # each attempt reads the same bytes again
    attempts = iter([job])

    def of_size(part_bytes: float, path: Path) -> PruneSummary:
        return write(
            replace(next(attempts, silent), out=path),
            Budget(bytes_per_parameter=part_bytes / entries),
            quick,
        )

    keep_inputs(job.out, job.base, job.fine)
    with tempfile.TemporaryDirectory() as folder:
        summary, path = fit_to_size(of_size, target, Path(folder))
        if choose is not None and _drop_rate(summary) > 0:  # otherwise everything is kept
            given["q"] = choose(_drop_rate(summary))
            summary, path = fit_to_size(of_size, target, Path(folder))
        while chosen.trains:
            spent = summary.recipe.budget or {}
            summary = write(replace(silent, out=path), Budget(**spent), known)
            if summary.file_bytes <= budget:
                break
            over = summary.file_bytes - budget
            room = spent["bytes_per_parameter"] * entries - 1.5 * over - 0.01 * budget
            if room <= 0:
                raise TooSmall(
                    f"after training, the file is {over:,} bytes larger than the requested {budget:,}."
                )
            summary = of_size(room, path)
        write_whole(job.out, path.read_bytes())
    return summary


def prune_within(
    job: Job,
    method: str,
    max_loss: float,
    *,
    of: Literal["agreement", "metric"] = "agreement",
    seed: int = 0,
    gathered: tuple[Evidence, Mapping[str, str]],
    options: Mapping[str, Any] | None = None,
    on_size: Callable[[int, float], None] = lambda size, kept: None,
) -> PruneSummary:
    """A small artifact that loses at most `max_loss` of the agreement, or of the metric, on held-out texts.

    The smallest sufficient size is found by bisection over a grid of sizes, with trainings of a third of the
    steps; it is then trained in full and, if it is not sufficient, the next larger one, and so on.

    Args:
      method: one that trains; seed: as for `prune_by`; gathered: with a `Trainer`.
      max_loss: one minus the agreement with the fine-tuned model, whose resolution is one text.
      of: "metric" is the fine-tuned model's metric less that of the pruned one.
      on_size: called with every size tried and its agreement or metric.
    Raises: DarexError for a method without training, a model without predictions, evidence
      without the metric, or if no size is sufficient.
    """
    keep_inputs(job.out, job.base, job.fine)
    known, digests = gathered
    if not isinstance(known.train, Trainer):
        raise DarexError(f"{method} does not train, so its loss is not measured: choose a size instead.")
    if known.train.measure is None:
        raise DarexError("a model without a head has no predictions to compare: choose a size instead.")
    best, metric = 1.0, known.train.metric
    if of == "metric":
        if metric is None:
            raise DarexError("evidence for a loss of the metric is gathered with_metric.")
        if (best := metric.fine) <= max_loss:
            raise DarexError(
                f"the fine-tuned model's {metric.name} is {best:.4f} on {metric.examples} held-out examples: "
                f"a loss of {max_loss:g} would leave nothing of it; allow less."
            )
    full, quick = known.train, replace(known.train, steps=max(3, round(PROBE * known.train.steps)))

    def lost(size: int, path: Path, train: Trainer) -> float:
        evidence, train.result = (replace(known, train=train), digests), None
        try:
            found = prune_by(
                replace(job, out=path), method, size, seed=seed, gathered=evidence, options=options
            )
        except TooSmall:
            return math.inf
        if train.result is None:  # nothing was kept
            return math.inf
        kept = train.result.agreement if of == "agreement" else train.score
        assert kept is not None
        on_size(found.file_bytes, kept)
        written[size] = found
        return best - kept

    written: dict[int, PruneSummary] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta"
        nothing = replace(known, train=lambda parts, bits: parts), digests
        empty = Budget(bytes_per_parameter=1e-12)
        summary = prune_by(
            replace(job, out=path), method, empty, seed=seed, gathered=nothing, options=options
        )
        rooms = np.geomspace(SIZES[0], SIZES[1], PLACES) * summary.pruned_size
        sizes = [summary.file_bytes + round(float(room)) for room in rooms]
        low, high = -1, len(sizes)  # indices of an insufficient and a sufficient size
        while high - low > 1:
            middle = (low + high) // 2
            sufficient = lost(sizes[middle], path, quick) <= max_loss + ROUNDING
            low, high = (low, middle) if sufficient else (middle, high)
        for size in sizes[min(high, len(sizes) - 1) :]:
            if lost(size, path, full) <= max_loss + ROUNDING:
                write_whole(job.out, path.read_bytes())
                return written[size]
    raise DarexError(
        f"no file of up to {sizes[-1]:,} bytes loses at most {max_loss:g} of the {of} on held-out texts: "
        "allow a larger loss, train longer (--steps), or choose another method."
    )


def _drop_rate(summary: PruneSummary) -> float:
    """The drop rate of the random parts in a file."""
    blocks = summary.recipe.blocks or ()
    return float(next(part["drop_rate"] for b in blocks for p in b["parameters"].values() for part in p))


def wanted_bytes(job: Job, size: float | None, bytes_per_parameter: float | None) -> int:
    """The maximum file size: the fine-tuned model's divided by `size`, or per pruned parameter."""
    if bytes_per_parameter is not None:
        return round(bytes_per_parameter * pruned_entries(job))
    assert size is not None
    if (wanted := round(job.fine.nbytes / size)) < 1:
        raise TooSmall(f"{size:g} times smaller than {job.fine.nbytes:,} bytes is less than a byte.")
    return wanted


def pruned_entries(job: Job) -> int:
    """The number of pruned entries. Raises: FileError if the models do not match."""
    match = job.match()
    return sum(job.base.tensors[match.base_names[name]].info.size for name in match.pruned)


def fit_to_size(
    write: Callable[[float, Path], PruneSummary], file_bytes: int, folder: Path
) -> tuple[PruneSummary, Path]:
    """Writes files until one is just below `file_bytes`; returns the largest that fits.

    Args: write: (bytes of parts before coding, path) -> summary of the file written, or TooSmall for fewer
      bytes than the method can do with.
    Raises: TooSmall if none fits.
    """
    best: tuple[PruneSummary, Path] | None = None
    least: int | None = None
    refused: TooSmall | None = None
    room = 0.9 * file_bytes
    low, high = 0.0, float("inf")  # part sizes that fit and that do not
    for attempt in range(ATTEMPTS):
        path = folder / str(attempt)
        try:
            summary = write(room, path)
        except TooSmall as error:
            if room >= file_bytes:
                raise
            refused, low, room = error, max(low, room), min(file_bytes, 0.5 * (room + file_bytes) + 1)
            continue
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
        target = 0.5 * (1 + CLOSE) * file_bytes - (size - coded)  # the rest of the file hardly changes
        room = room * target / max(coded, 1) if target > 0 else room / 4
        if not low < room < high:
            room = (low + high) / 2 if np.isfinite(high) else 2 * low
    if best is None and refused is not None and least is None:
        raise refused
    if best is None:
        raise TooSmall(
            f"the file needs at least {least:,} bytes, {file_bytes:,} were requested: the head, the "
            "base's fingerprint and the recipe need space too; allow more, or choose another method."
        )
    return best
