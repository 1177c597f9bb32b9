"""Published splits, derived on the user's disk from the label tables, and checked by hash.

A split is a function of ids and labels in the order of the published table. `legacy` repeats what
the papers' code did, defects included; `clean` keeps patients (or images) apart. What a protocol's
ids must hash to is in ANCHORS: SHA-256 of the sorted ids, a line each, first 16 digits. A table
that gives another hash is another release, cut short, or read in another order.

pandas' `sample(n, random_state=s)` is `RandomState(s).choice(rows, n, replace=False)`;
`train_test_split` is scikit-learn's.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.model_selection import train_test_split

from medvlp_jax.config import UserError
from medvlp_jax.data import layouts
from medvlp_jax.data.cxr_labels import CHEXPERT, CHEXPERT_5

Ids = Mapping[str, list[str]]


class Anchor(NamedTuple):
    """What is published of one part of a split: its size and the hash of its ids, "" if unknown."""

    size: int
    hash: str = ""


# Per "corpus:variant": published numbers, and hashes recomputed from the public label files.
ANCHORS: Mapping[str, Mapping[str, Anchor]] = {
    "rsna_pneumonia:gloria": {
        "train": Anchor(18_678, "fdea2323542c4f7d"),
        "validation": Anchor(4_003, "6279287fa3e3d1e3"),
        "test": Anchor(4_003, "00eda73bce215e4b"),
    },
    "rsna_pneumonia:mgca": {
        "train": Anchor(16_010, "3941bdb6a942688b"),
        "validation": Anchor(5_337, "93e72ac638814123"),
        "test": Anchor(5_337, "e75061d168ffcae0"),
    },
    "chexpert:5x200": {"test": Anchor(1_000, "4d61ce58bd4fc6a7")},
    "chexpert:train_without_5x200": {"train": Anchor(216_180)},
    "chexpert:mgca_legacy": {
        "train": Anchor(185_771),
        "validation": Anchor(4_284),
        "test": Anchor(202),
    },
    "covidx:9a": {
        "train": Anchor(23_988),
        "validation": Anchor(5_998),
        "test": Anchor(400),
    },
    "covidx:cxr4": {
        "train": Anchor(67_863),
        "validation": Anchor(8_473),
        "test": Anchor(8_482),
    },
    "mimic_cxr:images": {
        "train": Anchor(368_960),
        "validation": Anchor(2_991),
        "test": Anchor(5_159),
    },
    "nih_cxr14:official": {"test": Anchor(25_596)},
    "rocov2:captions": {
        "train": Anchor(59_958),
        "validation": Anchor(9_904),
        "test": Anchor(9_927),
    },
    "siim_acr:gloria_legacy": {
        "train": Anchor(8_578),
        "validation": Anchor(1_910),
        "test": Anchor(1_903),
    },
    "vindr_cxr:physionet": {
        "train": Anchor(12_000),
        "validation": Anchor(3_000),
        "test": Anchor(3_000),
    },
}


class Verdict(NamedTuple):
    """One part of a split beside what is published of it."""

    part: str
    size: int
    hash: str
    published: Anchor | None

    @property
    def agrees(self) -> bool | None:
        """Whether size and hash are the published ones; None where nothing is published."""
        if self.published is None:
            return None
        return self.size == self.published.size and self.published.hash in ("", self.hash)


def compare(protocol: str, ids: Ids) -> list[Verdict]:
    """Return size and hash of every part of a split beside the published ones."""
    published = ANCHORS.get(protocol, {})
    return [
        Verdict(part, len(names), layouts.id_hash(names), published.get(part))
        for part, names in ids.items()
    ]


def require(protocol: str, ids: Ids, table: str) -> None:
    """Refuse a split of a whole table that is not the published one.

    Raises:
      UserError: with size and hash of the part that differs.
    """
    for verdict in compare(protocol, ids):
        if verdict.agrees is False:
            raise UserError(
                f"{protocol}: {verdict.part} has {verdict.size:,} ids with hash {verdict.hash}, "
                f"published are {verdict.published.size:,} with {verdict.published.hash}; {table} "
                "is another release or in another order."
            )


def sample(count: int, size: int, seed: int) -> np.ndarray:
    """Return `size` different positions below `count` as pandas draws them.

    Raises:
      UserError: for more than there are.
    """
    if not 0 <= size <= count:
        raise UserError(f"{size} cannot be drawn from {count}.")
    return np.random.RandomState(seed).choice(count, size, replace=False)


def train_and_rest(ids: Sequence, *, held: float, seed: int) -> tuple[list, list]:
    """Return scikit-learn's cut of a sequence into what is trained on and the rest."""
    return train_test_split(list(ids), test_size=held, random_state=seed)


