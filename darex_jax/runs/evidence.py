"""Gathering what methods may know: one pass of examples through the fine-tuned model, whatever the method,
and training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.choosing.pair import load_pair, split_in_scope
from darex_jax.core.errors import DarexError
from darex_jax.core.scope import Scope
from darex_jax.evaluation.calibration import InputStatistics, input_statistics
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.manifest import weights_digest
from darex_jax.files.model import load_model
from darex_jax.methods.evidence import Evidence
from darex_jax.models import Model
from darex_jax.parts.total import Parts
from darex_jax.parts.values import Values
from darex_jax.tasks.source import Material, Source, read_material
from darex_jax.training.distill import STEPS, Look, distill

STATISTICS, HELD_OUT = 200, 200  # texts that moments are taken over; that are kept for looks while training


def gather(
    base: Path,
    fine: Path,
    source: Source,
    needs: Collection[str],
    *,
    scope: Scope | None = None,
    steps: int = STEPS,
    checkpoints: Path | None = None,
    ignore_config_fields: Collection[str] = (),
    on_look: Callable[[Look], None] = lambda look: None,
) -> tuple[Evidence, dict[str, str]]:
    """The evidence that is needed, and digests of the model and the examples it comes from.

    Args:
      base, fine: directories of the models.
      source: examples that train the fine-tuned model, never those that are reported on.
      needs: fields of `Evidence`.
      scope: of what is pruned; None is the family's.
      steps, checkpoints, on_look: of training parts, see `distill`.
      ignore_config_fields: see `read_model_config`.
    """
    if not needs:
        return Evidence(), {}
    material = read_material(fine, source, held_out=False)
    with Checkpoint(fine) as checkpoint:
        digests = {"fine_weights": weights_digest(checkpoint), "data": material.encoded.digest()}
    if "train" not in needs:
        model, params = load_model(fine, ignore_config_fields=ignore_config_fields)
        known = _statistics(model, params, material, needs)
        return known, digests
    if len(material.encoded) < 2:
        raise DarexError("training parts takes two texts or more: to learn from, and to be held out.")
    model, params, base_params = load_pair(base, fine, scope, ignore_config_fields)
    start, _ = split_in_scope(params, base_params)
    order = np.random.default_rng(0).permutation(len(material.encoded))
    held = min(HELD_OUT, len(order) // 2)
    rest, held_out = material.select(np.sort(order[held:])), material.select(np.sort(order[:held]))

    def train(parts: Mapping[str, Parts], bits: int | None) -> Mapping[str, Parts]:
        folder = None
        if checkpoints is not None:  # what was trained of other models, texts or parts is no beginning
            stored = {name: [len(x) for x in jax.tree.leaves(p, is_leaf=_is_values) if _is_values(x)]
                      for name, p in parts.items()}  # fmt: skip
            with Checkpoint(base) as checkpoint:
                told = json.dumps([digests, weights_digest(checkpoint), stored, bits, steps], sort_keys=True)
            folder = checkpoints / hashlib.sha256(told.encode()).hexdigest()[:16]
        found = distill(
            model, params, start, parts, rest.epoch, held_out.batches(), steps=steps, bits=bits,
            checkpoints=folder, on_look=on_look,
        )  # fmt: skip
        return found.parts

    return replace(_statistics(model, params, held_out, needs), train=train), digests


def _statistics(model: Model, params: Any, material: Material, needs: Collection[str]) -> Evidence:
    few = material.select(np.arange(min(len(material.encoded), STATISTICS)))
    moments = _every if "second_moments" in needs else _none
    return evidence_of(input_statistics(model, params, few.batches(), moments))


def evidence_of(seen: dict[str, InputStatistics]) -> Evidence:
    """What methods take, from a calibration pass."""
    return Evidence(
        input_norms={name: np.asarray(jnp.sqrt(s.square * s.tokens)) for name, s in seen.items()},
        second_moments={
            name: np.asarray(s.second_moment) for name, s in seen.items() if s.second_moment is not None
        },
    )


def _every(name: str) -> bool:
    return True


def _none(name: str) -> bool:
    return False


def _is_values(node: Any) -> bool:
    return isinstance(node, Values)
