"""Findings of chest radiographs as the published label tables state them.

One vector a task: 1 present, 0 absent, -1 unknown (`records`). CheXpert and MIMIC-CXR tables have
four values; "finding" takes a blank, which means "not mentioned", for absent, as every protocol on
these labels does, and "uncertain" (-1) for unknown. A second task "mentioned" keeps blanks and
zeros apart, so that nothing of the table is lost.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from medvlp_jax.config import UserError, nearest
from medvlp_jax.data import files, records

# In CheXpert's order; MIMIC-CXR's tables are alphabetical. Records of both use this one.
CHEXPERT = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
CHEXPERT_5 = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
CHEXPERT_TASKS = {"finding": CHEXPERT, "mentioned": CHEXPERT}

NIH = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)

VINDR = (
    "Aortic enlargement",
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Clavicle fracture",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Enlarged PA",
    "ILD",
    "Infiltration",
    "Lung Opacity",
    "Lung cavity",
    "Lung cyst",
    "Mediastinal shift",
    "Nodule/Mass",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumothorax",
    "Pulmonary fibrosis",
    "Rib fracture",
    "Other lesion",
    "COPD",
    "Lung tumor",
    "Pneumonia",
    "Tuberculosis",
    "Other diseases",
    "No finding",
)

_VALUES = {
    "": (records.ABSENT, records.ABSENT),
    "1": (records.PRESENT, records.PRESENT),
    "0": (records.ABSENT, records.PRESENT),
    "-1": (records.UNKNOWN, records.PRESENT),
}


def four_valued(row: files.Row, classes: Sequence[str] = CHEXPERT) -> dict[str, np.ndarray]:
    """Return the tasks "finding" and "mentioned" of a row of a CheXpert or MIMIC-CXR table.

    Raises:
      UserError: for a cell other than 1, 0, -1 or nothing.
    """
    values = [_four_valued(row, name) for name in classes]
    finding, mentioned = np.array(values, np.int8).T
    return {"finding": finding, "mentioned": mentioned}


def unknown(tasks: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """Return labels that say nothing, for a corpus or study without a label table."""
    return {task: records.unknown(classes) for task, classes in tasks.items()}


def binary(row: files.Row, columns: Sequence[str]) -> np.ndarray:
    """Return a vector from columns that hold 1 or 0.

    Raises:
      UserError: for any other value.
    """
    for column in columns:
        if row[column] not in ("0", "1", "0.0", "1.0"):
            raise row.error(f"{column} is '{row[column][:40]}'; accepted are 0 and 1.")
    return np.array([row[column].startswith("1") for column in columns], np.int8)


def named(
    row: files.Row,
    column: str,
    names: Iterable[str],
    classes: Sequence[str],
    *,
    none: str = "No Finding",
) -> np.ndarray:
    """Return a vector from the names of what is present.

    Args:
      row: for errors.
      column: where the names stand.
      names: classes, or `none` alone.
      classes: of the task.
      none: the name that says that there is nothing; accepted only alone.

    Raises:
      UserError: for a name that is no class, or `none` beside another one.
    """
    vector = np.full(len(classes), records.ABSENT, np.int8)
    names = list(names)
    for name in names:
        if name == none and len(names) == 1:
            continue
        if name not in classes:
            raise row.error(f"{column} has '{name[:40]}'. {nearest(name[:40], [*classes, none])}")
        vector[classes.index(name)] = records.PRESENT
    return vector


def vote(vectors: Sequence[np.ndarray], *, needed: int) -> np.ndarray:
    """Return the vector of what at least `needed` readers see; VinDr-CXR has three readers.

    Raises:
      UserError: for more votes than readers.
    """
    if not 1 <= needed <= len(vectors):
        raise UserError(f"{needed} votes of {len(vectors)} readers cannot be had.")
    return (np.sum(vectors, axis=0) >= needed).astype(np.int8)


def _four_valued(row: files.Row, name: str) -> tuple[int, int]:
    found = _VALUES.get(row[name].removesuffix(".0"))
    if found is None:
        raise row.error(f"{name} is '{row[name][:40]}'; accepted are 1, 0, -1 or an empty cell.")
    return found
