"""ROCO: figures of articles in PubMed Central with their captions (Pelka et al. 2018).

Source folder: the repository of the dataset as it is,

  data/{train,validation,test}/{radiology,non-radiology}/
      captions.txt   ROCO_00001<TAB> caption
      licences.txt   ROCO_ID,PMC_ID,CC          (which article an image is from)
      dlinks.txt     ROCO_00001<TAB>wget ...<TAB>PMC4083729_AMHSR-4-14-g002.jpg
      images/        what the links still gave

or one `captions.csv` with roco_id, pmcid, split and caption. Variants: "pairs", the captions whose
image is there (many links are dead; the others are left out), and "captions", all, without images.
The caption is Findings; articles stand for patients. Those that the repository's split tears apart
are counted, in `captions.csv` they are refused.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from medvlp_jax.config import UserError
from medvlp_jax.data import building, files, layouts, records

KINDS = ("radiology", "non-radiology")
SPLITS = ("train", "validation", "test")
TABLE_SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
TABLE = "captions.csv"


class Caption(NamedTuple):
    """One figure: where its row and its image are; None where it has none."""

    row: files.Row
    split: str
    kind: str
    image: Path | None


class Builder(building.Builder):
    """TFDS builder of `roco`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = f"ROCO's repository with its data/ folder, or a {TABLE}."
    VARIANTS = {"pairs": "Captions whose image is there.", "captions": "All captions, no image."}

    def tasks(self):
        return {"kind": KINDS}

    def samples(self, folder: Path) -> Iterator[building.Sample]:
        captions = read_table(folder) if (folder / TABLE).is_file() else read_repository(folder)
        with_image = [caption for caption in captions if caption.image is not None]
        if self.variant == "pairs":
            if not with_image:
                raise UserError(
                    f"{folder} holds no image that a caption names; the variant captions takes "
                    "the texts alone."
                )
            if dead := len(captions) - len(with_image):
                self.left_out("captions whose image is not there", dead)
            captions = with_image
        for caption in captions:
            row = caption.row
            yield building.Sample(
                row=row,
                path=caption.image if self.variant == "pairs" else None,
                split=caption.split,
                image_id=row["id"],
                patient_id=row["pmcid"],
                study_id=row["id"],
                sections=(row["caption"], ""),
                labels={"kind": records.one_hot(caption.kind, KINDS)},
            )


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
        row = row._replace(cells=cells)
        image = layouts.member(part, row, f"images/{names.get(name, f'{name}.jpg')}")
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
