"""Cross-validation: the records of a corpus dealt anew, by patient and with like shares of classes.

Of K folds, fold k is the test split, the next one the validation split, all others the training
split; or validation is an inner share of what is not tested, the same for any K. No patient is in
two of them, or no study (lesion) where the dealing is by study: other lesions of one patient may
then be in train and test. The corpus' own splits play no part.
"""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from medvlp_jax.config import UserError, nearest
from medvlp_jax.data.corpora import Source

SPLITS = ("train", "validation", "test")
GROUPS = ("patient_id", "study_id")


class _Rows(Sequence):
    """Serialised records of several files, picked by (file, row)."""

    def __init__(self, parts: Sequence[Sequence], where: np.ndarray):
        self.parts, self.where = parts, where

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, index):
        part, row = self.where[index]
        return self.parts[part][int(row)]


def deal(
    groups: Sequence[str], labels: np.ndarray, *, count: int, seed: int, setting: str = "count"
) -> np.ndarray:
    """Return the fold of every row [N].

    Args:
      groups: [N] patient of each row.
      labels: [N] class of each row, -1 unknown.
      count: K, at least 3.
      seed: of the dealing.
      setting: of data.folds that says so, for messages.

    Raises:
      UserError: for fewer than 3 folds, or fewer patients than folds.
    """
    if count < 3:
        raise UserError(
            f"data.folds.{setting}={count} must be 0, or at least 3: train, validate, test."
        )
    patients = len(set(groups))
    if patients < count:
        raise UserError(f"data.folds.{setting}={count}, but there are only {patients} patients.")
    dealt = np.zeros(len(groups), int)
    dealer = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    try:
        with warnings.catch_warnings():
            # A class with fewer cases than folds is missing in some: evaluation lists it there.
            warnings.simplefilter("ignore", UserWarning)
            for fold, (_, held) in enumerate(dealer.split(labels, labels, groups)):
                dealt[held] = fold
    except ValueError as error:
        raise UserError(f"data.folds.{setting}={count}: {error}.") from None
    return dealt


def open_fold(
    sources: Sequence[Source],
    split: str,
    *,
    count: int,
    index: int,
    task: str,
    seed: int,
    group: str = GROUPS[0],
    inner: int = 0,
) -> Source:
    """Return one split of one fold of a corpus.

    Args:
      sources: all splits of the corpus.
      split: "train", "validation" or "test".
      count: K.
      index: k, from 0.
      task: label task whose classes are shared out evenly; "" ignores classes.
      seed: of the dealing.
      group: "patient_id" or "study_id", what stays together.
      inner: validation is one of this many parts of what is not tested; 0 is the next fold.

    Raises:
      UserError: for a split, fold, task or group that does not exist.
    """
    if split not in SPLITS:
        raise UserError(f"Folds have no split '{split}'. {nearest(split, SPLITS)}")
    if group not in GROUPS:
        raise UserError(f"data.folds.group is '{group}'. {nearest(group, GROUPS)}")
    if not 0 <= index < count:
        raise UserError(f"data.folds.index={index} must be at least 0 and below count={count}.")
    where = np.array([(k, i) for k, source in enumerate(sources) for i in range(len(source))])
    groups = np.array([sources[k][i][group] for k, i in where])
    labels = np.zeros(len(where), int)
    if task:
        one_hot = np.concatenate([source.labels(task) for source in sources])
        labels = np.where((one_hot == 1).any(1), one_hot.argmax(1), -1)
    fold = deal(groups, labels, count=count, seed=seed)
    role = np.where(fold == index, "test", "train").astype(object)
    rest = np.flatnonzero(fold != index)
    held = fold[rest] == (index + 1) % count
    if inner:
        inside = {"count": inner, "seed": seed, "setting": "inner"}
        held = deal(groups[rest], labels[rest], **inside) == 0
    role[rest[held]] = "validation"
    first = sources[0]
    rows = _Rows([source.serialised for source in sources], where[role == split])
    return Source(first.name, split, first.metadata, first.folder, rows)


def settings(data: Mapping) -> dict:
    """Return the arguments of `open_fold` that config.data says; {} for the corpus' own splits.

    Raises:
      UserError: for the index of a fold where there are none.
    """
    folds = dict(data["folds"])
    if not folds["count"]:
        if folds["index"]:
            raise UserError(
                f"data.folds.index={folds['index']} of data.folds.count=0: there are no folds, but "
                "the corpus' own splits; set the count, or leave the index out."
            )
        return {}
    return folds | {"task": folds["task"] or data["balance"]}
