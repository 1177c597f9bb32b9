"""The vision tower of CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020).

* The arithmetic of Hugging Face's CLIPVisionModel and CLIPVisionModelWithProjection.
* A ViT whose patch embedding has no bias, with a norm before the blocks.
* The norm after the blocks is on the class token alone: `tokens` are the patches before it.
* Positions are resized bicubically when the images are not of the native `image_size`.
* GELU is x sigmoid(1.702 x) in OpenAI's weights.

Axis letters: B batch, H, W pixels, P patch size, N = H/P * W/P patches, D width, E joint width.
"""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from medvlp_jax.encoders.base import Encoded, from_variant
from medvlp_jax.layers import (
    ACTIVATIONS,
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

BASE = {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072, "projection_dim": 512}
LARGE = {"width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096, "projection_dim": 768}

# Radford et al. 2021, Table 20. "tiny" is our choice, for CPU demos and tests.
VARIANTS = {
    "tiny": {"width": 128, "depth": 4, "num_heads": 4, "mlp_dim": 512, "projection_dim": 128},
    "B/32": {"patch_size": 32, **BASE},
    "B/16": {"patch_size": 16, **BASE},
    "L/14": {"patch_size": 14, **LARGE},
    "L/14-336": {"patch_size": 14, "image_size": 336, **LARGE},
}

normal = nn.initializers.normal(0.02)  # CLIPVisionConfig.initializer_range


class ClipVision(nn.Module):
    """Patches of an image through a transformer.

    Attributes:
      image_size: pixels a side the position table was made for; other sizes resize it.
      activation: of the Mlp, a key of layers.ACTIVATIONS.
      projection_dim: E.
      projection: whether the parameters of the projection to the joint space exist.
      pooling: what `pooled` is: "cls", "mean" of patches, or "projection" of cls to E, not of unit
        norm.
      attention_dropout: on the attention probabilities, in training only.
      kept_patches: share of the patches that training keeps, drawn anew for each image; `tokens`
        are then fewer (Li et al. 2023, https://arxiv.org/abs/2212.00794).
      attention: implementation, see layers.Attention.
      lora: low-rank adaptation of the blocks, see layers.Lora.
      layout: of the blocks, see layers.Stack.
      remat: of the blocks, see layers.Stack.
      dtype: of the matrix products.
    """

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    activation: str = "quick_gelu"
    projection_dim: int = 512
    projection: bool = False
    pooling: Literal["cls", "mean", "projection"] = "cls"
    attention_dropout: float = 0.0
    epsilon: float = 1e-5
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
          Encoded with pooled [B, D] or [B, E] and tokens [B, N, D].

        Raises:
          ValueError: if the images do not have three channels or do not tile into patches, or
            `pooling` is not to be had.
        """
        norm = lambda name: LayerNorm(self.epsilon, self.dtype, name=name)
        names = ("num_heads", "mlp_dim", "attention_dropout", "epsilon", "attention", "lora")
        fields = {name: getattr(self, name) for name in (*names, "dtype")}
        fields |= {"activation": ACTIVATIONS[self.activation], "kernel_init": normal}
        stack = Stack(Block, fields, self.depth, self.layout, self.remat, name="stack")
        x = norm("pre_norm")(self._embed(images))  # [B, N+1, D]
        if train and self.kept_patches != 1:
            key = self.make_rng("dropout")
            x, _ = keep_patches(x, key, self.kept_patches, prefix=1)
        x = stack(x, train=train)
        cls, tokens = norm("norm")(x[:, 0]), x[:, 1:]
        pooled = {"cls": cls, "mean": tokens.mean(1)}
        if self.projection:
            project = Linear(self.projection_dim, False, self.dtype, normal, name="projection")
            pooled["projection"] = project(cls)  # [B, E]
        if self.pooling not in pooled:
            raise ValueError(
                f"No pooling {self.pooling!r} in this ClipVision, only {', '.join(pooled)}; "
                "'projection' needs projection=True."
            )
        return Encoded(pooled=pooled[self.pooling], tokens=tokens)

    def _embed(self, images):
        rows, columns = patch_grid(images, self.patch_size)
        embed = PatchEmbedding(
            self.width, self.patch_size, False, self.dtype, normal, name="patch_embedding"
        )
        native = self.image_size // self.patch_size
        cls = self.param("cls_token", normal, (self.width,)).astype(self.dtype)
        positions = self.param("position_embedding", normal, (native**2 + 1, self.width))
        cls = jnp.broadcast_to(cls, (images.shape[0], 1, self.width))
        x = jnp.concatenate([cls, embed(images)], axis=1)  # [B, N+1, D]
        return x + resize_positions(positions, rows, columns).astype(self.dtype)


def make(variant: str = "B/32", **overrides: Any) -> ClipVision:
    """Build a published size; `overrides` are fields of ClipVision.

    Raises:
      UserError: for an unknown variant or field.
    """
    return from_variant(ClipVision, VARIANTS, variant, overrides)
