"""Gathers the `Evidence` that methods need: statistics of the fine-tuned model, and training of parts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.choosing.pair import load_pair
from darex_jax.core.delta import apply_delta
from darex_jax.core.errors import DarexError
from darex_jax.core.scope import Scope
from darex_jax.core.tree import combine, flatten_names
from darex_jax.evaluation.calibration import InputStatistics, input_statistics, linear_layers, token_counts
from darex_jax.evaluation.classification import predict
from darex_jax.evaluation.curvature import curvature
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.manifest import weights_digest
from darex_jax.files.model import load_model
from darex_jax.methods.evidence import Evidence
from darex_jax.models import DecoderConfig, Model
from darex_jax.parts.random import Random
from darex_jax.parts.rounding import rounded
from darex_jax.parts.total import Parts, values_of
from darex_jax.tasks.answers import EncodedAnswers
from darex_jax.tasks.batching import Encoded
from darex_jax.tasks.source import Material, Source, hold_out, read_material
from darex_jax.tasks.table import share_of_right
from darex_jax.training.causal_lm import answer_scores
from darex_jax.training.checkpoints import own_place
from darex_jax.training.distill import STEPS, Look, distill, look_at, unsupported_outputs

CURVATURE_ROWS = 8  # per gradient: smaller batches give a better estimate, and take longer
SCORED = 1000  # maximum number of labelled texts for a metric
HELD_OUT = 200  # maximum number of held-out texts for evaluation during training


class Metric(NamedTuple):
    """Attributes: name; examples: their number; fine: the fine-tuned model's; of: parameters -> metric."""

    name: str
    examples: int
    fine: float
    of: Callable[[Any], float]


@dataclass
class Trainer:
    """Trains parts by `distill` on texts, some of which are held out; `Evidence.train`.

    Attributes:
      model, fine, start, steps, checkpoints, on_look: as for `distill`.
      texts, held_out: examples.
      made_from: digests of the models and the texts, for `checkpoints`.
      metric: on labels; None if it is not asked for.
      result: the evaluation of the last training's result; score: its metric.
    """

    model: Model
    fine: Any
    start: Any
    texts: Material
    held_out: Material
    made_from: Mapping[str, str]
    steps: int = STEPS
    checkpoints: Path | None = None
    on_look: Callable[[Look], None] = lambda look: None
    metric: Metric | None = None
    result: Look | None = None
    score: float | None = None

    @property
    def measure(self) -> str | None:
        """The meaning of an evaluation's `agreement`; None without a head of one class or score."""
        config = self.model.config
        if isinstance(config, DecoderConfig):
            return "agreement of next tokens"
        if "ForSequenceClassification" not in config.architectures[0] or unsupported_outputs(self.model):
            return None
        return "correlation of scores" if config.num_labels == 1 else "agreement of predictions"

    @property
    def calibration(self) -> Material:
        """The texts of which methods without a training take statistics."""
        return self.texts.first(HELD_OUT)

    def look(self, parts: Mapping[str, Any]) -> Look:
        """Evaluates the model with these parts, by dotted name, on the held-out texts."""
        computed = flatten_names(self.start)
        known = {name: each for name, each in parts.items() if name in computed}
        return look_at(self.model, self.fine, apply_delta(self.start, known), self.held_out.batches())

    def __call__(self, parts: Mapping[str, Parts], bits: int | None) -> Mapping[str, Parts]:
        computed = flatten_names(self.start)
        aside = {
            name: rounded(each, bits, coarse=True) for name, each in parts.items() if name not in computed
        }
        parts = {name: each for name, each in parts.items() if name in computed}
        stored = {
            name: [len(v) for part in p.parts for v in values_of(part).values()] for name, p in parts.items()
        }
        drawn = [
            np.asarray(part.key).tolist()
            for p in parts.values()
            for part in p.parts
            if isinstance(part, Random)
        ]
        made_from = [dict(self.made_from), stored, drawn, bits, self.steps]
        with own_place(self.checkpoints, made_from, "training") as place:
            result = distill(
                self.model, self.fine, self.start, parts, self.texts.epoch, self.held_out.batches(),
                steps=self.steps, bits=bits, checkpoints=place, on_look=self.on_look,
            )  # fmt: skip
        self.result = result.looks[-1]
        if self.metric is not None:
            self.score = self.metric.of(apply_delta(self.start, result.parts))
        return result.parts | aside


