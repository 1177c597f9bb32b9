"""Regions of an image as masks: run lengths, polygons, ellipses and boxes, and back.

A mask is bool [H, W]. Points are (x, y) in pixels from the upper left corner; the pixel in row r
and column c has its centre at (c + 0.5, r + 0.5) and belongs to a region that holds its centre.
Boxes are (xmin, ymin, xmax, ymax). Run lengths count column by column, as Kaggle does.
"""

from collections.abc import Sequence

import numpy as np

from medvlp_jax.config import UserError

Shape = tuple[int, int]
Box = tuple[float, float, float, float]
# "-1", in some copies with a space before it, stands for no region (SIIM-ACR).
EMPTY = ("", "-1")


def from_relative_rle(text: str, shape: Shape) -> np.ndarray:
    """Return the mask of "gap length gap length ...", a gap from the run before (SIIM-ACR).

    Args:
      text: pairs of whole numbers; "-1" or nothing for an empty mask.
      shape: H, W.

    Raises:
      UserError: for anything else, or a run that leaves the image.
    """
    start, runs = 0, []
    for gap, length in _pairs(text):
        start += gap
        runs.append((start, length))
        start += length
    return _fill(runs, shape, text)


def to_relative_rle(mask: np.ndarray) -> str:
    """Return the inverse of `from_relative_rle`; "-1" for an empty mask."""
    end, parts = 0, []
    for start, length in _runs(mask):
        parts += [start - end, length]
        end = start + length
    return " ".join(map(str, parts)) or "-1"


def from_rle(text: str, shape: Shape) -> np.ndarray:
    """Return the mask of "start length start length ...", starts counting from 1.

    Raises:
      UserError: as `from_relative_rle`, and for a start of 0.
    """
    runs = [(start - 1, length) for start, length in _pairs(text)]
    return _fill(runs, shape, text)


def to_rle(mask: np.ndarray) -> str:
    """Return the inverse of `from_rle`; "-1" for an empty mask."""
    return " ".join(f"{start + 1} {length}" for start, length in _runs(mask)) or "-1"


def check_runs(text: str) -> None:
    """Refuse a text that can be no run lengths of any image.

    Raises:
      UserError: for it.
    """
    _pairs(text)


def from_box(box: Box, shape: Shape) -> np.ndarray:
    """Return the mask of a box."""
    x, y = _centres(shape)
    xmin, ymin, xmax, ymax = box
    return ((y >= ymin) & (y < ymax))[:, None] & ((x >= xmin) & (x < xmax))[None]


def from_ellipse(box: Box, shape: Shape) -> np.ndarray:
    """Return the mask of the ellipse that touches the sides of a box."""
    x, y = _centres(shape)
    xmin, ymin, xmax, ymax = box
    if not (xmax > xmin and ymax > ymin):
        return np.zeros(shape, bool)
    across = (2 * x - xmin - xmax) / (xmax - xmin)
    down = (2 * y - ymin - ymax) / (ymax - ymin)
    return down[:, None] ** 2 + across[None] ** 2 <= 1


def from_polygon(points: Sequence[tuple[float, float]], shape: Shape) -> np.ndarray:
    """Return the mask of a polygon, even-odd where it crosses itself.

    Raises:
      UserError: for fewer than three points, or one that is not finite.
    """
    xy = np.asarray(points, np.float64).reshape(-1, 2)
    if len(xy) < 3 or not np.isfinite(xy).all():
        raise UserError(f"a polygon of {len(xy)} points is none; three or more finite are needed.")
    x, y = _centres(shape)
    mask = np.zeros(shape, bool)
    for (x0, y0), (x1, y1) in zip(xy, np.roll(xy, -1, axis=0), strict=True):
        # Rows whose centre line the edge crosses; pixels left of the crossing change sides.
        rows = np.flatnonzero((y >= min(y0, y1)) & (y < max(y0, y1)))
        if len(rows):
            crossing = x0 + (y[rows] - y0) * ((x1 - x0) / (y1 - y0))
            mask[rows] ^= x[None] < crossing[:, None]
    return mask


def to_polygons(mask: np.ndarray) -> list[np.ndarray]:
    """Return the outlines [N, 2] of a mask, holes included; even-odd they give the mask again."""
    import contourpy

    height, width = mask.shape
    padded = np.pad(mask.astype(float), 1)
    lines = contourpy.contour_generator(
        x=np.arange(width + 2) - 0.5, y=np.arange(height + 2) - 0.5, z=padded
    ).lines(0.5)
    return [np.asarray(line[:-1]) for line in lines]


def to_boxes(mask: np.ndarray) -> list[Box]:
    """Return the box of each connected part of a mask (corners touching counts), top left first."""
    from scipy import ndimage

    parts, _ = ndimage.label(mask, np.ones((3, 3)))
    found = ndimage.find_objects(parts)
    return [(c.start, r.start, c.stop, r.stop) for r, c in found]


def fractions(box: Box, shape: Shape) -> Box:
    """Return (ymin, xmin, ymax, xmax) of a box as fractions of the image, cut off at its sides.

    Raises:
      UserError: for a box that is not finite or empty inside the image.
    """
    xmin, ymin, xmax, ymax = box
    height, width = shape
    corners = np.array([ymin / height, xmin / width, ymax / height, xmax / width])
    clipped = np.clip(corners, 0, 1)
    if not (np.isfinite(corners).all() and (clipped[2:] > clipped[:2]).all()):
        raise UserError(
            f"box {xmin}, {ymin}, {xmax}, {ymax} is empty in {width} x {height} pixels."
        )
    return tuple(clipped.tolist())


def _centres(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Return x [W] and y [H] of the pixels' centres."""
    return np.arange(shape[1]) + 0.5, np.arange(shape[0]) + 0.5


def _pairs(text: str) -> list[tuple[int, int]]:
    words = text.split()
    if " ".join(words) in EMPTY:
        return []
    if len(words) % 2 or not all(w.isascii() and w.isdecimal() and len(w) < 12 for w in words):
        raise UserError(
            f"run lengths '{text[:40]}' are no pairs of whole numbers; accepted is 'start length "
            "start length ...', or -1 for none."
        )
    numbers = list(map(int, words))
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _fill(runs: Sequence[tuple[int, int]], shape: Shape, text: str) -> np.ndarray:
    flat = np.zeros(shape[0] * shape[1], bool)
    for start, length in runs:
        if start < 0 or length < 1 or start + length > len(flat):
            raise UserError(
                f"run lengths '{text[:40]}' have a run of {length} from pixel {start}, and the "
                f"image {shape[0]} x {shape[1]}."
            )
        flat[start : start + length] = True
    return flat.reshape(shape[1], shape[0]).T


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Return (start, length) of the runs, column by column."""
    flat = np.concatenate(([0], np.asarray(mask, np.int8).T.ravel(), [0]))
    change = np.flatnonzero(np.diff(flat))
    return [(int(a), int(b - a)) for a, b in zip(change[::2], change[1::2], strict=True)]
