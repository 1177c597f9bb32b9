"""Rotary positions of sequences and of grids of patches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rope(NamedTuple):
    """Cosines and sines of rotary positions, [T, S] or [B, T, S], float32."""

    cos: jax.Array
    sin: jax.Array


def rope_1d(positions, head_width: int, base: float) -> Rope:
    """Return rotary positions of a sequence (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Frequency k = 0 ... S/2 - 1 is base^(-2k / S); channel k turns together with channel k + S/2,
    the "rotate half" layout of `transformers`.

    Args:
      positions: [T] or [B, T] integers.
      head_width: S, even.
      base: the paper's 10,000.
    """
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    frequencies = jnp.asarray(1.0 / np.float32(base) ** exponents)
    angles = jnp.asarray(positions, jnp.float32)[..., None] * frequencies  # [..., T, S/2]
    angles = jnp.concatenate([angles, angles], axis=-1)  # [..., T, S]
    return Rope(jnp.cos(angles), jnp.sin(angles))


def rope_2d(
    rows: int, columns: int, head_width: int, *, base: float, shift=(0.0, 0.0), scale=(1.0, 1.0)
) -> Rope:
    """Return rotary positions of a grid of patches, row by row: DINOv3's axial ones.

    A patch's centre (y, x) lies in [-1, 1] whatever the grid. Frequency k = 0 ... S/4 - 1 is
    2 pi base^(-4k / S); of S/2 angles the first half turns with y, the second with x. Channel k
    turns together with channel k + S/2, as in `rope_1d`.

    Args:
      rows: patches along the height.
      columns: patches along the width.
      head_width: S, a multiple of 4.
      base: DINOv3's 100.
      shift: [2], added to the centres (y, x) ...
      scale: [2], ... which are then multiplied by this.

    Returns:
      Rope of [rows * columns, S].
    """
    centres = [
        (2 * (np.arange(n, dtype=np.float32) + 0.5) / np.float32(n) - 1 + shift[i]) * scale[i]
        for i, n in enumerate((rows, columns))
    ]
    exponents = np.arange(0, 1, 4 / head_width, dtype=np.float32)
    frequencies = 2 * np.pi * (1 / np.float32(base) ** exponents)
    y, x = (jnp.asarray(c, jnp.float32)[:, None] * frequencies for c in centres)  # [rows, S/4] ...
    y = jnp.broadcast_to(y[:, None], (rows, columns, y.shape[-1]))
    x = jnp.broadcast_to(x[None], (rows, columns, x.shape[-1]))
    angles = jnp.concatenate([y, x, y, x], axis=-1).reshape(rows * columns, head_width)
    return Rope(jnp.cos(angles), jnp.sin(angles))


def rotate(x, rope: Rope):
    """Turn [B, T, A, S] by rotary positions; in float32, returned in the type of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cos, sin = rope.cos[..., None, :], rope.sin[..., None, :]  # [..., T, 1, S]
    return (x * cos + turned * sin).astype(x.dtype)
