"""A folder of your own: a CSV table, images, and a description of both.

Source folder:

* `corpus.json`, which says what the columns of the table are:

    {"classes": ["benign", "malignant"],
     "columns": {"image": "file", "label": "diagnosis", "group": "patient", "id": "", "split": ""},
     "images": {"dermoscopy": "derm_file"},
     "channels": 3}

  `group` is what must not be torn apart by a split (patient, lesion). `id` may be "": the path of
  the image then. `split` may be "": 80/10/10 by a hash of the group then. `images` names further
  images of a case and their columns, and may be left out, as may `channels` (3, or 1 for grey).
* `table.csv`: one row a case; paths are relative to the folder. JPEG or PNG; one of
  more than 8 bits is stretched to grey of 8.
* `table.json`: the schema of the columns that a model may see, see data/tabular.py.

    medvlp data prepare csv_folder --manual-dir DIR --builder-config NAME

prepares it as the corpus `csv_folder:NAME`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from medvlp_jax.config import UserError, nearest
from medvlp_jax.data import files, images, records, tabular

FIELDS = ("classes", "columns", "images", "channels")
COLUMNS = ("image", "label", "group", "id", "split")
SPLITS = ("train", "validation", "test")
TASK = "label"
UNDESCRIBED = {"classes": ("absent", "present"), "images": {}, "channels": 3}


class Builder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `csv_folder`; what its records hold is read from the source folder."""

    VERSION = tfds.core.Version("1.0.0")
    SELF_DESCRIBED = True
    MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder with corpus.json, table.csv, table.json and images."

    def __init__(self, *, source: Path | None = None, **fields: Any):
        """Read the description; without a source, that of the prepared corpus is read by TFDS."""
        self.described = read_description(source) if source else UNDESCRIBED
        self.schema = tabular.read_schema(source / "table.json") if source else {}
        super().__init__(**fields)

    def _info(self) -> tfds.core.DatasetInfo:
        tasks = {TASK: tuple(self.described["classes"])}
        images = {name: {} for name in self.described["images"]}
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=records.features(
                tasks=tasks,
                table=self.schema,
                channels=self.described["channels"],
                images=images,
            ),
            metadata=records.metadata(tasks=tasks, table=self.schema, images=images),
        )

    def _split_generators(self, dl_manager):
        folder = Path(dl_manager.manual_dir)
        columns = self.described["columns"]
        needed = tuple(columns[key] for key in ("image", "label", "group"))
        given = tuple(columns[key] for key in ("id", "split") if columns[key])
        rows = files.read_rows(
            folder / "table.csv",
            columns=(*needed, *given, *self.described["images"].values(), *self.schema),
            filled=(*(c for c in needed if c != columns["label"]), *given),
            unique=columns["id"] or columns["image"],
        )
        if not rows:
            raise UserError(f"{folder / 'table.csv'} has no row; one a case is needed.")
        if columns["split"]:
            files.check_groups(
                rows, group=columns["group"], split=columns["split"], accepted=SPLITS
            )
        splits: dict[str, list[files.Row]] = {}
        for row in rows:
            split = (
                row[columns["split"]] if columns["split"] else files.split_of(row[columns["group"]])
            )
            splits.setdefault(split, []).append(row)
        return {
            split: self._generate_examples(folder, splits[split])
            for split in SPLITS
            if split in splits
        }

    def _generate_examples(self, folder: Path, rows: list[files.Row]) -> Iterator:
        for row in rows:
            record = self._record(folder, row)
            yield record["image_id"], record

    def _record(self, folder: Path, row: files.Row) -> dict:
        columns, classes = self.described["columns"], self.described["classes"]
        label = row.choice(columns["label"], classes)
        image = lambda column: _read(files.inside(folder, row, column), row)
        return records.record(
            image=image(columns["image"]),
            images={name: image(column) for name, column in self.described["images"].items()},
            image_id=row[columns["id"] or columns["image"]],
            patient_id=row[columns["group"]],
            study_id=row[columns["group"]],
            labels={TASK: records.one_hot(label, classes)},
            table=tabular.parse_row(row, self.schema),
        )


def _read(path: Path, row: files.Row) -> bytes:
    """Return the bytes of a JPEG or PNG, decoded once; of a deeper PNG those of a grey JPEG."""
    try:
        with Image.open(path) as image:
            found, mode = image.format, image.mode
    except (OSError, ValueError):
        found = mode = ""
    if files.is_deep(mode):
        return images.load(path).content
    return files.read_image(path, row, format="PNG" if found == "PNG" else "JPEG")


def read_description(folder: Path) -> dict[str, Any]:
    """Read and check corpus.json.

    Raises:
      UserError: for a file that is missing or no JSON, a field that is missing or unknown, fewer
        than two classes, or channels other than 1 and 3.
    """
    path = folder / "corpus.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; it says what the columns of table.csv are.")
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold an object with {', '.join(FIELDS)}.")
    found = {"images": {}, "channels": 3, **found}
    for where, given, known in (
        (f"{path}", found, FIELDS),
        (f"{path}: columns", found.get("columns"), COLUMNS),
    ):
        if not isinstance(given, dict):
            raise UserError(f"{where} must be an object with {', '.join(known)}.")
        for field in given:
            if field not in known:
                raise UserError(f"{where} has no field '{field}'. {nearest(field, known)}")
        if missing := [field for field in known if field not in given]:
            raise UserError(f"{where} lacks {', '.join(missing)}.")
    classes = found["classes"]
    if not isinstance(classes, list) or len(set(map(str, classes))) < 2:
        raise UserError(f"{path} has classes {classes!r}; two or more different are needed.")
    if found["channels"] not in (1, 3):
        raise UserError(f"{path} has channels {found['channels']!r}; accepted are 1 and 3.")
    for name in found["images"]:
        if name in ("image", "image_2", "tabular"):
            raise UserError(f"{path}: a further image cannot be called '{name}'.")
    return found
