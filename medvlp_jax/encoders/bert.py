"""BERT (Devlin et al. 2019, https://arxiv.org/abs/1810.04805).

* The arithmetic of Hugging Face's BertModel.
* Learned positions, all tokens of type 0, LayerNorm after each residual, exact GELU.
* Several texts can be packed into one row by segment ids: attention, positions and pooling then
  keep to a segment.
* Optional heads by field: the pooler, and the masked-language-model head whose decoder is the
  transposed word embedding.

Axis letters: B batch, T tokens, D width, V vocabulary, G texts in a row.
"""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from medvlp_jax.encoders.base import (
    Encoded,
    Tokens,
    from_variant,
    pairs_of,
    pool,
    positions_of,
)
from medvlp_jax.layers import Attention, LayerNorm, Linear, Lora, Mlp, Stack, gelu

# base, large: Devlin et al. 2019, section 3. Vocabulary of "base" and "large": the cased one that
# BioBERT and Bio_ClinicalBERT keep; of "cxr": CXR-BERT's own 30,522 pieces (Boecking et al. 2022,
# https://arxiv.org/abs/2204.09817). "tiny" is our choice, for CPU demos and tests.
VARIANTS = {
    "tiny": {"vocab_size": 30522, "width": 128, "depth": 4, "num_heads": 4, "mlp_dim": 512},
    "base": {"vocab_size": 28996, "width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072},
    "large": {"vocab_size": 28996, "width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096},
    "cxr": {"vocab_size": 30522, "width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072},
}

normal = nn.initializers.normal(0.02)  # BertConfig.initializer_range


class Block(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    num_heads: int
    mlp_dim: int
    dropout: float = 0.1
    attention_dropout: float = 0.1
    epsilon: float = 1e-12
    attention: str = "xla"
    lora: Lora | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, mask=None, *, train=False):
        """Map [B, T, D] to [B, T, D]; mask as Attention takes it."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attend = Attention(
            self.num_heads,
            self.attention_dropout,
            self.attention,
            self.dtype,
            normal,
            lora=self.lora,
            name="attention",
        )
        y = x + drop(attend(x, mask, train=train))
        x = LayerNorm(self.epsilon, self.dtype, name="attention_norm")(y)
        mlp = Mlp(self.mlp_dim, self.dtype, normal, lora=self.lora, name="mlp")
        y = x + drop(mlp(x, train=train))
        return LayerNorm(self.epsilon, self.dtype, name="mlp_norm")(y)


class Bert(nn.Module):
    """Tokens through a bidirectional transformer.

    Attributes:
      max_length: rows of the position table, the longest text.
      pooling: what `pooled` is: "cls", "mean" of real tokens, "pooler" (tanh of a Linear of cls).
      pooler: whether the pooler's parameters exist.
      mlm_head: whether the masked-language-model head's parameters exist.
      dropout: after the embedding and on each residual branch, in training only.
      attention_dropout: on the attention probabilities, in training only.
      attention: implementation, see layers.Attention.
      lora: low-rank adaptation of the blocks, see layers.Lora.
      layout: of the blocks, see layers.Stack.
      remat: of the blocks, see layers.Stack.
      dtype: of the matrix products.
    """

    vocab_size: int = 28996
    max_length: int = 512
    num_types: int = 2
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    pooling: Literal["cls", "mean", "pooler"] = "cls"
    pooler: bool = False
    mlm_head: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1
    epsilon: float = 1e-12
    attention: Literal["xla", "cudnn"] = "xla"
    lora: Lora | None = None
    layout: Literal["unrolled", "scan"] = "unrolled"
    remat: Literal["none", "dots", "block", "full"] = "none"
    dtype: Any = jnp.float32

    def setup(self):
        """Name every parameter."""
        self.word_embedding = self.param("word_embedding", normal, (self.vocab_size, self.width))
        self.position_embedding = self.param(
            "position_embedding", normal, (self.max_length, self.width)
        )
        self.type_embedding = self.param("type_embedding", normal, (self.num_types, self.width))
        self.embedding_norm = LayerNorm(self.epsilon, self.dtype)
        self.embedding_dropout = nn.Dropout(self.dropout)
        fields = {
            name: getattr(self, name)
            for name in ("num_heads", "mlp_dim", "dropout", "attention_dropout", "epsilon")
        }
        fields |= {"attention": self.attention, "lora": self.lora, "dtype": self.dtype}
        self.stack = Stack(Block, fields, self.depth, self.layout, self.remat)
        if self.pooler:
            self.pooler_dense = Linear(self.width, dtype=self.dtype, kernel_init=normal)
        if self.mlm_head:
            self.mlm_dense = Linear(self.width, dtype=self.dtype, kernel_init=normal)
            self.mlm_norm = LayerNorm(self.epsilon, self.dtype)
            self.mlm_bias = self.param("mlm_bias", nn.initializers.zeros, (self.vocab_size,))

    def __call__(self, tokens: Tokens, *, train=False, segments=None, num_segments=0) -> Encoded:
        """Encode Tokens(ids [B, T], mask [B, T]).

        Args:
          tokens: one text a row, or several behind one another.
          train: apply dropout.
          segments: [B, T] in [0, G), which text of the row a token belongs to; equal ids adjacent.
          num_segments: G, given with `segments`.

        Returns:
          Encoded with pooled [B, D], tokens [B, T, D] and the mask [B, T]; with segments pooled is
          [B, G, D]. Tokens where the mask is False, and pooled segments without a token, hold
          values without meaning.

        Raises:
          ValueError: if the row is longer than the position table, `pooling` is not to be had, or
            `segments` come without their number.
        """
        known = ["cls", "mean", *(["pooler"] if self.pooler else [])]
        if self.pooling not in known:
            raise ValueError(
                f"No pooling {self.pooling!r} in this Bert, only {', '.join(known)}; "
                "'pooler' needs pooler=True."
            )
        x = self._encode(tokens, train, segments)
        packing = {"segments": segments, "num_segments": num_segments}
        pooled = pool(x, tokens.mask, "mean" if self.pooling == "mean" else "cls", **packing)
        pooled = pooled.astype(self.dtype)
        if self.pooling == "pooler":
            pooled = nn.tanh(self.pooler_dense(pooled))
        return Encoded(pooled, x, tokens.mask)

    def mlm_logits(self, tokens: Tokens, *, train=False, segments=None):
        """Return the logits [B, T, V] of the masked-language-model head, float32.

        Raises:
          ValueError: if this module has no such head.
        """
        if not self.mlm_head:
            raise ValueError("This Bert has no masked-language-model head: set mlm_head=True.")
        return self._decode(self._encode(tokens, train, segments))

    def _encode(self, tokens, train, segments):
        length = tokens.ids.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"A text of {length} tokens is longer than this encoder's position table of "
                f"{self.max_length}: truncate it."
            )
        # `take` turns an id outside the vocabulary into NaN; indexing would clamp it in silence.
        x = jnp.take(self.word_embedding, tokens.ids, axis=0) + self.type_embedding[0]  # [B, T, D]
        if segments is None:
            positions, mask = self.position_embedding[:length], tokens.mask
        else:
            positions = self.position_embedding[positions_of(segments)]  # [B, T, D]
            mask = pairs_of(tokens.mask, segments)
        x = self.embedding_norm(x + positions)
        x = self.embedding_dropout(x, deterministic=not train)
        x = self.stack(x, mask, train=train)
        if self.is_initializing():  # one `init` makes every parameter, whatever is called
            if self.pooler:
                self.pooler_dense(x[:, 0])
            if self.mlm_head:
                self._decode(x)
        return x

    def _decode(self, x):
        x = self.mlm_norm(gelu(self.mlm_dense(x)))
        logits = jnp.einsum(
            "btd,vd->btv",
            x,
            self.word_embedding.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return logits + self.mlm_bias


def make(variant: str = "base", **overrides: Any) -> Bert:
    """Build a published size; `overrides` are fields of Bert.

    Raises:
      UserError: for an unknown variant or field.
    """
    return from_variant(Bert, VARIANTS, variant, overrides)
