"""Learned queries that gather what is in a set of tokens, as in DETR's decoder.

Axis letters: B batch, P tokens that are looked at, M queries, D width.
"""

import flax.linen as nn
import jax.numpy as jnp

from medvlp_jax.layers.attention import Attention
from medvlp_jax.layers.linear import Mlp
from medvlp_jax.layers.norms import LayerNorm


class Queries(nn.Module):
    """M learned queries: self-attention, cross-attention to the tokens, MLP; pre-norm.

    Attributes:
      count: M.
      depth: layers.
      num_heads: of both attentions; divides D.
    """

    count: int
    depth: int
    num_heads: int

    @nn.compact
    def __call__(self, tokens, *, train):
        """Map [B, P, D] to [B, M, D] and the last look at the tokens [B, M, P]."""
        batch, _, width = tokens.shape
        queries = self.param("queries", nn.initializers.normal(0.02), (self.count, width))
        x = jnp.broadcast_to(queries, (batch, *queries.shape)).astype(tokens.dtype)
        context = LayerNorm(name="patch_norm")(tokens)
        for i in range(self.depth):
            norm = lambda name, i=i: LayerNorm(name=f"{name}_norm_{i}")
            attend = lambda name, i=i: Attention(self.num_heads, name=f"{name}_{i}")
            x += attend("self")(norm("self")(x), train=train)
            y, paid = attend("cross")(norm("cross")(x), train=train, context=context, shows=True)
            x += y
            x += Mlp(4 * width, name=f"mlp_{i}")(norm("mlp")(x), train=train)
        return LayerNorm(name="norm")(x), paid
