"""The 3-D residual-Mamba net of CFCML (Liu et al. 2026, https://arxiv.org/abs/2603.20016).

* A stem and three stages of residual blocks, each of half the size and twice the channels; the
  blocks after a stage's first add a Mamba branch (Gu and Dao 2023,
  https://arxiv.org/abs/2312.00752).
* All those blocks of one stage hold the *same* branch: its parameters and running statistics.
* The branch reads its tokens four ways, reversed along the tokens and along the *channels*, as the
  released code does.
* The state is float32 and exact in any chunking; the scan is associative, not a loop over tokens.
* `levels` are the stem's and the stages' outputs; `tokens` are the voxels of the last, slices
  fastest.

Axis letters: B batch, H, W pixels, S slices, C channels, L tokens, E inner channels, N state,
K tokens of a chunk, G chunks.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medvlp_jax.encoders.base import Encoded, from_variant
from medvlp_jax.layers import BatchNorm, Linear, product, torch_uniform

# "men": the released code's net for one modality of meningioma. "tiny" is our choice, for tests.
VARIANTS = {
    "tiny": {"channels": 4, "depths": (2, 2, 2)},
    "men": {"channels": 16, "depths": (3, 3, 3)},
}


@jax.custom_vjp
def recurrence(decay, drive):
    """Solve h_t = decay_t h_{t-1} + drive_t along the first axis, from h_{-1} = 0.

    Its gradient is the same recurrence backwards, which costs half of differentiating the scan.
    """
    return _scan(decay, drive)


def _scan(decay, drive, *, reverse=False):
    def combine(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(combine, (decay, drive), reverse=reverse)[1]


def _forward(decay, drive):
    state = _scan(decay, drive)
    return state, (decay, state)


def _backward(kept, gradient):
    decay, state = kept
    later = jnp.concatenate([decay[1:], jnp.zeros_like(decay[:1])])
    earlier = jnp.concatenate([jnp.zeros_like(state[:1]), state[:-1]])
    gradient = _scan(later, gradient, reverse=True)
    return gradient * earlier, gradient


recurrence.defvjp(_forward, _backward)


def selective_scan(u, delta, a, b, c, *, chunk: int = 16):
    """Run the state-space model of Mamba, Algorithm 2: y_t = c_t h_t along the tokens.

    h_t = exp(delta_t a) h_{t-1} + delta_t b_t u_t, from h = 0. Chunks follow one another, the
    tokens of one are scanned together, and the backward pass recomputes their states: memory is
    that of one chunk's states [K, B, E, N] and of G carried ones.

    Args:
      u: [B, L, E].
      delta: step sizes > 0, [B, L, E].
      a: [E, N], negative.
      b: [B, L, N].
      c: [B, L, N].
      chunk: K, at most L; 1 is the sequential scan. On a CPU that is the fastest forward, and 16
        the fastest with the gradient (benchmarks/selective_scan.py).

    Returns:
      [B, L, E].
    """
    batch, length, inner = u.shape
    chunk = min(chunk, length)
    chunks = -(-length // chunk)

    def cut(x):  # steps of size 0 keep the state
        x = jnp.pad(x, ((0, 0), (0, chunks * chunk - length), (0, 0)))
        return x.reshape(batch, chunks, chunk, -1).transpose(1, 2, 0, 3)  # [G, K, B, .]

    @jax.checkpoint
    def step(state, inputs):
        u, delta, b, c = inputs
        decay = jnp.exp(delta[..., None] * a)  # [K, B, E, N]
        drive = (delta * u)[..., None] * b[:, :, None]
        states = recurrence(decay, drive.at[0].add(decay[0] * state))
        return states[-1], jnp.einsum("kben,kbn->kbe", states, c)

    state = jnp.zeros((batch, *a.shape), jnp.float32)
    _, y = jax.lax.scan(step, state, tuple(map(cut, (u, delta, b, c))))  # [G, K, B, E]
    return y.transpose(2, 0, 1, 3).reshape(batch, chunks * chunk, inner)[:, :length]


def _log_arange(key, shape, dtype=jnp.float32):
    """Log of 1 ... N in every row: Mamba's real S4D initialisation of -a."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)


