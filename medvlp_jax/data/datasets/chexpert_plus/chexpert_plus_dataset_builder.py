"""CheXpert Plus: the radiographs of CheXpert with their reports.

Source folder: `df_chexpert_plus_240401.csv`; the images either as the JPEG files of CheXpert
(`train/patient42142/study5/view1_frontal.jpg`) or as PNG under `PNG/`, same names; labels in
`chexbert_labels/report_fixed.json` (JSON lines by path, with any suffix) where they are there, else
all unknown.

These are CheXpert's images and patients: never train on one and test on the other's training part.
"""

import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from medvlp_jax.config import UserError
from medvlp_jax.data import building, cxr_labels, files, layouts, records

WHERE = "https://stanfordaimi.azurewebsites.net (CheXpert Plus, research use agreement)"
TABLE = layouts.Table(
    ("df_chexpert_plus_240401.csv",),
    (
        "path_to_image,path_to_dcm,frontal_lateral,ap_pa,deid_patient_id,"
        "patient_report_date_order,report,section_narrative,section_clinical_history,"
        "section_history,section_comparison,section_technique,section_procedure_comments,"
        "section_findings,section_impression,section_end_of_impression,section_summary,"
        "section_accession_number,age,sex,race,ethnicity,interpreter_needed,insurance_type,"
        "recent_bmi,deceased,split",
    ),
    WHERE,
)
LABELS = "chexbert_labels/report_fixed.json"
SPLITS = {"train": "train", "valid": "validation"}
VIEWS = ("Frontal", "Lateral")


class Builder(building.Builder):
    """TFDS builder of `chexpert_plus`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = f"A folder with {TABLE.names[0]} and train/, valid/ or PNG/."
    VARIANTS = {
        "frontal": "Frontal views of studies with findings or an impression.",
        "pairs": "All views of studies with findings or an impression.",
        "images": "All views; the text may be missing.",
    }
    PUBLISHED = {"images (all views)": 223_228}

    def tasks(self):
        return cxr_labels.CHEXPERT_TASKS

    def samples(self, folder: Path) -> Iterator[building.Sample]:
        needed = ("path_to_image", "frontal_lateral", "split")
        rows = TABLE.rows(folder, filled=needed, unique="path_to_image")
        labels = read_labels(folder)
        _check_labels(folder, rows, labels)
        for row in rows:
            frontal = row.choice("frontal_lateral", VIEWS) == "Frontal"
            sections = tuple(
                " ".join(row[f"section_{name}"].split()) for name in ("findings", "impression")
            )
            if self.variant == "frontal" and not frontal:
                self.left_out("lateral view")
            elif self.variant != "images" and not any(sections):
                self.left_out("neither findings nor impression")
            else:
                if labels and _key(row["path_to_image"]) not in labels:
                    self.noted(f"without labels in {LABELS}")
                yield _sample(folder, row, sections, labels)


def read_labels(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Return the labels by path without its suffix; empty where the folder has none.

    Raises:
      UserError: for a line that is no JSON object with the path and the 14 findings.
    """
    if not (folder / LABELS).is_file():
        return {}
    found = {}
    for row in layouts.lines(folder, LABELS, WHERE):
        try:
            entry = json.loads(row["line"])
            values = {name: _cell(entry[name]) for name in cxr_labels.CHEXPERT}
            path = str(entry["path_to_image"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise row.error(
                f"no label of an image ({type(error).__name__}: {str(error)[:80]}); a JSON object "
                "with path_to_image and the 14 findings is needed."
            ) from error
        found[_key(path)] = cxr_labels.four_valued(files.Row(row.path, row.number, values))
    return found


def _check_labels(folder: Path, rows: Sequence[files.Row], labels: Mapping[str, Any]) -> None:
    """Refuse a label file of other images.

    Raises:
      UserError: naming a path of each table.
    """
    if labels and rows and not any(_key(row["path_to_image"]) in labels for row in rows):
        raise UserError(
            f"{folder / LABELS} labels no image of {rows[0].path.name}: it has paths like "
            f"{min(labels)[:80]}, the table has {rows[0]['path_to_image'][:80]}; take both from "
            f"one release ({WHERE}), or remove the labels."
        )


def _key(path: str) -> str:
    """Return a path without its suffix: images are JPEG or PNG, and labels name either."""
    return posixpath.splitext(path)[0]


def _cell(value) -> str:
    """Return a JSON value as CheXpert's tables write it; null is blank."""
    return "" if value is None or value != value else str(value)


def _sample(folder: Path, row: files.Row, sections, labels) -> building.Sample:
    path = row["path_to_image"]
    parts = PurePosixPath(path).parts
    if len(parts) != 4 or not parts[1].startswith("patient"):
        raise row.error(
            f"path_to_image '{path[:80]}' names no patient; accepted is "
            "train/patient42142/study5/view1_frontal.jpg."
        )
    layouts.member(folder, row, path)
    found = building.first_found(folder, (path, f"PNG/{PurePosixPath(path).with_suffix('.png')}"))
    unknown = {task: records.unknown(names) for task, names in cxr_labels.CHEXPERT_TASKS.items()}
    return building.Sample(
        row=row,
        path=folder / found,
        split=SPLITS[row.choice("split", tuple(SPLITS))],
        image_id=path,
        patient_id=parts[1],
        study_id="/".join(parts[1:3]),
        sections=sections,
        labels=labels.get(_key(path), unknown),
    )
