"""Metrics against loops written from the definitions, scikit-learn, and a recomputed oracle."""

import itertools

import numpy as np
import pytest
from sklearn import metrics as sk

from medvlp_jax.evaluation import metrics

Y = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0])
A = np.array([0.10, 0.40, 0.35, 0.20, 0.15, 0.80, 0.70, 0.35, 0.90, 0.60, 0.55, 0.05])
B = np.array([0.30, 0.45, 0.20, 0.50, 0.10, 0.60, 0.40, 0.40, 0.85, 0.55, 0.35, 0.25])


def loop_auroc(labels, scores, weights):
    wins = total = 0.0
    for i in np.flatnonzero(labels):
        for j in np.flatnonzero(~labels.astype(bool)):
            psi = 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
            wins += weights[i] * weights[j] * psi
            total += weights[i] * weights[j]
    return wins / total if total else np.nan


def loop_average_precision(labels, scores, weights):
    area, previous, positives = 0.0, 0.0, (weights * labels).sum()
    for threshold in np.unique(scores)[::-1]:
        chosen = scores >= threshold
        true, count = (weights * labels)[chosen].sum(), weights[chosen].sum()
        if count:
            area += (true / count) * (true / positives - previous)
            previous = true / positives
    return area


@pytest.fixture
def tied():
    rng = np.random.default_rng(3)
    return rng.integers(0, 2, 60), rng.integers(0, 12, 60) / 4, rng.integers(0, 4, (5, 60))


def test_oracle_of_auroc_and_average_precision():
    assert metrics.auroc(Y, A) == pytest.approx(0.9, abs=1e-12)
    assert metrics.auroc(Y, B) == pytest.approx(0.742857, abs=1e-6)
    assert metrics.average_precision(Y, A) == pytest.approx(0.8850, abs=1e-4)
    assert metrics.average_precision(Y, B) == pytest.approx(0.753571, abs=1e-6)


def test_oracle_of_decisions_at_one_half():
    table = metrics.confusion(Y, A >= 0.5, 2)
    np.testing.assert_array_equal(table, [[6, 1], [1, 4]])
    assert metrics.sensitivity(table)[1] == pytest.approx(0.8)
    assert metrics.specificity(table)[1] == pytest.approx(0.857143, abs=1e-6)
    assert metrics.balanced_accuracy(table) == pytest.approx(0.828571, abs=1e-6)
    assert metrics.f1(table)[1] == pytest.approx(0.8)
    assert metrics.mcc(table) == pytest.approx(0.657143, abs=1e-6)


def test_oracle_of_the_f1_threshold_which_counts_as_positive():
    threshold = metrics.best_f1_threshold(Y, A)
    assert threshold == 0.55
    assert ((threshold <= A) == Y).mean() == pytest.approx(0.8333, abs=1e-4)
    assert ((threshold < A) == Y).mean() == pytest.approx(0.75)


def test_best_f1_threshold_beats_every_other_score(tied):
    labels, scores, _ = tied

    def f1_at(t):
        return sk.f1_score(labels, scores >= t, zero_division=0)

    assert f1_at(metrics.best_f1_threshold(labels, scores)) == max(map(f1_at, np.unique(scores)))


def test_weighted_ranking_metrics_equal_the_double_loop(tied):
    labels, scores, weights = tied
    auroc = metrics.auroc(labels, scores, weights)
    area = metrics.average_precision(labels, scores, weights)
    for r, row in enumerate(weights):
        assert auroc[r] == pytest.approx(loop_auroc(labels, scores, row), rel=1e-12)
        assert area[r] == pytest.approx(loop_average_precision(labels, scores, row), rel=1e-12)


def test_integer_weights_equal_repeated_rows(tied):
    labels, scores, weights = tied
    repeated = np.repeat(np.arange(60), weights[0])
    for metric in (metrics.auroc, metrics.average_precision):
        assert metric(labels, scores, weights[0]) == pytest.approx(
            metric(labels[repeated], scores[repeated]), rel=1e-12
        )


def test_ranking_metrics_equal_scikit_learn(tied):
    labels, scores, _ = tied
    assert metrics.auroc(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores))
    assert metrics.average_precision(labels, scores) == pytest.approx(
        sk.average_precision_score(labels, scores)
    )


def test_order_of_rows_does_not_matter(tied):
    labels, scores, _ = tied
    order = np.random.default_rng(0).permutation(60)
    assert metrics.auroc(labels[order], scores[order]) == metrics.auroc(labels, scores)