def _step_bias(key, shape, dtype=jnp.float32):
    """Draw the bias whose softplus is log-uniform in [0.001, 0.1]."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    return step + jnp.log(-jnp.expm1(-step))


class Mamba(nn.Module):
    """A causal Mamba layer over tokens.

    Attributes:
      state: N, numbers a channel remembers.
      expand: E / C.
      conv_size: tokens the causal convolution sees.
      chunk: see selective_scan.
      dtype: of the matrix products; the scan is float32.
    """

    state: int = 16
    expand: int = 2
    conv_size: int = 4
    chunk: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Map [B, L, C] to [B, L, C]."""
        width = x.shape[-1]
        inner, rank = self.expand * width, math.ceil(width / 16)

        def linear(name, x, features):
            init = torch_uniform(x.shape[-1])
            return Linear(features, False, self.dtype, init, name=name)(x)

        u, gate = jnp.split(linear("in", x, 2 * inner), 2, axis=-1)  # [B, L, E] each
        u = nn.silu(self._causal_conv(u))
        delta, b, c = jnp.split(
            linear("select", u, rank + 2 * self.state), [rank, rank + self.state], axis=-1
        )
        bias = self.param("delta_bias", _step_bias, (inner,))
        delta = nn.softplus(linear("delta", delta, inner).astype(jnp.float32) + bias)
        a = -jnp.exp(self.param("a_log", _log_arange, (inner, self.state)))
        u, b, c = (part.astype(jnp.float32) for part in (u, b, c))
        y = selective_scan(u, delta, a, b, c, chunk=self.chunk)
        y += self.param("skip", nn.initializers.ones, (inner,)) * u
        return linear("out", y * nn.silu(gate), width)

    def _causal_conv(self, x):
        """Convolve each channel with itself and the tokens before it."""
        init = torch_uniform(self.conv_size)
        kernel = self.param("conv_kernel", init, (self.conv_size, x.shape[-1])).astype(x.dtype)
        bias = self.param("conv_bias", init, (x.shape[-1],)).astype(x.dtype)
        padded = jnp.pad(x, ((0, 0), (self.conv_size - 1, 0), (0, 0)))
        return sum(padded[:, i : i + x.shape[1]] * row for i, row in enumerate(kernel)) + bias


def four_ways(f, x):
    """Average f over [B, L, C] read as is, reversed in C, in L and in both, each reversed back."""
    flips = ((), (-1,), (-2,), (-1, -2))
    y = f(jnp.concatenate([jnp.flip(x, axes) for axes in flips]))  # [4B, L, C]
    parts = jnp.split(y, len(flips))
    return sum(jnp.flip(part, axes) for part, axes in zip(parts, flips, strict=True)) / len(flips)


def convolve(x, kernel, *, stride: int):
    """Convolve [B, H, W, S, C] with [k, k, k, C, D], padded by k // 2 on all sides."""
    side = kernel.shape[0] // 2
    numbers = ("NHWDC", "HWDIO", "NHWDC")
    padding = ((side, side),) * 3
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,) * 3, padding, dimension_numbers=numbers
    )


def convolve_by_slices(x, kernel, *, stride: int):
    """Do the same as a sum over the slices of the kernel of convolutions of images."""
    batch, _, _, slices, channels = x.shape
    size, side, count = kernel.shape[0], kernel.shape[0] // 2, -(-slices // stride)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (side, side), (0, 0)))
    x = jnp.moveaxis(x, 3, 1)  # [B, S, H, W, C]
    numbers, padding, total = ("NHWC", "HWIO", "NHWC"), ((side, side),) * 2, 0
    for k in range(size):
        images = x[:, k : k + (count - 1) * stride + 1 : stride]
        images = images.reshape(batch * count, *x.shape[2:4], channels)
        total += jax.lax.conv_general_dilated(
            images, kernel[:, :, k], (stride,) * 2, padding, dimension_numbers=numbers
        )
    return jnp.moveaxis(total.reshape(batch, count, *total.shape[1:]), 1, 3)


