"""Images and a text as soft tokens between the words of a prompt.

PRIMA, Wang et al. 2026, https://arxiv.org/abs/2602.23297, stage 3; sizes are our choice. Class
tokens go through an Mlp, the other tokens through a convolution that halves their grid:

  question <0> [g_1, l_1, ...] [g_2, l_2, ...] <1> <2> g_text, l_text, ... <3> answer

Axis letters: B batch, J views, K patches, T tokens of a text, D width in, W width out.
"""

import math

import jax.numpy as jnp
from flax import linen as nn

from medvlp_jax.layers.linear import Linear, gelu
from medvlp_jax.layers.norms import LayerNorm

AROUND = 4  # delimiters: before and after the images, before and after the text


class Downsample(nn.Module):
    """Convolution of 3 taps an axis with stride 2, GELU, LayerNorm, pointwise convolution."""

    hidden: int
    features: int

    @nn.compact
    def __call__(self, x):
        """Map [B, ..., D] to [B, ceil(.../2), W]: of H x W pixels, or of T tokens."""
        axes = x.ndim - 2
        x = nn.Conv(self.hidden, (3,) * axes, strides=2, padding=1, name="convolution")(x)
        return Linear(self.features, name="out")(LayerNorm(name="norm")(gelu(x)))


class Projector(nn.Module):
    """Linear, GELU, Linear, after a LayerNorm where asked for; float32."""

    features: int
    hidden: int
    has_norm: bool = False

    @nn.compact
    def __call__(self, x):
        """Map [..., D] to [..., W]."""
        x = x.astype(jnp.float32)
        x = LayerNorm(name="norm")(x) if self.has_norm else x
        return Linear(self.features, name="out")(gelu(Linear(self.hidden, name="up")(x)))


class Fusion(nn.Module):
    """From aligned features to the tokens a language model reads.

    Attributes:
      width: W.
      hidden: channels between the two convolutions.
    """

    width: int
    hidden: int

    @nn.compact
    def __call__(self, image, text, *, question, answer, delimiters):
        """Lay everything out in one row a patient.

        Args:
          image: class tokens [B, J, D] and patches [B, J, K, D], K a square number.
          text: class token [B, D], words [B, T, D] and their mask, padding behind the words.
          question: embeddings [1, n, W].
          answer: likewise.
          delimiters: what each delimiter starts from [4, W]; what is learnt is added to it, so
            that weight decay pulls back to the words.

        Returns:
          Embeddings [B, length, W] and their mask [B, length].

        Raises:
          ValueError: if the patches form no square, or the delimiters are not four.
        """
        (seen, patches), (told, words, real) = image, text
        batch, views, count, _ = patches.shape
        side = math.isqrt(count)
        if side**2 != count:
            raise ValueError(f"{count} patches form no square grid.")
        if len(delimiters) != AROUND:
            raise ValueError(f"There are {AROUND} delimiters, not {len(delimiters)}.")
        grid = patches.reshape(batch * views, side, side, -1)
        patches = Downsample(self.hidden, self.width, name="image_local")(grid)
        patches = patches.reshape(batch, views, -1, self.width)
        seen = Projector(self.width, self.width, name="image_global")(seen)[
            :, :, None
        ]  # [B, J, 1, W]
        seen = jnp.concatenate([seen, patches], axis=2).reshape(batch, -1, self.width)

        # Padding is zero to the convolution, as beyond the last token: no text sees its length.
        words = jnp.where(real[..., None], words, 0)
        words = Downsample(self.hidden, self.width, name="text_local")(words)
        told = Projector(self.width, self.width, name="text_global")(told)[:, None]

        learnt = self.param("delimiters", nn.initializers.zeros, (AROUND, self.width))
        marks = delimiters + learnt.astype(delimiters.dtype)
        pieces = [question, marks[None, :1], seen, marks[None, 1:2], marks[None, 2:3]]
        pieces += [told, words, marks[None, 3:], answer]
        rows = [jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in pieces]
        # Token i of the shorter text stands on token 2i: real where that is.
        masks = [real[:, ::2] if x is words else jnp.ones(x.shape[:2], bool) for x in pieces]
        masks = [jnp.broadcast_to(mask, (batch, mask.shape[1])) for mask in masks]
        embeddings = jnp.concatenate([x.astype(delimiters.dtype) for x in rows], axis=1)
        return embeddings, jnp.concatenate(masks, axis=1)
