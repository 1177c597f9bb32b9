"""Swin Transformer (Liu et al. 2021, https://arxiv.org/abs/2103.14030).

* The arithmetic of Hugging Face's SwinModel; `levels` are the stage outputs *before* merging.
* Attention is within windows of a map; every other block moves the windows by half a window.
* A map that does not tile is padded with zeros, and padding may be attended, as in the reference.
* A map no larger than one window is not shifted; a smaller one is refused.
* Stochastic depth drops both branches of a block, as in the authors' code; SwinModel's training
  drops the attention's alone.

Axis letters: B batch, H, W pixels of image or map, C channels, G windows of a map, P pixels of a
window, A heads, S head width, N pixels of the last map, D = width.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medvlp_jax.encoders.base import Encoded, from_variant
from medvlp_jax.layers import LayerNorm, Linear, Lora, Mlp, Stack

# Liu et al. 2021, section 3.3. "tiny" is our choice, for CPU demos and tests.
VARIANTS = {
    "tiny": {"embed_dim": 32, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "window_size": 4},
    "T": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "S": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "B": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
}

EPSILON = 1e-5  # of the norms whose epsilon SwinConfig does not set

truncated_normal = nn.initializers.truncated_normal(0.02)  # SwinConfig.initializer_range


class WindowAttention(nn.Module):
    """Multi-head attention within windows, its logits shifted by a table over relative positions.

    Attributes:
      num_heads: A; divides C.
      window_size: pixels a side; P is its square.
      qkv_bias: whether query, key and value have a bias.
    """

    num_heads: int
    window_size: int
    qkv_bias: bool = True
    dtype: Any = jnp.float32
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x, regions, *, train=False):
        """Map [B, G, P, C] to [B, G, P, C]; pixels of unequal `regions` [G, P] do not meet."""
        linear = functools.partial(
            Linear, x.shape[-1], dtype=self.dtype, kernel_init=truncated_normal, lora=self.lora
        )
        query, key, value = (
            linear(use_bias=self.qkv_bias, name=name)(x, train=train).reshape(
                *x.shape[:-1], self.num_heads, -1
            )
            for name in ("query", "key", "value")
        )  # [B, G, P, A, S]
        offsets = relative_positions(self.window_size)  # [P, P]
        table = self.param(
            "relative_position", truncated_normal, (offsets.max() + 1, self.num_heads)
        )
        logits = jnp.einsum("bgpas,bgqas->bgapq", query, key, preferred_element_type=jnp.float32)
        logits *= query.shape[-1] ** -0.5
        logits += table[offsets].transpose(2, 0, 1)  # [A, P, P]
        # 100 and not infinity, as in the reference.
        apart = regions[:, :, None] != regions[:, None, :]
        logits += jnp.where(apart, -100.0, 0.0)[:, None]  # [G, 1, P, P]
        weights = jax.nn.softmax(logits).astype(self.dtype)
        y = jnp.einsum("bgapq,bgqas->bgpas", weights, value)
        return linear(name="out")(y.reshape(x.shape), train=train)


def relative_positions(size: int) -> np.ndarray:
    """Number the offsets between pixels of a window: [P, P], each 0 ... (2 size - 1)² - 1."""
    row, column = np.divmod(np.arange(size * size), size)
    down, across = row[:, None] - row, column[:, None] - column
    return (down + size - 1) * (2 * size - 1) + across + size - 1


class Block(nn.Module):
    """x + attention(norm(x)) over windows, then x + mlp(norm(x))."""

    num_heads: int
    window_size: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    dropout: float = 0.0
    drop_path: float = 0.0
    epsilon: float = 1e-5
    lora: Lora | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, mask=None, *, train=False, own: Mapping[str, Any]):
        """Map [B, H, W, C] to (the same, None); `own` says this block's shift and drop_path."""
        del mask
        drop = nn.Dropout(self.dropout, deterministic=not train)

        def residual(branch):
            branch = drop(branch)
            if not train or self.drop_path == 0:
                return branch
            keep = 1.0 - own["drop_path"]
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (x.shape[0], 1, 1, 1))
            return jnp.where(kept, branch / keep, 0).astype(branch.dtype)

        y = LayerNorm(self.epsilon, self.dtype, name="attention_norm")(x)
        x += residual(self._attend(y, own["shift"], train))
        y = LayerNorm(self.epsilon, self.dtype, name="mlp_norm")(x)
        mlp_dim = int(self.mlp_ratio * x.shape[-1])
        mlp = Mlp(mlp_dim, self.dtype, truncated_normal, lora=self.lora, name="mlp")
        return x + residual(mlp(y, train=train)), None

    def _attend(self, x, shift, train):
        height, width = x.shape[1:3]
        size = self.window_size
        x = jnp.pad(x, ((0, 0), (0, -height % size), (0, -width % size), (0, 0)))
        regions = _regions(x.shape[1], size, shift)[:, None] * 3 + _regions(
            x.shape[2], size, shift
        )  # [H, W]
        attend = WindowAttention(
            self.num_heads, size, self.qkv_bias, self.dtype, self.lora, name="attention"
        )
        windows = partition(jnp.roll(x, (-shift, -shift), axis=(1, 2)), size)  # [B, G, P, C]
        regions = partition(regions[None, ..., None], size)[0, ..., 0]  # [G, P]
        y = unpartition(attend(windows, regions, train=train), size, x.shape)
        return jnp.roll(y, (shift, shift), axis=(1, 2))[:, :height, :width]


