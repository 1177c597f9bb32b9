"""The text tower of CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020).

* The arithmetic of Hugging Face's CLIPTextModel and CLIPTextModelWithProjection.
* Causal: a token sees itself and those before it. Pre-norm blocks, a final norm.
* `pooled` is the token that ends the text, at the first `eos_id`. Configs older than
  transformers 4.31 say 2 there, which is no such token: then it is the largest id.
* GELU is x sigmoid(1.702 x) in OpenAI's weights.
* Several texts can be packed into one row by segment ids: attention, positions and pooling then
  keep to a segment.

Axis letters: B batch, T tokens, D width, E joint width, V vocabulary, G texts in a row.
"""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from medvlp_jax.encoders.base import (
    Encoded,
    Tokens,
    from_variant,
    members_of,
    pairs_of,
    pick,
    positions_of,
)
from medvlp_jax.layers import ACTIVATIONS, Block, LayerNorm, Linear, Lora, Stack

# Radford et al. 2021, Table 20, of ViT-B/32 and ViT-L/14; ViT-B/16 has the former's. "tiny" is our
# choice, for CPU demos and tests.
VARIANTS = {
    "tiny": {"width": 128, "depth": 4, "num_heads": 4, "mlp_dim": 512, "projection_dim": 128},
    "B/32": {"width": 512, "depth": 12, "num_heads": 8, "mlp_dim": 2048, "projection_dim": 512},
    "L/14": {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072, "projection_dim": 768},
}

OLD_EOS = 2  # the eos_token_id of configs from before transformers 4.31

normal = nn.initializers.normal(0.02)  # CLIPTextConfig.initializer_range


class ClipText(nn.Module):
    """Tokens through a causal transformer.

    Attributes:
      max_length: rows of the position table, the longest text.
      eos_id: of the token that ends a text.
      activation: of the Mlp, a key of layers.ACTIVATIONS.
      projection_dim: E.
      projection: whether the parameters of the projection to the joint space exist.
      pooling: what `pooled` is: "eos", or "projection" of that to E, not of unit norm.
      attention_dropout: on the attention probabilities, in training only.
      attention: implementation, see layers.Attention.
      lora: low-rank adaptation of the blocks, see layers.Lora.
      layout: of the blocks, see layers.Stack.
      remat: of the blocks, see layers.Stack.
      dtype: of the matrix products.
    """

    vocab_size: int = 49408
    max_length: int = 77
    eos_id: int = 49407
    width: int = 512
    depth: int = 12
    num_heads: int = 8
    mlp_dim: int = 2048
    activation: str = "quick_gelu"
    projection_dim: int = 512
    projection: bool = False
    pooling: Literal["eos", "projection"] = "eos"
    attention_dropout: float = 0.0
    epsilon: float = 1e-5
    attention: Literal["xla", "cudnn"] = "xla"
    lora: Lora | None = None
    layout: Literal["unrolled", "scan"] = "unrolled"
    remat: Literal["none", "dots", "block", "full"] = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens, *, train=False, segments=None, num_segments=0) -> Encoded:
        """Encode Tokens(ids [B, T], mask [B, T]); a text without its end is pooled at its start.

        Args:
          tokens: one text a row, or several behind one another.
          train: apply dropout.
          segments: [B, T] in [0, G), which text of the row a token belongs to; equal ids adjacent.
          num_segments: G, given with `segments`.

        Returns:
          Encoded with pooled [B, D] or [B, E], tokens [B, T, D] and the mask [B, T]; with segments
          pooled is [B, G, D] or [B, G, E]. Tokens where the mask is False, and pooled segments
          without a token, hold values without meaning.

        Raises:
          ValueError: if the row is longer than the position table, `pooling` is not to be had, or
            `segments` come without their number.
        """
        names = ("num_heads", "mlp_dim", "attention_dropout", "epsilon", "attention", "lora")
        fields = {name: getattr(self, name) for name in (*names, "dtype")}
        fields |= {"activation": ACTIVATIONS[self.activation], "causal": True}
        fields |= {"kernel_init": normal}
        stack = Stack(Block, fields, self.depth, self.layout, self.remat, name="stack")
        mask = tokens.mask if segments is None else pairs_of(tokens.mask, segments)
        x = stack(self._embed(tokens.ids, segments), mask, train=train)  # [B, T, D]
        x = LayerNorm(self.epsilon, self.dtype, name="norm")(x)
        end = tokens.ids if self.eos_id == OLD_EOS else tokens.ids == self.eos_id
        # A padding that says "end" too stands behind the first one: it need not be masked.
        members = members_of(jnp.ones_like(tokens.mask), segments, num_segments)
        at = jnp.where(members, end[..., None].astype(jnp.int32), -1).argmax(1)  # [B, G]
        eos = pick(x, at, is_packed=segments is not None)  # [B, D] or [B, G, D]
        pooled = {"eos": eos}
        if self.projection:
            project = Linear(self.projection_dim, False, self.dtype, normal, name="projection")
            pooled["projection"] = project(eos)  # [..., E]
        if self.pooling not in pooled:
            raise ValueError(
                f"No pooling {self.pooling!r} in this ClipText, only {', '.join(pooled)}; "
                "'projection' needs projection=True."
            )
        return Encoded(pooled=pooled[self.pooling], tokens=x, mask=tokens.mask)

    def _embed(self, ids, segments):
        length = ids.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"A text of {length} tokens is longer than this encoder's position table of "
                f"{self.max_length}: truncate it."
            )
        words = self.param("word_embedding", normal, (self.vocab_size, self.width))
        positions = self.param("position_embedding", normal, (self.max_length, self.width))
        # `take` turns an id outside the vocabulary into NaN; indexing would clamp it in silence.
        positions = positions[:length] if segments is None else positions[positions_of(segments)]
        return (jnp.take(words, ids, axis=0) + positions).astype(self.dtype)


def make(variant: str = "B/32", **overrides: Any) -> ClipText:
    """Build a published size; `overrides` are fields of ClipText.

    Raises:
      UserError: for an unknown variant or field.
    """
    return from_variant(ClipText, VARIANTS, variant, overrides)
