"""Patches of images: their embedding, their grid, and positions resized to another grid."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medvlp_jax.layers.linear import Initializer, product


class PatchEmbedding(nn.Module):
    """Map patches of P x P pixels to D numbers each.

    A matrix product, which a convolution of stride P is: on CPU the value and the kernel's gradient
    take half the time (ViT-B/16, 32 images, median of 7 paired runs).

    Parameters: kernel [P, P, C, D], bias [D].
    """

    features: int
    patch_size: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, images):
        """Map [B, H, W, C] to [B, N, D], row by row; pixels beyond whole patches are not seen."""
        size, (batch, height, width, channels) = self.patch_size, images.shape
        rows, columns = height // size, width // size
        images = images[:, : rows * size, : columns * size].astype(self.dtype)
        patches = images.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
        shape = (size, size, channels, self.features)
        kernel = self.param("kernel", self.kernel_init, shape).reshape(-1, self.features)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return product(patches.reshape(batch, rows * columns, -1), kernel, bias)


def patch_grid(images, patch_size: int, *, partial: bool = False) -> tuple[int, int]:
    """Return how many patches lie along the height and the width of [B, H, W, 3].

    Raises:
      ValueError: if the images do not have three channels, or hold no patch, or (unless `partial`)
        do not tile into patches.
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"Images must be [B, H, W, 3], got {list(images.shape)}.")
    height, width = images.shape[1:3]
    if min(height, width) < patch_size:
        raise ValueError(
            f"Images of {height} x {width} pixels are smaller than a patch of {patch_size} x "
            f"{patch_size}."
        )
    if not partial and (height % patch_size or width % patch_size):
        raise ValueError(
            f"Images of {height} x {width} pixels do not tile into patches of {patch_size} x "
            f"{patch_size}: both sides must be multiples of {patch_size}."
        )
    return height // patch_size, width // patch_size


def draw_patches(key, batch: int, patches: int, share: float, *, prefix: int = 1):
    """Draw the tokens that training keeps of each image: FLIP (Li et al. 2023), arXiv 2212.00794.

    Args:
      key: of the draw.
      batch: B.
      patches: N.
      share: of the patches.
      prefix: tokens before the patches, which all stay.

    Returns:
      [B, prefix + K] ascending, K = share N, rounded, at least 1.

    Raises:
      ValueError: for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"kept_patches={share} must be above 0 and at most 1, which keeps all.")
    order = jax.random.uniform(key, (batch, patches)).argsort(axis=1)
    kept = jnp.sort(order[:, : max(1, round(share * patches))], axis=1)
    before = jnp.broadcast_to(jnp.arange(prefix), (batch, prefix))
    return jnp.concatenate([before, prefix + kept], axis=1)


def keep_patches(x, key, share: float, *, prefix: int = 1):
    """Return the tokens of x that `draw_patches` keeps [B, prefix + K, D], and which those are.

    Raises:
      ValueError: for a share outside (0, 1].
    """
    kept = draw_patches(key, len(x), x.shape[1] - prefix, share, prefix=prefix)
    return jnp.take_along_axis(x, kept[..., None], axis=1), kept


def resize_positions(
    positions, rows: int, columns: int, *, prefix: int = 1, antialias: bool = False
):
    """Resize a square table of positions to another grid, as the models of `transformers` do.

    Args:
      positions: [prefix + n * n, D], the first ones for tokens that are no patches and stay.
      rows: patches along the height.
      columns: patches along the width.
      prefix: how many stay.
      antialias: see `bicubic_matrix`.

    Returns:
      [prefix + rows * columns, D].
    """
    native = round((positions.shape[0] - prefix) ** 0.5)
    if (rows, columns) == (native, native):
        return positions
    grid = positions[prefix:].reshape(native, native, -1)
    down, across = (bicubic_matrix(native, n, antialias=antialias) for n in (rows, columns))
    grid = jnp.einsum("yi,xj,ijd->yxd", down, across, grid)
    return jnp.concatenate([positions[:prefix], grid.reshape(rows * columns, -1)])


def bicubic_matrix(old: int, new: int, *, antialias: bool = False) -> np.ndarray:
    """Return torch's bicubic resize (align_corners=False) as a [new, old] matrix.

    Keys' kernel has a = -0.75 there, and taps beyond the edge repeat it. Antialiased, a = -0.5, the
    kernel is as wide as the coarser grid's pixels, and taps beyond the edge are left out.
    `jax.image.resize` has a = -0.5 in both cases.
    """
    step = old / new
    centre = (np.arange(new)[:, None] + 0.5) * step - 0.5
    if antialias:
        matrix = _keys((np.arange(old) - centre) / max(step, 1.0), -0.5)
        return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)
    matrix = np.zeros((new, old))
    taps = np.floor(centre) + np.arange(-1, 3)  # [new, 4]
    columns = np.clip(taps, 0, old - 1).astype(int)
    np.add.at(matrix, (np.arange(new)[:, None], columns), _keys(taps - centre, -0.75))
    return matrix.astype(np.float32)


def _keys(t, a):
    """Keys' cubic convolution kernel (1981, Eq. 4, there with a = -0.5)."""
    t = np.abs(t)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))