def gather(
    base: Path,
    fine: Path,
    source: Source,
    needs: Collection[str],
    *,
    scope: Scope | None = None,
    ignore_config_fields: Collection[str] = (),
    with_metric: bool = False,
    **training: Any,
) -> tuple[Evidence, dict[str, str]]:
    """The required evidence, and digests of the model and the examples that it comes from.

    Args:
      base, fine: directories of the models.
      source: its training split is used, for a metric the held-out one, never the reported one.
      needs: names of fields of `Evidence`.
      scope: of pruning; None is the family's default.
      ignore_config_fields: see `read_model_config`.
      with_metric: the `Trainer` measures its result on the labels of the source's held-out split.
      training: steps, checkpoints and on_look of the `Trainer`.
    """
    if not needs:
        return Evidence(), {}
    material = read_material(fine, source, "train")
    with Checkpoint(fine) as checkpoint:
        digests = {"fine_weights": weights_digest(checkpoint), "data": material.encoded.digest()}
    if "train" not in needs:
        model, params = load_model(fine, ignore_config_fields=ignore_config_fields)
        return _statistics(model, params, material, needs), digests
    if len(material.encoded) < 2:
        raise DarexError("training parts needs at least two texts, to train and to hold out.")
    model, params, base_params = load_pair(base, fine, scope, ignore_config_fields)
    rows, held = hold_out(len(material.encoded), min(HELD_OUT, len(material.encoded) // 2), 0)
    texts, held_out = material.select(rows), material.select(held)
    made_from = digests | {"seed": str(source.seed)}
    if training.get("checkpoints") is not None:  # only checkpoints need it
        with Checkpoint(base) as checkpoint:
            made_from["base_weights"] = weights_digest(checkpoint)
        made_from["from_base"] = ", ".join(sorted(flatten_names(base_params)))
    train = Trainer(model, params, combine(params, base_params), texts, held_out, made_from, **training)
    if with_metric:
        some = read_material(fine, source, "validation").first(SCORED)
        train.metric = _metric(model, params, some, source)
    return replace(_statistics(model, params, train.calibration, needs), train=train), digests


def _metric(model: Model, fine: Any, material: Material, source: Source) -> Metric:
    """The metric on a source's labels; for a decoder its scores of answers, each token given those before it.

    Raises: DarexError for a source without labels, or without completions for a decoder.
    """
    batches, encoded, task, own = material.batches(), material.encoded, material.task, source.table
    answers = isinstance(encoded, EncodedAnswers)
    if not source.labelled or (answers and own is not None and own.completion is None):
        raise DarexError(
            "a metric is measured on labels: pass --task, or --data with --label (a decoder: --prompt and "
            "--completion)."
        )
    if isinstance(encoded, Encoded):
        assert task is not None  # its labels are read
        name, metric, labels = task.metric_name, task.metric, encoded.labels

        def of(params: Any) -> float:
            return metric(predict(model, params, batches), labels)
    else:
        name = share_of_right(material.metric or "exact_match")

        def of(params: Any) -> float:
            return answer_scores(model, params, batches).named()[name]

    return Metric(name, len(encoded), of(fine), of)


def _statistics(model: Model, params: Any, material: Material, needs: Collection[str]) -> Evidence:
    moments = _every if "second_moments" in needs else _none
    evidence = Evidence()
    if {"input_norms", "second_moments"} & set(needs):
        evidence = evidence_of(input_statistics(model, params, material.batches(), moments))
    if "linear_layers" in needs:
        evidence = replace(evidence, linear_layers=linear_layers(model, params, material.batches()[0]))
    if "second_moments" in needs:  # those of embedding tables are diagonal
        counts = token_counts(model, params, material.batches())
        evidence = replace(evidence, token_counts=jax.tree.map(np.asarray, counts))
    if "curvature" not in needs:
        return evidence
    batches = material.batches(CURVATURE_ROWS)
    mean_curvature = curvature(model, params, flatten_names(params), batches, jax.random.key(0))
    return replace(evidence, curvature=mean_curvature)


def evidence_of(statistics: dict[str, InputStatistics]) -> Evidence:
    """`Evidence` from the statistics of a calibration pass."""
    return Evidence(
        input_norms={name: np.asarray(jnp.sqrt(s.square * s.tokens)) for name, s in statistics.items()},
        second_moments={
            name: np.asarray(s.second_moment) for name, s in statistics.items() if s.second_moment is not None
        },
    )


def _every(name: str) -> bool:
    return True


def _none(name: str) -> bool:
    return False
