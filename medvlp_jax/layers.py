"""The few layers the encoders and heads are made of: Flax Linen, parameters in float32.

`dtype` is the type of the matrix products; norms, softmax and statistics are float32 in any case.

Axis letters: B batch, T tokens, D width, A heads, S head width, L layers.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]

gelu = functools.partial(jax.nn.gelu, approximate=False)


def torch_uniform(fan_in: int) -> Initializer:
    """Uniform in ±1/sqrt(fan_in): torch's default for both weight and bias of `nn.Linear`."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Linear(nn.Module):
    """x W + b over the last axis. Parameters: kernel [in, features], bias [features]."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x):
        """Map [..., in] to [..., features]."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        x = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            x += self.param("bias", self.bias_init, (self.features,)).astype(self.dtype)
        return x


class LayerNorm(nn.Module):
    """Normalise the last axis, then scale and shift; in float32, returned as `dtype`."""

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Map [..., D] to [..., D]."""
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        y *= self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y += self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return y.astype(self.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation with torch's semantics, over every axis but the last.

    Training normalises with the batch's mean and biased variance, and moves the running averages
    (collection "batch_stats") by `momentum` towards the mean and the *unbiased* variance, as torch
    does and flax's own BatchNorm does not. Two calls in one `apply` move them twice, in order.

    Under `jit` with global arrays the mean is over the global batch: synchronised BatchNorm.

    Attributes:
      momentum: weight of the new statistics, torch's convention (0.1 = flax's 0.9).
      epsilon: added to the variance.
      affine: whether to scale and shift afterwards.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    affine: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, train=False, valid=None, source=""):
        """Normalise.

        Args:
          x: [B, ..., D].
          train: use this batch's statistics and update the running ones.
          valid: [B] bool, examples that count in the statistics; None counts all.
          source: which running statistics, where one layer serves several kinds of input.

        Returns:
          [B, ..., D] as `dtype`.

        Raises:
          ValueError: in training with a single value a channel, whose variance is undefined.
        """
        width = (x.shape[-1],)
        suffix = f"_{source}" if source else ""
        running_mean = self.variable("batch_stats", f"mean{suffix}", jnp.zeros, width)
        running_var = self.variable("batch_stats", f"var{suffix}", jnp.ones, width)
        x = x.astype(jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train:
            mean, var, unbiased = _batch_statistics(x, valid)
            if not self.is_initializing():
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_var.value += self.momentum * (unbiased - running_var.value)
        scale = jax.lax.rsqrt(var + self.epsilon)
        if self.affine:
            scale *= self.param("scale", nn.initializers.ones, width)
        y = (x - mean) * scale
        if self.affine:
            y += self.param("bias", nn.initializers.zeros, width)
        return y.astype(self.dtype)


def _batch_statistics(x, valid):
    """Return mean, biased and unbiased variance of [B, ..., D] over all axes but the last."""
    count = x.size // x.shape[-1]
    if count < 2:
        raise ValueError(
            f"BatchNorm cannot train on {x.shape}: one value a channel has no variance."
        )
    axes = tuple(range(x.ndim - 1))
    if valid is None:
        average = functools.partial(jnp.mean, axis=axes)
    else:
        weight = valid.astype(jnp.float32).reshape(-1, *[1] * (x.ndim - 1))
        count = weight.sum() * (count // x.shape[0])

        def average(values):
            return (values * weight).sum(axes) / jnp.maximum(count, 1.0)

    mean = average(x)
    var = average(
        jnp.square(x - mean)
    )  # two passes: E[x²] - E[x]² loses digits where |mean| >> std
    return mean, var, var * (count / jnp.maximum(count - 1, 1))


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, Linear."""

    mlp_dim: int
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        """Map [..., D] to [..., D] through [..., mlp_dim]."""
        linear = functools.partial(Linear, dtype=self.dtype, kernel_init=self.kernel_init)
        return linear(x.shape[-1], name="down")(gelu(linear(self.mlp_dim, name="up")(x)))


class Attention(nn.Module):
    """Multi-head self-attention with separate query, key, value and out projections.

    Attributes:
      num_heads: divides the width.
      dropout: on the attention probabilities, in training only.
      implementation: of `jax.nn.dot_product_attention`: "xla" anywhere; "cudnn" (flash attention)
        on NVIDIA GPUs, with a 16-bit `dtype` and no dropout.
    """

    num_heads: int
    dropout: float = 0.0
    implementation: Literal["xla", "cudnn"] = "xla"
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x, mask=None, *, train=False):
        """Attend.

        Args:
          x: [B, T, D].
          mask: [B, T] bool, True = this key may be attended; None attends all.
          train: apply dropout.

        Returns:
          [B, T, D].

        Raises:
          ValueError: if the heads do not divide D, or dropout is asked of cuDNN.
        """
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide a width of {width}.")
        linear = functools.partial(Linear, width, dtype=self.dtype, kernel_init=self.kernel_init)
        heads = (*x.shape[:-1], self.num_heads, width // self.num_heads)
        query, key, value = (
            linear(name=name)(x).reshape(heads) for name in ("query", "key", "value")
        )  # [B, T, A, S]
        mask = None if mask is None else mask[:, None, None, :]
        if train and self.dropout > 0:
            y = self._attend_with_dropout(query, key, value, mask)
        else:
            y = jax.nn.dot_product_attention(
                query, key, value, mask=mask, implementation=self.implementation
            )
        return linear(name="out")(y.reshape(x.shape))

    def _attend_with_dropout(self, query, key, value, mask):
        if self.implementation != "xla":
            raise ValueError(
                f"Attention dropout {self.dropout} needs implementation 'xla', not "
                f"{self.implementation!r}; or set the dropout to 0."
            )
        logits = jnp.einsum("btas,buas->batu", query, key, preferred_element_type=jnp.float32)
        logits *= query.shape[-1] ** -0.5
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        probabilities = nn.Dropout(self.dropout, deterministic=False)(jax.nn.softmax(logits))
        return jnp.einsum("batu,buas->btas", probabilities.astype(self.dtype), value)


REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stack(nn.Module):
    """The same block L times: the one place that scans or rematerialises.

    Parameters are block_0 ... block_{L-1} when unrolled; scanned, one "blocks" whose arrays have a
    leading axis L (compiles L times faster, and cannot treat layers differently).

    Attributes:
      block: a module class called as block(x, mask, train=...) that keeps the shape of x.
      fields: what to construct it with.
      depth: L.
      layout: how parameters and program are laid out.
      remat: what the backward pass recomputes: "none", "dots" (all but matrix products), "full".
    """

    block: type[nn.Module]
    fields: Mapping[str, Any]
    depth: int
    layout: Literal["unrolled", "scan"] = "unrolled"
    remat: Literal["none", "dots", "full"] = "none"

    @nn.compact
    def __call__(self, x, mask=None, *, train=False):
        """Map [B, T, D] to [B, T, D]."""

        def run(block, x):
            return block(x, mask, train=train)

        if self.remat != "none":
            # Inside a scan nothing can be merged across iterations, so the CSE barrier only costs.
            run = nn.remat(run, policy=REMAT[self.remat], prevent_cse=self.layout != "scan")
        if self.layout == "scan":
            scan = nn.scan(
                lambda block, x, _: (run(block, x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.depth,
            )
            return scan(self.block(**self.fields, name="blocks"), x, None)[0]
        for i in range(self.depth):
            x = run(self.block(**self.fields, name=f"block_{i}"), x)
        return x
