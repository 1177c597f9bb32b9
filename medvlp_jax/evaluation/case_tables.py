"""Tables with a row a case: a classifier's probabilities, and scores of yes/no questions.

One class a case ("predictions.csv" of a classifier):

    image_id,patient_id,truth,normal,edema
    i1,p1,edema,0.25,0.75

with an empty truth where no class is known. Several questions a case ("zero_shot.csv", and
"predictions.csv" of a classifier of findings):

    image_id,patient_id,finding/edema,finding/edema (truth),...
    i1,p1,0.75,1,...

with the truth 1, 0 or empty where unknown. Both read back as the very numbers that were written,
which rounding could make equal.

Axis letters: N cases, C classes.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medvlp_jax.config import UserError
from medvlp_jax.evaluation.zero_shot import PromptScores
from medvlp_jax.writing import replaced

IDS, TRUTH = ["image_id", "patient_id", "truth"], " (truth)"


def write_chances(found: Mapping, labels, chances, classes: Sequence[str], out: Path) -> None:
    """Write the probabilities of one class a case, whole or not at all.

    Args:
      found: "image_id" and "patient_id", [N] each.
      labels: [N, C], 1 is the class of a case; a row without a 1 has an unknown one.
      chances: [N, C], float64.
      classes: C names.
      out: file.
    """
    with replaced(out) as scratch, scratch.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*IDS, *classes))
        for image, patient, label, chance in zip(
            found["image_id"], found["patient_id"], labels, chances, strict=True
        ):
            truth = classes[label.argmax()] if (label == 1).any() else ""
            writer.writerow((image, patient, truth, *chance.tolist()))


def write_scores(tasks: Mapping[str, PromptScores], found: Mapping, out: Path) -> None:
    """Write the scores of questions, whole or not at all.

    Args:
      tasks: labels [N, C], scores [N, C] and classes of each task.
      found: "image_id" and "patient_id", [N] each.
      out: file.
    """
    header, columns = ["image_id", "patient_id"], [found["image_id"], found["patient_id"]]
    for task, (labels, scores, classes) in tasks.items():
        for c, name in enumerate(classes):
            header += [f"{task}/{name}", f"{task}/{name}{TRUTH}"]
            columns += [
                scores[:, c].tolist(),
                ["" if label < 0 else label for label in labels[:, c]],
            ]
    with replaced(out) as scratch, scratch.open("w", newline="") as file:
        csv.writer(file).writerows([header, *zip(*columns, strict=True)])


def lines_of(file: Path) -> list[list[str]]:
    """Read the cells of a CSV file, with or without a byte order mark.

    Raises:
      UserError: if it is no CSV file in UTF-8.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            return [*csv.reader(stream)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read ({error}); a UTF-8 CSV file is needed.") from None


def read_scores(file: Path) -> dict[str, PromptScores]:
    """Read the scores of questions.

    Raises:
      UserError: for a file that is none.
    """
    header, *rows = lines_of(file) or [[]]
    if header[:2] != IDS[:2] or len(header) == 2:
        raise UserError(
            f"{file} is no table of scores: it has the columns {header[:3]} ...; "
            f"{IDS[:2]} and, for each class, TASK/CLASS and TASK/CLASS{TRUTH} are needed."
        )
    tasks: dict[str, list] = {}
    for c in range(2, len(header), 2):
        task, _, name = header[c].partition("/")
        try:
            scores = [float(row[c]) for row in rows]
            labels = [int(row[c + 1] or -1) for row in rows]
            is_whole = header[c + 1] == f"{header[c]}{TRUTH}"
        except (ValueError, IndexError):
            is_whole = False
        if not (is_whole and np.isfinite(scores).all() and {*labels} <= {-1, 0, 1}):
            raise UserError(
                f"{file} is no table of scores: its column {header[c]!r} fails, which needs finite "
                f"numbers and behind it {header[c] + TRUTH!r} of 1, 0 and empty cells."
            )
        tasks.setdefault(task, []).append((name, scores, labels))
    found = {}
    for task, columns in tasks.items():
        names, scores, labels = zip(*columns, strict=True)
        found[task] = PromptScores(np.array(labels).T, np.array(scores).T, names)
    return found
