"""IMITATE's heads: what reads a few channels of every level, and the projection all three share.

Liu et al., https://arxiv.org/abs/2310.07355; what follows the released code is told in
docs/imitate.md.

Axis letters: B batch, R readings, D width, H, W feature-map pixels, P = H * W, C channels, c drawn
channels, T tokens, G = 16 * 16 pooled pixels, N tokens with padding, A attention heads, S head
width.
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


def pool_matrix(height: int, width: int) -> np.ndarray:
    """Return [height * width, G], which pools a level whose pixels stand in one row."""
    return np.kron(adaptive_pool_matrix(height), adaptive_pool_matrix(width)).T


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

    A token is a channel of a level, pooled to 16x16; the class token does not depend on the image.
    So neither does its query q [A, S], and neither tokens nor their keys and values are ever made:
    a key enters as W_k^T q, which pooling, being linear, spreads over the pixels of a level once
    for all images, and the channels are weighed and summed before they are pooled and multiplied
    by W_v. Positions, padding and class token, the same for all images, enter apart. To rounding
    the result is row N of the full layer over pooled tokens, for (1 + R) A products a pixel and
    channel. Levels are multiplied in their own type and summed in float32.
    """

    num_heads: int = 4

    @nn.compact
    def __call__(self, levels, draws, fixed, mask=None):
        """Return the class token's output in R readings of the same levels: [B, R, G].

        Args:
          levels: feature maps, each [B, H, W, C].
          draws: R times [c] of each level, the channels that are tokens, None for all in order.
          fixed: [N + 1, G], added to the tokens, the class token last; rows beyond T are padding.
          mask: [N + 1], True = attended.
        """
        width = fixed.shape[1]
        heads = (self.num_heads, width // self.num_heads)
        # torch initialises the stacked [3 * width, width] projection as one Xavier matrix.
        bound = np.sqrt(6 / (4 * width))
        xavier = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        kernel = lambda name: self.param(f"{name}_kernel", xavier, (width, width))
        bias = lambda name: self.param(f"{name}_bias", nn.initializers.zeros, (width,))

        query = (fixed[-1] @ kernel("query") + bias("query")).reshape(heads)  # [A, S]
        query /= np.sqrt(heads[1])
        # The key bias adds the same number to every logit of a head: it is kept, as torch has it,
        # and cancels in the softmax.
        keys = jnp.einsum("gas,as->ag", kernel("key").reshape(width, *heads), query)
        shift = jnp.einsum("as,as->a", bias("key").reshape(heads), query)
        of_fixed = keys @ fixed.T + shift[:, None]  # [A, N + 1]

        pools = [pool_matrix(*level.shape[1:3]) for level in levels]  # [P, G] of each level
        ends = np.cumsum([len(pool) for pool in pools])[:-1]
        pool = jnp.asarray(np.concatenate(pools))
        levels = [rearrange(level, "b h w c -> b (h w) c") for level in levels]
        spread = jnp.split(keys @ pool.T, ends, axis=1)  # [A, P] of each level
        logits = [_for_each(key, level) for key, level in zip(spread, levels, strict=True)]

        read = [_weigh(logits, drawn, of_fixed, mask) for drawn in draws]
        weights, shares = zip(*read, strict=True)
        shares = [jnp.concatenate(level, axis=1) for level in zip(*shares, strict=True)]
        maps = [_maps(share, level) for share, level in zip(shares, levels, strict=True)]
        context = jnp.concatenate(maps, axis=-1) @ pool  # [B, R A, G]
        context = rearrange(context, "b (r a) g -> b r a g", r=len(draws))
        context += jnp.stack(weights, axis=1) @ fixed
        value_kernel = kernel("value").reshape(width, *heads)
        values = jnp.einsum("brag,gas->bras", context, value_kernel) + bias("value").reshape(heads)
        out = Linear(width, kernel_init=torch_uniform(width), name="out")
        return out(rearrange(values, "b r a s -> b r (a s)")) + fixed[-1]


def _for_each(key, level):
    """Multiply [A, P] and [B, P, C]: [B, A, C], in float32.

    A product for each image: as one of all images it would transpose level and gradient.
    """
    key = jnp.broadcast_to(key.astype(level.dtype), (len(level), *key.shape))
    return jnp.einsum("bap,bpc->bac", key, level, preferred_element_type=jnp.float32)


def _maps(share, level):
    """Multiply [B, R A, C] and [B, P, C]: [B, R A, P], in float32."""
    share = share.astype(level.dtype)
    return jnp.einsum("brc,bpc->brp", share, level, preferred_element_type=jnp.float32)


def _weigh(logits, drawn, of_fixed, mask):
    """Weigh the tokens of a reading.

    Args:
      logits: of all channels of each level, [B, A, C].
      drawn: of each level [c] the channels that are tokens, or None for all.
      of_fixed: [A, N + 1], logits of what is the same for all images.
      mask: [N + 1], or None.

    Returns:
      The weights of all tokens [B, A, N + 1], and those of the channels of each level, [B, A, C].
    """
    tokens = [x if d is None else x[..., d] for x, d in zip(logits, drawn, strict=True)]
    ends = np.cumsum([x.shape[-1] for x in tokens])
    padding = of_fixed.shape[-1] - ends[-1]
    tokens = jnp.pad(jnp.concatenate(tokens, axis=-1), ((0, 0), (0, 0), (0, padding))) + of_fixed
    if mask is not None:
        tokens = jnp.where(mask, tokens, -jnp.inf)
    weights = jax.nn.softmax(tokens)
    shares = jnp.split(weights[..., : ends[-1]], ends[:-1], axis=-1)
    # A channel that was drawn twice is two tokens.
    shares = [
        share if d is None else jnp.zeros_like(x).at[..., d].add(share)
        for share, x, d in zip(shares, logits, drawn, strict=True)
    ]
    return weights, shares


class ReadingHead(nn.Module):
    """Channel tokens of all levels, positions, a class token, one attention layer, a head."""

    dim: int
    num_tokens: int
    mask_padding: bool

    @nn.compact
    def __call__(self, levels, draws, *, train):
        """Read the same levels R times.

        Args:
          levels: feature maps, each [B, H, W, C].
          draws: R times [c] of each level, the channels that are read, None for all.
          train: normalise each reading by its own batch, one after the other.

        Returns:
          R embeddings [B, dim].
        """
        width = POOLED**2
        first = zip(levels, draws[0], strict=True)
        drawn = sum(level.shape[-1] if d is None else len(d) for level, d in first)
        positions = self.param("positions", nn.initializers.zeros, (1, self.num_tokens + 1, width))
        class_token = self.param("class_token", nn.initializers.zeros, (1, 1, width))
        # The class token has position 0 and stands last; padding has positions too, as released.
        fixed = jnp.concatenate([positions[0, 1:], class_token[0] + positions[0, :1]])
        real = np.r_[np.arange(self.num_tokens) < drawn, True] if self.mask_padding else None
        pooled = ClassAttention(name="attention")(levels, draws, fixed, real)
        head = Head(width, self.dim, name="head")
        return [head(pooled[:, r], train=train) for r in range(len(draws))]
