"""Where things are in the picture a model sees: images, masks and boxes of records in one frame.

The whole image becomes a square and nothing is cut off, so that no lesion leaves the picture. Masks
follow by their nearest pixel. Boxes are (ymin, xmin, ymax, xmax) in pixels of the square.

Axis letters: S side of the square, C channels, K regions, n boxes.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from medvlp_jax.config import UserError, nearest
from medvlp_jax.data import transforms

Example = dict[str, np.ndarray]
VISIBLE = 0.3  # share of its area that a box must keep when its image is moved: our choice


class Frame(NamedTuple):
    """How a stored image becomes a square; fields as of `transforms.decode`."""

    size: int
    channels: int = 1
    crop_black_border: bool = False
    stretch: bool = True
    fit: str = "squash"

    def image(self, record: Mapping[str, Any]) -> np.ndarray:
        """Return the image of a record, [S, S, C] uint8."""
        return transforms.decode(record["image"], **self._asdict())

    def boxes(self, record: Mapping[str, Any]) -> np.ndarray:
        """Return the boxes of a record in pixels of the square, [n, 4] float64."""
        return self._placed(record, record["boxes"]["bbox"].astype(np.float64))

    def mask(self, record: Mapping[str, Any], regions: Sequence[int]) -> np.ndarray:
        """Return the regions of a record, [S, S, K] bool.

        Args:
          record: with a mask; what lies beside its image is in no region.
          regions: K sets of bits of the mask, a pixel is inside where it has one of the set.
        """
        with Image.open(io.BytesIO(record["mask"])) as opened:
            field = np.asarray(opened)
        top, left, bottom, right = self._placed(record, np.array([[0.0, 0.0, 1.0, 1.0]]))[0]
        rows, in_rows = _sources(self.size, top, bottom, field.shape[0])
        columns, in_columns = _sources(self.size, left, right, field.shape[1])
        seen = np.where(np.outer(in_rows, in_columns), field[np.ix_(rows, columns)], 0)
        return np.stack([(seen & bits) > 0 for bits in regions], axis=-1)

    def _placed(self, record, boxes):
        names = ("size", "channels", "crop_black_border", "fit")
        return transforms.placed(boxes, record["image"], **{n: getattr(self, n) for n in names})


def has_mask(record: Mapping[str, Any]) -> bool:
    """Say whether a record was stored with a mask, which may be an empty one."""
    with Image.open(io.BytesIO(record["mask"])) as opened:
        return opened.size != (1, 1)


def channels_of(records: Iterable[Mapping[str, Any]]) -> int:
    """Return 1 where all images are grey, else 3: one with colours among grey ones keeps them.

    Only the heads of the images are read, up to the first with colours.
    """
    return 3 if any(_mode(record["image"]) != "L" for record in records) else 1


def _mode(encoded: bytes) -> str:
    with Image.open(io.BytesIO(encoded)) as opened:
        return opened.mode


def bits_of(names: Sequence[str], mask_bits: Mapping[str, int], corpus: str) -> list[int]:
    """Return the set of bits of each region; "a+b" is the union of two.

    Raises:
      UserError: for a region the corpus does not have, or where it has none.
    """
    if not mask_bits:
        raise UserError(f"{corpus} has no masks; segmentation needs a corpus with mask regions.")
    for part in (part for name in names for part in name.split("+")):
        if part not in mask_bits:
            raise UserError(f"{corpus} has no region '{part}'. {nearest(part, list(mask_bits))}")
    return [sum(1 << mask_bits[part] for part in {*name.split("+")}) for name in names]


def motion(rng: np.random.Generator, size: int, *, scale=0.1, rotation=10.0, shift=0.05):
    """Return the 3x3 matrix of a random small move, from output to source coordinates.

    Args:
      rng: source of the randomness.
      size: S.
      scale: largest change of size, a fraction.
      rotation: largest angle either way, degrees.
      shift: largest move, a fraction of S.
    """
    zoom = np.diag([1 / rng.uniform(1 - scale, 1 + scale)] * 2 + [1])
    zoom[:2, 2] = size / 2 * (1 - zoom[0, 0]) + rng.uniform(-shift, shift, 2) * size
    return zoom @ transforms.rotation_map(rng.uniform(-rotation, rotation), size)


def move_mask(mask: np.ndarray, to_source: np.ndarray) -> np.ndarray:
    """Resample regions [S, S, K] bool under a move; what comes from outside is in no region."""
    layers = [
        transforms.warp(mask[..., k : k + 1].astype(np.uint8) * 255, to_source)[..., 0] > 127
        for k in range(mask.shape[-1])
    ]
    return np.stack(layers, axis=-1)


def move_boxes(boxes: np.ndarray, to_source: np.ndarray, size: int):
    """Return boxes under a move, cut off at the sides, and which of them can still be seen.

    A turned box becomes the upright one around it.

    Returns:
      [n, 4], and [n] bool: at least VISIBLE of the area is left.
    """
    if not len(boxes):
        return boxes, np.zeros(0, bool)
    to_output = np.linalg.inv(to_source)
    corners = boxes[:, [[1, 0], [3, 0], [1, 2], [3, 2]]]  # [n, 4, (x, y)]
    points = np.concatenate([corners, np.ones((*corners.shape[:2], 1))], axis=-1) @ to_output.T
    xy = points[..., :2] / points[..., 2:]
    around = np.concatenate([xy.min(1)[:, ::-1], xy.max(1)[:, ::-1]], axis=1)
    cut = np.clip(around, 0, size)
    area = lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    return cut, area(cut) >= VISIBLE * area(around)


class Prepared(Sequence):
    """The examples of some rows of a corpus; what fits into `budget` bytes is kept decoded."""

    def __init__(
        self, source: Sequence, rows: np.ndarray, prepare: Callable, *, budget: int = 1 << 31
    ):
        """Decode nothing yet.

        Args:
          source: corpus.
          rows: which of its records, in this order.
          prepare: record -> example.
          budget: bytes.
        """
        self.source, self.rows, self.prepare, self.left = source, np.asarray(rows), prepare, budget
        self.kept: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        i = range(len(self))[i]  # negative ones, and an IndexError at the end
        example = self.kept.get(i)
        if example is None:
            example = self.prepare(self.source[int(self.rows[i])])
            size = sum(value.nbytes for value in example.values())
            if size <= self.left:
                self.left -= size
                self.kept[i] = example
        return example


def _sources(size: int, start: float, end: float, count: int):
    """Return the pixel [S] of a mask under each pixel of the square, and [S] whether there is one.

    Args:
      size: S.
      start: where the stored image begins along this axis, pixels of the square.
      end: where it ends.
      count: pixels of the mask along this axis.
    """
    places = (np.arange(size) + 0.5 - start) / (end - start) * count
    inside = (places >= 0) & (places < count)
    return np.clip(np.floor(places).astype(int), 0, count - 1), inside
