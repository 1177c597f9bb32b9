"""The pre-norm transformer block, and the stack that scans or rematerialises any block."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from medvlp_jax.layers.attention import Attention
from medvlp_jax.layers.layout import row_major
from medvlp_jax.layers.linear import GatedMlp, Initializer, Lora, Mlp, gelu
from medvlp_jax.layers.norms import LayerNorm
from medvlp_jax.sharding import batch_apart


class Block(nn.Module):
    """Pre-norm transformer block: x + s attention(norm(x)), then x + s mlp(norm(x)).

    Attributes:
      gated: GatedMlp in place of Mlp.
      layer_scale: initial value of s [D] (Touvron et al. 2021, https://arxiv.org/abs/2103.17239,
        Eq. 4), one for each branch; 0 is none.
      dropout: on each branch, in training only.
      drop_path: probability that an example goes without a branch, in training only.
      epsilon: of the norms.
      attention: implementation, see Attention; as are attention_dropout, biased and causal.
    """

    num_heads: int
    mlp_dim: int
    activation: Callable[[jax.Array], jax.Array] = gelu
    gated: bool = False
    layer_scale: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    epsilon: float = 1e-6
    attention: str = "xla"
    biased: tuple[str, ...] = ("query", "key", "value", "out")
    causal: bool = False
    kernel_init: Initializer = nn.initializers.lecun_normal()
    lora: Lora | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, mask=None, *, train=False, rope=None):
        """Map [B, T, D] to [B, T, D]; mask and rope as Attention takes them."""
        norm = functools.partial(LayerNorm, self.epsilon, self.dtype)
        shared = {"dtype": self.dtype, "kernel_init": self.kernel_init, "lora": self.lora}
        attend = Attention(
            self.num_heads,
            self.attention_dropout,
            self.attention,
            biased=self.biased,
            causal=self.causal,
            name="attention",
            **shared,
        )
        y = attend(norm(name="attention_norm")(x), mask, train=train, rope=rope)
        x += self._branch(y, "attention_scale", train)
        if self.gated:
            mlp = GatedMlp(self.mlp_dim, self.activation, use_bias=True, name="mlp", **shared)
        else:
            mlp = Mlp(self.mlp_dim, activation=self.activation, name="mlp", **shared)
        y = mlp(norm(name="mlp_norm")(x), train=train)
        return x + self._branch(y, "mlp_scale", train)

    def _branch(self, y, name, train):
        if self.layer_scale:
            start = nn.initializers.constant(self.layer_scale)
            y *= self.param(name, start, (y.shape[-1],)).astype(self.dtype)
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        # One draw an example: broadcast over all other axes.
        return nn.Dropout(self.drop_path, (1, 2), deterministic=not train)(y)


# What the backward pass finds of a block besides its input.
REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
ALIGNED = 8  # tokens, so that rows of a batch are whole tiles of a product
Remat = Literal["none", "dots", "block", "full"]


class Stack(nn.Module):
    """The same block L times: the one place that scans or rematerialises.

    Parameters are block_0 ... block_{L-1} when unrolled; scanned, one "blocks" whose arrays have a
    leading axis L (compiles L times faster, and cannot treat layers differently).

    Attributes:
      block: a module class called as block(x, mask, train=..., **shared) that keeps the shape of x;
        where the stack is given `each`, also with own=..., and it then returns (x, output).
      fields: what to construct it with.
      depth: L.
      layout: how parameters and program are laid out.
      remat: what the backward pass recomputes: "none"; "dots", all but the matrix products of a
        block; "block", all but its input; "full", all but the input of the stack: once to have the
        blocks' inputs, and then as "block". "full" is for what waits, the first of two towers.
    """

    block: type[nn.Module]
    fields: Mapping[str, Any]
    depth: int
    layout: Literal["unrolled", "scan"] = "unrolled"
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x, mask=None, *, train=False, each=None, **shared):
        """Map [B, T, D] to [B, T, D].

        Args:
          x: [B, T, D].
          mask: what every block gets beside x.
          train: what every block gets as `train`.
          each: pytree of arrays with a leading axis L; block i gets its slice i as `own`. NumPy
            arrays stay NumPy when unrolled, so that a block can branch on them.
          **shared: further keywords for every block, such as rope.

        Returns:
          [B, T, D]; with `each` the pair of that and the blocks' outputs, stacked over L.
        """

        length = x.shape[1]
        x, mask, shared = self._aligned(x, mask, each, shared)

        def run(block, x, own):
            x = row_major(batch_apart(x))
            if each is None:
                return block(x, mask, train=train, **shared), None
            return block(x, mask, train=train, own=own, **shared)

        # Inside a scan nothing can be merged across iterations, so the CSE barrier only costs.
        if self.remat != "none":
            run = nn.remat(run, policy=REMAT[self.remat], prevent_cse=self.layout != "scan")

        def scanned(stack, x):
            scan = nn.scan(
                run,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=stack.depth,
            )
            return scan(stack.block(**stack.fields, name="blocks"), x, each)

        def unrolled(stack, x):
            outputs = []
            for i in range(stack.depth):
                own = jax.tree.map(lambda leaf: leaf[i], each)  # noqa: B023 - used at once
                x, output = run(stack.block(**stack.fields, name=f"block_{i}"), x, own)
                outputs.append(output)
            return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

        whole = scanned if self.layout == "scan" else unrolled
        if self.remat == "full":
            whole = nn.remat(whole)
        x, outputs = whole(self, x)
        x = x[:, :length]
        return x if each is None else (x, outputs)

    def _aligned(self, x, mask, each, shared):
        """Fill the tokens up to a multiple of ALIGNED for cuDNN, which takes no odd number.

        Once here instead of in every block's attention; nothing attends to what is filled in. Not
        where blocks are given masks or positions of their own: then each attention does it.
        """
        more = -x.shape[1] % ALIGNED
        own = each is not None or mask is not None or not set(shared) <= {"rope"}
        if self.fields.get("attention") != "cudnn" or own or not more:
            return x, mask, shared
        fill = lambda array: jnp.pad(array, (*[(0, 0)] * (array.ndim - 2), (0, more), (0, 0)))
        shared = jax.tree.map(fill, shared)
        return fill(x), x.shape[1], shared
