"""A fine-tuned model and its test examples: the metric, and the agreement with it, of any parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from darex_jax.evaluation.classification import agreement, predict
from darex_jax.evaluation.objectives import prediction_objective
from darex_jax.files.manifest import params_digest
from darex_jax.files.model import load_model
from darex_jax.models import DecoderConfig, Model
from darex_jax.study.fine_tunes import Place
from darex_jax.study.plan import FineTune
from darex_jax.tasks import load_task
from darex_jax.tasks.answers import answer_batches, encode_problems, load_problems
from darex_jax.tasks.batching import encode, evaluation_batches, load_tokenizer
from darex_jax.tasks.source import Source
from darex_jax.training.causal_lm import answer_scores

ROWS = 50  # of a batch of problems
CALIBRATION = 50  # training texts, without labels, for statistics of inputs and for q


@dataclass(frozen=True)
class Tested:
    """Attributes:
    model, params: the fine-tuned model; weights: digest of `params`.
    metric_name, examples: what is measured, on how many test examples.
    constant: the metric of the best constant answer; None for a decoder.
    values: model, parameters -> `metric` and `agreement` with the fine-tuned model, of next tokens for a
      decoder, with the share of right `tokens` and, where outputs are finite, the `loss` of its answers.
    """

    model: Model
    params: Any
    weights: str
    metric_name: str
    examples: int
    constant: float | None
    values: Callable[[Model, Any], dict[str, float]]

    def score(self, params: Any) -> float:
        """The metric of parameters of the fine-tuned model's shapes."""
        return self.values(self.model, params)["metric"]


def open_tested(fine_tune: FineTune, fine: Path, place: Place, limit: int) -> Tested:
    """Reads a fine-tuned model and the first `limit` test examples of its task."""
    model, params = load_model(fine)
    tokenizer, weights = load_tokenizer(fine), params_digest(params)
    if isinstance(model.config, DecoderConfig):
        difficulty = texts_of(fine_tune, place).difficulty
        problems = load_problems(fine_tune.task, "test", place.data_dir, difficulty, fine_tune.seed)[:limit]
        answers = list(answer_batches(encode_problems(tokenizer, problems), ROWS, 0, 0))
        agrees = prediction_objective(model, params, answers).measure

        def answered(model: Model, params: Any) -> dict[str, float]:
            scores = answer_scores(model, params, answers)
            found = {"metric": scores.answers, "tokens": scores.tokens, "agreement": agrees(params)}
            if math.isnan(found["agreement"]):  # an output is not finite: there is no prediction to agree
                return found | {"agreement": 0.0}
            return found | {"loss": scores.loss}

        return Tested(model, params, weights, "answers", len(problems), None, answered)
    task = load_task(fine_tune.task, place.data_dir)
    test = encode(tokenizer, task.test.select(slice(limit)))
    batches = evaluation_batches(test)
    reference = predict(model, params, batches)

    def classified(model: Model, params: Any) -> dict[str, float]:
        logits = predict(model, params, batches)
        if not np.isfinite(logits).all():  # there is no prediction to score
            return {"metric": 0.0, "agreement": 0.0}
        agrees = agreement(logits, reference)
        found = {"metric": task.metric(logits, test.labels)}
        return found | {"agreement": 0.0 if math.isnan(agrees) else agrees}

    constant = 0.0
    if task.kind != "regression":
        same = np.eye(task.num_labels)[:, None].repeat(len(test), axis=1)
        constant = max(task.metric(logits, test.labels) for logits in same)
    return Tested(model, params, weights, task.metric_name, len(test), constant, classified)


def texts_of(fine_tune: FineTune, place: Place, limit: int | None = None) -> Source:
    """The examples of a fine-tune's task, at most `limit`."""
    difficulty = fine_tune.options.get("difficulty", 3)
    return Source(task=fine_tune.task, data_dir=place.data_dir, difficulty=difficulty, limit=limit)


def about(tested: Tested) -> dict[str, Any]:
    """What a fine-tuned model's row says of the test."""
    return {
        "metric_name": tested.metric_name, "test_examples": tested.examples, "weights": tested.weights,
        "constant": tested.constant,
    }  # fmt: skip


def spread(seen: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean and sample standard deviation of the metric over masks; means of what else was measured."""
    metrics = [each["metric"] for each in seen]
    names = set.intersection(*map(set, seen)) - {"metric"}
    others = {name: float(np.mean([each[name] for each in seen])) for name in seen[0] if name in names}
    std = float(np.std(metrics, ddof=1)) if len(metrics) > 1 else 0.0
    return {"mean": float(np.mean(metrics)), "std": std, "metrics": metrics, **others}
