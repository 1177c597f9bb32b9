"""Is one classifier better than another? Differences paired over patients, from predictions.csv.

  medvlp compare --ours RUN RUN ... --theirs RUN RUN ... [--metric macro_f1]

The n-th run of each side has scored the same cases: one run each, or one a seed or fold. The OUT of
`medvlp adapt --task finetune` stands for its seeds. The number is the mean over the runs of ours
minus theirs; patients are drawn with all their rows in all runs, the same for both sides; the
interval of a difference is the percentile one. What folds say among themselves is `over_folds`.
Several findings a case are compared by macro AUROC alone.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import classify, metrics, statistics
from medvlp_jax.evaluation.case_tables import IDS, lines_of, read_scores

FILE = "predictions.csv"
METRICS = ("macro_auroc", "macro_f1", "balanced_accuracy", "accuracy")
RANKED = METRICS[:1]  # what there is of several findings a case


class Predictions(NamedTuple):
    """Rows of known truth alone; there may be none.

    Attributes:
      images: [N], ids.
      patients: [N].
      truth: [N] as an index; of several findings a case [N, C], 1 present, 0 absent, -1 unknown.
      chances: probabilities [N, C].
      classes: C names.
    """

    images: np.ndarray
    patients: np.ndarray
    truth: np.ndarray
    chances: np.ndarray
    classes: list[str]

    @property
    def metrics(self) -> tuple[str, ...]:
        """What can be said of them."""
        return RANKED if self.truth.ndim == 2 else METRICS


def seeds(folder: Path) -> list[Path]:
    """Return the folders of the seeds of `medvlp adapt`, in order; a run by such a name is none."""
    found = [path for path in folder.glob("seed_*") if path.name.removeprefix("seed_").isdecimal()]
    found.sort(key=lambda path: int(path.name.removeprefix("seed_")))
    return [path for path in found if path.is_dir() and not (path / "config.json").exists()]


def files(run: Path) -> list[Path]:
    """Return the predictions of a run, or those of the seeds of `medvlp adapt`; [] for none."""
    own = run / FILE if run.is_dir() else run
    found = [own, *(seed / FILE for seed in seeds(run))] if run.is_dir() else [own]
    return found[:1] if own.is_file() else [file for file in found if file.is_file()]


def read(file: Path) -> Predictions:
    """Read what a classifier's run leaves behind.

    Args:
      file: predictions.csv, or the folder it lies in.

    Raises:
      UserError: if it is not there or no CSV file, has other columns, a class that is none of them,
        or what is no probability.
    """
    file = file / FILE if file.is_dir() else file
    if not file.is_file():
        raise UserError(
            f"No {file}: only runs of a classifier that were evaluated, and what `medvlp adapt "
            "--task finetune` writes, have one."
        )
    header, *lines = lines_of(file) or [[]]
    if header[:2] == IDS[:2] and "/" in "".join(header[2:3]):
        return _of_questions(file, lines)
    if header[:3] != IDS or len(header) == 3 or any(len(line) != len(header) for line in lines):
        raise UserError(f"{file} has the columns {header[:3]} ...; {IDS} and classes are needed.")
    classes, known = header[3:], [line for line in lines if line[2]]
    for row, line in enumerate(lines, 2):
        if line[2] and line[2] not in classes:
            raise UserError(f"{file}: '{line[2]}' is none of the classes {', '.join(classes)}.")
        if line[2] and (wrong := [cell for cell in line[3:] if not _is_probability(cell)]):
            raise UserError(
                f"{file} row {row}: '{wrong[0]}' is no probability; a number from 0 to 1 is needed."
            )
    chances = np.array([line[3:] for line in known], float).reshape(-1, len(classes))
    truth = np.array([classes.index(line[2]) for line in known], int)
    images, patients = (np.array([line[i] for line in known]) for i in (0, 1))
    return Predictions(images, patients, truth, chances, classes)


def _of_questions(file: Path, lines: Sequence[Sequence[str]]) -> Predictions:
    """Return predictions of several findings a case.

    Raises:
      UserError: for a file that is none, or has several tasks.
    """
    tasks = read_scores(file)
    if len(tasks) > 1:
        raise UserError(
            f"{file} holds the tasks {', '.join(tasks)}; predictions of one are needed."
        )
    (scored,) = tasks.values()
    known = (scored.labels >= 0).any(1)
    images, patients = (np.array([line[i] for line in lines])[known] for i in (0, 1))
    return Predictions(images, patients, scored.labels[known], scored.scores[known], [*scored[2]])


def _is_probability(cell: str) -> bool:
    try:
        return 0 <= float(cell) <= 1  # NaN is not
    except ValueError:
        return False


def value(metric: str, case: Predictions, weights: np.ndarray) -> np.ndarray:
    """Return a metric [R] under row weights [R, N], over the classes that are present.

    NaN in a draw that has lost a class; so is the macro AUROC of a single class, always.
    """
    if case.truth.ndim == 2:
        both = (case.truth == 1).any(0) & (case.truth == 0).any(0)
        if not both.any():
            return np.full(len(weights), np.nan)
        labels, chances = case.truth[:, both], case.chances[:, both]
        return classify.ranking(labels, chances, weights)[:, 0].mean(-1)
    classes = case.chances.shape[1]
    present = np.bincount(case.truth, minlength=classes) > 0
    if metric == "macro_auroc":
        if present.sum() < 2:
            return np.full(len(weights), np.nan)
        one_hot = (case.truth[:, None] == np.flatnonzero(present)).astype(np.int8)
        return classify.ranking(one_hot, case.chances[:, present], weights)[:, 0].mean(-1)
    table = metrics.confusion(case.truth, classify.answers(case.chances), classes, weights)
    if metric == "accuracy":
        return metrics.accuracy(table)
    of_class = {"macro_f1": metrics.f1, "balanced_accuracy": metrics.recall}[metric]
    return of_class(table)[:, present].mean(-1)


def over_runs(metric: str, cases: Sequence[Predictions], weights: np.ndarray) -> np.ndarray:
    """Return the mean over runs [R, 1] under weights [R, N of all runs].

    A run whose metric is never defined (a fold of one class has no AUROC) is left out.
    """
    values, ends = [], np.cumsum([len(case.truth) for case in cases])
    for case, own in zip(cases, np.split(weights, ends[:-1], axis=1), strict=True):
        if np.isfinite(value(metric, case, np.ones((1, len(case.truth))))[0]):
            values.append(value(metric, case, own))
    return (np.mean(values, axis=0) if values else np.full(len(weights), np.nan))[:, None]


def compare(
    ours: Sequence[Path], theirs: Sequence[Path], metric: str, *, resamples: int = 2000
) -> dict[str, float]:
    """Return difference, low, high (95 %) and p of ours minus theirs.

    Args:
      ours: predictions.csv of each run, or its folder.
      theirs: of the same cases, in the same order.
      metric: one of METRICS.
      resamples: of patients.

    Raises:
      UserError: for unequal numbers of runs, predictions of other cases, too few of them, or a
        metric that they do not have.
    """
    each = lambda runs: [file for run in runs for file in files(run) or [run]]
    ours, theirs = each(ours), each(theirs)
    if len(ours) != len(theirs):
        raise UserError(f"{len(ours)} runs against {len(theirs)}: they are compared one by one.")
    if metric not in METRICS:
        raise UserError(f"No metric '{metric}'; accepted are {', '.join(METRICS)}.")
    runs = [read(file) for file in ours], [read(file) for file in theirs]
    for a, b, one, other in zip(*runs, ours, theirs, strict=True):
        ids = ("images", "patients", "truth")
        same = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ids)
        if not same or a.classes != b.classes:
            raise UserError(f"{one} and {other} are predictions of other cases.")
        if metric not in a.metrics:
            raise UserError(
                f"{one} has several findings a case, of which there is no {metric}; accepted is "
                f"{', '.join(a.metrics)}."
            )
    patients = np.concatenate([case.patients for case in runs[0]])
    if len({*patients}) < 2 or resamples < 1:
        raise UserError(
            f"{len({*patients})} patients of known class and {resamples} resamples: a comparison "
            "needs two and one."
        )
    found = statistics.compare(
        *(functools.partial(over_runs, metric, side) for side in runs),
        len(patients),
        groups=patients,
        resamples=resamples,
    )
    return {key: float(array[0]) for key, array in found._asdict().items()}


def over_folds(
    differences: Sequence[float], *, ratio: float, level: float = 0.95
) -> dict[str, float]:
    """Return the mean over k folds of a difference, with the interval of the corrected t test.

    Folds share training data, so that their spread says too little; the variance is s^2 (1/k + r)
    with r = test cases / training cases, Nadeau and Bengio (2003), section 3.

    Args:
      differences: of each of k >= 2 folds.
      ratio: r of one fold.
      level: coverage, in (0, 1).

    Raises:
      ValueError: for fewer than two folds.
    """
    k = len(differences)
    if k < 2:
        raise ValueError(f"an interval over folds needs two of them, got {k}")
    spread = np.std(differences, ddof=1) * np.sqrt(1 / k + ratio)
    reach = scipy.stats.t.ppf((1 + level) / 2, k - 1) * spread
    mean = float(np.mean(differences))
    return {"difference": mean, "low": mean - float(reach), "high": mean + float(reach)}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the difference of every metric, or of one.

    Raises:
      UserError: for bad input.
    """
    parser = argparse.ArgumentParser(
        "medvlp compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for side in ("ours", "theirs"):
        parser.add_argument(f"--{side}", nargs="+", type=Path, required=True, help="run folders")
    parser.add_argument("--metric", choices=METRICS, help="default: all")
    parser.add_argument("--resamples", type=int, default=2000)
    options = parser.parse_args(argv)
    sides = options.ours, options.theirs
    first = next(iter(files(options.ours[0])), options.ours[0])
    chosen = [options.metric] if options.metric else read(first).metrics
    found = {metric: compare(*sides, metric, resamples=options.resamples) for metric in chosen}
    adjusted = statistics.holm([entry["p"] for entry in found.values()])
    for (metric, entry), p in zip(found.items(), adjusted, strict=True):
        line = "{difference:+.3f} [{low:+.3f}, {high:+.3f}]  p = {p:.4f}".format(**entry)
        after = f"; {p:.4f} after Holm, of {len(found)} metrics" if len(found) > 1 else ""
        print(f"{metric:<18}{line}{after}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"medvlp: {error}", file=sys.stderr)
        sys.exit(2)
