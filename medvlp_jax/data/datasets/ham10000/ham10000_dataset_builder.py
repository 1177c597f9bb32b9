"""HAM10000: dermatoscopic images of pigmented lesions with age, sex and site.

Source folder, either of

* `HAM10000_metadata` or `HAM10000_metadata.csv` and the images of the official archives, in
  `HAM10000_images_part_1/` and `_part_2/`, or in `images/`; split 80/10/10 by lesion;
* `tabular.csv`, the same columns with `file` (path of the image) and `split` (train, val, test).
"""

from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from medvlp_jax.data import files, records, tabular

DIAGNOSES = {  # Tschandl et al. 2018, https://doi.org/10.1038/sdata.2018.161, Table 2
    "akiec": "actinic keratosis or Bowen's disease",
    "bcc": "basal cell carcinoma",
    "bkl": "benign keratosis",
    "df": "dermatofibroma",
    "mel": "melanoma",
    "nv": "melanocytic nevus",
    "vasc": "vascular lesion",
}
TASKS = {"diagnosis": tuple(DIAGNOSES.values())}
SCHEMA = tabular.read_schema(Path(__file__).with_name("table.json"))
COLUMNS = ("lesion_id", "image_id", "dx", *SCHEMA)
SPLITS = {"train": "train", "val": "validation", "test": "test"}
FOLDERS = ("HAM10000_images_part_1", "HAM10000_images_part_2", "images")


class Builder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `ham10000`."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "A folder with HAM10000_metadata and HAM10000_images_part_1/, _part_2/ "
        "(doi 10.7910/DVN/DBW86T), or with tabular.csv and images/."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=records.features(tasks=TASKS, table=SCHEMA, channels=3),
            metadata=records.metadata(tasks=TASKS, table=SCHEMA),
        )

    def _split_generators(self, dl_manager):
        folder = Path(dl_manager.manual_dir)
        rows = read_table(folder)
        splits: dict[str, list[files.Row]] = {}
        for row in rows:
            splits.setdefault(row["split"], []).append(row)
        return {
            split: self._generate_examples(folder, splits[split])
            for split in SPLITS.values()
            if split in splits
        }

    def _generate_examples(self, folder: Path, rows: list[files.Row]) -> Iterator:
        for row in rows:
            yield row["image_id"], to_record(folder, row)


def read_table(folder: Path) -> list[files.Row]:
    """Return the rows of either layout, each with `file` and the name of its `split` here.

    Raises:
      UserError: for a defect of the table, or a lesion in two splits.
    """
    official = [folder / name for name in ("HAM10000_metadata", "HAM10000_metadata.csv")]
    found = [path for path in official if path.is_file()]
    needed = ("lesion_id", "image_id", "dx")
    if not found:
        rows = files.read_rows(
            folder / "tabular.csv",
            columns=(*COLUMNS, "file", "split"),
            filled=(*needed, "file", "split"),
            unique="image_id",
        )
        files.check_groups(rows, group="lesion_id", split="split", accepted=tuple(SPLITS))
        for row in rows:
            row.cells["split"] = SPLITS[row["split"]]
        return rows
    rows = files.read_rows(found[0], columns=COLUMNS, filled=needed, unique="image_id")
    for row in rows:
        name = f"{row['image_id']}.jpg"
        where = next((f for f in FOLDERS if (folder / f / name).is_file()), FOLDERS[0])
        row.cells.update(file=f"{where}/{name}", split=files.split_of(row["lesion_id"]))
    return rows


def to_record(folder: Path, row: files.Row) -> dict:
    """Return the record of one row.

    Raises:
      UserError: for an unknown diagnosis, a table cell that does not fit, or a damaged image.
    """
    dx = row.choice("dx", tuple(DIAGNOSES))
    return records.record(
        image=files.read_image(files.inside(folder, row, "file"), row),
        image_id=row["image_id"],
        patient_id=row["lesion_id"],
        study_id=row["lesion_id"],
        labels={"diagnosis": records.one_hot(DIAGNOSES[dx], TASKS["diagnosis"])},
        table=tabular.parse_row(row, SCHEMA),
    )
