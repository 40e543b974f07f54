"""Recommends a method for a pair of models, by each method's loss at a given file size."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from darex_jax.choosing.pair import Pair, split_in_scope
from darex_jax.choosing.two_point import two_point
from darex_jax.core.errors import DarexError
from darex_jax.core.spectrum import spectral_norm
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.files.artifact import load_delta
from darex_jax.files.prune import Job
from darex_jax.methods.evidence import Evidence
from darex_jax.methods.table import METHODS
from darex_jax.runs.evidence import Trainer, gather
from darex_jax.runs.prune import prune_by
from darex_jax.tasks.source import Source

STEPS = 60  # of the short trial training
CALIBRATION = 50  # texts for choosing q
TAIL = 0.01  # share of the entries
TRIED: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("dare", {}),
    ("dare", {"bits": 4, "q": "two-point"}),
    ("magnitude", {"bits": 4}),
    ("wanda", {"bits": 4}),
    ("svd", {"bits": 4}),
    ("allocated", {"bits": 4}),
    ("distilled", {"bits": 4}),
)


class Facts(NamedTuple):
    """Properties of the pruned part of a delta.

    Attributes:
      entries: their number.
      relative: its norm relative to the base's.
      stable_rank: median of |D|_F^2 / |D|_2^2 over matrices; rank: median of their smaller sides.
      tail: share of its squared norm in the largest 1 % of each parameter's entries.
    """

    entries: int
    relative: float
    stable_rank: float
    rank: float
    tail: float


class Tried(NamedTuple):
    """A tried method.

    Attributes:
      method, options: as for `darex prune`; a chosen q is given by its objective.
      file_bytes: of the whole file.
      error: |delta - what is restored|^2 / |delta|^2.
      loss: 1 - agreement with the fine-tuned model on held-out texts; None without texts.
      steps: of training; 0 without.
      seconds: time taken.
    """

    method: str
    options: Mapping[str, Any]
    file_bytes: int
    error: float
    loss: float | None
    steps: int
    seconds: float

    @property
    def name(self) -> str:
        return way_name(self.method, self.options)


def way_name(method: str, options: Mapping[str, Any]) -> str:
    """Such as "dare, q two-point" or "svd, 4 bits"."""
    told = [f"{name} {value}" for name, value in options.items() if name != "bits"]
    bits = [f"{options['bits']} bits"] if "bits" in options else []
    return ", ".join([method, *told, *bits])


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The measurements and the recommended method.

    Attributes:
      facts: of the delta.
      tried: methods with a file of this size; failed: reasons of the others, by `way_name`.
      chosen: the one of `tried` with the least loss, or without texts the least error.
      without_delta: the base's loss; None without texts.
      measure: the agreement that losses are one minus of; held_out: number of texts.
      calibration: number of texts of which methods without a training take statistics.
    """

    facts: Facts
    tried: list[Tried]
    chosen: Tried
    without_delta: float | None = None
    measure: str | None = None
    held_out: int = 0
    calibration: int = 0
    failed: Mapping[str, str] = field(default_factory=dict)


