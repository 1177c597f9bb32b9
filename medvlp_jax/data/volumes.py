"""Volumes from 16-bit PNG to training views: float32 [H, W, S], in-plane pixels and slices.

Section 2.5.1 of CFCML (https://arxiv.org/abs/2603.20016): augment, clip, then z-score over the
voxels above zero; the background stays zero. Crop, flip and erased patch are the same in all
sequences of a case, as `pipeline.record_transform` gives them equal draws; noise is not.
"""

import io
import zlib

import numpy as np
from PIL import Image

from medvlp_jax.config import UserError


def decode(encoded: bytes, *, slices: int, size: int) -> np.ndarray:
    """Decode a volume that `records.encode_volume` wrote; resize its slices where they differ.

    Args:
      encoded: PNG, slices one below the other.
      slices: S.
      size: in-plane side of the result, pixels.

    Returns:
      float32 [size, size, S], intensities as they are stored.

    Raises:
      UserError: if the picture does not hold S slices.
    """
    column = np.asarray(Image.open(io.BytesIO(encoded)), np.float32)
    if len(column) % slices:
        raise UserError(f"A volume of {len(column)} rows does not hold {slices} slices.")
    stack = column.reshape(slices, -1, column.shape[1])
    if stack.shape[1:] != (size, size):
        stack = np.stack([_resized(layer, size) for layer in stack])
    return np.moveaxis(stack, 0, -1)


def _resized(layer: np.ndarray, size: int, box=None) -> np.ndarray:
    shape = (size, size)
    return np.asarray(Image.fromarray(layer).resize(shape, Image.Resampling.BILINEAR, box=box))


def normalise(volume: np.ndarray, *, ceiling: float = 1200.0) -> np.ndarray:
    """Clip to [0, ceiling] and standardise the voxels above zero; zero stays zero.

    A volume without a voxel above zero, or with one value, is all zeros.
    """
    volume = np.clip(volume, 0, ceiling)
    inside = volume > 0
    if not inside.any():
        return np.zeros_like(volume)
    mean, spread = volume[inside].mean(), volume[inside].std()
    return np.where(inside, (volume - mean) / (spread or 1.0), 0).astype(np.float32)


def center_view(
    volume: np.ndarray, rng: np.random.Generator | None = None, *, size: int, ceiling: float = 1200
) -> np.ndarray:
    """Return the central in-plane square, normalised; takes `rng` to stand in for a random view."""
    top, left = ((side - size) // 2 for side in volume.shape[:2])
    return normalise(volume[top : top + size, left : left + size], ceiling=ceiling)


def men_view(
    volume: np.ndarray,
    rng: np.random.Generator,
    *,
    size: int,
    probability: float = 0.3,
    smallest: float = 0.75,
    erased: tuple[float, float] = (0.02, 0.1),
    ceiling: float = 1200.0,
) -> np.ndarray:
    """Return one random view of a volume, normalised: CFCML section 2.5.1.

    Args:
      volume: float32 [R, R, S], R >= size.
      rng: source of the randomness that all sequences of a case share.
      size: in-plane side of the result.
      probability: of each of crop, flip, noise and erasing.
      smallest: least area of the random crop, as a fraction; aspect 3/4 to 4/3.
      erased: area of the erased patch, from and to, as fractions; aspect 0.3 to 3.3.
      ceiling: intensity that the result is clipped to before it is standardised.

    Returns:
      float32 [size, size, S].
    """
    side = volume.shape[0]
    box = _crop_box(rng, side, size, smallest, rng.random() < probability)
    layers = np.ascontiguousarray(np.moveaxis(volume, -1, 0))
    view = np.stack([_resized(layer, size, box) for layer in layers], axis=-1)
    if rng.random() < probability:
        view = np.flip(view, rng.integers(3))
    noisy = rng.random() < probability
    hidden = _patch(rng, size, erased) if rng.random() < probability else None
    if noisy:
        # Keyed by the content: sequences that share the draws above do not share their noise.
        own = np.random.default_rng((int(rng.integers(2**32)), zlib.crc32(volume.tobytes())))
        strength = own.integers(2, 11)
        view = view + own.normal(view.mean(), view.std(), view.shape) / strength
    if hidden is not None:
        view = view.copy()
        view[hidden] = 0
    return normalise(view.astype(np.float32), ceiling=ceiling)


def _crop_box(rng, side, size, smallest, random) -> tuple[float, float, float, float]:
    """Return (left, upper, right, lower): a random part of the plane, or its central square."""
    if not random:
        edge = (side - size) / 2
        return (edge, edge, edge + size, edge + size)
    area = rng.uniform(smallest, 1) * side**2
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    width, height = (min(np.sqrt(area * a), side) for a in (aspect, 1 / aspect))
    left, top = rng.uniform(0, side - width), rng.uniform(0, side - height)
    return (left, top, left + width, top + height)


def _patch(rng, size, erased) -> tuple[slice, slice]:
    """Return the rows and columns of a random rectangle inside the plane."""
    area = rng.uniform(*erased) * size**2
    aspect = np.exp(rng.uniform(np.log(0.3), np.log(3.3)))
    height, width = (min(max(round(np.sqrt(area * a)), 1), size) for a in (aspect, 1 / aspect))
    top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
    return slice(top, top + height), slice(left, left + width)
