"""Chest radiographs of COVID-19 patients with laboratory values, most of them missing.

Source folder: `tabular.csv` and `images/`, the covid-19-image-repository of Hannover Medical School
with `file`, `split` (by patient) and `label_icu` beside its own columns.
"""

from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from medvlp_jax.data import files, records, tabular

TASKS = {"icu": ("not in intensive care", "in intensive care")}
LABELS = dict(zip("01", TASKS["icu"], strict=True))
SCHEMA = tabular.read_schema(Path(__file__).with_name("table.json"))
NEEDED = ("image_id", "file", "split", "patient_id", "label_icu")
SPLITS = {"train": "train", "val": "validation", "test": "test"}


class Builder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `cxr_tabular`."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder with tabular.csv and images/."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=records.features(tasks=TASKS, table=SCHEMA),
            metadata=records.metadata(tasks=TASKS, table=SCHEMA),
        )

    def _split_generators(self, dl_manager):
        folder = Path(dl_manager.manual_dir)
        rows = files.read_rows(
            folder / "tabular.csv",
            columns=(*NEEDED, *SCHEMA),
            filled=NEEDED,
            unique="image_id",
        )
        files.check_groups(rows, group="patient_id", split="split", accepted=tuple(SPLITS))
        found = {row["split"] for row in rows}
        return {
            split: self._generate_examples(folder, [row for row in rows if row["split"] == name])
            for name, split in SPLITS.items()
            if name in found
        }

    def _generate_examples(self, folder: Path, rows: list[files.Row]) -> Iterator:
        for row in rows:
            yield row["image_id"], to_record(folder, row)


def to_record(folder: Path, row: files.Row) -> dict:
    """Return the record of one exposure.

    Raises:
      UserError: for an unknown label, a table cell that does not fit, or a damaged image.
    """
    label = LABELS[row.choice("label_icu", tuple(LABELS))]
    return records.record(
        image=files.read_image(files.inside(folder, row, "file"), row),
        image_id=row["image_id"],
        patient_id=row["patient_id"],
        study_id=row["image_id"],
        labels={"icu": records.one_hot(label, TASKS["icu"])},
        table=tabular.parse_row(row, SCHEMA),
    )
