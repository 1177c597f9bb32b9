"""A folder of your own: images, a CSV table with reports, labels and attributes, a description.

Source folder:

* `corpus.json`, which says what the columns of the table are. Radiographs with reports:

    {"columns": {"image": "file", "group": "patient", "findings": "findings",
                 "impression": "impression"},
     "labels": {"finding": ["effusion", "edema"]},
     "channels": 1, "side": 512}

  Photographs with one diagnosis each and a table:

    {"columns": {"image": "file", "group": "patient", "label": "diagnosis"},
     "classes": ["benign", "malignant"],
     "images": {"dermoscopy": "derm_file"}}

* `table.csv`: one row an image or case; paths are relative to the folder. JPEG, PNG or DICOM; one
  of more than 8 bits is stretched to grey of 8.
* `table.json`, if a model may see columns: their schema, see data/tabular.py; no label is one.
* `prompts.json`, if the names of the classes are no good prompts: see evaluation/prompts.py.

Columns: `image` and `group` are needed. `group` is what must not be torn apart by a split (patient,
lesion). `findings`, `impression`: parts of a report, or `report`, a whole one, which is split at
its headings; a placeholder such as "nan" or "N/A" is no text. `label`: one of `classes`. `study`:
images taken together, the group without it. `id`: of the image, its path without it. `split`:
train, validation or test; without it 80/10/10 by a hash of the group.

`labels`: per task the columns that hold 1 (present), 0 (absent), -1 or nothing (unknown); they are
the names of its classes. `images`: further images of a case and their columns. `channels`: 3
(default), or 1 for grey. `side`: shorter side of the stored images in pixels, 0 (default) as they
are.

    medvlp data prepare csv_folder --manual-dir DIR --builder-config NAME

prepares it as the corpus `csv_folder:NAME`, once: delete its folder to prepare it anew.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from medvlp_jax.config import UserError
from medvlp_jax.data import building, files, headings, records, reports, tabular
from medvlp_jax.data.datasets.csv_folder import description
from medvlp_jax.data.datasets.csv_folder.description import NEEDED, TASK

LABELS = {"1": records.PRESENT, "0": records.ABSENT, "-1": records.UNKNOWN, "": records.UNKNOWN}


class Builder(building.Builder):
    """TFDS builder of `csv_folder`; what its records hold is read from the source folder."""

    SELF_DESCRIBED = True
    digest_of = staticmethod(description.digest)
    MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder with corpus.json, table.csv and images."

    def __init__(self, *, source: Path | None = None, **fields: Any):
        """Read the description; without a source, that of the prepared corpus is read by TFDS."""
        self.described, self.schema, self.prompts, self.digest = description.DEFAULTS, {}, {}, ""
        if source:
            self.described = description.read(source)
            if (source / "table.json").is_file():
                self.schema = tabular.read_schema(source / "table.json")
                description.check_table(source / "table.json", self.schema, self.described)
            self.prompts = description.read_prompts(source, self.tasks())
            self.digest = self.digest_of(source)
        super().__init__(**fields)

    @property
    def variant(self) -> str:
        """The name the user gave."""
        return self.builder_config.name

    @property
    def side(self) -> int:
        """The shorter side of the images in pixels; 0 for those of the source."""
        return self.described["side"]

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.described["channels"]

    def tasks(self) -> dict[str, tuple[str, ...]]:
        """Return the class names of every label task."""
        tasks = {task: tuple(columns) for task, columns in self.described["labels"].items()}
        if self.described["classes"]:
            tasks[TASK] = tuple(self.described["classes"])
        return tasks

    def texts(self) -> tuple[str, ...]:
        """Return the sections that columns are named for."""
        columns = self.described["columns"]
        names = {"findings": "findings", "impression": "impressions"}
        return tuple(n for key, n in names.items() if key in columns or "report" in columns)

    def _info(self) -> tfds.core.DatasetInfo:
        tasks, images = self.tasks(), {name: {} for name in self.described["images"]}
        metadata = records.metadata(tasks=tasks, table=self.schema, images=images)
        metadata["prompts"] = self.prompts or class_names(tasks)
        metadata["source_digest"] = self.digest
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=records.features(
                tasks=tasks, table=self.schema, channels=self.channels, images=images
            ),
            metadata=metadata,
        )

    def samples(self, folder: Path) -> Iterator[building.Sample]:
        """Read table.csv."""
        columns = self.described["columns"]
        tasks = self.described["labels"]
        given = [name for task in tasks.values() for name in task]
        rows = files.read_rows(
            folder / "table.csv",
            columns=(*columns.values(), *given, *self.described["images"].values(), *self.schema),
            filled=[columns[key] for key in (*NEEDED, "study", "id", "split") if key in columns],
            unique=columns.get("id", columns["image"]),
        )
        if not rows:
            raise UserError(f"{folder / 'table.csv'} has no row; one a case is needed.")
        if "split" in columns:
            split, accepted = columns["split"], building.SPLITS
            files.check_groups(rows, group=columns["group"], split=split, accepted=accepted)
        for row in rows:
            sample = self._sample(folder, row)
            if self.texts() and not any(sample.sections):
                self.noted("without a text")
            yield sample

    def _sample(self, folder: Path, row: files.Row) -> building.Sample:
        columns, classes = self.described["columns"], self.described["classes"]
        cell = lambda key: row[columns[key]] if key in columns else ""
        labels = {
            task: np.array([_label(row, name) for name in names], np.int8)
            for task, names in self.described["labels"].items()
        }
        if classes:
            labels[TASK] = records.one_hot(row.choice(columns[TASK], classes), classes)
        text = lambda key: reports.text_of(cell(key))
        texts = headings.tidy(text("findings")), headings.tidy(text("impression"))
        return building.Sample(
            row=row,
            path=files.inside(folder, row, columns["image"]),
            split=cell("split") or files.split_of(cell("group")),
            image_id=cell("id") or cell("image"),
            patient_id=cell("group"),
            study_id=cell("study") or cell("group"),
            sections=headings.split_sections(text("report")) if "report" in columns else texts,
            labels=labels,
            images={
                name: files.inside(folder, row, column)
                for name, column in self.described["images"].items()
            },
            table=tabular.parse_row(row, self.schema),
        )


def class_names(tasks: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return prompts that are the names of the classes, for want of better ones."""
    positive, negative = {"positive": ["{c}"]}, {"negative": ["no {c}"]}
    specs = {
        task: {"section": "impression", "multi_label": task != TASK}
        | {"template": positive if task == TASK else positive | negative}
        for task in tasks
    }
    return {"version": "class names", "tasks": specs}


def _label(row: files.Row, column: str) -> int:
    value = row[column].removesuffix(".0")  # as pandas writes columns with empty cells
    if value not in LABELS:
        raise row.error(f"{column} is '{row[column][:40]}'; accepted are 1, 0, -1 and nothing.")
    return LABELS[value]
