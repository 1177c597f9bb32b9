"""The radiographic sign of each finding, written onto the thickness maps of one side of a chest.

A sign is a function (a, half, tissue, f, rng, size): the altered anatomy, one half of it, the
tissue to write into, the finding, random numbers and the image size. It returns (index, outline),
a bool outline [h, w] that lies at half[index], or None where the finding has no outline.

Axis letters: H rows, w columns of one half of the image.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from medvlp_jax.data.datasets.cxr_phantom import anatomy, banks, projection
from medvlp_jax.data.datasets.cxr_phantom.anatomy import SIDES, Anatomy, Half, ramp, step
from medvlp_jax.data.datasets.cxr_phantom.findings import ZONES, Finding


class Tissue(NamedTuple):
    """What disease changes on one side, [H, w] float32, written in place.

    Attributes:
      aerated: cm of water that the ray would cross more if the lung were solid.
      water: cm of water or solid tissue that fills lung.
      vessels: cm of blood.
    """

    aerated: np.ndarray
    water: np.ndarray
    vessels: np.ndarray


def _tree(a: Anatomy, half: Half, rng, size: int) -> np.ndarray:
    """A random tree of vessels (or bronchi) from this side's hilum, in cm [H, w]."""
    y, x = hilum(a, half.side)
    pixel = banks.FIELD_OF_VIEW / size
    right = half.side == "right"
    column = (a.middle + a.tilt * y + (-x if right else x) + banks.FIELD_OF_VIEW / 2) / pixel
    at = (round((y + banks.FIELD_OF_VIEW / 2) / pixel), round(column) - half.columns.start)
    tree = banks.vessels(size)[rng.integers(banks.TREES)]
    return banks.place_tree(tree, at, half.x.shape, mirror=right)


def healthy(a: Anatomy, half: Half, rng, size: int) -> Tissue:
    """Lung, vessels and fine texture of one side before any finding."""
    aerated = anatomy.lung_depth(a, half) * np.float32(1 - projection.AERATED)
    vessels = _tree(a, half, rng, size)
    grain = banks.crop(banks.texture(size), rng)[:, half.columns]
    return Tissue(aerated, aerated * grain * np.float32(0.012), vessels)


def hilum(a: Anatomy, side: str) -> tuple[float, float]:
    """Return (y, distance from the midline) of a hilum in cm; the left lies higher."""
    return a.apex + (11.0 if side == "right" else 10.2), 3.0


def _centre(a: Anatomy, half: Half, f: Finding, rng) -> tuple[float, float]:
    """A point (y, x) inside the finding's zone, clear of mediastinum and wall."""
    bottom = a.dome[SIDES.index(f.side)] + 1.0
    third = (bottom - a.apex) / 3
    y = a.apex + third * (ZONES.index(f.zone) + rng.uniform(0.3, 0.75))
    y = max(y, a.apex + 0.5 * f.size + 1.2)
    row = int(np.clip(np.searchsorted(half.y[:, 0], y), 0, len(half.y) - 1))
    inner = float(anatomy.mediastinum(a, half)[row, 0])
    outer = float(half.wall[row, 0])
    room = min(f.size / 2, 0.38 * (outer - inner))
    return y, rng.uniform(inner + room, outer - room - 0.2)


def _round(a: Anatomy, half: Half, f: Finding, rng) -> tuple[tuple[slice, slice], Half, np.ndarray]:
    """Window around a round finding and the distance from its centre there, with a wavy outline."""
    y, x = _centre(a, half, f, rng)
    reach = f.size * 0.9 + 0.5
    index, near = anatomy.window(half, y=(y - reach, y + reach), x=(x - reach, x + reach))
    stretch = rng.uniform(0.82, 1.2)
    dy, dx = (near.y - np.float32(y)) * np.float32(stretch), near.x - np.float32(x)
    return index, near, np.sqrt(dy * dy + dx * dx)


def _cloud(half: Half, index, size: int, rng) -> np.ndarray:
    return banks.crop(banks.clouds(size), rng)[:, half.columns][index]


def consolidation(a, half, tissue, f, rng, size):
    """Fluffy filling of air spaces with air-filled bronchi, sometimes cut off by a fissure."""
    index, near, r = _round(a, half, f, rng)
    cloud = _cloud(half, index, size, rng)
    fluff = step(np.float32(f.size * 0.46) - r + np.float32(0.07 * f.size) * cloud, 0.22 * f.size)
    if f.zone == "upper" and rng.random() < 0.5:  # the minor fissure is its lower border
        fluff *= step(np.float32(a.apex + 8.6) - near.y + np.float32(0.06) * near.x, 0.25)
    bronchi = _tree(a, half, rng, size)[index]
    path = np.float32(3.0 + 5.5 * f.severity) * (1 + np.float32(0.18) * cloud)
    filled = fluff * path * (1 - np.float32(0.45) * np.clip(bronchi - np.float32(0.15), 0, 0.7))
    tissue.water[index] += filled
    return index, (fluff > 0.5) & (near.lung > 0.5)


def effusion(a, half, tissue, f, rng, size):
    """Fluid in the pleural space: a meniscus that climbs the lateral wall."""
    angle = float(half.diaphragm[np.argmin(np.abs(half.x[-1] - 0.97 * a.half_width))])
    level = angle - 0.74 * f.size
    surface = level - np.float32(0.32 * f.size) * np.exp(
        -np.clip(half.edge, 0, 20) / np.float32(1.7)
    )
    full = step(half.y - surface, 0.35 + 0.09 * f.size)
    tissue.water[...] += full * tissue.aerated
    return (slice(None), slice(None)), (full > 0.5) & (tissue.aerated > 0.3)


