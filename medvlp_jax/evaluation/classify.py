"""Scores against labels: the numbers behind zero-shot, probe and supervised classification.

Clean flavour: macro averages over the classes that can be scored, the others listed; intervals from
a bootstrap over patients; a chance level beside every number.

Axis letters: N rows, C classes, R resamples.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special

from medvlp_jax.config import UserError, nearest
from medvlp_jax.data import studies
from medvlp_jax.evaluation import metrics, scoring, statistics
from medvlp_jax.evaluation.features import check_finite
from medvlp_jax.evaluation.results import Results, assemble, number

PROTOCOL = "classify@clean-v2"  # v1 ranked rows by raw logits, which rows do not share a zero of


class Scored(NamedTuple):
    """Numbers by metric name, and notes for the protocol entry."""

    numbers: dict[str, dict[str, Any]]
    notes: dict[str, Any]


def run(
    logits,
    labels,
    classes: Sequence[str],
    *,
    task: str,
    multi_label: bool,
    views: int = 1,
    groups=None,
    **options,
) -> Results:
    """Score a model's own class logits (supervised recipes).

    One class a row is ranked by its probability: a constant added to the logits of a row, which
    changes no answer, changes no number.

    Args:
      logits: [N, C]; any monotone score a class for multi_label, of a softmax else.
      labels: [N, C] int8: 1 present, 0 absent, -1 unknown.
      classes: C names.
      task: middle part of the keys.
      multi_label: one yes/no question a class, or one class a row.
      views: flips and turns the logits are an average of; a setting that the hash covers.
      groups: [N] patient of each row.
      **options: resamples, seed, level of `statistics.bootstrap`; positive of `single_label`.
    """
    score = multi_label_scores
    if not multi_label:
        score = single_label_scores
        check_finite("logits", np.asarray(logits))
        logits = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=1)
    scored = score(labels, logits, classes, groups=groups, **options)
    settings = {"classes": list(classes), "multi_label": multi_label, **options}
    settings |= {"views": views} if views > 1 else {}
    return assemble(PROTOCOL, task, scored.numbers, settings=settings, notes=scored.notes)


def by_study(found: Mapping[str, np.ndarray], task: str) -> dict[str, np.ndarray]:
    """Return one row a study: its images' mean probabilities as `logits`, label and patient.

    Args:
      found: `logits`, labels of the task, `study_id` and `patient_id`, a row an image.
      task: whose labels; that of a study is of its first image whose class is known.

    Raises:
      UserError: for a study with images of several classes.
    """
    rows = study_rows(found["study_id"], found[f"label/{task}"])
    study = np.unique(found["study_id"], return_inverse=True)[1]
    logits = np.asarray(found["logits"], np.float64)
    total = np.zeros((len(rows), logits.shape[1]))
    np.add.at(total, study, scipy.special.softmax(logits, axis=1))
    mean = total / np.bincount(study)[:, None]
    kept = {key: found[key][rows] for key in (f"label/{task}", "patient_id", "study_id")}
    return kept | {"logits": np.log(np.maximum(mean, 1e-300))}


def study_rows(study_id: Sequence[str], labels) -> np.ndarray:
    """Return the row whose label each study has, see `studies.labelled_rows`."""
    return studies.labelled_rows(
        study_id, labels, "classify_studies", "evals.protocols without classify_studies"
    )


def _check(labels, scores, classes):
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    if labels.shape != scores.shape or labels.shape[1:] != (len(classes),):
        raise ValueError(
            f"labels {labels.shape} and scores {scores.shape} must both be [N, {len(classes)}]"
        )
    check_finite("scores", scores)
    return labels, scores


def _has_both(labels) -> np.ndarray:
    """Return [C]: the classes with a known positive and a known negative."""
    return (labels == 1).any(0) & (labels == 0).any(0)


def ranking(labels, scores, weights) -> np.ndarray:
    """AUROC and AUPRC of each class over its known rows, [R, 2, C]."""
    values = []
    for c in range(labels.shape[1]):
        known = labels[:, c] >= 0
        data = labels[known, c] == 1, scores[known, c], weights[:, known]
        values.append((metrics.auroc(*data), metrics.average_precision(*data)))
    return np.moveaxis(np.array(values), -1, 0).swapaxes(1, 2)


def multi_label_scores(labels, scores, classes, *, groups=None, **bootstrap) -> Scored:
    """AUROC and AUPRC of each class and their macro averages.

    A class without a positive or without a negative is skipped and listed. Chance: 0.5 for AUROC,
    for AUPRC what random scores have on average (`metrics.expected_average_precision`).

    Args:
      labels: [N, C] int8, -1 = unknown; an unknown cell is left out of its class alone.
      scores: [N, C], only their order within a class matters.
      classes: C names.
      groups: [N] patient of each row.
      **bootstrap: resamples, seed, level.
    """
    labels, scores = _check(labels, scores, classes)
    usable = _has_both(labels)
    names = [name for name, ok in zip(classes, usable, strict=True) if ok]
    y, s = labels[:, usable], scores[:, usable]
    known = y >= 0
    positives, rows = (y == 1).sum(0), known.sum(0)
    notes = _notes(classes, usable, groups, len(labels)) | {
        "left_out": int((labels < 0).all(1).sum()),
        "prevalence": dict(zip(names, positives / rows, strict=True)),
        "fewest_patients": dict(zip(names, fewest_patients(y, groups), strict=True)),
    }
    if not names:
        return Scored({}, notes)

    def statistic(weights):
        per_class = ranking(y, s, weights)  # [R, 2, C]
        both = np.concatenate([per_class.mean(-1, keepdims=True), per_class], axis=-1)
        return both.reshape(len(weights), -1)

    found = statistics.bootstrap(statistic, len(y), groups=groups, **bootstrap)
    entries = iter(zip(*found, strict=True))
    random = metrics.expected_average_precision(positives, rows)
    chances = {"auroc": np.full(len(names), 0.5), "auprc": random}
    numbers, details = {}, {}
    for metric, chance in chances.items():
        total = int(known.any(1).sum())
        numbers[f"macro_{metric}"] = number(*next(entries), n=total, chance=chance.mean())
        for c, name in enumerate(names):
            entry = number(*next(entries), n=int(rows[c]), chance=chance[c])
            details[f"{metric}/{name}"] = entry
    return Scored(numbers | details, notes)


def fewest_patients(labels, groups=None) -> list[int]:
    """Return how many patients have each class, or lack it, whichever are fewer [C].

    Args:
      labels: [N, C], 1 present, 0 absent, -1 unknown.
      groups: [N] patient of each row; None is one each.
    """
    patient, _ = statistics.group_index(groups, len(labels))
    count = lambda column, value: len(np.unique(patient[column == value]))
    return [min(count(column, 1), count(column, 0)) for column in np.asarray(labels).T]


def _notes(classes, usable, groups, n) -> dict[str, Any]:
    skipped = [name for name, ok in zip(classes, usable, strict=True) if not ok]
    return {"patients": statistics.group_index(groups, n)[1], "skipped": skipped}


def class_index(labels) -> np.ndarray:
    """Return the class of each row [N], -1 where no class is known to be present.

    Raises:
      UserError: for a row with several classes.
    """
    positive = np.asarray(labels) == 1
    crowded = np.flatnonzero(positive.sum(1) > 1)
    if len(crowded):
        row = crowded[0]
        raise UserError(
            f"Row {row} of a single-label task has {positive[row].sum()} classes; one is needed. "
            'Set "multi_label": true for this task.'
        )
    return np.where(positive.any(1), positive.argmax(1), -1)


def answers(scores) -> np.ndarray:
    """Return which share of a row's answer each class is [N, C].

    1 for the highest score. Classes that tie for it share the row, as drawing one of them would on
    average: always the first would make the accuracy of a model that tells nothing depend on the
    order of classes.

    Args:
      scores: [N, C].
    """
    scores = np.asarray(scores)
    best = scores == scores.max(1, keepdims=True)
    return best / best.sum(1, keepdims=True)


def single_label_scores(
    labels, scores, classes, *, ranked=None, groups=None, positive="", **bootstrap
) -> Scored:
    """Argmax decisions (accuracy, balanced accuracy, F1, MCC, ...) and one-vs-rest ranking.

    Classes that tie for the highest score share the row, see `answers`.

    `hard_auprc` is the average precision of the decisions taken as scores of 0 and 1, as CFCML's
    released code reports it: recall * precision + (1 - recall) * prevalence.

    Averages run over the classes that are present in the data. Chance is a uniform guess over all
    C classes (for F1 and `hard_auprc` its large-sample value; of the latter that is the prevalence,
    which every constant answer has in any sample), and random scores for AUROC and AUPRC; the
    prevalence control always answers the most frequent class. Rows without a known class are left
    out and counted; what cannot be computed, such as AUROC where all rows are of one class, is
    listed as undefined.

    Args:
      labels: [N, C] int8, one 1 a row; rows without a 1 are left out.
      scores: [N, C], comparable between classes.
      classes: C names.
      ranked: [N, C], comparable between rows: what AUROC and AUPRC rank; None takes the scores.
      groups: [N] patient of each row.
      positive: class whose sensitivity, specificity, G-mean and `hard_auprc` are reported (binary
        tasks; its AUPRC is `auprc/<class>`); empty = macro averages of one-vs-rest values.
      **bootstrap: resamples, seed, level.

    Raises:
      UserError: for a row with several classes, or an unknown `positive`.
    """
    labels, scores = _check(labels, scores, classes)
    _, ranked = _check(labels, scores if ranked is None else ranked, classes)
    if positive and positive not in classes:
        raise UserError(f"No class '{positive}'. {nearest(positive, list(classes))}")
    truth = class_index(labels)
    known = truth >= 0
    truth, scores, ranked = truth[known], scores[known], ranked[known]
    groups = None if groups is None else np.asarray(groups)[known]
    share = np.bincount(truth, minlength=len(classes)) / max(len(truth), 1)  # [C]
    one_hot = np.arange(len(classes)) == truth[:, None]
    notes = _notes(classes, share > 0, groups, len(truth)) | {
        "left_out": int((~known).sum()),
        "prevalence": dict(zip(classes, share, strict=True)),
        "fewest_patients": dict(zip(classes, fewest_patients(one_hot, groups), strict=True)),
    }
    if not len(truth):
        return Scored({}, notes)
    statistic, chances = _decisions(truth, scores, ranked, classes, share, positive)
    found = statistics.bootstrap(statistic, len(truth), groups=groups, **bootstrap)
    numbers = {
        name: number(*entry, n=len(truth), chance=chance)
        for (name, chance), entry in zip(chances.items(), zip(*found, strict=True), strict=True)
    }
    # With one class in the data nothing can be ranked: said by name, not by a number.
    if undefined := [name for name, entry in numbers.items() if not np.isfinite(entry["value"])]:
        notes["undefined"] = undefined
        numbers = {name: entry for name, entry in numbers.items() if name not in undefined}
    return Scored(numbers | _prevalence_control(share, len(truth)), notes)


def _decisions(truth, scores, ranked, classes, share, positive):
    """Return the statistic behind single-label numbers, and chance by metric in the same order."""
    num_classes, present = len(classes), share > 0
    predictions = answers(scores)
    # Worth many points and transductive (it looks at the whole test set): a row of its own.
    standard = answers(scoring.standardised(scores))
    one_hot = (truth[:, None] == np.arange(num_classes)).astype(np.int8)[:, present]
    one_hot = one_hot[:, _has_both(one_hot)]  # none where all rows are of one class, else all
    focus = np.array([name == positive for name in classes]) if positive else present

    def statistic(weights):
        table = metrics.confusion(truth, predictions, num_classes, weights)  # [R, C, C]
        z_table = metrics.confusion(truth, standard, num_classes, weights)
        recall = metrics.recall(table)
        sensitivity = recall[:, focus].mean(-1)
        specificity = metrics.specificity(table)[:, focus].mean(-1)
        order, per_class = np.full((2, len(weights)), np.nan), np.empty((len(weights), 2, 0))
        if one_hot.size:
            per_class = ranking(one_hot, ranked[:, present], weights)
            order = per_class.mean(-1).T
        f1 = metrics.f1(table)
        rows, called = table.sum(-1), table.sum(-2)  # [R, C]
        precision = np.diagonal(table, axis1=-2, axis2=-1) / np.where(called > 0, called, 1)
        prevalence = rows / rows.sum(-1, keepdims=True)
        hard = recall * precision + (1 - recall) * prevalence
        # a plain mean, so that a resample that lost a class is NaN and is drawn again
        columns = [
            metrics.accuracy(table),
            recall[:, present].mean(-1),
            f1[:, present].mean(-1),
            (f1 * prevalence)[:, present].sum(-1),
            *order,
            hard[:, focus].mean(-1),
            metrics.mcc(table),
            sensitivity,
            specificity,
            np.sqrt(sensitivity * specificity),
            metrics.accuracy(z_table),
            *recall[:, present].T,
            *f1[:, present].T,
            *per_class[:, 0].T,
            *per_class[:, 1].T,
        ]
        return np.stack(columns, axis=-1)

    random = metrics.expected_average_precision(one_hot.sum(0), len(truth))
    return statistic, _chances(classes, share, random, focus)


def _chances(classes, share, random, focus) -> Mapping[str, float]:
    """Chance by metric name, in the order of the statistic.

    Args:
      classes: C names.
      share: of the rows [C].
      random: AUPRC of random scores, of the classes that are present; none if it is one alone.
      focus: [C], the classes that sensitivity and the like are of.
    """
    guess = 1 / len(classes)
    f1 = 2 * share * guess / (share + guess)
    names = [name for name, s in zip(classes, share, strict=True) if s > 0]
    return {
        "accuracy": guess,
        "balanced_accuracy": guess,
        "macro_f1": f1[share > 0].mean(),
        "weighted_f1": (f1 * share)[share > 0].sum(),
        "macro_auroc": 0.5,
        "macro_auprc": random.mean() if len(random) else np.nan,
        "hard_auprc": share[focus].mean(),
        "mcc": 0.0,
        "sensitivity": guess,
        "specificity": 1 - guess,
        "g_mean": np.sqrt(guess * (1 - guess)),
        "accuracy_zscore": guess,
        **{f"recall/{name}": guess for name in names},
        **{f"f1/{name}": value for name, value in zip(names, f1[share > 0], strict=True)},
        **{f"auroc/{name}": 0.5 for name in names[: len(random)]},
        **{f"auprc/{name}": value for name, value in zip(names, random, strict=False)},
    }


def _prevalence_control(share, n: int) -> dict[str, dict[str, Any]]:
    """Return what always answering the most frequent class scores; no interval: it is exact."""
    top, present = share.max(), (share > 0).sum()
    return {
        "prevalence_control_accuracy": number(top, n=n),
        "prevalence_control_balanced_accuracy": number(1 / present, n=n),
        "prevalence_control_macro_f1": number(2 * top / (1 + top) / present, n=n),
    }
