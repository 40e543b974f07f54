"""Gathering what methods may know: one pass of examples through the fine-tuned model, whatever the method."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from darex_jax.evaluation.calibration import InputStatistics, input_statistics
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.manifest import weights_digest
from darex_jax.files.model import load_model
from darex_jax.methods.evidence import Evidence
from darex_jax.tasks.source import Source, read_material


def gather(
    fine: Path, source: Source, needs: Collection[str], ignore_config_fields: Collection[str] = ()
) -> tuple[Evidence, dict[str, str]]:
    """The evidence that is needed, and digests of the model and the examples it comes from.

    Args:
      fine: directory of the fine-tuned model.
      source: examples that train it, never those that are reported on.
      needs: fields of `Evidence`.
      ignore_config_fields: see `read_model_config`.
    """
    if not needs:
        return Evidence(), {}
    material = read_material(fine, source, held_out=False)
    model, params = load_model(fine, ignore_config_fields=ignore_config_fields)
    moments = _every if "second_moments" in needs else _none
    seen = input_statistics(model, params, material.batches(), moments)
    with Checkpoint(fine) as checkpoint:
        digests = {"fine_weights": weights_digest(checkpoint), "data": material.encoded.digest()}
    return evidence_of(seen), digests


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
