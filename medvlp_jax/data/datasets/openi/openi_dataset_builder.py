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
import tensorflow_datasets as tfds

from medvlp_jax.config import UserError
from medvlp_jax.data import files, records, reports

CLASSES = ("normal", "abnormal")
TASKS = {"normal": CLASSES}
SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
# Headings of a report that nobody could or did index.
UNINDEXED = ("no indexing", "technical quality of image unsatisfactory")
REPORTS, IMAGES, INDEX = "ecgen-radiology", "NLMCXR_png", "index.csv"


class Builder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `openi`."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"A folder with {REPORTS}.tgz; for the variant pairs also {IMAGES}/."
    )
    BUILDER_CONFIGS = (
        tfds.core.BuilderConfig(name="pairs", description="One record an image."),
        tfds.core.BuilderConfig(name="reports", description="One record a report, no image."),
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=records.features(tasks=TASKS),
            metadata=records.metadata(tasks=TASKS),
        )

    def _split_generators(self, dl_manager):
        folder = Path(dl_manager.manual_dir)
        splits = read_splits(folder)
        found: dict[str, list] = {}
        for report in reports.read_reports(source_of(folder)):
            if report.text:
                split = splits[report.id] if splits else files.split_of(report.id)
                found.setdefault(split, []).append(report)
        return {split: self._generate_examples(folder, found[split]) for split in sorted(found)}

    def _generate_examples(self, folder: Path, found: list[reports.Report]) -> Iterator:
        for report in found:
            if self.builder_config.name == "reports":
                yield report.id, to_record(report, report.id, records.empty_image())
            else:
                for name in report.images:
                    yield name, to_record(report, name, read_png(folder, report, name))


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


def read_png(folder: Path, report: reports.Report, name: str) -> bytes:
    """Return the bytes of an image of a report.

    Raises:
      UserError: where it is missing, damaged or no PNG, or its name is no plain name.
    """
    row = files.Row(folder / REPORTS / report.id, 1, {"image": f"{IMAGES}/{name}.png"})
    return files.read_image(files.inside(folder, row, "image"), row, format="PNG")


def label_of(headings: tuple[str, ...]) -> np.ndarray:
    """Return the label vector over CLASSES."""
    lower = {heading.strip().lower() for heading in headings}
    if not lower or lower & {*UNINDEXED}:
        return records.unknown(CLASSES)
    return records.one_hot("normal" if lower == {"normal"} else "abnormal", CLASSES)


def to_record(report: reports.Report, name: str, image: bytes) -> dict:
    """Return the record of an image of a report, or of a report alone."""
    return records.record(
        image=image,
        image_id=name,
        patient_id=report.id,
        study_id=report.id,
        findings=report.findings,
        impression=report.impression,
        labels={"normal": label_of(report.headings)},
    )
