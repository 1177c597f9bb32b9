"""IMITATE's heads: what reads a few channels of every level, and the projection all three share.

Liu et al., https://arxiv.org/abs/2310.07355; what follows the released code is told in
docs/imitate.md.

Axis letters: B batch, D width, H, W feature-map pixels, c drawn channels, T tokens, G = 16 * 16
pooled pixels, N tokens with padding, A attention heads, S head width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from medvlp_jax.layers.linear import Linear, torch_linear, torch_uniform
from medvlp_jax.layers.norms import BatchNorm

POOLED = 16  # side of the pooled maps


def adaptive_pool_matrix(size: int, out: int = POOLED) -> np.ndarray:
    """Return P [out, size] so that P X P^T is torch's adaptive average pooling of X [size, size].

    Window i covers floor(i size / out) up to ceil((i + 1) size / out), exclusive.
    """
    matrix = np.zeros((out, size), np.float32)
    for i in range(out):
        start, end = i * size // out, -(-(i + 1) * size // out)
        matrix[i, start:end] = 1.0 / (end - start)
    return matrix


def pool_levels(levels, draws) -> jax.Array:
    """Pool the drawn channels of every level, None for all, to 16x16: [B, G, T], a token each."""
    tokens = []
    for level, channels in zip(levels, draws, strict=True):
        picked = level if channels is None else jnp.take(level, channels, axis=-1)  # [B, H, W, c]
        rows, columns = (adaptive_pool_matrix(n) for n in picked.shape[1:3])
        pooled = jnp.einsum("ph,qw,bhwc->bpqc", rows, columns, picked)
        tokens.append(rearrange(pooled, "b p q c -> b (p q) c"))
    return jnp.concatenate(tokens, axis=-1)


class Head(nn.Module):
    """Linear, BatchNorm, ReLU, Linear, BatchNorm without affine: the shape of all three heads."""

    hidden: int
    dim: int

    @nn.compact
    def __call__(self, x, *, train, valid=None, source=""):
        """Map [B, D] to [B, dim], not normalised; `valid` and `source` as in BatchNorm."""
        norm, last_norm = BatchNorm(name="norm"), BatchNorm(affine=False, name="last_norm")
        kind = {"train": train, "valid": valid, "source": source}
        x = nn.relu(norm(torch_linear(x, self.hidden, "first"), **kind))
        return last_norm(torch_linear(x, self.dim, "second"), **kind)


class ClassAttention(nn.Module):
    """Self-attention with residual of which only the class token, the last one, is evaluated.

    The class token does not depend on the image, so neither does its query q [A, S]: keys enter as
    (W_k^T q)^T x and values as W_v (sum_t a_t x_t), and no token is ever projected. The sequence is
    never built either: what an image adds to it is read where it lies, and positions, padding and
    class token, the same for all images, enter apart. The result is exactly row N of the full layer
    at T * G * A instead of N * N * G multiplications.
    """

    num_heads: int = 4

    @nn.compact
    def __call__(self, tokens, fixed, mask=None):
        """Return the class token's output [B, G].

        Args:
          tokens: [B, G, T], added to the first T rows of `fixed`.
          fixed: [N + 1, G], the class token last; rows beyond T are padding.
          mask: [N + 1], True = attended.
        """
        width, drawn = tokens.shape[1:]
        heads = (self.num_heads, width // self.num_heads)
        # torch initialises the stacked [3 * width, width] projection as one Xavier matrix.
        bound = np.sqrt(6 / (4 * width))
        xavier = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        kernel = lambda name: self.param(f"{name}_kernel", xavier, (width, width))
        bias = lambda name: self.param(f"{name}_bias", nn.initializers.zeros, (width,))

        tokens = tokens.astype(jnp.float32)
        query = (fixed[-1] @ kernel("query") + bias("query")).reshape(heads)  # [A, S]
        # The key bias adds the same number to every logit of a head: it is kept, as torch has it,
        # and cancels in the softmax.
        keys = jnp.einsum("gas,as->ga", kernel("key").reshape(width, *heads), query)
        shift = jnp.einsum("as,as->a", bias("key").reshape(heads), query)
        logits = jnp.einsum("bgt,ga->bat", tokens, keys)
        logits = jnp.pad(logits, ((0, 0), (0, 0), (0, len(fixed) - drawn)))
        logits = (logits + (fixed @ keys + shift).T) / np.sqrt(heads[1])
        if mask is not None:
            logits = jnp.where(mask, logits, -jnp.inf)
        weights = jax.nn.softmax(logits)  # [B, A, N + 1]
        context = jnp.einsum("bat,bgt->bag", weights[..., :drawn], tokens) + weights @ fixed
        value_kernel = kernel("value").reshape(width, *heads)
        values = jnp.einsum("bag,gas->bas", context, value_kernel) + bias("value").reshape(heads)
        out = Linear(width, kernel_init=torch_uniform(width), name="out")
        return out(rearrange(values, "b a s -> b (a s)")) + fixed[-1]


class ReadingHead(nn.Module):
    """Channel tokens of all levels, positions, a class token, one attention layer, a head."""

    dim: int
    num_tokens: int
    mask_padding: bool

    @nn.compact
    def __call__(self, levels, draws, *, train):
        """Map levels, each [B, H, W, C], and draws, each [c] or None for all, to [B, dim]."""
        tokens = pool_levels(levels, draws)  # [B, G, drawn]
        width, drawn = tokens.shape[1:]
        positions = self.param("positions", nn.initializers.zeros, (1, self.num_tokens + 1, width))
        class_token = self.param("class_token", nn.initializers.zeros, (1, 1, width))
        # The class token has position 0 and stands last; padding has positions too, as released.
        fixed = jnp.concatenate([positions[0, 1:], class_token[0] + positions[0, :1]])
        real = np.r_[np.arange(self.num_tokens) < drawn, True] if self.mask_padding else None
        pooled = ClassAttention(name="attention")(tokens, fixed, real)
        return Head(width, self.dim, name="head")(pooled, train=train)