def _regions(length, size, shift):
    """Number the parts of a rolled axis that were no neighbours; without a shift, one a window."""
    at = np.arange(length)
    return (at >= length - size).astype(int) + (at >= length - shift)


def partition(x, size: int):
    """Cut [B, H, W, C] into windows [B, G, P, C], row by row."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, size * size, channels)


def unpartition(x, size: int, shape: tuple[int, ...]):
    """Inverse of `partition`, for a map of `shape`."""
    batch, height, width, channels = shape
    x = x.reshape(batch, height // size, width // size, size, size, channels)
    return x.swapaxes(2, 3).reshape(shape)


class Merging(nn.Module):
    """Every 2 x 2 pixels become one of twice the channels."""

    lora: Lora | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, train=False):
        """Map [B, H, W, C] to [B, H/2, W/2, 2C], both sides rounded up."""
        height, width, channels = x.shape[1:]
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        corners = [x[:, i::2, j::2] for j in range(2) for i in range(2)]
        x = LayerNorm(EPSILON, self.dtype, name="norm")(jnp.concatenate(corners, axis=-1))
        reduce = Linear(
            2 * channels, False, self.dtype, truncated_normal, lora=self.lora, name="reduction"
        )
        return reduce(x, train=train)


class Swin(nn.Module):
    """Stages of window attention with patch merging between; `pooled` is the mean of `tokens`.

    Attributes:
      patch_size: pixels a side of the patches that become the first map.
      embed_dim: channels of the first stage; each further one has twice as many.
      depths: blocks of each stage.
      num_heads: of each stage.
      window_size: pixels a side.
      mlp_ratio: hidden over outer width of the Mlp.
      qkv_bias: whether query, key and value have a bias.
      dropout: after the embedding and on each residual branch, in training only.
      drop_path: probability to drop a branch of the last block, in training only; it grows linearly
        from 0 at the first block.
      epsilon: of the blocks' norms and the last.
      lora: low-rank adaptation, see layers.Lora.
      layout: of the blocks of each stage, see layers.Stack.
      remat: of the blocks, see layers.Stack.
      dtype: of the matrix products.
    """

    patch_size: int = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    dropout: float = 0.0
    drop_path: float = 0.1
    epsilon: float = 1e-5
    lora: Lora | None = None
    layout: Literal["unrolled", "scan"] = "unrolled"
    remat: Literal["none", "dots", "block", "full"] = "none"
    dtype: Any = jnp.float32

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Channels of each of `levels`."""
        return tuple(self.embed_dim * 2**i for i in range(len(self.depths)))

    @property
    def width(self) -> int:
        """Dimension of `pooled` and `tokens`."""
        return self.level_widths[-1]

    @nn.compact
    def __call__(self, images, *, train=False) -> Encoded:
        """Encode normalised images [B, H, W, 3].

        Returns:
          Encoded with pooled [B, D], tokens [B, N, D] after the last norm, and a level a stage.

        Raises:
          ValueError: if the images do not have three channels, or come to a map that is smaller
            than a window.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"Swin takes images [B, H, W, 3], got {list(images.shape)}.")
        x = self._embed(images)  # [B, H/4, W/4, C]
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        names = ("window_size", "mlp_ratio", "qkv_bias", "dropout", "drop_path", "epsilon")
        fields = {name: getattr(self, name) for name in (*names, "lora", "dtype")}
        rates = np.linspace(0, self.drop_path, sum(self.depths), dtype=np.float32)
        levels = []
        for i, depth in enumerate(self.depths):
            if i > 0:
                x = Merging(self.lora, self.dtype, name=f"merging_{i}")(x, train=train)
            shift = self._shift(x.shape, i)
            own = {"shift": np.arange(depth) % 2 * shift, "drop_path": rates[:depth]}
            rates = rates[depth:]
            stage = {**fields, "num_heads": self.num_heads[i]}
            stack = Stack(Block, stage, depth, self.layout, self.remat, name=f"stage_{i}")
            x, _ = stack(x, train=train, each=own)
            levels.append(x)
        x = LayerNorm(self.epsilon, self.dtype, name="norm")(x)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, N, D]
        return Encoded(pooled=tokens.mean(1), tokens=tokens, levels=tuple(levels))

    def _embed(self, images):
        side = self.patch_size
        height, width = images.shape[1:3]
        images = jnp.pad(images, ((0, 0), (0, -height % side), (0, -width % side), (0, 0)))
        patches = nn.Conv(
            self.embed_dim,
            (side, side),
            (side, side),
            "VALID",
            dtype=self.dtype,
            kernel_init=truncated_normal,
            name="patch_embedding",
        )
        return LayerNorm(EPSILON, self.dtype, name="embedding_norm")(patches(images))

    def _shift(self, shape, stage):
        """Return by how much every other block of a stage moves its windows."""
        smaller = min(shape[1:3])
        if smaller < self.window_size:
            raise ValueError(
                f"The map of stage {stage}, {shape[1]} x {shape[2]}, is smaller than a window of "
                f"{self.window_size} x {self.window_size}: give larger images."
            )
        return self.window_size // 2 if smaller > self.window_size else 0


def make(variant: str = "T", **overrides: Any) -> Swin:
    """Build a published size; `overrides` are fields of Swin.

    Raises:
      UserError: for an unknown variant or field.
    """
    return from_variant(Swin, VARIANTS, variant, overrides)
