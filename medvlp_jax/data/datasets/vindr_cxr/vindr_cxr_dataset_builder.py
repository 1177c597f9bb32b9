"""VinDr-CXR: 18,000 radiographs of two hospitals in Hanoi, read by three and five radiologists.

Source folder, from PhysioNet: `train/<image_id>.dicom`, `test/`, and in `annotations/`
`image_labels_train.csv` (a row a reader), `image_labels_test.csv` (consensus),
`annotations_train.csv` and `annotations_test.csv` (boxes in pixels). The training and the test
table name one column "Other diseases" and "Other disease".

Labels: "finding" is present where any of the three readers sees it (CXR-CLIP), "finding_majority"
where two do; the test split has one consensus for both. Validation is a fifth of the training
images, drawn as CXR-CLIP does. Kaggle's VinBigData is this training part, renamed and resized.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from medvlp_jax.data import building, cxr_labels, files, layouts, splits

WHERE = "https://physionet.org/content/vindr-cxr/1.0.0/ (credentialed, data use agreement)"
CLASSES = cxr_labels.VINDR
TRAIN_COLUMNS = ",".join(CLASSES)
TEST_COLUMNS = TRAIN_COLUMNS.replace("Other diseases", "Other disease")
HERE = "annotations/"
LABELS = {
    "train": layouts.Table(
        (f"{HERE}image_labels_train.csv",),
        tuple(f"image_id,rad_id,{names}" for names in (TRAIN_COLUMNS, TEST_COLUMNS)),
        WHERE,
        ordered=False,
    ),
    "test": layouts.Table(
        (f"{HERE}image_labels_test.csv",),
        tuple(f"image_id,{names}" for names in (TRAIN_COLUMNS, TEST_COLUMNS)),
        WHERE,
        ordered=False,
    ),
}
CORNERS = ("x_min", "y_min", "x_max", "y_max")
BOXES = {
    "train": layouts.Table(
        (f"{HERE}annotations_train.csv",),
        (f"image_id,rad_id,class_name,{','.join(CORNERS)}",),
        WHERE,
    ),
    "test": layouts.Table(
        (f"{HERE}annotations_test.csv",),
        tuple(f"image_id,{reader}class_name,{','.join(CORNERS)}" for reader in ("", "rad_id,")),
        WHERE,
    ),
}
SUFFIXES = ("dicom", "dcm")
SAME = {"Other disease": "Other diseases"}


class Builder(building.Builder):
    """TFDS builder of `vindr_cxr`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder with train/, test/ and annotations/ of VinDr-CXR."
    VARIANTS = {"physionet": "All images."}
    PUBLISHED = {"train + validation": 15_000, "test": 3_000}

    def tasks(self):
        return {"finding": CLASSES, "finding_majority": CLASSES}

    def samples(self, folder: Path) -> Iterator[building.Sample]:
        for part, table in LABELS.items():
            images: dict[str, list[files.Row]] = {}
            for row in table.rows(folder, filled=("image_id",)):
                images.setdefault(row["image_id"], []).append(row)
            boxes = read_boxes(folder, part)
            names = list(images)
            held = splits.train_and_rest(names, held=0.2, seed=0)[1] if len(names) > 1 else ()
            held = {*held} if part == "train" else {*()}
            for name, rows in images.items():
                split = "validation" if name in held else part
                yield _sample(folder, part, rows, split, boxes.get(name, ()))


def _sample(folder: Path, part: str, rows: Sequence[files.Row], split: str, boxes):
    name = rows[0]["image_id"]
    choices = [f"{part}/{name}.{suffix}" for suffix in SUFFIXES]
    layouts.member(folder, rows[0], choices[0])
    return building.Sample(
        row=rows[0],
        path=folder / building.first_found(folder, choices),
        split=split,
        image_id=name,
        patient_id=name,
        study_id=name,
        labels=labels_of(rows),
        boxes=boxes,
    )


def labels_of(rows: Sequence[files.Row]) -> Mapping[str, np.ndarray]:
    """Return what any reader and what most readers see."""
    columns = [name if name in rows[0].cells else "Other disease" for name in CLASSES]
    seen = [cxr_labels.binary(row, columns) for row in rows]
    return {
        "finding": cxr_labels.vote(seen, needed=1),
        "finding_majority": cxr_labels.vote(seen, needed=len(seen) // 2 + 1),
    }


def read_boxes(folder: Path, part: str) -> dict[str, list]:
    """Return (box, finding) by image, of all readers; rows without a box say "No finding".

    Raises:
      UserError: for an unknown finding, a finding without a box, or a cell that is no number.
    """
    found: dict[str, list] = {}
    for row in BOXES[part].rows(folder, filled=("image_id", "class_name")):
        name = SAME.get(row["class_name"], row["class_name"])
        row.cells["class_name"] = name
        row.choice("class_name", CLASSES)
        if name == "No finding" and not any(row[corner] for corner in CORNERS):
            continue
        box = tuple(layouts.number(row, corner) for corner in CORNERS)
        found.setdefault(row["image_id"], []).append((box, name))
    return found