def pneumothorax(a, half, tissue, f, rng, size):
    """Free air around a retracted lung: no vessels outside a thin pleural line."""
    taper = ramp(np.float32(a.apex + 9 + 14 * f.severity) - half.y, 6.0)
    lung = anatomy.inside(half, a, lower=f.size, inset=0.55 * f.size * taper)
    free = step(-lung, 0.12) * half.lung
    line = np.exp(-((lung - np.float32(0.1)) ** 2) * 50) * half.lung
    tissue.aerated[...] *= 1 + free * np.float32(0.34)  # from the density of lung to that of air
    tissue.water[...] += (np.float32(0.9) * line) + (1 - free) * np.float32(1.2 * f.severity)
    tissue.vessels[...] *= 1 - free
    return (slice(None), slice(None)), (free > 0.5) & (tissue.aerated > 0.3)


def nodule(a, half, tissue, f, rng, size):
    """A ball below 3 cm, denser than water: most nodules that radiographs show are calcified."""
    index, near, r = _round(a, half, f, rng)
    ball = np.sqrt(np.clip(np.float32(f.size**2 / 4) - r * r, 0, None))
    tissue.water[index] += ball * np.float32(2 * rng.uniform(1.5, 2.2))
    return index, (r < f.size / 2) & (near.lung > 0.5)


def mass(a, half, tissue, f, rng, size):
    """A solid, lobulated body above 3 cm with an irregular outline."""
    index, near, r = _round(a, half, f, rng)
    lobes = r - np.float32(0.035 * f.size) * _cloud(half, index, size, rng)
    ball = np.sqrt(np.clip(np.float32(f.size**2 / 4) - lobes * lobes, 0, None))
    tissue.water[index] += ball * np.float32(2.0)
    return index, (lobes < f.size / 2) & (near.lung > 0.5)


def atelectasis(a, half, tissue, f, rng, size):
    """One to three plate-like bands above a raised diaphragm, with some basal haze."""
    top, x = a.dome[SIDES.index(f.side)], 0.5 * a.half_width
    index, near = anatomy.window(half, y=(top - 7.5, top + 4), x=(x - 7.5, x + 7.5))
    band = np.zeros_like(near.x)
    for _ in range(1 + int(rng.integers(1, 3) * (0.4 + f.severity))):
        dx = near.x - np.float32(x + rng.uniform(-0.8, 1.2))
        slope, bend = rng.uniform(-0.28, 0.28), rng.uniform(-0.02, 0.02)
        height = top - rng.uniform(0.8, 3.6)
        d = near.y - np.float32(height) - dx * (np.float32(slope) + np.float32(bend) * dx)
        width = rng.uniform(0.30, 0.5) + 0.15 * f.severity
        band += np.exp(-d * d * np.float32(1 / width**2)) * ramp(f.size / 2 - np.abs(dx), 0.8)
    haze = ramp(near.y - np.float32(top - 3), 3.0) * np.float32(0.3 + 1.0 * f.severity)
    tissue.water[index] += np.float32(2.2 + 2.4 * f.severity) * np.clip(band, 0, 1.2) + haze
    return index, (band > 0.4) & (near.lung > 0.5)


def edema(a, half, tissue, f, rng, size):
    """Perihilar haze, crowded vessels and short Kerley lines at the lateral bases."""
    y0, x0 = hilum(a, half.side)
    cloud = banks.crop(banks.clouds(size), rng)[:, half.columns]
    dy, dx = half.y - np.float32(y0 + 1.0), half.x - np.float32(x0 + 1.0)
    wing = np.exp((dy * dy + dx * dx) * np.float32(-1 / (38 + 30 * f.severity)))
    haze = wing * (1 + np.float32(0.30) * cloud) + np.float32(0.15)
    tissue.vessels[...] *= np.float32(1.3 + 1.1 * f.severity)
    tissue.water[...] += np.float32(1.6 + 4.6 * f.severity) * haze
    index, base = anatomy.window(half, y=(y0 + 3, a.dome[0] + 3), x=(0.6 * a.half_width, 99))
    lines = banks.crop(banks.noise(size), rng)[index[0], :1]  # one number a row
    tissue.water[index] += ramp(np.float32(1.9) - base.edge, 0.5) * np.clip(lines - 0.8, 0, 1)
    return None


_SIGNS = {
    "consolidation": consolidation,
    "effusion": effusion,
    "pneumothorax": pneumothorax,
    "nodule": nodule,
    "mass": mass,
    "atelectasis": atelectasis,
    "edema": edema,
}


def mark(
    a: Anatomy, half: Half, tissue: Tissue, found: Sequence[Finding], *, rng, size: int
) -> Mapping[int, tuple]:
    """Write the signs of all findings on this side into `tissue`.

    Returns:
      {position in found: (index, outline)} for those that have an outline.
    """
    outlines = {}
    for i, f in enumerate(found):
        if f.side not in (half.side, "bilateral"):
            continue
        outline = _SIGNS[f.name](a, half, tissue, f, rng, size)
        if outline is not None:
            outlines[i] = outline
    return outlines
