"""Linear probe: logistic regression on frozen, standardised features.

The regularisation strength is the one with the best macro AUROC on a validation fifth of the
training patients; the probe is then fitted again on all of them. The test set is used once. This is
a convex problem solved to convergence, unlike the AdamW probe of MGCA: its numbers do not compare.

Axis letters: N rows, D feature width, C classes.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import classify, metrics, statistics
from medvlp_jax.evaluation.features import check_finite
from medvlp_jax.evaluation.results import Results, assemble, stamped, task_name

PROTOCOL = "probe@clean-v1"
# Inverse L2 strengths, our choice: a path in which each fit starts from the one before.
STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
VALIDATION_FRACTION = 0.2
MAX_ITERATIONS = 2000


class Split(NamedTuple):
    """Row numbers of the fitting and of the validation part."""

    fit: np.ndarray
    validation: np.ndarray


def take_patients(groups, fraction: float, *, seed: int) -> np.ndarray:
    """Return the rows of a random share of the patients, at least two, in order.

    Args:
      groups: [N] patient numbers.
      fraction: in (0, 1]; smaller fractions of one seed are subsets of larger ones.
      seed: of the patients' order.

    Raises:
      UserError: for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"The fraction of training patients is {fraction}; it must be in (0, 1].")
    patients = np.random.default_rng(seed).permutation(np.unique(groups))
    kept = patients[: max(2, round(fraction * len(patients)))]
    return np.flatnonzero(np.isin(groups, kept))


def check_fractions(*, fractions: Sequence[float], draws: int) -> None:
    """Refuse shares and numbers of draws that cannot be.

    Raises:
      UserError: naming them.
    """
    wrong = [fraction for fraction in fractions if not 0 < fraction <= 1]
    if wrong or not fractions:
        raise UserError(
            f"evals.probe.fractions={tuple(fractions)} must be shares of the training patients in "
            "(0, 1], such as (0.01, 0.1, 1.0)."
        )
    if draws < 1:
        raise UserError(f"evals.probe.draws={draws} must be at least 1; 3 or more say something.")


def is_multi_label(labels) -> bool:
    """Say whether some row [C] with a known label is not of exactly one class."""
    labels = np.asarray(labels)
    return bool(((labels == 1).sum(1) != 1)[(labels >= 0).any(1)].any())


def validation_split(groups, *, seed: int) -> Split:
    """Hold out a fifth of the patients, at least one, with all their rows."""
    patients = np.random.default_rng([seed, 1]).permutation(np.unique(groups))
    held = patients[: max(1, round(VALIDATION_FRACTION * len(patients)))]
    inside = np.isin(groups, held)
    return Split(np.flatnonzero(~inside), np.flatnonzero(inside))


