"""Open-i: chest reports of Indiana University, with their radiographs or alone.

Source folder: the reports, as `ecgen-radiology.tgz` or unpacked as `ecgen-radiology/*.xml`; for the
variant "pairs" also the PNG files of the images under `NLMCXR_png/`, each named as its report names
it (`CXR1_1_IM-0001-3001.png`). A file `index.csv` with the columns `uid` and `split` (train, val,
test) sets the split; without it a report's is a hash of its id, 80/10/10. The source names no
patients: each report counts as one.

Task `normal`: the coders' heading "normal", or any other; unknown where they indexed nothing.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from medvlp_jax.config import UserError
from medvlp_jax.data import building, files, layouts, records, reports

CLASSES = ("normal", "abnormal")
SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
# Headings of a report that nobody could or did index.
UNINDEXED = ("no indexing", "technical quality of image unsatisfactory")
REPORTS, IMAGES, INDEX = "ecgen-radiology", "NLMCXR_png", "index.csv"


class Builder(building.Builder):
    """TFDS builder of `openi`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"A folder with {REPORTS}.tgz; for the variant pairs also {IMAGES}/."
    )
    VARIANTS = {"pairs": "One record an image.", "reports": "One record a report, no image."}
    PUBLISHED = {"reports": 3_955, "images": 7_470}

    def tasks(self):
        return {"normal": CLASSES}

    def samples(self, folder: Path) -> Iterator[building.Sample]:
        splits = read_splits(folder)
        for report in reports.read_reports(source_of(folder)):
            if not report.text:
                self.left_out("reports without a text")
                continue
            split = splits[report.id] if splits else files.split_of(report.id)
            for name in (report.id,) if self.variant == "reports" else report.images:
                yield self._sample(folder, report, name, split)

    def _sample(self, folder, report, name, split):
        row = files.Row(folder / REPORTS / report.id, 1, {})
        image = layouts.member(folder, row, f"{IMAGES}/{name}.png")
        return building.Sample(
            row=row,
            path=None if self.variant == "reports" else image,
            split=split,
            image_id=name,
            patient_id=report.id,
            study_id=report.id,
            sections=(report.findings, report.impression),
            labels={"normal": label_of(report.headings)},
        )


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
