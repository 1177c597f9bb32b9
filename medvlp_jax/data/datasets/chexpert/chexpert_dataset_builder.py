"""CheXpert: chest radiographs of Stanford with 14 findings read from their reports, no text.

Source folder: the release, `CheXpert-v1.0` or `CheXpert-v1.0-small`, with `train.csv`, `valid.csv`,
`train/` and `valid/`; with `groundtruth.csv` (the published test labels) and `test/` also the test
split, the first view of each study.

`valid` and `test` are labelled by radiologists. Variant `5x200` holds MGCA's draw of 200 images a
class out of `train.csv`, which has to be left out of a pretraining, better with all images of
its 969 patients: `train_without_5x200` does. `mgca_legacy` and `mgca_clean` are MGCA's split for
fine-tuning, with its defect (98 % of the validation rows are trained on) and without; the test
split is then `valid.csv`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from medvlp_jax.data import building, cxr_labels, files, layouts, records, splits

WHERE = "https://aimi.stanford.edu/datasets/chexpert-chest-x-rays (research use agreement)"
FINDINGS = ",".join(cxr_labels.CHEXPERT)
HEADER = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{FINDINGS}"
TABLES = {
    "train": layouts.Table(("train.csv", "train.csv.gz"), (HEADER,), WHERE),
    "validation": layouts.Table(("valid.csv", "valid.csv.gz"), (HEADER,), WHERE),
}
TEST = layouts.Table(
    ("groundtruth.csv",),
    (f"Study,{FINDINGS}",),
    "https://github.com/rajpurkarlab/cheXpert-test-set-labels",
)
VIEWS = ("Frontal", "Lateral")


class Builder(building.Builder):
    """TFDS builder of `chexpert`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "The folder CheXpert-v1.0 or CheXpert-v1.0-small."
    VARIANTS = {
        "frontal": "Frontal views; train, validation and, where it is there, test.",
        "images": "Frontal and lateral views.",
        "5x200": "MGCA's 200 frontal images of each of five classes as the test split.",
        "train_without_5x200": "All training views of the patients who are not in 5x200.",
        "mgca_legacy": "MGCA's frontal views to train and validate on, overlap included.",
        "mgca_clean": "As many to validate on, all their patients taken from training.",
    }
    PUBLISHED = {"train (images)": 223_414, "train (frontal)": 191_027, "validation (images)": 234}

    def tasks(self):
        five = {"class": cxr_labels.CHEXPERT_5} if self.variant == "5x200" else {}
        return cxr_labels.CHEXPERT_TASKS | five

    def samples(self, folder: Path) -> Iterator[building.Sample]:
        needed = ("Path", "Frontal/Lateral")
        rows = TABLES["train"].rows(folder, filled=needed, unique="Path")
        if "5x200" in self.variant:
            yield from self._five(folder, rows)
            return
        valid = TABLES["validation"].rows(folder, filled=needed, unique="Path")
        if self.variant.startswith("mgca"):
            for split, part in self._mgca(rows).items():
                yield from self._views(folder, split, part)
            yield from self._views(folder, "test", valid)
            return
        yield from self._views(folder, "train", rows)
        yield from self._views(folder, "validation", valid)
        if TEST.find(folder):
            for row in TEST.rows(folder, filled=("Study",), unique="Study"):
                path = f"{row['Study']}/view1_frontal.jpg"
                yield to_sample(folder, row, path, "test")

    def _views(self, folder: Path, split: str, rows: Sequence[files.Row]) -> Iterator:
        for row in rows:
            if row.choice("Frontal/Lateral", VIEWS) == "Frontal" or self.variant == "images":
                yield to_sample(folder, row, row["Path"], split)
            else:
                self.left_out("lateral view")

    def _mgca(self, rows: Sequence[files.Row]) -> dict[str, list[files.Row]]:
        drawn = {path for paths in draw_5x200(rows).values() for path in paths}
        patients = [patient_of(row, row["Path"]) for row in rows]
        is_drawn = np.array([row["Path"] in drawn for row in rows])
        parts = splits.chexpert_mgca(patients, is_drawn, self.variant.removeprefix("mgca_"))
        used = np.union1d(*parts.values())
        self.left_out("5x200, or a patient of 5x200 or of validation", len(rows) - len(used))
        return {split: [rows[k] for k in part] for split, part in parts.items()}

    def _five(self, folder: Path, rows: Sequence[files.Row]) -> Iterator[building.Sample]:
        by_path = {row["Path"]: row for row in rows}
        drawn = draw_5x200(rows)
        if self.variant == "5x200":
            for name, paths in drawn.items():
                label = records.one_hot(name, cxr_labels.CHEXPERT_5)
                for path in paths:
                    sample = to_sample(folder, by_path[path], path, "test")
                    yield sample._replace(labels={**sample.labels, "class": label})
            self.left_out("not drawn", len(rows) - sum(map(len, drawn.values())))
            return
        held = {patient_of(by_path[path], path) for paths in drawn.values() for path in paths}
        for row in rows:
            if patient_of(row, row["Path"]) in held:
                self.left_out("patient of 5x200")
            else:
                yield to_sample(folder, row, row["Path"], "train")


def draw_5x200(rows: Sequence[files.Row]) -> dict[str, list[str]]:
    """Return the paths of MGCA's draw per class."""
    finding = np.stack([cxr_labels.four_valued(row)["finding"] for row in rows])
    frontal = np.array([row["Frontal/Lateral"] == "Frontal" for row in rows])
    return splits.chexpert_5x200([row["Path"] for row in rows], finding, frontal)


def patient_of(row: files.Row, path: str) -> str:
    """Return the patient in CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg.

    Raises:
      UserError: for another path.
    """
    parts = PurePosixPath(path).parts
    if len(parts) != 5 or not parts[2].startswith("patient"):
        raise row.error(
            f"path '{path[:80]}' names no patient; accepted is "
            "CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg."
        )
    return parts[2]


def to_sample(folder: Path, row: files.Row, path: str, split: str) -> building.Sample:
    """Return the sample of a row; its path begins with the name of the release."""
    patient = patient_of(row, path)
    inner = "/".join(PurePosixPath(path).parts[1:])
    return building.Sample(
        row=row,
        path=layouts.member(folder, row, inner),
        split=split,
        image_id=inner,
        patient_id=patient,
        study_id="/".join(PurePosixPath(inner).parts[1:3]),
        labels=cxr_labels.four_valued(row),
    )
