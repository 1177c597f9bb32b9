"""One radiograph: anatomy, findings and projection, with the masks and boxes that go with it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from medvlp_jax.data.datasets.cxr_phantom import anatomy, bones, findings, projection, signs
from medvlp_jax.data.datasets.cxr_phantom.anatomy import SIDES, Anatomy, Half
from medvlp_jax.data.datasets.cxr_phantom.findings import MASK_BITS, REGION, Finding

Box = tuple[float, float, float, float]  # ymin, xmin, ymax, xmax as fractions of the image


class Radiograph(NamedTuple):
    """An image [H, W] uint8, its mask bit field [H, W] uint8, and (position in findings, box)."""

    image: np.ndarray
    mask: np.ndarray
    boxes: tuple[tuple[int, Box], ...]


def radiograph(
    a: Anatomy, found: Sequence[Finding], rng: np.random.Generator, size: int
) -> Radiograph:
    """Take a radiograph of a chest with these findings.

    Args:
      a: the healthy chest.
      found: what is wrong with it.
      rng: chooses vessels, textures, exposure and noise.
      size: of the square image, pixels.
    """
    a = findings.alter(a, found)
    exposure = projection.draw_exposure(rng)
    soft, bone = np.empty((2, size, size), np.float32)
    mask = np.zeros((size, size), np.uint8)
    boxes = []
    for side in SIDES:
        half = anatomy.half(a, side, size)
        tissue = signs.healthy(a, half, rng, size)
        outlines = signs.mark(a, half, tissue, found, rng=rng, size=size)
        soft[:, half.columns] = _soft(anatomy.body(a, half), tissue)
        bone[:, half.columns] = bones.skeleton(a, half)
        _outline(a, half, mask[:, half.columns])
        for i, (index, inside) in outlines.items():
            region = REGION.get(found[i].name, found[i].name)
            mask[:, half.columns][index] |= inside.astype(np.uint8) << MASK_BITS[region]
            boxes.append((i, _box(inside, index, half.columns.start, size)))
    boxes += [
        (i, _box(mask & (1 << MASK_BITS["heart"]) > 0, (slice(0, None), slice(0, None)), 0, size))
        for i, f in enumerate(found)
        if f.name == "cardiomegaly"
    ]
    image = projection.project(soft, bone, exposure, rng)
    return Radiograph(image, mask, tuple(sorted(boxes)))


def _soft(body: np.ndarray, tissue: signs.Tissue) -> np.ndarray:
    """Water-equivalent path: the body less the air, vessels seen where air is left around them."""
    filled = np.minimum(tissue.water, tissue.aerated)
    air = tissue.aerated - filled
    body -= air
    body += tissue.vessels * np.clip(air * np.float32(0.35), 0, np.float32(0.73))
    return body


def _outline(a: Anatomy, half: Half, mask: np.ndarray) -> None:
    """Set the bits of this side's lung field and of the heart in a mask [H, w]."""
    field = half.lung > 0.5
    h = anatomy.heart(a)
    where = {"y": (h.y - h.long, h.y + h.long), "x": (-9, h.reach + abs(h.x))}
    index, near = anatomy.window(half, **where)
    # The heart rests on the diaphragm, whose central part is hidden behind it.
    inside = (anatomy.heart_radius2(a, near) < 1) & (near.y < near.diaphragm + 0.6)
    field[index] &= ~inside
    mask |= field.astype(np.uint8) << MASK_BITS[f"lung_{half.side}"]
    mask[index] |= inside.astype(np.uint8) << MASK_BITS["heart"]


def _box(inside: np.ndarray, index, first_column: int, size: int) -> Box:
    """Tight box around a bool outline [h, w] that lies at `index` of a half image."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    top, left = (index[0].start or 0), (index[1].start or 0) + first_column
    corners = (rows[0] + top, columns[0] + left, rows[-1] + 1 + top, columns[-1] + 1 + left)
    return tuple(float(c) / size for c in corners)
