"""One class a study: images taken together, of one lesion or at one visit, are of one diagnosis."""

from collections.abc import Sequence

import numpy as np

from medvlp_jax.config import UserError


def labelled_rows(study_id: Sequence[str], labels: np.ndarray, where: str, remedy: str):
    """Return the row whose label each study has [S], studies in the order of `np.unique`.

    The first of its images whose class is known; where none is, its first.

    Args:
      study_id: [N], of each image.
      labels: [N, C], 1 present, one class a row; rows without a 1 are unknown.
      where: the setting that takes the images of a study together, for messages.
      remedy: what else is accepted there, likewise.

    Raises:
      UserError: for a study with images of several classes, naming it.
    """
    names, first, study = np.unique(study_id, return_index=True, return_inverse=True)
    is_present = np.asarray(labels) == 1
    truth, known = is_present.argmax(1), np.flatnonzero(is_present.any(1))
    rows = first.copy()
    rows[study[known[::-1]]] = known[::-1]  # of several images the first is written last
    mixed = known[truth[known] != truth[rows[study[known]]]]
    if len(mixed):
        raise UserError(
            f"{where}: study '{names[study[mixed[0]]]}' has images of more than one class; "
            "accepted are studies of one class each, such as lesions by a column `study` of "
            f"csv_folder, or {remedy}."
        )
    return rows
