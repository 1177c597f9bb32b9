"""ModernBERT (Warner et al. 2024, https://arxiv.org/abs/2412.13663).

* The arithmetic of Hugging Face's ModernBertModel; Clinical ModernBERT is this architecture.
* Every third layer attends to the whole text, the others to `window` tokens around each; the two
  kinds turn rotary positions with different bases.
* Pre-norm blocks with GeGLU and no bias anywhere; the first has no norm before its attention, for
  one stands after the embedding, so it is `first` and the others are `stack`.
* Several texts can be packed into one row by segment ids: attention, positions and pooling then
  keep to a segment.

Axis letters: B batch, T tokens, D width, V vocabulary, L layers, G segments in a row, S head width.
"""

import functools
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medvlp_jax.encoders.base import (
    Encoded,
    Tokens,
    from_variant,
    pairs_of,
    pool,
    positions_of,
)
from medvlp_jax.layers import (
    Attention,
    GatedMlp,
    LayerNorm,
    Linear,
    Lora,
    Rope,
    Stack,
    gelu,
    rope_1d,
)

# base, large: Warner et al. 2024, released config.json. "tiny" is our choice, for CPU demos.
VARIANTS = {
    "tiny": {"width": 128, "depth": 4, "num_heads": 4, "mlp_dim": 192},
    "base": {"width": 768, "depth": 22, "num_heads": 12, "mlp_dim": 1152},
    "large": {"width": 1024, "depth": 28, "num_heads": 16, "mlp_dim": 2624},
}

# ModernBertConfig.initializer_range, initializer_cutoff_factor.
truncated_normal = nn.initializers.truncated_normal(0.02, lower=-2.0, upper=2.0)


class View(NamedTuple):
    """What a layer sees: pairs (query, key) that may attend, and rotary positions."""

    mask: jax.Array
    rope: Rope


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    num_heads: int
    mlp_dim: int
    pre_norm: bool = True
    attention_dropout: float = 0.0
    epsilon: float = 1e-5
    attention: str = "xla"
    lora: Lora | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, mask=None, *, train=False, own, whole: View, local: View):
        """Map [B, T, D] to [B, T, D]; `own` is True where this layer takes the whole view."""
        view = jax.tree.map(functools.partial(jnp.where, own), whole, local)
        norm = functools.partial(LayerNorm, self.epsilon, self.dtype, False)
        attend = Attention(
            self.num_heads,
            self.attention_dropout,
            self.attention,
            self.dtype,
            truncated_normal,
            biased=(),
            lora=self.lora,
            name="attention",
        )
        mlp = GatedMlp(
            self.mlp_dim,
            gelu,
            dtype=self.dtype,
            kernel_init=truncated_normal,
            lora=self.lora,
            name="mlp",
        )
        y = norm(name="attention_norm")(x) if self.pre_norm else x
        y = attend(y, view.mask, train=train, rope=view.rope)
        x += nn.Dropout(self.attention_dropout, deterministic=not train)(y)
        return x + mlp(norm(name="mlp_norm")(x), train=train), None


