"""Classification metrics from their definitions, computed for many bootstrap resamples at once.

A resample is a vector of row weights (how often each row was drawn), so every metric takes
`weights` [..., N] and returns [...]; without weights each row counts once and the result is a
scalar. What is undefined (a class with one label) is NaN here: callers skip it and list it.

Axis letters: N rows, C classes, R resamples (any leading axes of `weights`).
"""

import numpy as np
from scipy import sparse, special


def _split(labels, scores, weights):
    """Return scores and weights of the positives and of the negatives, each sorted by score."""
    labels = np.asarray(labels).astype(bool)  # [N]
    scores = np.asarray(scores, np.float64)
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
    order = np.argsort(scores, kind="stable")
    positive, negative = order[labels[order]], order[~labels[order]]
    return scores[positive], scores[negative], weights[..., positive], weights[..., negative]


def _cumulative(weights):
    """Return [..., N + 1]: entry i is the weight of the first i rows."""
    out = np.zeros((*weights.shape[:-1], weights.shape[-1] + 1))
    np.cumsum(weights, axis=-1, out=out[..., 1:])
    return out


def _ratio(numerator, denominator):
    """Divide; NaN where the denominator is zero."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    out = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=out, where=denominator > 0)
    return out[()]


def auroc(labels, scores, weights=None):
    """Area under the ROC curve: P(score of a positive > score of a negative), ties count one half.

    Args:
      labels: [N], true or 1 = positive.
      scores: [N], higher = more positive.
      weights: [..., N] non-negative, or None for ones.

    Returns:
      [...] in [0, 1]; NaN where positives or negatives have no weight.
    """
    positive, negative, w_pos, w_neg = _split(labels, scores, weights)
    below = _cumulative(w_neg)  # [..., negatives + 1]
    lower = below[..., np.searchsorted(negative, positive, "left")]
    upto = below[..., np.searchsorted(negative, positive, "right")]
    wins = np.sum(w_pos * (lower + upto), axis=-1) / 2
    return _ratio(wins, w_pos.sum(-1) * w_neg.sum(-1))


def average_precision(labels, scores, weights=None):
    """Area under the precision-recall steps: sum over thresholds of precision x gain in recall.

    Rows with equal scores enter together. Args and NaN rule as in `auroc`, except that only
    positives are needed.
    """
    positive, negative, w_pos, w_neg = _split(labels, scores, weights)
    below_pos, below_neg = _cumulative(w_pos), _cumulative(w_neg)
    true = below_pos[..., -1:] - below_pos[..., np.searchsorted(positive, positive, "left")]
    false = below_neg[..., -1:] - below_neg[..., np.searchsorted(negative, positive, "left")]
    precision = np.divide(true, true + false, out=np.zeros_like(true), where=true > 0)
    return _ratio(np.sum(w_pos * precision, axis=-1), w_pos.sum(-1))


def expected_average_precision(positives, rows):
    """Average precision of distinct scores drawn at random: what guessing gives.

    [(P - 1) (n - H_n) / (n - 1) + H_n] / n with H_n = 1 + 1/2 + ... + 1/n: a positive at rank k has
    one hit, itself, and (P - 1) / (n - 1) of each row above it. It is above the prevalence P / n,
    which it nears in large sets: 0.10 and not 0.02 for one positive of 43.

    Args:
      positives: P >= 1, a number or an array.
      rows: n, likewise.
    """
    positives, rows = np.asarray(positives, np.float64), np.asarray(rows, np.float64)
    harmonic = special.digamma(rows + 1) + np.euler_gamma
    others = (positives - 1) * (rows - harmonic) / np.maximum(rows - 1, 1)
    return (others + harmonic) / rows


def best_f1_threshold(labels, scores) -> float:
    """Return the score t for which predicting `scores >= t` has the highest F1; the highest such t.

    Choose it on validation data: on the test set it is optimistic.

    Raises:
      ValueError: if there is no positive.
    """
    positive, negative, _, _ = _split(labels, scores, None)
    if not len(positive):
        raise ValueError(f"best_f1_threshold needs a positive, got 0 of {len(negative)} rows")
    thresholds = np.unique(positive)  # between two positives only false positives are gained
    true = len(positive) - np.searchsorted(positive, thresholds, "left")
    false = len(negative) - np.searchsorted(negative, thresholds, "left")
    f1_scores = 2 * true / (true + false + len(positive))
    return float(thresholds[len(f1_scores) - 1 - np.argmax(f1_scores[::-1])])


def confusion(labels, predictions, num_classes: int, weights=None):
    """Count truth (rows) against prediction (columns).

    Args:
      labels: [N] integers in [0, num_classes).
      predictions: [N], the same range; or [N, C], which share of a row each class is the answer of.
      num_classes: C.
      weights: [..., N], or None for ones.

    Returns:
      [..., C, C] float64; every metric below takes this.
    """
    labels, predictions = np.asarray(labels, np.int64), np.asarray(predictions)
    n, cells = len(labels), num_classes**2
    weights = np.ones(n) if weights is None else np.asarray(weights, np.float64)
    rows, answers, shares = np.arange(n), predictions, np.ones(n)
    if predictions.ndim == 2:
        rows, answers = predictions.nonzero()
        shares = predictions[rows, answers]
    cell = labels[rows] * num_classes + answers.astype(np.int64)
    indicator = sparse.csr_array((shares, (rows, cell)), shape=(n, cells))
    counts = weights.reshape(-1, n) @ indicator  # hardly more than one non-zero a row: R N work
    return counts.reshape(*weights.shape[:-1], num_classes, num_classes)


def accuracy(confusion):
    """Share of rows on the diagonal, [...]."""
    return _ratio(np.trace(confusion, axis1=-2, axis2=-1), confusion.sum((-2, -1)))


def recall(confusion):
    """Recall (sensitivity) of each class, [..., C]; NaN where the class is absent."""
    return _ratio(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1))


sensitivity = recall


def specificity(confusion):
    """TN / (TN + FP) of each class against the rest, [..., C]."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    negatives = confusion.sum((-2, -1))[..., None] - confusion.sum(-1)
    false_positives = confusion.sum(-2) - hits
    return _ratio(negatives - false_positives, negatives)


