"""Lower-grade glioma: slices of three MR sequences, a clinical and genomic table, tumour masks.

Source folder: `slices.csv`, `patients.csv`, `images/` (JPEG whose channels are pre-contrast, FLAIR
and post-contrast) and `masks/` (PNG). The LGG Segmentation Dataset; split by patient.
"""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from medvlp_jax.data import files, records, tabular

TASKS = {
    "grade": ("grade II", "grade III"),
    "histology": ("astrocytoma", "oligoastrocytoma", "oligodendroglioma"),
}
TARGETS = {"grade": "neoplasm_histologic_grade", "histology": "histological_type"}
SCHEMA = tabular.read_schema(Path(__file__).with_name("table.json"))
IMAGES = {"pre": {"channel": 0}, "flair": {"channel": 1}, "post": {"channel": 2}}
MASK_BITS = {"tumour": 0}
SPLITS = {"train": "train", "val": "validation", "test": "test"}
BOX = ("x0", "y0", "x1", "y1")


class Builder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `brain_mr_tabular`."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder with slices.csv, patients.csv, images/ and masks/."
    BUILDER_CONFIGS = (
        tfds.core.BuilderConfig(name="tumour", description="Slices that show tumour."),
        tfds.core.BuilderConfig(name="all", description="One slice without tumour a patient, too."),
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=records.features(tasks=TASKS, table=SCHEMA, channels=3, images=IMAGES),
            metadata=records.metadata(
                tasks=TASKS, table=SCHEMA, images=IMAGES, mask_bits=MASK_BITS
            ),
        )

    def _split_generators(self, dl_manager):
        folder = Path(dl_manager.manual_dir)
        patients = {
            row["Patient"]: row
            for row in files.read_rows(
                folder / "patients.csv",
                columns=("Patient", *SCHEMA),
                filled=("Patient",),
                unique="Patient",
            )
        }
        needed = ("file", "Patient", "split")
        rows = files.read_rows(
            folder / "slices.csv", columns=(*needed, "mask", *BOX), filled=needed, unique="file"
        )
        files.check_groups(rows, group="Patient", split="split", accepted=tuple(SPLITS))
        if self.builder_config.name == "tumour":
            rows = [row for row in rows if row["mask"]]
        found = {row["split"] for row in rows}
        return {
            split: self._generate_examples(
                folder, [row for row in rows if row["split"] == name], patients
            )
            for name, split in SPLITS.items()
            if name in found
        }

    def _generate_examples(
        self, folder: Path, rows: list[files.Row], patients: Mapping[str, files.Row]
    ) -> Iterator:
        for row in rows:
            yield row["file"], to_record(folder, row, patients)


def to_record(folder: Path, row: files.Row, patients: Mapping[str, files.Row]) -> dict:
    """Return the record of one slice, with the table of its patient.

    Raises:
      UserError: for a patient without a table, a cell that does not fit, or a damaged image.
    """
    if row["Patient"] not in patients:
        raise row.error(f"Patient {row['Patient']} is not in patients.csv; a row there is needed.")
    patient = patients[row["Patient"]]
    table = tabular.parse_row(patient, SCHEMA)
    path = files.inside(folder, row, "file")
    image = files.read_image(path, row)
    with Image.open(io.BytesIO(image)) as opened:
        width, height = opened.size
    boxes = ()
    if row["x0"]:
        x0, y0, x1, y1 = (float(row[side]) for side in BOX)
        box = np.clip([y0 / height, x0 / width, y1 / height, x1 / width], 0, 1)
        boxes = ((tuple(box.tolist()), "tumour"),)
    labels = {}
    for task, classes in TASKS.items():
        index = table[TARGETS[task]]
        name = "" if np.isnan(index) else classes[int(index)]
        labels[task] = records.one_hot(name, classes)
    return records.record(
        image=image,
        image_id=Path(row["file"]).stem,
        patient_id=row["Patient"],
        study_id=row["Patient"],
        labels=labels,
        boxes=boxes,
        mask=_mask(files.inside(folder, row, "mask"), row) if row["mask"] else b"",
        table=table,
    )


def _mask(path: Path, row: files.Row) -> bytes:
    files.read_image(path, row, format="PNG")
    with Image.open(path) as mask:
        return records.encode_mask((np.asarray(mask.convert("L")) > 127) << MASK_BITS["tumour"])
