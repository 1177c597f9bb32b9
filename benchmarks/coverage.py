"""How often do 95 % intervals hold the truth, and how often does a test err? Simulated patients.

  python benchmarks/coverage.py [--replications 1000] [--out FILE.json]

Scores are normal, s = sqrt(1/2) (b + e) with b of the patient and e of the image where a patient
has several, and positives are shifted by delta: the true AUROC is Phi(delta / sqrt(2)) (binormal).
An image is right where s < Phi^-1(p): the true accuracy is p. Prints the tables of
docs/evaluation.md; --out gets every number.

Axis letters: N rows, M replications.
"""

import argparse
import json
import pathlib
import time
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from medvlp_jax import cli
from medvlp_jax.config import UserError
from medvlp_jax.evaluation import metrics, statistics
from medvlp_jax.writing import replaced

RESAMPLES = 500
METHODS = ("percentile", "bca")


class Case(NamedTuple):
    """What is simulated.

    Attributes:
      statistic: whose interval.
      truth: its true value.
      patients: how many.
      images: of each patient.
      positives: patients with the finding; 0 for accuracy.
    """

    statistic: Literal["auroc", "accuracy"]
    truth: float
    patients: int
    images: int = 1
    positives: int = 0


CASES = (
    Case("auroc", 0.7, 100, 1, 30),
    Case("auroc", 0.9, 100, 1, 30),
    Case("auroc", 0.9, 100, 1, 10),
    Case("auroc", 0.9, 300, 1, 30),
    Case("auroc", 0.9, 30, 1, 10),
    Case("auroc", 0.7, 100, 3, 30),
    Case("auroc", 0.9, 100, 3, 30),
    Case("accuracy", 0.7, 100),
    Case("accuracy", 0.9, 100),
    Case("accuracy", 0.9, 30),
    Case("accuracy", 0.9, 100, 3),
)


class Coverage(NamedTuple):
    """Shares of replications in which the truth is inside, below and above; mean width."""

    inside: float
    below: float
    above: float
    width: float


def scores(case: Case, replications: int, seed: int) -> np.ndarray:
    """Return scores [M, N] of unit variance, rows of a patient side by side."""
    rng = np.random.default_rng(seed)
    shape = replications, case.patients, case.images
    own = rng.normal(size=shape)
    if case.images > 1:
        own = np.sqrt(0.5) * (own + rng.normal(size=shape[:2])[..., None])
    return own.reshape(replications, -1)


def labels(case: Case) -> np.ndarray:
    """Return which rows [N] have the finding."""
    return np.repeat(np.arange(case.patients) < case.positives, case.images)


def shifted(case: Case, replications: int, seed: int) -> np.ndarray:
    """Return scores [M, N] with the true AUROC of the case."""
    delta = np.sqrt(2) * stats.norm.ppf(case.truth)
    return scores(case, replications, seed) + delta * labels(case)


def coverage(case: Case, method: str, *, replications: int, resamples=RESAMPLES, seed=0):
    """Return the Coverage of one kind of interval.

    Args:
      case: what is simulated.
      method: of `statistics.bootstrap`; or "delong", "delong-linear": its two scales.
      replications: M.
      resamples: of each bootstrap.
      seed: of patients and resamples.
    """
    groups = np.repeat(np.arange(case.patients), case.images)
    options = {"groups": groups, "resamples": resamples, "method": method}
    if case.statistic == "accuracy":
        right = (scores(case, replications, seed) < stats.norm.ppf(case.truth)).T  # [N, M]
        mean = lambda weights: metrics.weighted_mean(right, weights)
        found = statistics.bootstrap(mean, len(right), seed=seed, **options)
    elif method.startswith("delong"):
        scale = "linear" if method.endswith("linear") else "logit"
        rows = shifted(case, replications, seed)
        found = statistics.delong_interval(statistics.delong(labels(case), rows), scale=scale)
    else:
        found = [
            statistics.bootstrap(_auroc(labels(case), row), len(row), seed=seed + i, **options)
            for i, row in enumerate(shifted(case, replications, seed))
        ]
        found = statistics.Interval(*(np.concatenate(part) for part in zip(*found, strict=True)))
    return measure(found, case.truth)


