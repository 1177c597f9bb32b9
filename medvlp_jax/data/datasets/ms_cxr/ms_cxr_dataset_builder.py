"""MS-CXR: sentences of chest reports with the boxes of what they describe (Boecking et al. 2022).

Source folder: `MS_CXR_Local_Alignment_v1.1.0.csv` (or v1.0.0, which has no column `split`) and the
JPEG files of MIMIC-CXR-JPG under `files/`, both from PhysioNet with its data use agreement. One row
of the table is a box in pixels; boxes of one image and one sentence belong together. A record is an
image; it has no report of its own here. `category` of a box is one of the eight findings.

The split is MS-CXR's, which is not that of MIMIC-CXR; without the column all is "test". Patients
of this set have to be left out of a pretraining on MIMIC-CXR.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from medvlp_jax.data import files, records

CATEGORIES = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Lung Opacity",
    "Pleural Effusion",
    "Pneumonia",
    "Pneumothorax",
)
TASKS = {"finding": CATEGORIES}
TABLES = ("MS_CXR_Local_Alignment_v1.1.0.csv", "MS_CXR_Local_Alignment_v1.0.0.csv")
COLUMNS = ("dicom_id", "category_name", "label_text", "path", "x", "y", "w", "h")
SIZES = ("image_width", "image_height")
SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


class Builder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `ms_cxr`."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"A folder with {TABLES[0]} and MIMIC-CXR-JPG's files/."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=records.features(tasks=TASKS, categories=True),
            metadata=records.metadata(tasks=TASKS),
        )

    def _split_generators(self, dl_manager):
        folder = Path(dl_manager.manual_dir)
        images = read_table(folder)
        found: dict[str, list] = {}
        for rows in images.values():
            found.setdefault(split_of(rows[0]), []).append(rows)
        return {split: self._generate_examples(folder, found[split]) for split in sorted(found)}

    def _generate_examples(self, folder: Path, images: list[list[files.Row]]) -> Iterator:
        for rows in images:
            yield rows[0]["dicom_id"], to_record(folder, rows)


def read_table(folder: Path) -> dict[str, list[files.Row]]:
    """Return the rows of each image.

    Raises:
      UserError: for a defect of the table, or an image in two places or splits.
    """
    path = next((folder / name for name in TABLES if (folder / name).is_file()), folder / TABLES[0])
    needed = (*COLUMNS, *SIZES)
    images: dict[str, list[files.Row]] = {}
    for row in files.read_rows(path, columns=needed, filled=needed):
        row.choice("category_name", CATEGORIES)
        rows = images.setdefault(row["dicom_id"], [])
        rows.append(row)
        for column in ("path", *SIZES, *(("split",) if "split" in row.cells else ())):
            if row[column] != rows[0][column]:
                raise row.error(
                    f"{column} of {row['dicom_id']} is '{row[column]}' here and "
                    f"'{rows[0][column]}' in row {rows[0].number}; an image has one."
                )
    return images


def split_of(row: files.Row) -> str:
    """Return the split of an image; "test" where the table does not say."""
    if "split" not in row.cells:
        return "test"
    return SPLITS[row.choice("split", tuple(SPLITS)) or "test"]


def patient_of(row: files.Row) -> str:
    """Return the patient in a path of MIMIC-CXR-JPG: files/p10/p10000032/s50414267/<image>.jpg.

    Raises:
      UserError: for another path.
    """
    parts = Path(row["path"]).parts
    if len(parts) != 5 or not (parts[2][:1] == "p" and parts[2][1:].isdigit()):
        raise row.error(
            f"path '{row['path']}' does not name a patient; accepted is "
            "files/p10/p10000032/s50414267/<image>.jpg."
        )
    return parts[2]


def box_of(row: files.Row) -> tuple[float, float, float, float]:
    """Return (ymin, xmin, ymax, xmax) of a row as fractions of its image.

    Raises:
      UserError: for what is no number, or a box that lies outside the image.
    """
    try:
        x, y, w, h = (float(row[name]) for name in ("x", "y", "w", "h"))
        width, height = (float(row[name]) for name in SIZES)
    except ValueError as error:
        raise row.error(f"{error}; pixels are needed in x, y, w, h and the image's size.") from None
    corners = np.array([y / height, x / width, (y + h) / height, (x + w) / width])
    clipped = np.clip(corners, 0, 1)
    if not (w > 0 and h > 0 and (clipped[2:] > clipped[:2]).all()):
        raise row.error(f"box {x}, {y}, {w}, {h} is empty inside {width} x {height} pixels.")
    return tuple(clipped.tolist())


def to_record(folder: Path, rows: list[files.Row]) -> dict:
    """Return the record of an image with all its boxes."""
    first = rows[0]
    named = {row["category_name"] for row in rows}
    label = records.unknown(CATEGORIES)
    label[[CATEGORIES.index(name) for name in named]] = records.PRESENT
    return records.record(
        image=files.read_image(files.inside(folder, first, "path"), first),
        image_id=first["dicom_id"],
        patient_id=patient_of(first),
        study_id=Path(first["path"]).parts[3],
        labels={"finding": label},
        boxes=[(box_of(row), row["label_text"]) for row in rows],
        categories=[row["category_name"] for row in rows],
    )
