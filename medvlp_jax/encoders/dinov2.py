"""DINOv2 (Oquab et al. 2023, https://arxiv.org/abs/2304.07193), also with registers.

* The arithmetic of Hugging Face's Dinov2Model and Dinov2WithRegistersModel (Darcet et al. 2024,
  https://arxiv.org/abs/2309.16588).
* A ViT with layer scale; the giant size has a gated Mlp of two thirds the hidden width.
* Registers go between class token and patches, and have no position.
* Positions are resized bicubically when the images are not of the native `image_size`, with
  antialiasing in the models with registers and without in the others.
* `pooled` is the class token, `tokens` are the patches.

Axis letters: B batch, H, W pixels, P patch size, N = H/P * W/P patches, R registers, D width.
"""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from medvlp_jax.encoders.base import Encoded, from_variant
from medvlp_jax.layers import (
    ACTIVATIONS,
    Block,
    LayerNorm,
    Lora,
    PatchEmbedding,
    Stack,
    keep_patches,
    patch_grid,
    resize_positions,
)

# Oquab et al. 2023, released configurations. "tiny" is our choice, for CPU demos and tests.
SIZES = {
    "S/14": {"width": 384, "depth": 12, "num_heads": 6},
    "B/14": {"width": 768, "depth": 12, "num_heads": 12},
    "L/14": {"width": 1024, "depth": 24, "num_heads": 16},
    "g/14": {"width": 1536, "depth": 40, "num_heads": 24, "gated": True},
}
VARIANTS = {
    "tiny": {"image_size": 224, "width": 128, "depth": 4, "num_heads": 4},
    **SIZES,
    **{f"{name}-reg": {**size, "registers": 4} for name, size in SIZES.items()},
}

truncated_normal = nn.initializers.truncated_normal(0.02)  # Dinov2Config.initializer_range


class DinoV2(nn.Module):
    """Patches of an image through a transformer.

    Attributes:
      image_size: pixels a side the position table was made for; other sizes resize it.
      registers: R; 0 is Dinov2Model, more is Dinov2WithRegistersModel.
      mlp_ratio: hidden over outer width of the Mlp.
      activation: of the Mlp, a key of layers.ACTIVATIONS; the gated one has silu.
      gated: layers.GatedMlp in place of layers.Mlp.
      qkv_bias: whether query, key and value have a bias.
      layer_scale: initial value; 1e-5 in the paper's training, 1 in the released config.json.
      mask_token: whether the parameter of masked patches exists.
      pooling: what `pooled` is: "cls", "mean" of patches.
      dropout: after the embedding, in training only.
      attention_dropout: on the attention probabilities, in training only.
      drop_path: probability that an example goes without a branch, in training only.
      kept_patches: share of the patches that training keeps, drawn anew for each image; `tokens`
        are then fewer (Li et al. 2023, https://arxiv.org/abs/2212.00794).
      attention: implementation, see layers.Attention.
      lora: low-rank adaptation, see layers.Lora.
      layout: of the blocks, see layers.Stack.
      remat: of the blocks, see layers.Stack.
      dtype: of the matrix products.
    """

    image_size: int = 518
    patch_size: int = 14
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    registers: int = 0
    mlp_ratio: int = 4
    activation: str = "gelu"
    gated: bool = False
    qkv_bias: bool = True
    layer_scale: float = 1.0
    mask_token: bool = False
    pooling: Literal["cls", "mean"] = "cls"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    epsilon: float = 1e-6
    kept_patches: float = 1.0
    attention: Literal["xla", "cudnn"] = "xla"
    lora: Lora | None = None
    layout: Literal["unrolled", "scan"] = "unrolled"
    remat: Literal["none", "dots", "block", "full"] = "none"
    dtype: Any = jnp.float32

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the Mlp; of the gated one two thirds, rounded up to a multiple of 8."""
        hidden = self.width * self.mlp_ratio
        return (int(hidden * 2 / 3) + 7) // 8 * 8 if self.gated else hidden

    @nn.compact
    def __call__(self, images, *, train=False, masked=None) -> Encoded:
        """Encode normalised images [B, H, W, 3].

        Args:
          images: H and W are multiples of P.
          train: apply dropout.
          masked: [B, N] bool, patches to replace by the mask token.

        Returns:
          Encoded with pooled [B, D] and tokens [B, N, D].

        Raises:
          ValueError: if the images do not have three channels or do not tile into patches, if
            patches are masked without a mask token, or `pooling` is not to be had.
        """
        x = self._embed(images, masked)  # [B, 1+R+N, D]
        if train and self.kept_patches != 1:
            key = self.make_rng("dropout")
            x, _ = keep_patches(x, key, self.kept_patches, prefix=1 + self.registers)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        names = ("num_heads", "mlp_dim", "gated", "layer_scale", "attention_dropout", "drop_path")
        names += ("epsilon", "attention", "lora", "dtype")
        fields = {name: getattr(self, name) for name in names}
        fields |= {
            "activation": ACTIVATIONS["silu" if self.gated else self.activation],
            "biased": ("query", "key", "value", "out") if self.qkv_bias else ("out",),
            "kernel_init": truncated_normal,
        }
        stack = Stack(Block, fields, self.depth, self.layout, self.remat, name="stack")
        x = stack(x, train=train)
        norm = LayerNorm(self.epsilon, self.dtype, name="norm")
        # Apart: where only one of them is read, the other costs nothing.
        cls, tokens = norm(x[:, 0]), norm(x[:, 1 + self.registers :])
        pooled = {"cls": cls, "mean": tokens.mean(1)}
        if self.pooling not in pooled:
            raise ValueError(f"No pooling {self.pooling!r} in DinoV2, only {', '.join(pooled)}.")
        return Encoded(pooled=pooled[self.pooling], tokens=tokens)

    def _embed(self, images, masked):
        rows, columns = patch_grid(images, self.patch_size)
        embed = PatchEmbedding(
            self.width,
            self.patch_size,
            dtype=self.dtype,
            kernel_init=truncated_normal,
            name="patch_embedding",
        )
        x = embed(images)  # [B, N, D]
        if self.mask_token:
            token = self.param("mask_token", nn.initializers.zeros, (1, self.width))
            if masked is not None:
                x = jnp.where(masked[..., None], token.astype(self.dtype), x)
        elif masked is not None:
            raise ValueError("This DinoV2 has no token for masked patches: set mask_token=True.")
        native = self.image_size // self.patch_size
        cls = self.param("cls_token", truncated_normal, (1, 1, self.width))
        positions = self.param(
            "position_embedding", truncated_normal, (1, native**2 + 1, self.width)
        )
        positions = resize_positions(
            positions[0], rows, columns, antialias=self.registers > 0
        ).astype(self.dtype)
        prefix = cls.astype(self.dtype) + positions[0]  # [1, 1, D]
        if self.registers:
            start = nn.initializers.zeros
            registers = self.param("registers", start, (1, self.registers, self.width))
            prefix = jnp.concatenate([prefix, registers.astype(self.dtype)], axis=1)
        prefix = jnp.broadcast_to(prefix, (images.shape[0], *prefix.shape[1:]))
        return jnp.concatenate([prefix, x + positions[1:]], axis=1)


def make(variant: str = "B/14", **overrides: Any) -> DinoV2:
    """Build a published size, with registers as "B/14-reg"; `overrides` are fields of DinoV2.

    Raises:
      UserError: for an unknown variant or field.
    """
    return from_variant(DinoV2, VARIANTS, variant, overrides)