def _models(labels, multi_label: bool) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Return (class or -1 for all, rows, targets) of each regression that can be fitted."""
    if not multi_label:
        truth = classify.class_index(labels)
        rows = np.flatnonzero(truth >= 0)
        return [(-1, rows, truth[rows])] if len(np.unique(truth[rows])) > 1 else []
    columns = [(c, np.flatnonzero(labels[:, c] >= 0)) for c in range(labels.shape[1])]
    found = [(c, rows, labels[rows, c]) for c, rows in columns]
    return [(c, rows, y) for c, rows, y in found if len(np.unique(y)) > 1]


def _fit_path(features, labels, test_features, *, multi_label: bool, strengths):
    """Yield (test scores [n, C], converged) for each strength, each fit warm-started.

    A class that cannot be fitted scores 0: no ranking (multi-label), probability 0 (single-label).
    """
    scaler = StandardScaler().fit(features)
    x, x_test = scaler.transform(features), scaler.transform(test_features)
    tasks = [
        (c, rows, y, LogisticRegression(warm_start=True, max_iter=MAX_ITERATIONS, tol=1e-5))
        for c, rows, y in _models(labels, multi_label)
    ]
    for strength in strengths:
        scores, converged = np.zeros((len(x_test), labels.shape[1])), True
        for c, rows, y, model in tasks:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.set_params(C=strength).fit(x[rows], y)
            converged &= bool(np.all(model.n_iter_ < MAX_ITERATIONS))
            if c >= 0:
                scores[:, c] = model.decision_function(x_test)
            else:
                scores[:, model.classes_] = model.predict_proba(x_test)
        yield scores, converged


def _macro_auroc(labels, scores, multi_label: bool) -> float:
    """Mean AUROC over the classes with both labels; NaN if there is none."""
    if not multi_label:
        truth = classify.class_index(labels)
        labels = (truth[:, None] == np.arange(labels.shape[1])).astype(np.int8)[truth >= 0]
        scores = scores[truth >= 0]
    per_class = classify.ranking(labels, scores, np.ones((1, len(labels))))[0, 0]
    return float(metrics.over_present(per_class))


def choose_strength(features, labels, groups, *, multi_label: bool, seed: int) -> float | None:
    """Return the inverse L2 strength with the best validation macro AUROC; the smaller on a tie.

    None where so few patients leave no class that can be fitted and scored.
    """
    fit, held = validation_split(groups, seed=seed)
    if not len(fit):  # a single patient
        return None
    path = _fit_path(
        features[fit], labels[fit], features[held], multi_label=multi_label, strengths=STRENGTHS
    )
    values = [_macro_auroc(labels[held], scores, multi_label) for scores, _ in path]
    return None if np.isnan(values).all() else STRENGTHS[int(np.nanargmax(values))]


def fit(
    train_features,
    train_labels,
    test_features,
    *,
    multi_label: bool,
    seed: int,
    train_groups=None,
    fraction: float = 1.0,
) -> tuple[np.ndarray, dict]:
    """Choose the strength, fit, and score the test features.

    Args as in `run`.

    Returns:
      Scores [n, C], and what was fitted: strength, whether it was chosen (else it is 1, and a run
      of hours does not end in an error), train_rows, converged, not_fitted: the columns of classes
      without both answers among these rows, which score as a guess.

    Raises:
      UserError: for a fraction outside (0, 1], or features that are not finite.
    """
    train_features, test_features = np.asarray(train_features), np.asarray(test_features)
    check_finite("training features", train_features)
    check_finite("test features", test_features)
    groups, _ = statistics.group_index(train_groups, len(train_features))
    rows = take_patients(groups, fraction, seed=seed)
    x, y, groups = train_features[rows], np.asarray(train_labels)[rows], groups[rows]
    chosen = choose_strength(x, y, groups, multi_label=multi_label, seed=seed)
    strength = 1.0 if chosen is None else chosen
    path = _fit_path(x, y, test_features, multi_label=multi_label, strengths=(strength,))
    scores, converged = next(path)
    fitted = {"strength": strength, "strength_chosen": chosen is not None}
    fitted |= {"train_rows": len(rows), "converged": converged}
    return scores, fitted | {"not_fitted": not_fitted(y, multi_label)}


def not_fitted(labels, multi_label: bool) -> list[int]:
    """Return the columns of labels [N, C] that no regression answers."""
    models = _models(labels, multi_label)
    found = {int(k) for c, _, y in models for k in ([c] if multi_label else np.unique(y))}
    return [c for c in range(labels.shape[1]) if c not in found]


def named(fitted: dict, classes: Sequence[str]) -> dict:
    """Return what `fit` says with the names of the classes that were not fitted."""
    return fitted | {"not_fitted": [classes[c] for c in fitted["not_fitted"]]}


def run(
    train_features,
    train_labels,
    test_features,
    test_labels,
    *,
    classes: Sequence[str],
    task: str,
    multi_label: bool,
    seed: int,
    train_groups=None,
    test_groups=None,
    fraction: float = 1.0,
    probe_limit: int = 0,
    **bootstrap,
) -> Results:
    """Fit on frozen training features, score on test features.

    Args:
      train_features: [N, D], as the encoder gives them.
      train_labels: [N, C] int8: 1 present, 0 absent, -1 unknown.
      test_features: [n, D].
      test_labels: [n, C].
      classes: C names.
      task: middle part of the result keys; a fraction below 1 is appended ("finding_1%").
      multi_label: one regression a class, or one multinomial regression.
      seed: of the patient subset and of the validation split; report at least three.
      train_groups: [N] patient of each row.
      test_groups: [n].
      fraction: share of the training patients used.
      probe_limit: the training features are of the first so many rows, 0 of all; a setting that the
        hash covers.
      **bootstrap: resamples (2,000), level.

    Returns:
      The numbers of `classify`, and what was fitted in the protocol entry.

    Raises:
      UserError: for a fraction outside (0, 1], or features that are not finite.
    """
    scores, fitted = fit(
        train_features,
        train_labels,
        test_features,
        multi_label=multi_label,
        seed=seed,
        train_groups=train_groups,
        fraction=fraction,
    )
    score = classify.multi_label_scores if multi_label else classify.single_label_scores
    scored = score(test_labels, scores, classes, groups=test_groups, seed=seed, **bootstrap)
    settings = {"classes": list(classes), "multi_label": multi_label, "fraction": fraction}
    settings |= {"strengths": STRENGTHS, **bootstrap}
    settings |= {"probe_limit": probe_limit} if probe_limit else {}
    name = task_name(task, fraction)
    notes = scored.notes | named(fitted, classes)
    return assemble(PROTOCOL, name, scored.numbers, settings=settings, notes=notes)


def curve(
    *arrays, task: str, fractions: Sequence[float] = (1.0,), draws: int = 3, **options
) -> Results:
    """Probe with shares of the training patients, each share drawn several times.

    A smaller share of a draw lies inside its larger ones. All patients are one set, probed once.

    Args:
      *arrays: the four of `run`.
      task: middle part of the keys: "finding_1% (draw 0)" for one draw, "finding_1%" for the mean
        over the draws with its standard deviation (n - 1) and every draw's value.
      fractions: each in (0, 1].
      draws: of patients, of every fraction below 1; their seeds are 0, 1, ...
      **options: of `run`, without `seed` and `fraction`.
    """
    check_fractions(fractions=fractions, draws=draws)
    results: Results = {}
    for fraction in fractions:
        if fraction == 1:
            results |= run(*arrays, task=task, seed=0, fraction=1.0, **options)
            continue
        found = [
            run(*arrays, task=task, seed=seed, fraction=fraction, **options)
            for seed in range(draws)
        ]
        results |= _mean_of(found)
        for seed, result in enumerate(found):
            for key, entry in result.items():
                protocol, name, metric = key.split("/", 2)
                results[f"{protocol}/{name} (draw {seed})/{metric}"] = entry
    return results


def _mean_of(draws: Sequence[Results]) -> Results:
    """Return the mean of every number all draws have; the spread is not an interval.

    Of how many draws it is the mean is a setting that its hash covers.
    """
    means: Results = {}
    settings = next(entry["settings"] for entry in draws[0].values() if "settings" in entry)
    settings = {**settings, "draws": len(draws)}
    stamp = stamped(PROTOCOL, settings)
    for key, first in draws[0].items():
        if "value" not in first:
            kept = {k: first[k] for k in ("skipped", "undefined") if k in first}  # of the test rows
            means[key] = {**stamp, "settings": settings, **kept}
            each = {name: [d[key][name] for d in draws] for name in ("train_rows", "not_fitted")}
            means[key] |= {"draws": len(draws), **each}
            continue
        values = [draw.get(key, {}).get("value") for draw in draws]
        if None in values:
            continue
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        spread = {"value": float(np.mean(values)), "low": None, "high": None}
        means[key] = {**first, **stamp, **spread, "sd": sd, "draws": values}
    return means