def _auroc(truth, row):
    return lambda weights: metrics.auroc(truth, row, weights)[:, None]


def measure(found: statistics.Interval, truth: float) -> Coverage:
    """Compare intervals [M] with the truth; one that could not be had does not hold it."""
    low, high = found.low - 1e-9, found.high + 1e-9  # accuracies are fractions of the same n
    below, above = (truth < low).mean(), (truth > high).mean()
    inside = ((low <= truth) & (truth <= high)).mean()
    return Coverage(*map(float, (inside, below, above, np.nanmean(high - low))))


def delong_size(case: Case, *, replications: int, shared=0.5, level=0.05, seed=0) -> float:
    """Return how often DeLong's test finds a difference between two equally good models.

    Args:
      case: of one image a patient.
      replications: M.
      shared: correlation of the two scores of a row.
      level: of the test.
      seed: of the scores.
    """
    a, b = _two_models(case, replications, shared, seed)
    p = [statistics.delong_test(labels(case), *pair).p for pair in zip(a, b, strict=True)]
    return float(np.mean(np.array(p) < level))


def paired_size(
    case: Case, *, replications: int, shared=0.5, level=0.05, resamples=RESAMPLES, seed=0
) -> float:
    """Return the same of the paired bootstrap, see `delong_size`; any number of images."""
    groups = np.repeat(np.arange(case.patients), case.images)
    options = {"groups": groups, "resamples": resamples}
    truth, p = labels(case), []
    for i, pair in enumerate(zip(*_two_models(case, replications, shared, seed), strict=True)):
        statistic = [_auroc(truth, row) for row in pair]
        p.append(statistics.compare(*statistic, len(truth), seed=seed + i, **options).p[0])
    return float(np.mean(np.array(p) < level))


def _two_models(case, replications, shared, seed):
    common, *own = (scores(case, replications, 3 * seed + i) for i in range(3))
    delta = np.sqrt(2) * stats.norm.ppf(case.truth) * labels(case)
    return [np.sqrt(shared) * common + np.sqrt(1 - shared) * one + delta for one in own]


def study(replications: int) -> dict:
    """Return everything that is written."""
    found = {"replications": replications, "resamples": RESAMPLES, "coverage": [], "size": []}
    for case in CASES:
        delong = (
            ("delong", "delong-linear") if (case.statistic, case.images) == ("auroc", 1) else ()
        )
        for method in (*METHODS, *delong):
            row = coverage(case, method, replications=replications)
            found["coverage"].append({**case._asdict(), "method": method, **row._asdict()})
            print(_line(found["coverage"][-1]), flush=True)
    for case in CASES:
        if case.statistic == "auroc":
            tests = {"paired bootstrap": paired_size(case, replications=replications)}
            if case.images == 1:
                tests["delong"] = delong_size(case, replications=replications)
            found["size"] += [
                {**case._asdict(), "test": test, "errs": rate} for test, rate in tests.items()
            ]
            print(case, tests, flush=True)
    return found


def _line(row: dict) -> str:
    setting = [
        row["statistic"],
        row["truth"],
        row["patients"],
        row["positives"] or "",
        row["images"],
    ]
    rates = [f"{100 * row[name]:.1f}" for name in ("inside", "below", "above")]
    return f"| {' | '.join(map(str, [*setting, row['method'], *rates]))} | {row['width']:.3f} |"


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replications", type=int, default=1000)
    parser.add_argument("--out", type=pathlib.Path, help="file that gets every number as JSON")
    options = parser.parse_args(argv)
    if options.replications < 1:
        raise UserError(f"--replications={options.replications} must be above 0.")
    began = time.process_time()
    found = study(options.replications)
    found["cpu_seconds"] = round(time.process_time() - began)
    if options.out:
        with replaced(options.out) as scratch:
            scratch.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    cli.leave(cli.run(main))
