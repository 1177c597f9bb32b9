"""Normalisation; statistics are float32 whatever the type of the input."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medvlp_jax.layers.layout import sum_of_rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(x, scale, bias, epsilon: float, dtype: Any):
    """Return (x - mean) / sqrt(var + epsilon) * scale + bias over the last axis.

    Its backward pass keeps x, mean and deviation and works the rest out again: what XLA would keep
    is larger, in float32. No forward-mode derivative.

    Args:
      x: [..., D]; the arithmetic is float32.
      scale: [D].
      bias: [D] or None.
      epsilon: added to the variance.
      dtype: of the result.
    """
    return _layer_norm_forward(x, scale, bias, epsilon, dtype)[0]


def _layer_norm_forward(x, scale, bias, epsilon, dtype):
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + epsilon)
    y = (wide - mean) * inverse * scale
    return (y if bias is None else y + bias).astype(dtype), (x, mean, inverse, scale, bias)


def _layer_norm_backward(epsilon, dtype, kept, dy):
    x, mean, inverse, scale, bias = kept
    # Else the compiler finds the forward pass' numbers again, and keeps them in float32.
    x, dy = jax.lax.optimization_barrier((x, dy))
    wide, unit = dy.astype(jnp.float32), (x.astype(jnp.float32) - mean) * inverse
    average = lambda array: array.mean(-1, keepdims=True)
    inner = wide * scale
    dx = inverse * (inner - average(inner) - unit * average(inner * unit))
    # Likewise: the sums over rows read x and dy, not a product that was written for them.
    x, dy = jax.lax.optimization_barrier((x, dy))
    wide, unit = dy.astype(jnp.float32), (x.astype(jnp.float32) - mean) * inverse
    dbias = None if bias is None else sum_of_rows(wide)
    return dx.astype(x.dtype), sum_of_rows(wide * unit), dbias


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
    """Normalise the last axis, then scale and maybe shift; in float32, returned as `dtype`."""

    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        """Map [..., D] to [..., D]."""
        features, bias = x.shape[-1:], None
        scale = self.param("scale", nn.initializers.ones, features)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, features)
        return layer_norm(x, scale, bias, self.epsilon, self.dtype)


class RMSNorm(nn.Module):
    """Divide the last axis by its root mean square, then scale; float32, returned as `dtype`.

    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, Eq. 4.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Map [..., D] to [..., D]."""
        x = x.astype(jnp.float32)
        y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (y * self.param("scale", nn.initializers.ones, (x.shape[-1],))).astype(self.dtype)


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
          valid: [B] bool, examples that count in the statistics; None counts all. Where they are
            too few for a variance, the running statistics serve and stay as they are.
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
            if valid is not None:
                # Without two values there is no variance: as in evaluation, and nothing is learnt.
                enough = valid.sum() * (x[0].size // x.shape[-1]) >= 2
                mean = jnp.where(enough, mean, running_mean.value)
                var = jnp.where(enough, var, running_var.value)
                unbiased = jnp.where(enough, unbiased, running_var.value)
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
    # Two passes: E[x²] - E[x]² loses digits where |mean| >> std.
    var = average(jnp.square(x - mean))
    return mean, var, var * (count / jnp.maximum(count - 1, 1))
