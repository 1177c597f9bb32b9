"""Limited pairing: some studies keep their report, the rest are images and reports apart.

A row of the stream is an image and a report. Rows of pairs hold both of one study; in the others
the two come from their own pools. Each patient's studies are all on one side: an evaluation or a
pair never meets the other half of an unpaired study of the same patient.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medvlp_jax.config import UserError

VARIANTS = ("disjoint", "shuffled")
ROUNDS = 16  # meetings of each unpaired image with another report before they repeat


@dataclasses.dataclass(frozen=True)
class Pools:
    """Rows of a source: `images` and `reports` begin with the `pairs`, in the same order."""

    pairs: np.ndarray
    images: np.ndarray
    reports: np.ndarray


def split(patients: Sequence[str], *, ratio: float, variant: str, seed: int) -> Pools:
    """Choose patients until their studies are the wanted share, and part the others.

    Args:
      patients: of each study.
      ratio: share of studies that stay pairs, in (0, 1]; at least one patient's.
      variant: "disjoint" puts every other patient into one of the two pools; "shuffled" puts each
        study into both, with the link removed: easier, since each image's own report is there.
      seed: of the draw.

    Raises:
      UserError: for a value outside these.
    """
    if not 0 < ratio <= 1:
        raise UserError(f"data.pairing.ratio must be above 0 and at most 1, got {ratio}.")
    if variant not in VARIANTS:
        known = " or ".join(VARIANTS)
        raise UserError(f"data.pairing.variant must be {known}, got '{variant}'.")
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    order = np.random.default_rng((seed, 41)).permutation(len(names))
    place = np.empty(len(names), np.int64)
    place[order] = np.arange(len(names))
    counts = np.bincount(owner, minlength=len(names))[order]
    # The fewest patients whose studies reach the share.
    paired = 1 + int(np.searchsorted(np.cumsum(counts), ratio * len(owner) - 1e-9))
    row = np.arange(len(owner))
    pairs, rest = row[place[owner] < paired], row[place[owner] >= paired]
    if variant == "shuffled":
        images = reports = rest
    else:
        side = place[owner[rest]] % 2
        images, reports = rest[side == 0], rest[side == 1]
    return Pools(pairs, np.r_[pairs, images], np.r_[pairs, reports])


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows made of the records of a source, of which they keep what is known of the corpus."""

    source: Any
    pools: Pools

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What was stored of the corpus."""
        return self.source.metadata

    @property
    def images(self) -> Mapping[str, Any]:
        """Further images of the corpus."""
        return self.source.images


@dataclasses.dataclass(frozen=True)
class Pairs(_Rows):
    """The rows of pairs, as a source."""

    def __len__(self) -> int:
        return len(self.pools.pairs)

    def __getitem__(self, k: int) -> dict:
        record = self.source[int(self.pools.pairs[k])]
        return {**record, "paired": True, "image_row": k, "report_row": k}


class Related:
    """The related reports of each image, by number in the pools; nothing before `learn`."""

    def __init__(self):
        self.found: tuple[np.ndarray, np.ndarray] | None = None

    def learn(self, column: np.ndarray, weight: np.ndarray, confidence: np.ndarray) -> None:
        """Take relations [I, m]; an image with confidence 0 has none."""
        weight = np.where(np.asarray(confidence)[:, None] > 0, weight, 0)
        self.found = np.asarray(column), weight  # at once: other threads read it


@dataclasses.dataclass(frozen=True)
class Unpaired(_Rows):
    """Images and reports that are no pairs, as a source: in each round an image meets another.

    Attributes:
      seed: of the meetings.
      share: of the rows in which the report is one that the image is related to, drawn by weight
        from those that have no image of their own; where it is related to none, any.
      related: which these are.
    """

    seed: int
    share: float = 0.0
    related: Related = dataclasses.field(default_factory=Related)

    def __len__(self) -> int:
        apart = [len(x) - len(self.pools.pairs) for x in (self.pools.images, self.pools.reports)]
        return ROUNDS * max(apart) if min(apart) else 0

    def __getitem__(self, k: int) -> dict:
        pairs = len(self.pools.pairs)
        images, reports = len(self.pools.images) - pairs, len(self.pools.reports) - pairs
        turn, place = divmod(k, max(images, reports))
        image = pairs + place % images
        report = self._neighbour(k, image)
        if report is None:
            report = pairs + int(self._order(turn, reports)[place % reports])
        record = self.source[int(self.pools.images[image])]
        other = self.source[int(self.pools.reports[report])]
        return {**_told_by(record, other), "image_row": image, "report_row": report}

    def _neighbour(self, k: int, image: int) -> int | None:
        found = self.related.found
        if found is None:
            return None
        rng = np.random.default_rng((self.seed, 43, k))
        column, weight = found[0][image], found[1][image].astype(np.float64)
        weight[column < len(self.pools.pairs)] = 0
        if rng.random() >= self.share or not weight.any():
            return None
        return int(rng.choice(column, p=weight / weight.sum()))

    def _order(self, turn: int, count: int) -> np.ndarray:
        return _permutation((self.seed, 42, turn), count)


@dataclasses.dataclass(frozen=True)
class Nodes:
    """The rows of one pool in order, as a source: what is related to what."""

    source: Any
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> dict:
        return self.source[int(self.rows[k])]


@functools.lru_cache(maxsize=2 * ROUNDS)
def _permutation(seed: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


def _told_by(record: Mapping, other: Mapping) -> dict:
    """Return a record with the texts of another; what else is known of it is dropped."""
    texts = {key: other[key] for key in ("findings", "impression", "text_id")}
    return {"image": record["image"], "patient_id": record["patient_id"], **texts, "paired": False}
