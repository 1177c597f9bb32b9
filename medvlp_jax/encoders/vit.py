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

from medvlp_jax.encoders.base import Encoded, from_variant
from medvlp_jax.layers import (
    Block,
    LayerNorm,
    Linear,
    Lora,
    PatchEmbedding,
    Stack,
    keep_patches,
    patch_grid,
    resize_positions,
)

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


class ViT(nn.Module):
    """Patches of an image through a transformer.

    Attributes:
      image_size: pixels a side the position table was made for; other sizes resize it.
      pooling: what `pooled` is: "cls", "mean" of patches, "pooler" (tanh of a Linear of cls).
      pooler: whether the pooler's parameters exist.
      dropout: after the embedding and on each residual branch, in training only.
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
    pooling: Literal["cls", "mean", "pooler"] = "cls"
    pooler: bool = False
    dropout: float = 0.0
    epsilon: float = 1e-12
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
          ValueError: if the images do not have three channels or do not tile into patches, or
            `pooling` is not to be had.
        """
        x = self._embed(images)  # [B, N+1, D]
        if train and self.kept_patches != 1:
            key = self.make_rng("dropout")
            x, _ = keep_patches(x, key, self.kept_patches, prefix=1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        names = ("num_heads", "mlp_dim", "dropout", "epsilon", "attention", "lora", "dtype")
        fields = {name: getattr(self, name) for name in names} | {"kernel_init": truncated_normal}
        x = Stack(Block, fields, self.depth, self.layout, self.remat, name="stack")(x, train=train)
        norm = LayerNorm(self.epsilon, self.dtype, name="norm")
        # Apart: where only one of them is read, the other costs nothing.
        cls, tokens = norm(x[:, 0]), norm(x[:, 1:])
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
        rows, columns = patch_grid(images, self.patch_size)
        embed = PatchEmbedding(
            self.width,
            self.patch_size,
            dtype=self.dtype,
            kernel_init=truncated_normal,
            name="patch_embedding",
        )
        patches = embed(images)  # [B, N, D]
        native = self.image_size // self.patch_size
        cls = self.param("cls_token", truncated_normal, (1, 1, self.width))
        positions = self.param(
            "position_embedding", truncated_normal, (1, native**2 + 1, self.width)
        )
        cls = jnp.broadcast_to(cls, (images.shape[0], 1, self.width)).astype(self.dtype)
        x = jnp.concatenate([cls, patches], axis=1)  # [B, N+1, D]
        return x + resize_positions(positions[0], rows, columns).astype(self.dtype)


def make(variant: str = "B/16", **overrides: Any) -> ViT:
    """Build a published size; `overrides` are fields of ViT.

    Raises:
      UserError: for an unknown variant or field.
    """
    return from_variant(ViT, VARIANTS, variant, overrides)
