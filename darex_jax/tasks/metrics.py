"""The metrics of the evaluation protocol: functions of logits and labels.

Every function takes `logits` ([N, classes], or [N] / [N, 1] for regression) and `labels` ([N]) and returns a
Python float. A correlation that is undefined because predictions or labels are constant is 0.0: a badly
pruned model often predicts a single class.
Source: GLUE (arXiv:1804.07461) with the choices of DAREx (arXiv:2410.09344).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from darex_jax.core.errors import DarexError


def _classes(logits: ArrayLike, labels: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    scores, gold = np.asarray(logits), np.asarray(labels)
    if scores.ndim != 2 or gold.shape != scores.shape[:1] or not len(gold):
        raise DarexError(f"need logits [N, classes] and labels [N], got {scores.shape} and {gold.shape}.")
    _refuse_non_finite(scores)
    return scores.argmax(axis=1), gold


def _refuse_non_finite(scores: NDArray[Any]) -> None:
    if not np.isfinite(scores).all():
        bad = int((~np.isfinite(scores)).reshape(len(scores), -1).any(axis=1).sum())
        raise DarexError(f"the model's output is NaN or infinite for {bad} of {len(scores)} examples.")


def accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Share of examples whose largest logit is that of the label."""
    predicted, gold = _classes(logits, labels)
    return float((predicted == gold).mean())


def matthews(logits: ArrayLike, labels: ArrayLike) -> float:
    """Matthews correlation of the predicted classes, in [-1, 1]; 0.0 when either side is constant."""
    from sklearn.metrics import matthews_corrcoef

    predicted, gold = _classes(logits, labels)
    if np.ptp(predicted) == 0 or np.ptp(gold) == 0:
        return 0.0
    return float(matthews_corrcoef(gold, predicted))


def accuracy_and_f1(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean of accuracy and `f1`."""
    return (accuracy(logits, labels) + f1(logits, labels)) / 2


def f1(logits: ArrayLike, labels: ArrayLike) -> float:
    """F1 of class 1 for two classes, macro-averaged for more over those that labels or predictions have; 0.0
    for a class that only one of the two has."""
    from sklearn.metrics import f1_score

    predicted, gold = _classes(logits, labels)
    average = "binary" if np.shape(logits)[1] == 2 else "macro"
    return float(f1_score(gold, predicted, average=average, zero_division=0.0))


def pearson_and_spearman(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean of the Pearson and Spearman correlations; 0.0 when either side is constant (up to rounding)."""
    from scipy.stats import pearsonr, spearmanr

    predicted = np.asarray(logits, dtype=np.float64)
    gold = np.asarray(labels, dtype=np.float64)
    if gold.ndim != 1 or not len(gold) or predicted.shape not in (gold.shape, (*gold.shape, 1)):
        raise DarexError(f"need scores [N] or [N, 1] and labels [N], got {predicted.shape} and {gold.shape}.")
    _refuse_non_finite(predicted)
    predicted = predicted.reshape(-1)
    # Float32 predictions that differ in the last bits only are constant; their correlation would be noise.
    if any(np.ptp(x) <= 1e-6 * np.abs(x).max() for x in (predicted, gold)):
        return 0.0
    return float(pearsonr(predicted, gold).statistic + spearmanr(predicted, gold).statistic) / 2


METRICS = {f.__name__: f for f in (accuracy, matthews, f1, accuracy_and_f1, pearson_and_spearman)}
