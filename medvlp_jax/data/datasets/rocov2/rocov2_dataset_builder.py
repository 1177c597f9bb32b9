"""ROCOv2: figures of open-access articles with captions and UMLS concepts (Rückert et al. 2024).

Source folder: the Zenodo archive unpacked, `{train,valid,test}_images/`,
`{train,valid,test}_captions.csv` and, where they are there, `{...}_concepts.csv`, whose ids have to
be those of the captions. The caption is Findings. The source does not say which figures are of one
article: each counts as one patient. Every image has its own licence, CC BY or CC BY-NC.
"""

from collections.abc import Iterator
from pathlib import Path

from medvlp_jax.data import building, layouts

WHERE = "https://doi.org/10.5281/zenodo.8333645"
SPLITS = {"train": "train", "valid": "validation", "test": "test"}


class Builder(building.Builder):
    """TFDS builder of `rocov2`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "The Zenodo archive of ROCOv2, unpacked."
    VARIANTS = {"captions": "Every image with its caption."}
    PUBLISHED = {"train": 59_958, "validation": 9_904, "test": 9_927}

    def samples(self, folder: Path) -> Iterator[building.Sample]:
        for part, split in SPLITS.items():
            captions = layouts.Table((f"{part}_captions.csv",), ("ID,Caption",), WHERE)
            rows = captions.rows(folder, filled=("ID", "Caption"), unique="ID")
            check_concepts(folder, part, {row["ID"] for row in rows})
            for row in rows:
                name = f"{part}_images/{row['ID']}.jpg"
                yield building.Sample(
                    row=row,
                    path=layouts.member(folder, row, name),
                    split=split,
                    image_id=row["ID"],
                    patient_id=row["ID"],
                    study_id=row["ID"],
                    sections=(" ".join(row["Caption"].split()), ""),
                )


def check_concepts(folder: Path, part: str, ids: set[str]) -> None:
    """Refuse concepts of images that have no caption.

    Raises:
      UserError: for the first one.
    """
    table = layouts.Table((f"{part}_concepts.csv",), ("ID,CUIs",), WHERE)
    if table.find(folder):
        for row in table.rows(folder, filled=("ID",)):
            if row["ID"] not in ids:
                raise row.error(f"ID '{row['ID'][:40]}' has no row in {part}_captions.csv.")