def halves(ids: Sequence[str], *, held: float, seed: int = 0) -> dict[str, list[str]]:
    """Return train, validation and test: `held` of the ids are held out and cut in two.

    GLoRIA's and MGCA's rule for RSNA (held 0.3 and 0.4) and SIIM-ACR (0.3), seed 0. The first half
    of what is held out is the test part.

    Args:
      ids: in the order of the table they split.
      held: share that is not trained on.
      seed: of both cuts.

    Raises:
      UserError: for fewer than four ids.
    """
    if len(ids) < 4:
        raise UserError(f"{len(ids)} images cannot be cut in three; four or more are needed.")
    train, rest = train_and_rest(ids, held=held, seed=seed)
    test, validation = train_and_rest(rest, held=0.5, seed=seed)
    return {"train": train, "validation": validation, "test": test}


def rsna(patients: Sequence[str], flavour: str) -> dict[str, list[str]]:
    """Return GLoRIA's or MGCA's split of RSNA Pneumonia.

    Args:
      patients: of every row of the label table; rows of one patient count once, by id.
      flavour: "gloria" or "mgca".
    """
    return halves(sorted({*patients}), held={"gloria": 0.3, "mgca": 0.4}[flavour])


def siim_legacy(image_of_row: Sequence[str]) -> dict[str, list[str]]:
    """Return GLoRIA's split of SIIM-ACR, which cuts rows: images are in several parts.

    Args:
      image_of_row: the image of every row of train-rle.csv in order.
    """
    return halves(image_of_row, held=0.3)


def siim_clean(image_of_row: Sequence[str]) -> dict[str, list[str]]:
    """Return the same shares of SIIM-ACR, an image in one part."""
    return halves(sorted({*image_of_row}), held=0.3)


def chexpert_5x200(
    paths: Sequence[str], finding: np.ndarray, frontal: np.ndarray, *, seed: int = 0
) -> dict[str, list[str]]:
    """Return MGCA's draw of 200 images a class, each the only finding of its image.

    Args:
      paths: of every row of train.csv in order.
      finding: [N, 14] of `cxr_labels.CHEXPERT`; blank is 0, uncertain -1.
      frontal: [N] bool.
      seed: of each class' draw; GLoRIA drew without one, so its list cannot be derived.

    Returns:
      the paths of each class, 200 each, in the order drawn.

    Raises:
      UserError: for a class with fewer than 200.
    """
    pools = chexpert_pools(finding, frontal)
    drawn = {}
    for name, pool in pools.items():
        if len(pool) < 200:
            raise UserError(
                f"CheXpert 5x200 needs 200 frontal images with {name} alone, and this table has "
                f"{len(pool)}; train.csv of CheXpert-v1.0 has 537 or more of each class."
            )
        drawn[name] = [paths[pool[k]] for k in sample(len(pool), 200, seed)]
    return drawn


def chexpert_pools(finding: np.ndarray, frontal: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows of each of the five classes whose other twelve findings are all absent.

    "No Finding" is not looked at.
    """
    others = [k for k, name in enumerate(CHEXPERT) if name != "No Finding"]
    pools = {}
    for name in CHEXPERT_5:
        k = CHEXPERT.index(name)
        rest = [c for c in others if c != k]
        alone = frontal & (finding[:, k] == 1) & (finding[:, rest] == 0).all(1)
        pools[name] = np.flatnonzero(alone)
    return pools


def chexpert_mgca(
    patients: Sequence[str], drawn: np.ndarray, flavour: str
) -> dict[str, np.ndarray]:
    """Return the rows of train.csv that MGCA trains and validates on.

    The images of 5x200 go first; 5,000 of the rows that are left are drawn by position.
    `legacy` then takes from training the rows whose *number in the whole table* was drawn as a
    position, which leaves 98 % of the validation rows in training.
    `clean` takes all patients of 5x200 and of the drawn rows from training.

    Args:
      patients: of every row of the table.
      drawn: [N] bool, the rows of 5x200.
      flavour: "legacy" or "clean".
    """
    patients = np.asarray(patients)
    gone = drawn if flavour == "legacy" else np.isin(patients, patients[drawn])
    left = np.flatnonzero(~gone)
    position = sample(len(left), min(5_000, len(left) // 2), 0)
    validation = left[position]
    if flavour == "legacy":
        return {"train": np.setdiff1d(left, position), "validation": np.sort(validation)}
    apart = ~np.isin(patients[left], patients[validation])
    return {"train": left[apart], "validation": np.sort(validation)}