def recommend(
    job: Job,
    file_bytes: int,
    source: Source | None,
    *,
    steps: int = STEPS,
    seed: int = 0,
    ignore_config_fields: Collection[str] = (),
    on_try: Callable[[str], None] = lambda what: None,
) -> Advice:
    """Tries those of `TRIED` that the inputs allow, in temporary files of at most `file_bytes`.

    Memory holds the delta and one restored delta.

    Args:
      job: its `out` is not used.
      source: of texts, labels are not used; None without texts.
      steps: of the trial training; seed: of random methods, as for `prune_by`.
      on_try: called with the name of the next measurement.
    Raises: DarexError if no method has so small a file, or the models do not match.
    """
    on_try("the delta")
    deltas, facts = _facts(job)
    evidence, trainer, calibration = Evidence(), None, 0
    digests: dict[str, str] = {}
    if source is not None:
        evidence, digests = gather(
            job.base.source, job.fine.source, source, ("input_norms", "curvature", "train"), scope=job.scope,
            ignore_config_fields=ignore_config_fields, steps=steps,
        )  # fmt: skip
        trainer = evidence.train if isinstance(evidence.train, Trainer) else None
        calibration = 0 if trainer is None else len(trainer.calibration.encoded)
        if trainer is not None and trainer.measure is None:
            trainer, evidence = None, replace(evidence, train=None)
    total = sum(map(_square, deltas.values()))
    tried: list[Tried] = []
    failed: dict[str, str] = {}
    for method, options in TRIED:
        missing = [need for need in METHODS[method].needs if not getattr(evidence, need)]
        if missing or (options.get("q") and trainer is None):
            continue
        on_try(method)
        begun = time.monotonic()
        given = dict(options) | ({"dtype": "bfloat16"} if method == "dare" else {})
        choose = _two_point(trainer, deltas) if given.pop("q", None) and trainer is not None else None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "delta"
            try:
                summary = prune_by(
                    replace(job, out=path), method, file_bytes, seed=seed, gathered=(evidence, digests),
                    options=given, choose=choose,
                )  # fmt: skip
            except (DarexError, FloatingPointError) as refusal:
                failed[way_name(method, options)] = str(refusal)
                continue
            restored = flatten_names(load_delta(path, max_entries=facts.entries))
        error = sum(_square(delta - np.asarray(restored[name])) for name, delta in deltas.items())
        loss = None if trainer is None else 1.0 - trainer.look(restored).agreement
        trained = steps if METHODS[method].trains else 0
        seconds = round(time.monotonic() - begun, 1)
        relative = error / total if total else 0.0
        tried.append(Tried(method, options, summary.file_bytes, relative, loss, trained, seconds))
    if not tried:
        raise DarexError(next(iter(failed.values())))
    chosen = min(tried, key=lambda t: (t.error if t.loss is None else t.loss, t.error))
    if trainer is None:
        return Advice(facts=facts, tried=tried, chosen=chosen, failed=failed, calibration=calibration)
    return Advice(
        facts=facts, tried=tried, chosen=chosen, measure=trainer.measure,
        without_delta=1.0 - trainer.look({}).agreement, held_out=len(trainer.held_out.encoded),
        failed=failed, calibration=calibration,
    )  # fmt: skip


def _two_point(trainer: Trainer, deltas: Mapping[str, np.ndarray]) -> Callable[[float], float]:
    batches = trainer.texts.first(CALIBRATION).batches()
    start = flatten_names(trainer.start)
    in_scope = unflatten_names({name: start[name] for name in deltas if name in start})
    _, delta = split_in_scope(trainer.fine, in_scope)

    def choose(drop_rate: float) -> float:
        return two_point(Pair(trainer.model, trainer.fine, trainer.start, delta, drop_rate), batches)[0]

    return choose


def _facts(job: Job) -> tuple[dict[str, np.ndarray], Facts]:
    """The pruned delta, float32 by name, and its properties."""
    match = job.match()
    if extra := [name for name in match.pruned if name in match.extra_rows]:
        raise DarexError(
            f"rows of a larger vocabulary ({', '.join(extra)}) have no base: exclude these with --exclude."
        )
    deltas, square, whole = {}, 0.0, 0.0
    ranks, sides, tails = [], [], []
    for name in match.pruned:
        base = job.base.tensors[match.base_names[name]].read()
        own = np.asarray(base, np.float32)
        fine = np.asarray(job.fine.tensors[name].read(), np.float32)
        deltas[name] = delta = fine - own
        job.progress(base.nbytes + fine.nbytes)
        energy = _square(delta)
        square, whole = square + energy, whole + _square(own)
        if delta.ndim == 2 and energy and (norm := spectral_norm(delta)) > 0:
            ranks.append(energy / norm**2)
            sides.append(min(delta.shape))
        if energy:
            kept = max(1, round(TAIL * delta.size))
            flat = np.square(delta.reshape(-1))
            tails.append(float(np.sum(np.partition(flat, -kept)[-kept:], dtype=np.float64)))
    return deltas, Facts(
        entries=sum(delta.size for delta in deltas.values()),
        relative=float(np.sqrt(square / whole)) if whole else 0.0,
        stable_rank=float(np.median(ranks)) if ranks else 0.0,
        rank=float(np.median(sides)) if sides else 0.0,
        tail=sum(tails) / square if square else 0.0,
    )


def _square(x: np.ndarray) -> float:
    return float(np.sum(np.square(x), dtype=np.float64))
