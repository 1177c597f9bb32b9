"""Open-i: chest reports of Indiana University, with their radiographs or alone.

Source folder: the reports, as `ecgen-radiology.tgz` or unpacked as `ecgen-radiology/*.xml`; for the
variant "pairs" also the PNG files of the images under `NLMCXR_png/`, each named as its report names
it (`CXR1_1_IM-0001-3001.png`). Or the CSV re-pack of Kaggle: `indiana_reports.csv`,
`indiana_projections.csv`, which alone tells frontal images from lateral ones, and
`images/images_normalized/`. Ids of reports and images are the same from both. A file `index.csv`
with the columns `uid` (`CXR1`) and `split` (train, val, test) sets the split; without it a report's
is a hash of its id, 80/10/10. The source names no patients: each report counts as one.

Task `normal`: the coders' heading "normal", or any other; unknown where they indexed nothing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medvlp_jax.config import UserError
from medvlp_jax.data import building, files, headings, layouts, records, reports

CLASSES = ("normal", "abnormal")
SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
# Headings of a report that nobody could or did index.
UNINDEXED = ("no indexing", "technical quality of image unsatisfactory")
REPORTS, IMAGES, INDEX = "ecgen-radiology", "NLMCXR_png", "index.csv"
KAGGLE = "https://www.kaggle.com/datasets/raddar/chest-xrays-indiana-university"
TABLE = layouts.Table(
    ("indiana_reports.csv",),
    ("uid,MeSH,Problems,image,indication,comparison,findings,impression",),
    KAGGLE,
)
PROJECTIONS = layouts.Table(("indiana_projections.csv",), ("uid,filename,projection",), KAGGLE)
REPACKED, SUFFIX = "images/images_normalized", ".dcm.png"


class Image(NamedTuple):
    """An image of a report.

    Attributes:
      row: that names it, for errors.
      id: as the XML names it.
      file: its path in the source folder.
      view: "Frontal", "Lateral", or "" where the source does not tell.
    """

    row: files.Row
    id: str
    file: str
    view: str = ""


class Builder(building.Builder):
    """TFDS builder of `openi`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"A folder with {REPORTS}.tgz; for the variant pairs also {IMAGES}/. Or the CSV re-pack."
    )
    VARIANTS = {
        "pairs": "One record an image.",
        "frontal": "Frontal images; needs the CSV re-pack.",
        "reports": "One record a report, no image.",
    }
    PUBLISHED = {"reports": 3_955, "images": 7_470}

    def tasks(self):
        return {"normal": CLASSES}

    def samples(self, folder: Path) -> Iterator[building.Sample]:
        splits = read_splits(folder)
        is_table = TABLE.find(folder) is not None
        if self.variant == "frontal" and not is_table:
            raise UserError(
                f"{folder / TABLE.names[0]} is missing: only the CSV re-pack ({KAGGLE}) says which "
                "images are frontal; the variant pairs needs no such table."
            )
        for report, images in (_repacked if is_table else _original)(folder):
            if not report.text:
                self.left_out("reports without a text")
                continue
            split = splits[report.id] if splits else files.split_of(report.id)
            if self.variant == "reports":
                row = images[0].row if images else files.Row(folder / report.id, 1, {})
                yield self._sample(report, row, report.id, None, split)
                continue
            if not images:
                self.left_out("reports without an image")
            for image in images:
                if self.variant == "frontal" and image.view != "Frontal":
                    self.left_out("lateral images")
                    continue
                path = layouts.member(folder, image.row, image.file)
                yield self._sample(report, image.row, image.id, path, split)

    def _sample(self, report, row, image_id, path, split):
        return building.Sample(
            row=row,
            path=path,
            split=split,
            image_id=image_id,
            patient_id=report.id,
            study_id=report.id,
            sections=(report.findings, report.impression),
            labels={"normal": label_of(report.headings)},
        )


def _original(folder: Path) -> Iterator[tuple[reports.Report, list[Image]]]:
    """Yield the reports of the XML files with their images."""
    for report in reports.read_reports(source_of(folder)):
        row = files.Row(folder / REPORTS / report.id, 1, {})
        yield report, [Image(row, name, f"{IMAGES}/{name}.png") for name in report.images]


def _repacked(folder: Path) -> Iterator[tuple[reports.Report, list[Image]]]:
    """Yield the reports of the CSV re-pack with their images.

    Raises:
      UserError: for an image of a report that is not there, or whose file is named otherwise.
    """
    rows = TABLE.rows(folder, filled=("uid",), unique="uid")
    images: dict[str, list[Image]] = {row["uid"]: [] for row in rows}
    needed = ("uid", "filename", "projection")
    for row in PROJECTIONS.rows(folder, filled=needed, unique="filename"):
        uid, name = row["uid"], row["filename"]
        if uid not in images:
            raise row.error(f"uid {uid} is no report of {TABLE.names[0]}.")
        if not (name.startswith(f"{uid}_") and name.endswith(SUFFIX)):
            raise row.error(f"filename '{name[:80]}' is not like {uid}_IM-0001-4001{SUFFIX}.")
        view = row.choice("projection", ("Frontal", "Lateral"))
        image_id = f"CXR{uid}_{name.removesuffix(SUFFIX)}"
        images[uid].append(Image(row, image_id, f"{REPACKED}/{name}", view))
    for row in rows:
        coded = tuple(filter(None, map(str.strip, row["MeSH"].split(";"))))
        texts = headings.tidy(row["findings"]), headings.tidy(row["impression"])
        yield reports.Report(f"CXR{row['uid']}", *texts, coded), images[row["uid"]]


def source_of(folder: Path) -> Path:
    """Return where the reports of a source folder are: the archive, or what it unpacks to."""
    archive = folder / f"{REPORTS}.tgz"
    return archive if archive.is_file() else folder / REPORTS


def read_splits(folder: Path) -> dict[str, str]:
    """Return the split of each report that index.csv names; empty without that file."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    named = ("uid", "split")
    rows = files.read_rows(path, columns=named, filled=named, unique="uid")
    return _Splits(path, {r["uid"]: SPLITS[r.choice("split", tuple(SPLITS))] for r in rows})


class _Splits(dict):
    """Splits by report, which say where one is missing."""

    def __init__(self, path: Path, splits: dict[str, str]):
        super().__init__(splits)
        self.path = path

    def __missing__(self, name: str) -> str:
        raise UserError(f"{self.path} has no row for report {name}; every report needs one.")


def label_of(headings: tuple[str, ...]) -> np.ndarray:
    """Return the label vector over CLASSES."""
    lower = {heading.strip().lower() for heading in headings}
    if not lower or lower & {*UNINDEXED}:
        return records.unknown(CLASSES)
    return records.one_hot("normal" if lower == {"normal"} else "abnormal", CLASSES)
