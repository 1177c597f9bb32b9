"""Radiology images of VQA-Med-2019 and VQA-RAD with texts composed from their answers.

Source folder: `pairs.csv` (one row an image) and `images/`. In an answer "#" separates accepted
alternatives (the first is used) and "()" encloses optional words (kept, without the signs).
"""

import re
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from medvlp_jax.data import files, records

ORGANS = (
    "breast",
    "face, sinuses, and neck",
    "gastrointestinal",
    "genitourinary",
    "heart and great vessels",
    "lung, mediastinum, pleura",
    "musculoskeletal",
    "skull and contents",
    "spine and contents",
    "vascular and lymphatic",
)
PLANES = (
    "3d reconstruction",
    "ap",
    "axial",
    "coronal",
    "decubitus",
    "frontal",
    "lateral",
    "longitudinal",
    "mammo - cc",
    "mammo - mag cc",
    "mammo - mlo",
    "mammo - xcc",
    "oblique",
    "pa",
    "sagittal",
    "transverse",
)
MODALITIES = (
    "angiography",
    "ct",
    "gi_fluoroscopy",
    "mammography",
    "mr",
    "nuclear",
    "ultrasound",
    "xray",
)
# The 10 organs and 16 planes are the closed answer sets of VQA-Med-2019.
TASKS = {"organ": ORGANS, "plane": PLANES, "modality": MODALITIES}
SPLITS = {"train": "train", "val": "validation", "test": "test"}


class Builder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `radiology_qa`."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder with pairs.csv and images/."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=records.features(tasks=TASKS),
            metadata=records.metadata(tasks=TASKS),
        )

    def _split_generators(self, dl_manager):
        folder = Path(dl_manager.manual_dir)
        needed = ("image_id", "file", "split", "group_id")
        texts = ("source", "modality_group", "modality", "plane", "organ", "abnormality")
        rows = files.read_rows(
            folder / "pairs.csv",
            columns=(*needed, *texts, "text_composed"),
            filled=needed,
            unique="image_id",
        )
        files.check_groups(rows, group="group_id", split="split", accepted=tuple(SPLITS))
        found = {row["split"] for row in rows}
        return {
            SPLITS[split]: self._generate_examples(
                folder, [row for row in rows if row["split"] == split]
            )
            for split in SPLITS
            if split in found
        }

    def _generate_examples(self, folder: Path, rows: list[files.Row]) -> Iterator:
        for row in rows:
            yield row["image_id"], to_record(folder, row)


def to_record(folder: Path, row: files.Row) -> dict:
    """Return the record of one row of pairs.csv."""
    row.cells.update({c: first_alternative(row[c]) for c in ("plane", "organ", "abnormality")})
    return records.record(
        image=files.read_image(files.inside(folder, row, "file"), row),
        image_id=row["image_id"],
        patient_id=row["group_id"],
        study_id=row["group_id"],
        findings=findings(row),
        impression=sentence(row["abnormality"]),
        labels={
            "organ": records.one_hot(row.choice("organ", ORGANS), ORGANS),
            "plane": records.one_hot(row.choice("plane", PLANES), PLANES),
            "modality": records.one_hot(row.choice("modality_group", MODALITIES), MODALITIES),
        },
    )


def findings(row: files.Row) -> str:
    """Return modality, plane, organ and VQA-RAD's questions with answers, in the source's words."""
    group = row["modality_group"].replace("gi_", "gi ").replace("xray", "x-ray")
    modality = ", ".join(filter(None, (group, first_alternative(row["modality"]))))
    parts = [sentence(modality), sentence(row["plane"]), sentence(row["organ"])]
    if "vqarad" in row["source"]:
        parts.append(questions(row["text_composed"]))
    return " ".join(filter(None, parts))


def first_alternative(answer: str) -> str:
    """Return the first of the "#"-separated answers without the signs around optional words."""
    return " ".join(re.sub(r"[()]", " ", answer.split("#")[0]).split()).replace(" ,", ",")


def sentence(words: str) -> str:
    """Close a non-empty text with a full stop."""
    return f"{words.rstrip('. ')}." if words else ""


def questions(composed: str) -> str:
    """Return a composed text from its first question on; "" where it asks none."""
    match = re.search(r"(?:^|\. )([^.?]*\?.*)$", composed)
    return match[1] if match else ""
