"""NIH ChestX-ray14: 112,120 frontal radiographs of 30,805 patients, 14 findings, some with boxes.

Source folder: `Data_Entry_2017_v2020.csv` (or the first release, `Data_Entry_2017.csv`), the PNG
files in `images/` or `images_001/images/` ... `images_012/images/`, `BBox_List_2017.csv` where it
is there, and for the variant `official` `train_val_list.txt` and `test_list.txt`.

Two names of the source have commas in them, so that its headers have more names than columns one
would count: they are read as they stand. The boxes call Infiltration "Infiltrate".
"""

import functools
from collections.abc import Iterator
from pathlib import Path

from medvlp_jax.config import UserError
from medvlp_jax.data import building, cxr_labels, files, layouts

WHERE = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
ENTRIES = layouts.Table(
    ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv"), (HEADER, f"{HEADER},"), WHERE
)
BOXES = layouts.Table(
    ("BBox_List_2017.csv",), ("Image Index,Finding Label,Bbox [x,y,w,h],,,",), WHERE, fields=6
)
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
SAME = {"Infiltrate": "Infiltration"}


class Builder(building.Builder):
    """TFDS builder of `nih_cxr14`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = f"A folder with {ENTRIES.names[0]}, images/ and the lists."
    VARIANTS = {
        "official": "The official test list; a tenth of the other patients is validation.",
        "by_patient": "80/10/10 by a hash of the patient, without the lists.",
    }
    PUBLISHED = {"images": 112_120, "train + validation": 86_524, "test": 25_596}

    def tasks(self):
        return {"finding": cxr_labels.NIH}

    def samples(self, folder: Path) -> Iterator[building.Sample]:
        needed = ("Image Index", "Finding Labels", "Patient ID")
        rows = ENTRIES.rows(folder, filled=needed, unique="Image Index")
        names = {row["Image Index"] for row in rows}
        part = read_lists(folder, names) if self.variant == "official" else {}
        boxes = read_boxes(folder)
        for row in rows:
            name, patient = row["Image Index"], row["Patient ID"]
            split = files.split_of(patient)
            if part:
                split = "test" if part[name] == "test" else _of_ten(patient)
            labels = row["Finding Labels"].split("|")
            yield building.Sample(
                row=row,
                path=_path(folder, row, name),
                split=split,
                image_id=name,
                patient_id=patient,
                study_id=name.partition(".")[0],
                labels={"finding": cxr_labels.named(row, "Finding Labels", labels, cxr_labels.NIH)},
                boxes=boxes.get(name, ()),
            )


def read_lists(folder: Path, names: set[str]) -> dict[str, str]:
    """Return "train" or "test" by image.

    Raises:
      UserError: for a missing list, or an image in both or none; names the lists have and the
        table lacks are refused as well.
    """
    part: dict[str, str] = {}
    for split, file in LISTS.items():
        for row in layouts.lines(folder, file, WHERE):
            name = row["line"]
            if name not in names or part.setdefault(name, split) != split:
                raise row.error(f"'{name[:40]}' is not in the table, or also in another list.")
    if missing := names - {*part}:
        raise UserError(
            f"{folder}: {len(missing)} images are in neither {' nor '.join(LISTS.values())}, such "
            f"as {min(missing)}; the variant by_patient needs no lists."
        )
    return part


def read_boxes(folder: Path) -> dict[str, list]:
    """Return ((xmin, ymin, xmax, ymax), finding) by image; empty without the table."""
    found: dict[str, list] = {}
    if BOXES.find(folder):
        for row in BOXES.rows(folder, filled=("Image Index", "Finding Label")):
            name = SAME.get(row["Finding Label"], row["Finding Label"])
            row.cells["Finding Label"] = name
            row.choice("Finding Label", cxr_labels.NIH)
            x, y = layouts.number(row, "Bbox [x", low=0), layouts.number(row, "y", low=0)
            w, h = layouts.number(row, "w", low=0), layouts.number(row, "h]", low=0)
            found.setdefault(row["Image Index"], []).append(((x, y, x + w, y + h), name))
    return found


def _of_ten(patient: str) -> str:
    """Return "validation" for a tenth of the patients, "train" for the others."""
    return "validation" if files.split_of(patient) == "validation" else "train"


def _path(folder: Path, row: files.Row, name: str) -> Path:
    path = layouts.member(folder, row, f"images/{name}")
    return _folders(folder).get(name, path)


@functools.lru_cache(maxsize=2)
def _folders(folder: Path) -> dict[str, Path]:
    """Return the images of the numbered archives by name."""
    return {path.name: path for path in folder.glob("images_*/images/*.png")}
