"""ROCO: figures of articles in PubMed Central with their captions (Pelka et al. 2018).

Source folder: the repository of the dataset as it is,

  data/{train,validation,test}/{radiology,non-radiology}/
      captions.txt   ROCO_00001<TAB> caption
      licences.txt   ROCO_ID,PMC_ID,CC          (which article an image is from)
      dlinks.txt     ROCO_00001<TAB>wget ...<TAB>PMC4083729_AMHSR-4-14-g002.jpg
      images/        what the links still gave

or one `captions.csv` with roco_id, pmcid, split and caption. Variants: "pairs", the captions whose
image is there (many links are dead; the others are left out), and "captions", all, without images.
The caption is Findings; articles stand for patients, so that no article is torn apart.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds

from medvlp_jax.config import UserError
from medvlp_jax.data import files, records

KINDS = ("radiology", "non-radiology")
TASKS = {"kind": KINDS}
SPLITS = ("train", "validation", "test")
TABLE_SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
TABLE = "captions.csv"


class Caption(NamedTuple):
    """One figure: where its row and its image are; an empty path where it has none."""

    row: files.Row
    split: str
    kind: str
    image: Path | None


class Builder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `roco`."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"ROCO's repository with its data/ folder, or a {TABLE}."
    BUILDER_CONFIGS = (
        tfds.core.BuilderConfig(name="pairs", description="Captions whose image is there."),
        tfds.core.BuilderConfig(name="captions", description="All captions, no image."),
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
        captions = read_table(folder) if (folder / TABLE).is_file() else read_repository(folder)
        if self.builder_config.name == "pairs":
            captions = [c for c in captions if c.image is not None]
            if not captions:
                raise UserError(
                    f"{folder} holds no image that a caption names; the variant captions takes "
                    "the texts alone."
                )
        found = {caption.split for caption in captions}
        return {
            split: self._generate_examples([c for c in captions if c.split == split])
            for split in SPLITS
            if split in found
        }

    def _generate_examples(self, captions: list[Caption]) -> Iterator:
        has_images = self.builder_config.name == "pairs"
        for caption in captions:
            yield caption.row["id"], to_record(caption, has_image=has_images)


def read_table(folder: Path) -> list[Caption]:
    """Return the captions of captions.csv, which has no images."""
    needed = ("roco_id", "pmcid", "split", "caption")
    rows = files.read_rows(folder / TABLE, columns=needed, filled=needed, unique="roco_id")
    files.check_groups(rows, group="pmcid", split="split", accepted=tuple(TABLE_SPLITS))
    return [
        Caption(
            row._replace(cells={**row.cells, "id": row["roco_id"]}),
            TABLE_SPLITS[row["split"]],
            "radiology",
            None,
        )
        for row in rows
    ]


def read_repository(folder: Path) -> list[Caption]:
    """Return the captions of all six parts.

    Raises:
      UserError: where there is none, a line has no caption, or an id stands twice.
    """
    captions, seen = [], {}
    for split in SPLITS:
        for kind in KINDS:
            part = folder / "data" / split / kind
            if part.is_dir():
                captions += _read_part(part, split, kind)
    if not captions:
        raise UserError(f"{folder} has neither {TABLE} nor data/<split>/<kind>/captions.txt.")
    for caption in captions:
        first = seen.setdefault(caption.row["id"], caption.row)
        if first is not caption.row:
            raise caption.row.error(f"{caption.row['id']} is also in {first.path}.")
    return captions


def _read_part(part: Path, split: str, kind: str) -> list[Caption]:
    articles = {
        row["ROCO_ID"]: row["PMC_ID"]
        for row in files.read_rows(part / "licences.txt", columns=("ROCO_ID", "PMC_ID"))
    }
    links = part / "dlinks.txt"
    names = {row["id"]: row["last"] for row in _lines(links)} if links.is_file() else {}
    found = []
    for row in _lines(part / "captions.txt"):
        name = row["id"]
        if not row["last"]:
            raise row.error(f"{name} has no caption; a line is <id><TAB> <caption>.")
        # Without a licence the article is not known: the figure stands for itself.
        cells = {"id": name, "caption": row["last"], "pmcid": articles.get(name) or name}
        row = row._replace(cells={**cells, "image": f"images/{names.get(name, f'{name}.jpg')}"})
        image = files.inside(part, row, "image")
        found.append(Caption(row, split, kind, image if image.is_file() else None))
    return found


def _lines(path: Path) -> list[files.Row]:
    """Return the first and the last cell of the lines of a tab-separated file without header."""
    if not path.is_file():
        raise UserError(f"{path} is missing; ROCO's own file is needed.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        first, *rest = line.split("\t")
        if first.strip():
            last = rest[-1].strip() if rest else ""
            rows.append(files.Row(path, number, {"id": first.strip(), "last": last}))
    return rows


def to_record(caption: Caption, *, has_image: bool) -> dict:
    """Return the record of a figure."""
    row = caption.row
    image = files.read_image(caption.image, row) if has_image else records.empty_image()
    return records.record(
        image=image,
        image_id=row["id"],
        patient_id=row["pmcid"],
        study_id=row["id"],
        findings=row["caption"],
        labels={"kind": records.one_hot(caption.kind, KINDS)},
    )
