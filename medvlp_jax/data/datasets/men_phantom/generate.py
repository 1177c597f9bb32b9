"""Three sequences of a head with three masses, and a table that says which of them is meant.

Every case has a mass at the convexity, at the skull base and deep inside. Each has a bright rim in
`t1` or not, by a coin. The table names one location and an oedema area.

  grade 1                        the named mass has no rim
  grade 2, brain invasion        it has one, and the oedema area is large
  grade 2, no brain invasion     it has one, and the oedema area is small

So the images alone say how many masses have a rim, not which one counts; the table alone says
nothing of the grade and, given grade 2, all of the invasion. Only together they give the label.
`t2` and `adc` show the masses and no rim. Intensities are 0 (air) to about 1,200, uint16.

Axis letters: H, W in-plane pixels, S slices.
"""

from typing import NamedTuple

import numpy as np

SIDE, SLICES = 128, 24
SEQUENCES = ("t1", "t2", "adc")
CLASSES = ("grade 1", "grade 2, brain invasion", "grade 2, no brain invasion")
# Centres (y, x, slice) as fractions of the volume.
PLACES = ((0.24, 0.5, 0.5), (0.74, 0.38, 0.3), (0.5, 0.66, 0.7))
BRAIN = {"t1": 420, "t2": 520, "adc": 480}
MASS = {"t1": 620, "t2": 700, "adc": 380}
RIM = 330  # brighter than the mass, in t1
NOISE = 45


class Case(NamedTuple):
    """A generated patient."""

    volumes: dict[str, np.ndarray]
    table: dict[str, float]
    label: int


def case(seed: int, number: int, *, flat: bool = False) -> Case:
    """Return case `number` of a population; classes take turns.

    Args:
      seed: of the population.
      number: of the case.
      flat: all three masses lie in the middle slice, and volumes are that slice [H, W, 1].
    """
    rng = np.random.default_rng((seed, number))
    label = number % len(CLASSES)
    named = int(rng.integers(len(PLACES)))
    rims = rng.random(len(PLACES)) < 0.5
    rims[named] = label > 0
    # The oedema of grade 1 says nothing: it is drawn from both ranges alike.
    large = label == 1 if label else rng.random() < 0.5
    oedema = rng.uniform(900, 1600) if large else rng.uniform(100, 800)
    radii = rng.uniform(0.07, 0.1, len(PLACES))
    centres = np.array(PLACES) + rng.uniform(-0.03, 0.03, (len(PLACES), 3))
    if flat:
        centres[:, 2] = 0.5
    slices = (0.5,) if flat else np.linspace(0, 1, SLICES, endpoint=False)
    volumes = {name: _volume(rng, name, centres, radii, rims, slices) for name in SEQUENCES}
    table = {
        "location": float(named),
        "sex": float(rng.integers(2)),
        "age": float(rng.integers(25, 86)),
        "adc": float(rng.integers(700, 1100)),
        "tumour_area": float(round(np.pi * (radii[named] * SIDE) ** 2)),
        "oedema_area": float(round(oedema)),
    }
    return Case(volumes, table, label)


def _volume(rng, name, centres, radii, rims, slices) -> np.ndarray:
    """Draw one sequence, uint16 [H, W, S]."""
    in_plane = np.linspace(0, 1, SIDE, endpoint=False, dtype=np.float32)
    y, x, s = np.ix_(in_plane, in_plane, np.float32(slices))
    distance = lambda c, r: np.sqrt(
        ((y - c[0]) / r) ** 2 + ((x - c[1]) / r) ** 2 + ((s - c[2]) / (2 * r)) ** 2
    )
    head = ((y - 0.5) / 0.42) ** 2 + ((x - 0.5) / 0.36) ** 2 + ((s - 0.5) / 0.7) ** 2 < 1
    volume = np.where(head, BRAIN[name] * rng.uniform(0.9, 1.1), 0)
    for centre, radius, rim in zip(centres, radii, rims, strict=True):
        d = distance(centre, radius)
        volume = np.where(head & (d < 1), MASS[name], volume)
        if name == "t1" and rim:
            volume = np.where(head & (d > 0.7) & (d < 1), MASS[name] + RIM, volume)
    noisy = volume + NOISE * rng.standard_normal(volume.shape, np.float32) * head
    return np.clip(np.rint(noisy), 0, 2**16 - 1).astype(np.uint16)
