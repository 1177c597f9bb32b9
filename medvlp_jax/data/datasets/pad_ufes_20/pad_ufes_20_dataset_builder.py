"""PAD-UFES-20: smartphone photographs of skin lesions with what the patient tells.

Source folder: `metadata.csv` and the PNG images in `images/`, `images/imgs_part_{1,2,3}/` or
`imgs_part_{1,2,3}/`. Split 80/10/10 by a hash of the patient, there is no official one.
"""

from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from medvlp_jax.data import files, records, tabular

HEADER = (
    "patient_id",
    "lesion_id",
    "smoke",
    "drink",
    "background_father",
    "background_mother",
    "age",
    "pesticide",
    "gender",
    "skin_cancer_history",
    "cancer_history",
    "has_piped_water",
    "has_sewage_system",
    "fitspatrick",
    "region",
    "diameter_1",
    "diameter_2",
    "diagnostic",
    "itch",
    "grew",
    "hurt",
    "changed",
    "bleed",
    "elevation",
    "img_id",
    "biopsed",
)
DIAGNOSES = {  # Pacheco et al. 2020, https://doi.org/10.1016/j.dib.2020.106221, Table 1
    "ACK": "actinic keratosis",
    "BCC": "basal cell carcinoma",
    "MEL": "melanoma",
    "NEV": "melanocytic nevus",
    "SCC": "squamous cell carcinoma",
    "SEK": "seborrheic keratosis",
}
TASKS = {"diagnosis": tuple(DIAGNOSES.values())}
SCHEMA = tabular.read_schema(Path(__file__).with_name("table.json"))
PARTS = tuple(f"imgs_part_{part}" for part in (1, 2, 3))
FOLDERS = ("images", *(f"images/{part}" for part in PARTS), *PARTS)


class Builder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `pad_ufes_20`."""

    VERSION = tfds.core.Version("1.1.0")  # 1.1: parents' background; UNK apart from missing
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "A folder with metadata.csv and images/ (https://doi.org/10.17632/zr7vgbcyr2.1)."
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
        rows = files.read_rows(
            folder / "metadata.csv",
            columns=HEADER,
            filled=("patient_id", "diagnostic", "img_id"),
            unique="img_id",
        )
        splits: dict[str, list[files.Row]] = {}
        for row in rows:
            splits.setdefault(files.split_of(row["patient_id"]), []).append(row)
        return {
            split: self._generate_examples(folder, splits[split])
            for split in ("train", "validation", "test")
            if split in splits
        }

    def _generate_examples(self, folder: Path, rows: list[files.Row]) -> Iterator:
        for row in rows:
            yield row["img_id"], to_record(folder, row)


def to_record(folder: Path, row: files.Row) -> dict:
    """Return the record of one photograph.

    Raises:
      UserError: for an unknown diagnosis, a table cell that does not fit, or a damaged image.
    """
    diagnosis = DIAGNOSES[row.choice("diagnostic", tuple(DIAGNOSES))]
    where = next((f for f in FOLDERS if (folder / f / row["img_id"]).is_file()), FOLDERS[0])
    return records.record(
        image=files.read_image(files.inside(folder / where, row, "img_id"), row, format="PNG"),
        image_id=row["img_id"],
        patient_id=row["patient_id"],
        study_id=f"{row['patient_id']}/{row['lesion_id']}",
        labels={"diagnosis": records.one_hot(diagnosis, TASKS["diagnosis"])},
        table=tabular.parse_row(row, SCHEMA),
    )
