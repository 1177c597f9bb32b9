"""The vision tower of SigLIP (Zhai et al. 2023, https://arxiv.org/abs/2303.15343).

* The arithmetic of Hugging Face's SiglipVisionModel; SigLIP 2 at fixed resolution is the same.
* A ViT without class token: one learned query attends to all patches and makes `pooled`.
* `tokens` are the patches after the last norm. GELU is the tanh approximation.
* Pixels beyond the last whole patch are not seen, as in the reference: 384 = 27 * 14 + 6.
* Positions are resized bicubically when the images are not of the native `image_size`.

Axis letters: B batch, H, W pixels, P patch size, N = floor(H/P) * floor(W/P) patches, D width.
"""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from medvlp_jax.encoders.base import Encoded, from_variant
from medvlp_jax.layers import (
    ACTIVATIONS,
    Attention,
    Block,
    LayerNorm,
    Lora,
    Mlp,
    PatchEmbedding,
    Stack,
    keep_patches,
    patch_grid,
    resize_positions,
)

BASE = {"patch_size": 16, "width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072}
LARGE = {"patch_size": 16, "width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096}
# Alabdulmohsin et al. 2023, https://arxiv.org/abs/2305.13035.
SO400M = {"patch_size": 14, "width": 1152, "depth": 27, "num_heads": 16, "mlp_dim": 4304}

# The released checkpoints, by patch and image size. "tiny" is our choice, for CPU demos and tests.
VARIANTS = {
    "tiny": {"patch_size": 16, "width": 128, "depth": 4, "num_heads": 4, "mlp_dim": 512},
    **{f"B/16-{size}": {"image_size": size, **BASE} for size in (224, 256, 384, 512)},
    **{f"L/16-{size}": {"image_size": size, **LARGE} for size in (256, 384)},
    **{f"So400m/14-{size}": {"image_size": size, **SO400M} for size in (224, 384)},
}

xavier_uniform = nn.initializers.xavier_uniform()  # SiglipPreTrainedModel._init_weights


class PoolingHead(nn.Module):
    """y = attention of one learned query to all tokens, then y + mlp(norm(y))."""

    num_heads: int
    mlp_dim: int
    activation: str
    epsilon: float
    lora: Lora | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, train=False):
        """Map [B, N, D] to [B, D]."""
        probe = self.param("probe", xavier_uniform, (1, 1, x.shape[-1])).astype(self.dtype)
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, x.shape[-1]))
        shared = {"dtype": self.dtype, "kernel_init": xavier_uniform, "lora": self.lora}
        # Always "xla": one query is no work for flash attention.
        attend = Attention(self.num_heads, name="attention", **shared)
        y = attend(probe, train=train, context=x)  # [B, 1, D]
        activation = ACTIVATIONS[self.activation]
        mlp = Mlp(self.mlp_dim, activation=activation, name="mlp", **shared)
        y += mlp(LayerNorm(self.epsilon, self.dtype, name="norm")(y), train=train)
        return y[:, 0]


class Siglip(nn.Module):
    """Patches of an image through a transformer.

    Attributes:
      image_size: pixels a side the position table was made for; other sizes resize it.
      activation: of the Mlps, a key of layers.ACTIVATIONS.
      head: whether the parameters of the attention pooling exist.
      pooling: what `pooled` is: "head", or "mean" of the patches.
      attention_dropout: on the attention probabilities of the blocks, in training only.
      kept_patches: share of the patches that training keeps, drawn anew for each image; `tokens`
        are then fewer (Li et al. 2023, https://arxiv.org/abs/2212.00794).
      attention: implementation, see layers.Attention.
      lora: low-rank adaptation, see layers.Lora.
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
    activation: str = "gelu_pytorch_tanh"
    head: bool = True
    pooling: Literal["head", "mean"] = "head"
    attention_dropout: float = 0.0
    epsilon: float = 1e-6
    kept_patches: float = 1.0
    attention: Literal["xla", "cudnn"] = "xla"
    lora: Lora | None = None
    layout: Literal["unrolled", "scan"] = "unrolled"
    remat: Literal["none", "dots", "block", "full"] = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train=False) -> Encoded:
        """Encode normalised images [B, H, W, 3].

        Returns:
          Encoded with pooled [B, D] and tokens [B, N, D].

        Raises:
          ValueError: if the images do not have three channels or hold no patch, or `pooling` is
            not to be had.
        """
        names = ("num_heads", "mlp_dim", "epsilon", "lora", "dtype")
        shared = {name: getattr(self, name) for name in names}
        fields = {
            **shared,
            "activation": ACTIVATIONS[self.activation],
            "attention_dropout": self.attention_dropout,
            "attention": self.attention,
            "kernel_init": xavier_uniform,
        }
        stack = Stack(Block, fields, self.depth, self.layout, self.remat, name="stack")
        x = self._embed(images)  # [B, N, D]
        if train and self.kept_patches != 1:
            key = self.make_rng("dropout")
            x, _ = keep_patches(x, key, self.kept_patches, prefix=0)
        x = stack(x, train=train)
        tokens = LayerNorm(self.epsilon, self.dtype, name="norm")(x)
        pooled = {"mean": tokens.mean(1)}
        if self.head:
            pool = PoolingHead(activation=self.activation, name="head_pooling", **shared)
            pooled["head"] = pool(tokens, train=train)
        if self.pooling not in pooled:
            raise ValueError(
                f"No pooling {self.pooling!r} in this Siglip, only {', '.join(pooled)}; "
                "'head' needs head=True."
            )
        return Encoded(pooled=pooled[self.pooling], tokens=tokens)

    def _embed(self, images):
        rows, columns = patch_grid(images, self.patch_size, partial=True)
        embed = PatchEmbedding(
            self.width, self.patch_size, dtype=self.dtype, name="patch_embedding"
        )
        native = self.image_size // self.patch_size
        start = nn.initializers.normal(self.width**-0.5)
        positions = self.param("position_embedding", start, (native**2, self.width))
        positions = resize_positions(positions, rows, columns, prefix=0)
        return embed(images) + positions.astype(self.dtype)  # [B, N, D]


def make(variant: str = "B/16-224", **overrides: Any) -> Siglip:
    """Build a published size; `overrides` are fields of Siglip.

    Raises:
      UserError: for an unknown variant or field.
    """
    return from_variant(Siglip, VARIANTS, variant, overrides)