def f1(confusion):
    """2 TP / (2 TP + FP + FN) of each class, [..., C]; NaN where the class is absent."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    support = confusion.sum(-1)
    return np.where(support > 0, _ratio(2 * hits, support + confusion.sum(-2)), np.nan)


def balanced_accuracy(confusion):
    """Mean recall over the classes that are present, [...]."""
    return over_present(recall(confusion))


def macro_f1(confusion):
    """Mean F1 over the classes that are present, [...]."""
    return over_present(f1(confusion))


def over_present(per_class):
    """Mean over the classes [..., C] that are not NaN; NaN when all are."""
    known = ~np.isnan(per_class)
    return _ratio(np.where(known, per_class, 0.0).sum(-1), known.sum(-1))


def mcc(confusion):
    """Matthews correlation, R_K of Gorodkin (2004) for C > 2, [...]; 0 for a constant predictor.

    https://doi.org/10.1016/j.compbiolchem.2004.09.006
    """
    total = confusion.sum((-2, -1))
    truth, predicted = confusion.sum(-1), confusion.sum(-2)
    covariance = np.trace(confusion, axis1=-2, axis2=-1) * total - (truth * predicted).sum(-1)
    spread = (total**2 - (truth**2).sum(-1)) * (total**2 - (predicted**2).sum(-1))
    return np.where(spread > 0, covariance / np.sqrt(np.where(spread > 0, spread, 1.0)), 0.0)[()]


def weighted_mean(values, weights):
    """Mean of `values` [N, ...] under `weights` [R, N], [R, ...]."""
    totals = weights.sum(-1).reshape(-1, *(1,) * (values.ndim - 1))
    return np.tensordot(weights, values, axes=1) / totals


def weighted_median(values, weights):
    """Median of `values` [N] under integer `weights` [R, N], as if each row were repeated, [R]."""
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(weights[:, order], axis=-1)
    half = cumulative[:, -1:] / 2
    lower = np.argmax(cumulative >= half, axis=-1)
    upper = np.argmax(cumulative > half, axis=-1)
    return (values[order[lower]] + values[order[upper]]) / 2
