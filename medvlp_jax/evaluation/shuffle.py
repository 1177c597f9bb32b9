"""Does a model read what it is given? One kind of input exchanged between patients at test time.

A model that ignores the images, or the metadata, scores the same with those of another patient.
"""

import dataclasses

import numpy as np

from medvlp_jax.config import UserError
from medvlp_jax.data.corpora import Source

MOVED = {"shuffled_images": ("image", "images", "mask"), "shuffled_metadata": ("table",)}
CONTROLS = tuple(MOVED)


@dataclasses.dataclass(frozen=True)
class Shuffled(Source):
    """A source whose records have some fields of another patient's.

    Attributes:
      whole: the source as it was.
      partner: [N] row these are taken from.
      moved: names of the fields.
    """

    whole: Source = None
    partner: np.ndarray = dataclasses.field(default=None, repr=False)
    moved: tuple[str, ...] = ()

    def __len__(self):
        return len(self.whole)

    def __getitem__(self, index):
        """Return a record, part of it another patient's."""
        record, other = self.whole[index], self.whole[self.partner[int(index)]]
        return record | {name: other[name] for name in self.moved if name in other}


def shuffled(source: Source, control: str, seed: int = 0) -> Shuffled:
    """Return a source in which every row has the images, or the table, of another patient.

    Args:
      source: of the evaluation.
      control: one of CONTROLS.
      seed: of the exchange.

    Raises:
      UserError: where one patient has more than half of the rows.
    """
    patients = [source[i]["patient_id"] for i in range(len(source))]
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(Source)}
    partner = partners(patients, seed)
    return Shuffled(**fields, whole=source, partner=partner, moved=MOVED[control])


def partners(patients, seed: int) -> np.ndarray:
    """Return for each row another row [N], of another patient, each taken once.

    Raises:
      UserError: where one patient has more than half of the rows.
    """
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    largest = np.bincount(owner).max()
    if 2 * largest > len(owner):
        raise UserError(
            f"One patient has {largest} of {len(owner)} rows: there are not enough others to "
            "exchange with."
        )
    # Patients in a random order, a patient's rows together: a step as long as the longest patient
    # leaves every patient.
    order = np.argsort(np.random.default_rng(seed).permutation(len(names))[owner], kind="stable")
    found = np.empty(len(owner), int)
    found[order] = np.roll(order, -largest)
    return found
