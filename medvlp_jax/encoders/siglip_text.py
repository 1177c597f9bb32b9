"""The text tower of SigLIP (Zhai et al. 2023, https://arxiv.org/abs/2303.15343).

* The arithmetic of Hugging Face's SiglipTextModel.
* Every token sees every other, padding too: texts were trained at one length, 64 tokens, padded
  with the token that ends them (SigLIP 2: with <pad>), and no mask. What stands in the row beyond a
  text becomes `pad_id`.
* Pre-norm blocks, a final norm; `pooled` is the row's last token through a Linear with bias.
* For that reason texts cannot share a row.

Axis letters: B batch, T tokens, D width, E joint width, V vocabulary.
"""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from medvlp_jax.encoders.base import Encoded, Tokens, from_variant
from medvlp_jax.layers import ACTIVATIONS, Block, LayerNorm, Linear, Lora, Stack

BASE = {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072, "projection_dim": 768}
LARGE = {"width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096, "projection_dim": 1024}
# Alabdulmohsin et al. 2023, https://arxiv.org/abs/2305.13035.
SO400M = {"width": 1152, "depth": 27, "num_heads": 16, "mlp_dim": 4304, "projection_dim": 1152}

# The towers beside the vision encoders of encoders/siglip.py. "tiny" is our choice, for tests.
VARIANTS = {
    "tiny": {"width": 128, "depth": 4, "num_heads": 4, "mlp_dim": 512, "projection_dim": 128},
    "B": BASE,
    "L": LARGE,
    "So400m": SO400M,
}

xavier_uniform = nn.initializers.xavier_uniform()  # SiglipPreTrainedModel._init_weights


class SiglipText(nn.Module):
    """Tokens through a bidirectional transformer without a mask.

    Attributes:
      max_length: rows of the position table, the length texts were trained at.
      pad_id: what stands behind a text; None leaves there what the row holds.
      activation: of the Mlp, a key of layers.ACTIVATIONS.
      projection_dim: E.
      pooling: what `pooled` is: "head", the last token through a Linear, or that token, "last".
      attention_dropout: on the attention probabilities, in training only.
      attention: implementation, see layers.Attention.
      lora: low-rank adaptation of the blocks, see layers.Lora.
      layout: of the blocks, see layers.Stack.
      remat: of the blocks, see layers.Stack.
      dtype: of the matrix products.
    """

    vocab_size: int = 32000
    max_length: int = 64
    pad_id: int | None = 1
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    activation: str = "gelu_pytorch_tanh"
    projection_dim: int = 768
    pooling: Literal["head", "last"] = "head"
    attention_dropout: float = 0.0
    epsilon: float = 1e-6
    attention: Literal["xla", "cudnn"] = "xla"
    lora: Lora | None = None
    layout: Literal["unrolled", "scan"] = "unrolled"
    remat: Literal["none", "dots", "block", "full"] = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens, *, train=False) -> Encoded:
        """Encode Tokens(ids [B, T], mask [B, T]); as published where T is `max_length`.

        Returns:
          Encoded with pooled [B, E] or [B, D], tokens [B, T, D] and the mask [B, T].

        Raises:
          ValueError: if the row is longer than the position table, or `pooling` is not to be had.
        """
        if self.pooling not in ("head", "last"):
            raise ValueError(f"No pooling {self.pooling!r} in SiglipText, only head, last.")
        names = ("num_heads", "mlp_dim", "attention_dropout", "epsilon", "attention", "lora")
        fields = {name: getattr(self, name) for name in (*names, "dtype")}
        fields |= {"activation": ACTIVATIONS[self.activation], "kernel_init": xavier_uniform}
        stack = Stack(Block, fields, self.depth, self.layout, self.remat, name="stack")
        ids = tokens.ids
        if self.pad_id is not None:
            ids = jnp.where(tokens.mask, ids, self.pad_id)
        x = stack(self._embed(ids), train=train)
        x = LayerNorm(self.epsilon, self.dtype, name="norm")(x)  # [B, T, D]
        head = Linear(self.projection_dim, True, self.dtype, xavier_uniform, name="head")
        pooled = {"last": x[:, -1], "head": head(x[:, -1])}
        return Encoded(pooled=pooled[self.pooling], tokens=x, mask=tokens.mask)

    def _embed(self, ids):
        length = ids.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"A text of {length} tokens is longer than this encoder's position table of "
                f"{self.max_length}: truncate it."
            )
        start = nn.initializers.normal(1.0)  # torch.nn.Embedding, as the release leaves it
        words = self.param("word_embedding", start, (self.vocab_size, self.width))
        positions = self.param("position_embedding", start, (self.max_length, self.width))
        # `take` turns an id outside the vocabulary into NaN; indexing would clamp it in silence.
        return (jnp.take(words, ids, axis=0) + positions[:length]).astype(self.dtype)


def make(variant: str = "B", **overrides: Any) -> SiglipText:
    """Build a published size; `overrides` are fields of SiglipText.

    Raises:
      UserError: for an unknown variant or field.
    """
    return from_variant(SiglipText, VARIANTS, variant, overrides)
