"""F1 and accuracy of findings at a threshold, and where the threshold comes from.

A finding is called present where its score is at least the threshold, the one with the highest F1:

  maxf1-on-val   on the validation split
  maxf1-on-test  on the rows it is then scored on, as MedKLIP, KAD, MAVL and G2D do: optimistic,
                 and the notes say so

The intervals hold the thresholds fixed. MAVL and others report NaN for a finding without positives;
here it is skipped and listed.

Axis letters: N rows, C classes, R resamples.
"""

from collections.abc import Sequence

import numpy as np

from medvlp_jax.config import UserError, nearest
from medvlp_jax.evaluation import metrics, statistics
from medvlp_jax.evaluation.classify import Scored
from medvlp_jax.evaluation.results import number

RULES = ("maxf1-on-val", "maxf1-on-test")


def check(rule: str) -> None:
    """Refuse a rule that does not exist; "" is none.

    Raises:
      UserError: with the nearest.
    """
    if rule and rule not in RULES:
        raise UserError(f"No threshold rule '{rule}'. {nearest(rule, RULES)}")


def choose(labels, scores) -> np.ndarray:
    """Return the threshold [C] with the highest F1 of each class over its known rows.

    Args:
      labels: [N, C] int8, -1 = unknown.
      scores: [N, C].

    Returns:
      NaN for a class without a known positive.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    found = np.full(labels.shape[1], np.nan)
    for c in range(labels.shape[1]):
        known = labels[:, c] >= 0
        if (labels[known, c] == 1).any():
            found[c] = metrics.best_f1_threshold(labels[known, c] == 1, scores[known, c])
    return found


def decide(
    labels, scores, thresholds, classes: Sequence[str], *, rule: str, groups=None, **bootstrap
) -> Scored:
    """Score the decisions `scores >= thresholds`.

    Args:
      labels: [N, C] int8, -1 = unknown; an unknown cell is left out of its class alone.
      scores: [N, C].
      thresholds: [C] from `choose`; NaN = no decision, the class is skipped.
      classes: C names.
      rule: the thresholds' origin, one of RULES.
      groups: [N] patient of each row.
      **bootstrap: resamples, seed, level.

    Returns:
      macro_f1_at_threshold, macro_accuracy_at_threshold and both of each class; the thresholds in
      the notes. Chance of F1 is always answering "present", of accuracy the more frequent answer.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    usable = np.isfinite(thresholds) & (labels == 1).any(0)
    names = [name for name, ok in zip(classes, usable, strict=True) if ok]
    notes = {
        "thresholds": dict(zip(names, np.asarray(thresholds)[usable], strict=True)),
        "threshold_rule": rule + (" (optimistic)" if rule == "maxf1-on-test" else ""),
        "without_threshold": [name for name, ok in zip(classes, usable, strict=True) if not ok],
    }
    if not names:
        return Scored({}, notes)
    y, known = labels[:, usable] == 1, labels[:, usable] >= 0
    called = scores[:, usable] >= np.asarray(thresholds)[usable]

    def statistic(weights):
        total = lambda cells: weights @ (cells & known)  # [R, C]
        hits, wrong = total(y & called), total(y != called)
        f1 = 2 * hits / np.where(total(y) > 0, 2 * hits + wrong, np.nan)
        right = 1 - wrong / total(known)
        columns = [f1.mean(1, keepdims=True), f1, right.mean(1, keepdims=True), right]
        return np.concatenate(columns, axis=1)

    found = statistics.bootstrap(statistic, len(y), groups=groups, **bootstrap)
    entries = iter(zip(*found, strict=True))
    share = (y & known).sum(0) / known.sum(0)
    chances = {"f1": 2 * share / (1 + share), "accuracy": np.maximum(share, 1 - share)}
    numbers, details = {}, {}
    for metric, chance in chances.items():
        n = int(known.any(1).sum())
        numbers[f"macro_{metric}_at_threshold"] = number(*next(entries), n=n, chance=chance.mean())
        for c, name in enumerate(names):
            n = int(known[:, c].sum())
            key = f"{metric}_at_threshold/{name}"
            details[key] = number(*next(entries), n=n, chance=chance[c])
    return Scored(numbers | details, notes)
