"""Vision Transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929).

* The arithmetic of Hugging Face's ViTModel.
* Class token, learned positions, pre-norm blocks, exact GELU, a final LayerNorm.
* Positions are resized bicubically when the images are not of the native `image_size`.
* `tokens` are the patches alone; the class token is `pooled` (or, by `pooling`, the patches' mean).

Axis letters: B batch, H, W pixels, P patch size, N = H/P * W/P patches, D width.
"""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from medvlp_jax.encoders.base import Encoded, from_variant
from medvlp_jax.layers import Attention, LayerNorm, Linear, Mlp, Stack

# B, L: Dosovitskiy et al. 2021, Table 1. Ti, S: Touvron et al. 2021 (https://arxiv.org/abs/2012.12877),
# Table 1. "tiny" is our choice, for CPU demos and tests.
VARIANTS = {
    "tiny": {"patch_size": 16, "width": 128, "depth": 4, "num_heads": 4, "mlp_dim": 512},
    "Ti/16": {"patch_size": 16, "width": 192, "depth": 12, "num_heads": 3, "mlp_dim": 768},
    "S/16": {"patch_size": 16, "width": 384, "depth": 12, "num_heads": 6, "mlp_dim": 1536},
    "B/16": {"patch_size": 16, "width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072},
    "B/32": {"patch_size": 32, "width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072},
    "L/16": {"patch_size": 16, "width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096},
}

truncated_normal = nn.initializers.truncated_normal(0.02)  # ViTConfig.initializer_range


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    num_heads: int
    mlp_dim: int
    dropout: float = 0.0
    epsilon: float = 1e-12
    attention: str = "xla"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, mask=None, *, train=False):
        """Map [B, N+1, D] to [B, N+1, D]."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        y = LayerNorm(self.epsilon, self.dtype, name="attention_norm")(x)
        attend = Attention(
            self.num_heads,
            implementation=self.attention,
            dtype=self.dtype,
            kernel_init=truncated_normal,
            name="attention",
        )
        x += drop(attend(y, mask, train=train))
        y = LayerNorm(self.epsilon, self.dtype, name="mlp_norm")(x)
        return x + drop(Mlp(self.mlp_dim, self.dtype, truncated_normal, name="mlp")(y))


class ViT(nn.Module):
    """Patches of an image through a transformer.

    Attributes:
      image_size: pixels a side the position table was made for; other sizes resize it.
      pooling: what `pooled` is: "cls", "mean" of patches, "pooler" (tanh of a Linear of cls).
      pooler: whether the pooler's parameters exist.
      dropout: after the embedding and on each residual branch, in training only.
      attention: implementation, see layers.Attention.
      layout: of the blocks, see layers.Stack.
      remat: of the blocks, see layers.Stack.
      dtype: of the matrix products.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    pooling: Literal["cls", "mean", "pooler"] = "cls"
    pooler: bool = False
    dropout: float = 0.0
    epsilon: float = 1e-12
    attention: Literal["xla", "cudnn"] = "xla"
    layout: Literal["unrolled", "scan"] = "unrolled"
    remat: Literal["none", "dots", "full"] = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train=False) -> Encoded:
        """Encode normalised images [B, H, W, 3].

        Returns:
          Encoded with pooled [B, D] and tokens [B, N, D].

        Raises:
          ValueError: if the images do not have three channels or do not tile into patches, or
            `pooling` is not to be had.
        """
        x = self._embed(images)  # [B, N+1, D]
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        fields = {
            name: getattr(self, name)
            for name in ("num_heads", "mlp_dim", "dropout", "epsilon", "attention", "dtype")
        }
        x = Stack(Block, fields, self.depth, self.layout, self.remat, name="stack")(x, train=train)
        x = LayerNorm(self.epsilon, self.dtype, name="norm")(x)
        cls, tokens = x[:, 0], x[:, 1:]
        pooled = {"cls": cls, "mean": tokens.mean(1)}
        if self.pooler:
            dense = Linear(self.width, True, self.dtype, truncated_normal, name="pooler")
            pooled["pooler"] = nn.tanh(dense(cls))
        if self.pooling not in pooled:
            raise ValueError(
                f"No pooling {self.pooling!r} in this ViT, only {', '.join(pooled)}; "
                "'pooler' needs pooler=True."
            )
        return Encoded(pooled=pooled[self.pooling], tokens=tokens)

    def _embed(self, images):
        rows, columns = _grid(images.shape, self.patch_size)
        patches = nn.Conv(
            self.width,
            (self.patch_size, self.patch_size),
            (self.patch_size, self.patch_size),
            "VALID",
            dtype=self.dtype,
            kernel_init=truncated_normal,
            name="patch_embedding",
        )(images)
        patches = patches.reshape(images.shape[0], rows * columns, self.width)  # [B, N, D]
        native = self.image_size // self.patch_size
        cls = self.param("cls_token", truncated_normal, (1, 1, self.width))
        positions = self.param(
            "position_embedding", truncated_normal, (1, native**2 + 1, self.width)
        )
        cls = jnp.broadcast_to(cls, (images.shape[0], 1, self.width)).astype(self.dtype)
        x = jnp.concatenate([cls, patches], axis=1)  # [B, N+1, D]
        return x + resize_positions(positions, rows, columns).astype(self.dtype)


def _grid(shape, patch_size):
    if len(shape) != 4 or shape[-1] != 3:
        raise ValueError(f"ViT takes images [B, H, W, 3], got {list(shape)}.")
    height, width = shape[1:3]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"Images of {height} x {width} pixels do not tile into patches of {patch_size} x "
            f"{patch_size}: both sides must be multiples of {patch_size}."
        )
    return height // patch_size, width // patch_size


def resize_positions(positions, rows: int, columns: int):
    """Resize a square table of positions to another grid, as ViTModel's interpolate_pos_encoding.

    Args:
      positions: [1, 1 + n * n, D], the first for the class token, which stays.
      rows: patches along the height.
      columns: patches along the width.

    Returns:
      [1, 1 + rows * columns, D].
    """
    native = round((positions.shape[1] - 1) ** 0.5)
    if (rows, columns) == (native, native):
        return positions
    grid = positions[0, 1:].reshape(native, native, -1)
    down, across = bicubic_matrix(native, rows), bicubic_matrix(native, columns)
    grid = jnp.einsum("yi,xj,ijd->yxd", down, across, grid)
    return jnp.concatenate([positions[:, :1], grid.reshape(1, rows * columns, -1)], axis=1)


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """Return torch's bicubic resize (align_corners=False, not antialiased) as a [new, old] matrix.

    `jax.image.resize` differs: Keys' kernel there has a = -0.5, torch's has -0.75.
    """
    a = -0.75
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5
    left = np.floor(centre).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        t = np.abs(centre - (left + tap))
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
        column = np.clip(left + tap, 0, old - 1)  # taps beyond the edge repeat it
        np.add.at(matrix, (np.arange(new), column), np.where(t <= 1, near, far))
    return matrix.astype(np.float32)


def make(variant: str = "B/16", **overrides: Any) -> ViT:
    """Build a published size; `overrides` are fields of ViT.

    Raises:
      UserError: for an unknown variant or field.
    """
    return from_variant(ViT, VARIANTS, variant, overrides)
