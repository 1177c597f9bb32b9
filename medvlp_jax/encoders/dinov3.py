"""DINOv3 ViT (Siméoni et al. 2025, https://arxiv.org/abs/2508.10104).

* The arithmetic of Hugging Face's DINOv3ViTModel.
* Axial rotary positions on the patches alone; a class token and registers go before them unturned.
* The patches' centres lie in [-1, 1] for every image, so that any resolution is native. Training
  shifts, jitters and rescales them, one draw a call, from the random stream "dropout".
* Pre-norm blocks with layer scale, a key without bias, in three sizes a gated Mlp; a final norm.
* `pooled` is the class token, `tokens` are the patches.

Axis letters: B batch, H, W pixels, P patch size, N = H/P * W/P patches, R registers, D width.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from medvlp_jax.encoders.base import Encoded, from_variant
from medvlp_jax.layers import (
    ACTIVATIONS,
    Block,
    LayerNorm,
    Lora,
    PatchEmbedding,
    Rope,
    Stack,
    keep_patches,
    patch_grid,
    rope_2d,
)

GATED = {"gated": True, "activation": "silu"}

# Siméoni et al. 2025, in the terms of the released config.json files. "tiny" is our choice, for CPU
# demos and tests.
VARIANTS = {
    "tiny": {"width": 128, "depth": 4, "num_heads": 4, "mlp_dim": 512},
    "S/16": {"width": 384, "depth": 12, "num_heads": 6, "mlp_dim": 1536},
    "S+/16": {"width": 384, "depth": 12, "num_heads": 6, "mlp_dim": 1536, **GATED},
    "B/16": {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072},
    "L/16": {"width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096},
    "H+/16": {"width": 1280, "depth": 32, "num_heads": 20, "mlp_dim": 5120, **GATED},
    "7B/16": {
        "width": 4096,
        "depth": 40,
        "num_heads": 32,
        "mlp_dim": 8192,
        "query_bias": False,
        "value_bias": False,
        **GATED,
    },
}

truncated_normal = nn.initializers.truncated_normal(0.02)  # DINOv3ViTConfig.initializer_range


class DinoV3(nn.Module):
    """Patches of an image through a transformer with rotary positions.

    Attributes:
      registers: R, tokens that are neither class nor patch (Darcet et al. 2024,
        https://arxiv.org/abs/2309.16588).
      activation: of the Mlp, a key of layers.ACTIVATIONS.
      gated: layers.GatedMlp in place of layers.Mlp.
      query_bias: whether the query has a bias; likewise key_bias and value_bias.
      layer_scale: initial value; 1e-5 in the paper's training, 1 in the released config.json.
      rope_base: of the rotary positions.
      rope_shift: in training the centres move by up to this, each axis by its own.
      rope_jitter: in training each axis is multiplied by up to this or 1 / this; 1 is off.
      rope_rescale: in training both axes are multiplied by up to this or 1 / this; 1 is off.
      mask_token: whether the parameter of masked patches exists.
      pooling: what `pooled` is: "cls", "mean" of patches.
      dropout: on each residual branch, in training only.
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

    patch_size: int = 16
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    registers: int = 4
    activation: str = "gelu"
    gated: bool = False
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    layer_scale: float = 1.0
    rope_base: float = 100.0
    rope_shift: float = 0.0
    rope_jitter: float = 1.0
    rope_rescale: float = 2.0
    mask_token: bool = False
    pooling: Literal["cls", "mean"] = "cls"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    epsilon: float = 1e-5
    kept_patches: float = 1.0
    attention: Literal["xla", "cudnn"] = "xla"
    lora: Lora | None = None
    layout: Literal["unrolled", "scan"] = "unrolled"
    remat: Literal["none", "dots", "block", "full"] = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train=False, masked=None) -> Encoded:
        """Encode normalised images [B, H, W, 3].

        Args:
          images: H and W are multiples of P.
          train: apply dropout, and augment the positions.
          masked: [B, N] bool, patches to replace by the mask token.

        Returns:
          Encoded with pooled [B, D] and tokens [B, N, D].

        Raises:
          ValueError: if the images do not have three channels or do not tile into patches, if
            patches are masked without a mask token, or `pooling` is not to be had.
        """
        rope = self._rope(*patch_grid(images, self.patch_size), train)
        x = self._embed(images, masked)  # [B, 1+R+N, D]
        if train and self.kept_patches != 1:
            key = self.make_rng("dropout")
            x, kept = keep_patches(x, key, self.kept_patches, prefix=1 + self.registers)
            rope = Rope(rope.cos[kept], rope.sin[kept])
        names = ("num_heads", "mlp_dim", "gated", "layer_scale", "dropout", "attention_dropout")
        names += ("drop_path", "epsilon", "attention", "lora", "dtype")
        fields = {name: getattr(self, name) for name in names}
        biased = [n for n in ("query", "key", "value") if getattr(self, f"{n}_bias")]
        fields |= {
            "activation": ACTIVATIONS[self.activation],
            "biased": (*biased, "out"),
            "kernel_init": truncated_normal,
        }
        stack = Stack(Block, fields, self.depth, self.layout, self.remat, name="stack")
        x = stack(x, train=train, rope=rope)
        norm = LayerNorm(self.epsilon, self.dtype, name="norm")
        # Apart: where only one of them is read, the other costs nothing.
        cls, tokens = norm(x[:, 0]), norm(x[:, 1 + self.registers :])
        pooled = {"cls": cls, "mean": tokens.mean(1)}
        if self.pooling not in pooled:
            raise ValueError(f"No pooling {self.pooling!r} in DinoV3, only {', '.join(pooled)}.")
        return Encoded(pooled=pooled[self.pooling], tokens=tokens)

    def _embed(self, images, masked):
        embed = PatchEmbedding(
            self.width,
            self.patch_size,
            dtype=self.dtype,
            kernel_init=truncated_normal,
            name="patch_embedding",
        )
        x = embed(images)  # [B, N, D]
        if self.mask_token:
            token = self.param("mask_token", nn.initializers.zeros, (1, 1, self.width))
            if masked is not None:
                x = jnp.where(masked[..., None], token.astype(self.dtype), x)
        elif masked is not None:
            raise ValueError("This DinoV3 has no token for masked patches: set mask_token=True.")
        cls = self.param("cls_token", truncated_normal, (1, 1, self.width))
        registers = self.param("registers", truncated_normal, (1, self.registers, self.width))
        prefix = jnp.concatenate([cls, registers], axis=1).astype(self.dtype)
        prefix = jnp.broadcast_to(prefix, (images.shape[0], *prefix.shape[1:]))
        return jnp.concatenate([prefix, x], axis=1)

    def _rope(self, rows, columns, train):
        """Return the positions [1+R+N, S] of all tokens; those before the patches do not turn."""
        augment = {}
        if train and (self.rope_shift, self.rope_jitter, self.rope_rescale) != (0.0, 1.0, 1.0):
            draw = jax.random.uniform(self.make_rng("dropout"), (5,), minval=-1.0)
            scale = self.rope_jitter ** draw[2:4] * self.rope_rescale ** draw[4]
            augment = {"shift": self.rope_shift * draw[:2], "scale": scale}
        head_width = self.width // self.num_heads
        rope = rope_2d(rows, columns, head_width, base=self.rope_base, **augment)
        before = ((1 + self.registers, 0), (0, 0))
        return Rope(jnp.pad(rope.cos, before, constant_values=1.0), jnp.pad(rope.sin, before))


def make(variant: str = "B/16", **overrides: Any) -> DinoV3:
    """Build a published size; `overrides` are fields of DinoV3.

    Raises:
      UserError: for an unknown variant or field.
    """
    return from_variant(DinoV3, VARIANTS, variant, overrides)