class Conv(nn.Module):
    """3-D convolution, padded by size // 2 on both sides as in torch ("SAME" is not)."""

    features: int
    size: int
    stride: int = 1
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Map [B, H, W, S, C] to [B, H/stride, W/stride, S/stride, features], rounded up."""
        shape = (self.size,) * 3 + (x.shape[-1], self.features)
        init = torch_uniform(math.prod(shape[:-1]))
        kernel = self.param("kernel", init, shape)
        x, stride = x.astype(self.dtype), self.stride
        if self.size == 1:  # a matrix product
            y = product(x[:, ::stride, ::stride, ::stride], kernel[0, 0, 0])
        else:
            # XLA's convolution of volumes on a CPU takes 6 to 58 times as long with the gradient
            # (benchmarks/selective_scan.py).
            y = jax.lax.platform_dependent(
                x,
                kernel.astype(self.dtype),
                cpu=functools.partial(convolve_by_slices, stride=stride),
                default=functools.partial(convolve, stride=stride),
            )
        if self.use_bias:
            y += self.param("bias", init, (self.features,)).astype(self.dtype)
        return y


class Branch(nn.Module):
    """A Mamba layer over the voxels of a volume, between two 1x1x1 convolutions."""

    chunk: int = 16
    bn_momentum: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, train=False):
        """Map [B, H, W, S, C] to [B, H, W, S, C]."""
        width = x.shape[-1]
        conv = functools.partial(Conv, width, 1, dtype=self.dtype)
        norm = functools.partial(BatchNorm, self.bn_momentum, dtype=self.dtype)
        u = nn.relu(norm(name="norm_in")(conv(name="conv_in")(x), train=train))
        mamba = Mamba(chunk=self.chunk, dtype=self.dtype, name="mamba")
        y = four_ways(mamba, u.reshape(u.shape[0], -1, width))  # [B, L, C]
        y = conv(name="conv_out")(y.reshape(u.shape) + u)
        return nn.relu(norm(name="norm_out")(y, train=train))


class Residual(nn.Module):
    """Two 3x3x3 convolutions around a shortcut, projected where the shape changes."""

    features: int
    stride: int = 1
    bn_momentum: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, branch=None, *, train=False):
        """Map [B, H, W, S, C] to [B, H/stride, W/stride, S/stride, features]."""
        conv = functools.partial(Conv, self.features, dtype=self.dtype)
        norm = functools.partial(BatchNorm, self.bn_momentum, dtype=self.dtype)
        y = nn.relu(norm(name="norm1")(conv(3, self.stride, name="conv1")(x), train=train))
        y = norm(name="norm2")(conv(3, name="conv2")(y), train=train)
        if branch is not None:
            y += branch(x, train=train)
        if x.shape != y.shape:
            x = conv(1, self.stride, name="shortcut_conv")(x)
            x = norm(name="shortcut_norm")(x, train=train)
        return nn.relu(x + y)


class Mamba3D(nn.Module):
    """A volume through a stem and residual stages; `pooled` is the mean of the last's voxels.

    Attributes:
      channels: of the stem; each stage has twice as many as the one before.
      depths: blocks of each stage.
      chunk: tokens scanned together, see selective_scan.
      bn_momentum: weight of the new batch statistics in the running ones, torch's convention.
      dtype: of the convolutions and matrix products.
    """

    channels: int = 16
    depths: tuple[int, ...] = (3, 3, 3)
    chunk: int = 16
    bn_momentum: float = 0.1
    dtype: Any = jnp.float32

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Channels of each of `levels`."""
        return tuple(self.channels * 2**i for i in range(len(self.depths) + 1))

    @property
    def width(self) -> int:
        """Dimension of `pooled` and `tokens`."""
        return self.level_widths[-1]

    @nn.compact
    def __call__(self, volumes, *, train=False) -> Encoded:
        """Encode normalised volumes [B, H, W, S, C], such as one modality with C = 1.

        Returns:
          Encoded with pooled [B, D], tokens [B, L, D] and levels [B, H, W, S, C], the stem's first.

        Raises:
          ValueError: if the volumes have not five axes.
        """
        if volumes.ndim != 5:
            raise ValueError(f"Mamba3D takes volumes [B, H, W, S, C], got {list(volumes.shape)}.")
        x = volumes
        for i, stride in ((1, 2), (2, 1)):
            conv = Conv(self.channels, 3, stride, True, self.dtype, name=f"stem_conv{i}")
            norm = BatchNorm(self.bn_momentum, dtype=self.dtype, name=f"stem_norm{i}")
            x = nn.relu(norm(conv(x), train=train))  # [B, H/2, W/2, S/2, C]
        levels = [x]
        for stage, depth in enumerate(self.depths):
            branch = Branch(self.chunk, self.bn_momentum, self.dtype, name=f"stage_{stage}_branch")
            for i in range(depth):
                block = Residual(
                    self.level_widths[stage + 1],
                    2 if i == 0 else 1,
                    self.bn_momentum,
                    self.dtype,
                    name=f"stage_{stage}_block_{i}",
                )
                x = block(x, None if i == 0 else branch, train=train)
            levels.append(x)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, L, D]
        return Encoded(pooled=tokens.mean(1), tokens=tokens, levels=tuple(levels))


def make(variant: str = "men", **overrides: Any) -> Mamba3D:
    """Build a published size; `overrides` are fields of Mamba3D.

    Raises:
      UserError: for an unknown variant or field.
    """
    return from_variant(Mamba3D, VARIANTS, variant, overrides)