def test_constant_scores_are_chance():
    assert metrics.auroc(Y, np.zeros(12)) == 0.5
    assert metrics.average_precision(Y, np.zeros(12)) == pytest.approx(Y.mean())


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_chance_of_average_precision_is_the_mean_over_all_orders(rows):
    for positives in range(1, rows + 1):
        labels, total = np.arange(rows) < positives, []
        for order in itertools.permutations(range(rows)):
            total.append(sk.average_precision_score(labels, order))
        found = metrics.expected_average_precision(positives, rows)
        assert found == pytest.approx(np.mean(total), rel=1e-12), positives


def test_chance_of_average_precision_is_what_random_scores_have():
    rng = np.random.default_rng(0)
    rows, found = np.array([43, 43, 300]), []
    for positives, n in zip((1, 9, 30), rows, strict=True):
        each = [
            loop_average_precision(np.arange(n) < positives, rng.random(n), np.ones(n))
            for _ in range(300)
        ]
        expected = metrics.expected_average_precision(positives, n)
        assert abs(np.mean(each) - expected) < 4 * np.std(each) / np.sqrt(300)
        found.append(expected)
    np.testing.assert_allclose(
        metrics.expected_average_precision(np.array([1, 9, 30]), rows), found, rtol=1e-15
    )
    assert found[0] == pytest.approx(np.sum(1 / np.arange(1, 44)) / 43, rel=1e-12)  # 0.101


def test_one_label_is_nan_for_auroc():
    assert np.isnan(metrics.auroc(np.ones(3), np.arange(3)))
    assert np.isnan(metrics.auroc(Y, A, Y * 1.0))


def test_multi_class_metrics_equal_scikit_learn():
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 4, 80), rng.integers(0, 4, 80)
    table = metrics.confusion(truth, guess, 4)
    np.testing.assert_array_equal(table, sk.confusion_matrix(truth, guess))
    assert metrics.accuracy(table) == pytest.approx(sk.accuracy_score(truth, guess))
    assert metrics.balanced_accuracy(table) == pytest.approx(
        sk.balanced_accuracy_score(truth, guess)
    )
    assert metrics.macro_f1(table) == pytest.approx(sk.f1_score(truth, guess, average="macro"))
    assert metrics.mcc(table) == pytest.approx(sk.matthews_corrcoef(truth, guess))
    for c in range(4):
        negatives = truth != c
        assert metrics.specificity(table)[c] == pytest.approx((guess[negatives] != c).mean())


def test_weighted_confusion_equals_repeated_rows():
    rng = np.random.default_rng(0)
    truth, guess, weights = (rng.integers(0, 3, 20) for _ in range(3))
    repeated = np.repeat(np.arange(20), weights)
    np.testing.assert_array_equal(
        metrics.confusion(truth, guess, 3, weights[None])[0],
        metrics.confusion(truth[repeated], guess[repeated], 3),
    )


def test_a_row_may_be_shared_between_answers_as_drawing_one_of_them_would_on_average():
    truth, weights = np.array([0, 1, 2, 1]), np.array([[1.0, 1, 1, 1], [2, 0, 3, 1]])
    tied = [(0,), (0, 1), (0, 1, 2), (1, 2)]  # 1 * 2 * 3 * 2 ways to draw
    shares = np.array([[(c in t) / len(t) for c in range(3)] for t in tied])
    drawn = [metrics.confusion(truth, guess, 3, weights) for guess in itertools.product(*tied)]
    found = metrics.confusion(truth, shares, 3, weights)
    np.testing.assert_allclose(found, np.mean(drawn, axis=0), rtol=1e-12)
    guess = np.array([2, 1, 0, 1])
    np.testing.assert_array_equal(
        metrics.confusion(truth, np.eye(3)[guess], 3, weights),
        metrics.confusion(truth, guess, 3, weights),
    )


def test_absent_classes_leave_macro_averages():
    table = metrics.confusion([0, 0, 1], [0, 2, 1], 3)
    np.testing.assert_array_equal(metrics.recall(table), [0.5, 1.0, np.nan])
    assert metrics.balanced_accuracy(table) == 0.75
    assert metrics.macro_f1(table) == pytest.approx((2 / 3 + 1) / 2)


def test_constant_predictor_has_mcc_zero():
    assert metrics.mcc(metrics.confusion(Y, np.zeros(12, int), 2)) == 0.0


def test_weighted_median_equals_the_median_of_repeated_values():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 9, 11).astype(float)
    weights = rng.integers(0, 3, (40, 11)) * 1.0
    for row, median in zip(weights, metrics.weighted_median(values, weights), strict=True):
        assert median == np.median(np.repeat(values, row.astype(int)))
