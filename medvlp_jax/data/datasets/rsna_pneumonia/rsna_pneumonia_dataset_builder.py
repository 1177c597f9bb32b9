"""RSNA Pneumonia Detection Challenge: 26,684 radiographs of NIH ChestX-ray14 with boxes.

Source folder, from Kaggle: `stage_2_train_labels.csv` (a row a box),
`stage_2_detailed_class_info.csv` where it is there, `stage_2_train_images/<patientId>.dcm`. The
labels of the challenge's test images are not published: papers split the training part. Variants
are their splits, checked against the published hashes when the table is whole.

The images are NIH's: a model pretrained on ChestX-ray14 has seen them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from medvlp_jax.data import building, files, layouts, records, splits

WHERE = "https://www.kaggle.com/c/rsna-pneumonia-detection-challenge (competition rules)"
LABELS = layouts.Table(("stage_2_train_labels.csv",), ("patientId,x,y,width,height,Target",), WHERE)
CLASSES = layouts.Table(("stage_2_detailed_class_info.csv",), ("patientId,class",), WHERE)
KINDS = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")
PHRASE = "Pneumonia"
TASKS = {"finding": (PHRASE,), "class": KINDS}
IMAGES = 26_684


class Builder(building.Builder):
    """TFDS builder of `rsna_pneumonia`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = f"A folder with {LABELS.names[0]} and stage_2_train_images/."
    VARIANTS = {
        "gloria": "GLoRIA's split: 18,678 / 4,003 / 4,003.",
        "mgca": "MGCA's split: 16,010 / 5,337 / 5,337.",
    }
    PUBLISHED = {"images": IMAGES}

    def tasks(self):
        return TASKS

    def samples(self, folder: Path) -> Iterator[building.Sample]:
        patients: dict[str, list[files.Row]] = {}
        for row in LABELS.rows(folder, filled=("patientId", "Target")):
            patients.setdefault(row["patientId"], []).append(row)
        kinds = read_kinds(folder)
        ids = splits.rsna(list(patients), self.variant)
        if len(patients) == IMAGES:
            splits.require(f"{self.name}:{self.variant}", ids, LABELS.names[0])
        part = {name: split for split, names in ids.items() for name in names}
        for name, rows in patients.items():
            boxes = boxes_of(rows)
            yield building.Sample(
                row=rows[0],
                path=layouts.member(folder, rows[0], f"stage_2_train_images/{name}.dcm"),
                split=part[name],
                image_id=name,
                patient_id=name,
                study_id=name,
                labels={
                    "finding": np.array([bool(boxes)], np.int8),
                    "class": records.one_hot(kinds.get(name, ""), KINDS),
                },
                boxes=[(box, PHRASE) for box in boxes],
            )


def boxes_of(rows: Sequence[files.Row]) -> list[tuple[float, float, float, float]]:
    """Return the boxes of an image in pixels.

    Raises:
      UserError: for a target other than 0 and 1, a negative row beside another one, or a box that
        is no box.
    """
    boxes = []
    for row in rows:
        if row["Target"] not in ("0", "1") or (row["Target"] == "0" and len(rows) > 1):
            raise row.error(
                f"Target is '{row['Target'][:20]}' in one of {len(rows)} rows of an image; "
                "accepted is 0 in a single row, or 1."
            )
        if row["Target"] == "1":
            x, y = (layouts.number(row, name, low=0) for name in ("x", "y"))
            boxes.append(
                (x, y, x + layouts.number(row, "width"), y + layouts.number(row, "height"))
            )
    return boxes


def read_kinds(folder: Path) -> dict[str, str]:
    """Return the detailed class by image; empty without that table, whose rows repeat by box.

    Raises:
      UserError: for an image with two classes.
    """
    found: dict[str, str] = {}
    for row in CLASSES.rows(folder, filled=("patientId", "class")) if CLASSES.find(folder) else ():
        kind = row.choice("class", KINDS)
        if found.setdefault(row["patientId"], kind) != kind:
            raise row.error(f"class is {kind} here and {found[row['patientId']]} in another row.")
    return found