class ModernBert(nn.Module):
    """Tokens through a bidirectional transformer of whole and local attention.

    Attributes:
      max_length: the longest text; positions are rotary, so no parameter depends on it.
      window: tokens a local layer sees around each: half to either side.
      depth: L, at least 2.
      global_every: layers 0, n, 2n, ... see the whole text.
      global_base: base of the rotary positions where the whole text is seen.
      local_base: base of the rotary positions in the other layers.
      pooling: what `pooled` is: "cls", the first real token, or "mean" of the real tokens.
      mlm_head: whether the masked-language-model head's parameters exist.
      pad_id: id of the padding, kept for the config; the mask alone says what is padding.
      attention_dropout: on the attention's probabilities and its output, in training only.
      attention: implementation, see layers.Attention.
      layout: of the blocks, see layers.Stack.
      remat: of the blocks, see layers.Stack.
      lora: low-rank adaptation of the blocks' linear layers.
      dtype: of the matrix products.
    """

    vocab_size: int = 50368
    max_length: int = 8192
    width: int = 768
    depth: int = 22
    num_heads: int = 12
    mlp_dim: int = 1152
    window: int = 128
    global_every: int = 3
    global_base: float = 160_000.0
    local_base: float = 10_000.0
    pooling: Literal["cls", "mean"] = "cls"
    mlm_head: bool = False
    pad_id: int | None = 50283
    attention_dropout: float = 0.0
    epsilon: float = 1e-5
    attention: Literal["xla", "cudnn"] = "xla"
    layout: Literal["unrolled", "scan"] = "unrolled"
    remat: Literal["none", "dots", "block", "full"] = "none"
    lora: Lora | None = None
    dtype: Any = jnp.float32

    def setup(self):
        """Name every parameter.

        Raises:
          ValueError: if the depth is below 2, for the first block stands apart from the others.
        """
        if self.depth < 2:
            raise ValueError(f"ModernBert needs a depth of at least 2, got {self.depth}.")
        shape = (self.vocab_size, self.width)
        self.word_embedding = self.param("word_embedding", truncated_normal, shape)
        norm = functools.partial(LayerNorm, self.epsilon, self.dtype, False)
        self.embedding_norm = norm()
        fields = {
            name: getattr(self, name)
            for name in ("num_heads", "mlp_dim", "attention_dropout", "epsilon", "attention")
        }
        fields |= {"lora": self.lora, "dtype": self.dtype}
        first = fields | {"pre_norm": False}
        self.first = Stack(Block, first, 1, self.layout, self.remat)
        self.stack = Stack(Block, fields, self.depth - 1, self.layout, self.remat)
        self.norm = norm()
        if self.mlm_head:
            self.mlm_dense = Linear(self.width, False, self.dtype, truncated_normal)
            self.mlm_norm = norm()
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
          ValueError: if the row is longer than `max_length`, `pooling` is not to be had, or
            `segments` come without their number.
        """
        if self.pooling not in ("cls", "mean"):
            raise ValueError(f"No pooling {self.pooling!r} in this ModernBert, only cls, mean.")
        x = self._encode(tokens, train, segments)
        packing = {"segments": segments, "num_segments": num_segments}
        pooled = pool(x, tokens.mask, self.pooling, **packing)
        return Encoded(pooled.astype(self.dtype), x, tokens.mask)

    def mlm_logits(self, tokens: Tokens, *, train=False, segments=None):
        """Return the logits [B, T, V] of the masked-language-model head, float32.

        Raises:
          ValueError: if this module has no such head.
        """
        if not self.mlm_head:
            raise ValueError(
                "This ModernBert has no masked-language-model head: set mlm_head=True."
            )
        return self._decode(self._encode(tokens, train, segments))

    def _encode(self, tokens, train, segments):
        length = tokens.ids.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"A text of {length} tokens is longer than the {self.max_length} this encoder is "
                "made for: truncate it."
            )
        views = self._views(tokens.mask, segments)
        is_global = np.arange(self.depth) % self.global_every == 0
        # `take` turns an id outside the vocabulary into NaN; indexing would clamp it in silence.
        x = self.embedding_norm(jnp.take(self.word_embedding, tokens.ids, axis=0))  # [B, T, D]
        x, _ = self.first(x, train=train, each=is_global[:1], **views)
        x, _ = self.stack(x, train=train, each=is_global[1:], **views)
        x = self.norm(x)
        if self.is_initializing() and self.mlm_head:
            self._decode(x)  # one `init` makes every parameter, whatever is called
        return x

    def _views(self, mask, segments):
        steps = np.arange(mask.shape[1])
        near = np.abs(steps - steps[:, None]) <= self.window // 2  # [T, T]
        if segments is None:
            positions, pairs = steps, mask[:, None, :]  # [T], [B, 1, T]
        else:
            positions, pairs = positions_of(segments), pairs_of(mask, segments)
        rope = functools.partial(rope_1d, positions, self.width // self.num_heads)
        return {
            "whole": View(pairs, rope(self.global_base)),
            "local": View(pairs & near, rope(self.local_base)),
        }

    def _decode(self, x):
        x = self.mlm_norm(gelu(self.mlm_dense(x)))
        logits = jnp.einsum(
            "btd,vd->btv",
            x,
            self.word_embedding.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return logits + self.mlm_bias


def make(variant: str = "base", **overrides: Any) -> ModernBert:
    """Build a published size; `overrides` are fields of ModernBert.

    Raises:
      UserError: for an unknown variant or field.
    """
    return from_variant(ModernBert, VARIANTS, variant, overrides)
