"""Derm7pt: a clinical photograph, a dermoscopic image and attributes of each lesion.

Source folder: `release_v0`, with `meta/meta.csv`, `meta/{train,valid,test}_indexes.csv` (one column
`indexes`: row numbers of meta.csv from 0) and `images/`. The official split.
"""

from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from medvlp_jax.config import UserError
from medvlp_jax.data import files, records, tabular

HEADER = (
    "case_num",
    "diagnosis",
    "seven_point_score",
    "pigment_network",
    "streaks",
    "pigmentation",
    "regression_structures",
    "dots_and_globules",
    "blue_whitish_veil",
    "vascular_structures",
    "level_of_diagnostic_difficulty",
    "elevation",
    "location",
    "sex",
    "management",
    "clinic",
    "derm",
    "case_id",
    "notes",
)
NEVUS, MELANOMA = "melanocytic nevus", "melanoma"
OTHERS = {  # Kawahara et al. 2019, https://doi.org/10.1109/JBHI.2018.2824327, Table I
    "basal cell carcinoma": "basal cell carcinoma",
    "seborrheic keratosis": "seborrheic keratosis",
    "dermatofibroma": "miscellaneous",
    "lentigo": "miscellaneous",
    "melanosis": "miscellaneous",
    "miscellaneous": "miscellaneous",
    "vascular lesion": "miscellaneous",
}
CLASSES = {
    "nev_mel": (NEVUS, MELANOMA),
    "five": (
        "basal cell carcinoma",
        NEVUS,
        MELANOMA,
        "miscellaneous",
        "seborrheic keratosis",
    ),
}
SCHEMA = tabular.read_schema(Path(__file__).with_name("table.json"))
IMAGES = {"dermoscopy": {}}  # `image` is the clinical photograph
SPLITS = {"train": "train", "valid": "validation", "test": "test"}


class Builder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `derm7pt`."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "The folder release_v0 with meta/meta.csv, meta/*_indexes.csv and images/ "
        "(https://derm.cs.sfu.ca)."
    )
    BUILDER_CONFIGS = (
        tfds.core.BuilderConfig(name="nev_mel", description="Nevus or melanoma; as CFCML."),
        tfds.core.BuilderConfig(name="five", description="All cases, in five groups."),
    )

    @property
    def tasks(self) -> dict[str, tuple[str, ...]]:
        """Classes of the one task."""
        return {"diagnosis": CLASSES[self.builder_config.name]}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=records.features(tasks=self.tasks, table=SCHEMA, channels=3, images=IMAGES),
            metadata=records.metadata(tasks=self.tasks, table=SCHEMA, images=IMAGES),
        )

    def _split_generators(self, dl_manager):
        folder = Path(dl_manager.manual_dir)
        rows = files.read_rows(
            folder / "meta/meta.csv",
            columns=HEADER,
            filled=("case_num", "diagnosis", "clinic", "derm"),
            unique="case_num",
        )
        return {
            split: self._generate_examples(folder, picked)
            for split, picked in official_split(folder, rows).items()
        }

    def _generate_examples(self, folder: Path, rows: list[files.Row]) -> Iterator:
        for row in rows:
            name = group(row)
            if name in self.tasks["diagnosis"]:
                yield row["case_num"], to_record(folder, row, self.tasks["diagnosis"])


def official_split(folder: Path, rows: list[files.Row]) -> dict[str, list[files.Row]]:
    """Return the rows of each split, by position.

    Raises:
      UserError: for a position that is none, or stands in two splits.
    """
    found, seen = {}, {}
    for name, split in SPLITS.items():
        found[split] = []
        for line in files.read_rows(folder / f"meta/{name}_indexes.csv", columns=("indexes",)):
            text = line["indexes"]
            if not text.isdecimal() or int(text) >= len(rows):
                raise line.error(
                    f"indexes is '{text}'; accepted are 0 to {len(rows) - 1}, rows of meta.csv."
                )
            other = seen.setdefault(int(text), split)
            if other != split:
                raise line.error(f"case {text} is in {other} too.")
            found[split].append(rows[int(text)])
    return found


def group(row: files.Row) -> str:
    """Return which of the five groups a diagnosis belongs to.

    Raises:
      UserError: for a diagnosis of none.
    """
    said = row["diagnosis"]
    if "nevus" in said:
        return NEVUS
    if "melanoma" in said:
        return MELANOMA
    if said not in OTHERS:
        raise row.error(
            f"diagnosis is '{said}'; accepted are a nevus, a melanoma, {', '.join(OTHERS)}."
        )
    return OTHERS[said]


def to_record(folder: Path, row: files.Row, classes: tuple[str, ...]) -> dict:
    """Return the record of one case.

    Raises:
      UserError: for a table cell that does not fit, or an image that is missing or damaged.
    """
    images = folder / "images"
    if not images.is_dir():
        raise UserError(f"{images} is missing; the images of meta.csv are needed there.")
    return records.record(
        image=files.read_image(files.inside(images, row, "clinic"), row),
        images={"dermoscopy": files.read_image(files.inside(images, row, "derm"), row)},
        image_id=row["case_num"],
        patient_id=row["case_num"],  # the source names no patients
        study_id=row["case_num"],
        labels={"diagnosis": records.one_hot(group(row), classes)},
        table=tabular.parse_row(row, SCHEMA),
    )
