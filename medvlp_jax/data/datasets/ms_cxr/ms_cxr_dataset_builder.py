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

from medvlp_jax.config import UserError
from medvlp_jax.data import building, files, layouts, masks, records

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
HEADER = "dicom_id,category_name,label_text,path,x,y,w,h,image_width,image_height"
WHERE = "https://physionet.org/content/ms-cxr"
TABLE = layouts.Table(
    ("MS_CXR_Local_Alignment_v1.1.0.csv", "MS_CXR_Local_Alignment_v1.0.0.csv"),
    (f"{HEADER},split", HEADER),
    WHERE,
)
SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


class Builder(building.Builder):
    """TFDS builder of `ms_cxr`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = f"A folder with {TABLE.names[0]} and MIMIC-CXR-JPG's files/."
    VARIANTS = {"phrases": "Every image with its sentences and boxes."}
    CATEGORIES = True
    PUBLISHED = {"sentences": 1_162}

    def tasks(self):
        return {"finding": CATEGORIES}

    def samples(self, folder: Path) -> Iterator[building.Sample]:
        for rows in read_table(folder).values():
            first = rows[0]
            label = records.unknown(CATEGORIES)
            label[[CATEGORIES.index(row["category_name"]) for row in rows]] = records.PRESENT
            yield building.Sample(
                row=first,
                path=layouts.member(folder, first, first["path"]),
                split=split_of(first),
                image_id=first["dicom_id"],
                patient_id=patient_of(first),
                study_id=Path(first["path"]).parts[3],
                labels={"finding": label},
                boxes=[(box_of(row), row["label_text"]) for row in rows],
                categories=[row["category_name"] for row in rows],
            )


def read_table(folder: Path) -> dict[str, list[files.Row]]:
    """Return the rows of each image.

    Raises:
      UserError: for a defect of the table, or an image in two places or splits.
    """
    images: dict[str, list[files.Row]] = {}
    for row in TABLE.rows(folder, filled=HEADER.split(",")):
        row.choice("category_name", CATEGORIES)
        rows = images.setdefault(row["dicom_id"], [])
        rows.append(row)
        for column in ("path", "image_width", "image_height", "split"):
            if row.cells.get(column) != rows[0].cells.get(column):
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


def box_of(row: files.Row) -> masks.Box:
    """Return (xmin, ymin, xmax, ymax) of a row in pixels.

    Raises:
      UserError: for what is no number, or a box that is empty inside the image.
    """
    x, y, w, h = (layouts.number(row, name) for name in ("x", "y", "w", "h"))
    width, height = (layouts.number(row, f"image_{side}", low=1) for side in ("width", "height"))
    box = x, y, x + w, y + h
    try:
        masks.fractions(box, (int(height), int(width)))
    except UserError as error:
        raise row.error(str(error)) from None
    return box
