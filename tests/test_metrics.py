"""The GLUE metrics against their formulas, and their values where undefined."""

import numpy as np
import pytest

from darex_jax.tasks.metrics import METRICS, accuracy, accuracy_and_f1, f1, matthews, pearson_and_spearman


def one_hot(classes, count=2):
    return np.eye(count, dtype=np.float32)[np.asarray(classes)]


PREDICTED = np.array([1, 1, 1, 0, 0, 1, 0, 1])
GOLD = np.array([1, 0, 1, 0, 1, 1, 0, 1])  # 4 true positives, 1 false one, 2 true negatives, 1 false one


def test_classification_metrics_against_the_confusion_matrix():
    tp, fp, tn, fn = 4, 1, 2, 1
    assert accuracy(one_hot(PREDICTED), GOLD) == (tp + tn) / 8
    root = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(one_hot(PREDICTED), GOLD) == pytest.approx((tp * tn - fp * fn) / root)
    f1 = 2 * tp / (2 * tp + fp + fn)
    assert accuracy_and_f1(one_hot(PREDICTED), GOLD) == pytest.approx(((tp + tn) / 8 + f1) / 2)


def test_three_classes_have_a_mean_f1():
    gold, predicted = np.array([0, 1, 2, 2]), np.array([0, 2, 2, 2])
    assert f1(one_hot(predicted, 3), gold) == pytest.approx((1 + 0 + 0.8) / 3)
    assert accuracy_and_f1(one_hot(predicted, 3), gold) == pytest.approx((0.75 + 0.6) / 2)


def test_correlations_match_explicit_values():
    rng = np.random.default_rng(0)
    x = rng.normal(size=50).astype(np.float32)
    y = x + rng.normal(size=50).astype(np.float32)
    rank = [np.argsort(np.argsort(v)) for v in (x, y)]
    expected = (np.corrcoef(x, y)[0, 1] + np.corrcoef(*rank)[0, 1]) / 2
    assert pearson_and_spearman(x[:, None], y) == pytest.approx(expected, abs=1e-6)
    assert pearson_and_spearman(x, y) == pearson_and_spearman(x[:, None], y)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_perfect_is_one_and_constant_neither_warns_nor_is_nan(metric):
    regression = metric is pearson_and_spearman
    perfect = GOLD.astype(np.float32)[:, None] if regression else one_hot(GOLD)
    assert metric(perfect, GOLD) == pytest.approx(1.0)
    constant = np.full_like(perfect, 0.3) if regression else one_hot(np.zeros_like(GOLD))
    score = metric(constant, GOLD)  # warnings are errors in the test configuration
    assert isinstance(score, float) and np.isfinite(score)
    if metric in (matthews, pearson_and_spearman):
        assert score == 0.0
        assert metric(perfect, np.ones_like(GOLD)) == 0.0
    if metric is accuracy_and_f1:
        assert metric(one_hot([0, 0]), np.array([0, 0])) == 0.5  # all correct, without examples of class 1


def test_nearly_constant_scores_count_as_constant():
    noise = np.float32(2.5) * (1 + np.float32(1e-7) * np.arange(8, dtype=np.float32))
    assert pearson_and_spearman(noise, np.arange(8.0)) == 0.0


def test_errors_are_explained():
    broken = one_hot(PREDICTED).copy()
    broken[3, 0] = np.nan
    with pytest.raises(ValueError, match="the model's output is NaN or infinite for 1 of 8 examples"):
        accuracy(broken, GOLD)
    with pytest.raises(ValueError, match=r"got \(8, 2\) and \(7,\)"):
        accuracy(one_hot(PREDICTED), GOLD[:7])
    with pytest.raises(ValueError, match=r"need scores \[N\] or \[N, 1\]"):
        pearson_and_spearman(one_hot(PREDICTED), GOLD)
