"""The few layers the encoders and heads are made of: Flax Linen, parameters in float32.

`dtype` is the type of the matrix products; norms, softmax and statistics are float32 in any case.

Axis letters: B batch, T tokens, D width, A heads, S head width, L layers.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Initializer = Callable[..., jax.Array]

gelu = functools.partial(jax.nn.gelu, approximate=False)


def torch_uniform(fan_in: int) -> Initializer:
    """Uniform in ±1/sqrt(fan_in): torch's default for both weight and bias of `nn.Linear`."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Lora(NamedTuple):
    """Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1).

    A layer it covers computes x W + b + (alpha / rank) dropout(x) A B, where A starts random and B
    at zero, so that an adapted model starts as the model it adapts.

    Attributes:
      rank: columns of A.
      alpha: numerator of the scale.
      dropout: on the input of the low-rank branch, in training only.
      layers: regular expression searched in the path of a Linear: "attention/(query|value)"; the
        empty one is found in all.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    layers: str = ""

    @property
    def scale(self) -> float:
        """What multiplies A B."""
        return self.alpha / self.rank


class Linear(nn.Module):
    """x W + b over the last axis, plus a low-rank branch where `lora` covers this layer.

    Parameters: kernel [in, features], bias [features]; lora_a [in, rank], lora_b [rank, features].
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        """Map [..., in] to [..., features]; `train` switches the low-rank branch's dropout on."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype)
        if self.use_bias:
            y += self.param("bias", self.bias_init, (self.features,)).astype(self.dtype)
        if self.lora is not None and re.search(self.lora.layers, "/".join(self.path)):
            y += self._low_rank(x, train)
        return y

    def _low_rank(self, x, train):
        rank = self.lora.rank
        # torch's Kaiming uniform with a = sqrt(5), as PEFT starts A.
        down = self.param("lora_a", torch_uniform(x.shape[-1]), (x.shape[-1], rank))
        up = self.param("lora_b", nn.initializers.zeros, (rank, self.features))
        x = nn.Dropout(self.lora.dropout, deterministic=not train)(x)
        return (x @ down.astype(self.dtype)) @ up.astype(self.dtype) * self.lora.scale


class LayerNorm(nn.Module):
    """Normalise the last axis, then scale and maybe shift; in float32, returned as `dtype`."""

    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        """Map [..., D] to [..., D]."""
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        y *= self.param("scale", nn.initializers.ones, (x.shape[-1],))
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return y.astype(self.dtype)


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
    """Linear, activation (exact GELU unless said), Linear."""

    mlp_dim: int
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    activation: Callable[[jax.Array], jax.Array] = gelu
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        """Map [..., D] to [..., D] through [..., mlp_dim]."""
        linear = functools.partial(
            Linear, dtype=self.dtype, kernel_init=self.kernel_init, lora=self.lora
        )
        y = self.activation(linear(self.mlp_dim, name="up")(x, train=train))
        return linear(x.shape[-1], name="down")(y, train=train)


class GatedMlp(nn.Module):
    """down(activation(gate(x)) * up(x)): SwiGLU with silu, GeGLU with gelu.

    Shazeer 2020, https://arxiv.org/abs/2002.05202, Eq. 6.
    """

    mlp_dim: int
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu
    use_bias: bool = False
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        """Map [..., D] to [..., D] through [..., mlp_dim]."""
        linear = functools.partial(
            Linear,
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            lora=self.lora,
        )
        gate = self.activation(linear(self.mlp_dim, name="gate")(x, train=train))
        y = gate * linear(self.mlp_dim, name="up")(x, train=train)
        return linear(x.shape[-1], name="down")(y, train=train)


class Rope(NamedTuple):
    """Cosines and sines of rotary positions, [T, S] or [B, T, S], float32."""

    cos: jax.Array
    sin: jax.Array


def rope_1d(positions, head_width: int, base: float) -> Rope:
    """Return rotary positions of a sequence (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Frequency k = 0 ... S/2 - 1 is base^(-2k / S); channel k turns together with channel k + S/2,
    the "rotate half" layout of `transformers`.

    Args:
      positions: [T] or [B, T] integers.
      head_width: S, even.
      base: the paper's 10,000.
    """
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    frequencies = jnp.asarray(1.0 / np.float32(base) ** exponents)
    angles = jnp.asarray(positions, jnp.float32)[..., None] * frequencies  # [..., T, S/2]
    angles = jnp.concatenate([angles, angles], axis=-1)  # [..., T, S]
    return Rope(jnp.cos(angles), jnp.sin(angles))


def rotate(x, rope: Rope):
    """Turn [B, T, A, S] by rotary positions; in float32, returned in the type of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cos, sin = rope.cos[..., None, :], rope.sin[..., None, :]  # [..., T, 1, S]
    return (x * cos + turned * sin).astype(x.dtype)


class Cache(NamedTuple):
    """Keys and values of the tokens so far, [B, M, K, S] with room for M, and their number."""

    key: jax.Array
    value: jax.Array
    length: jax.Array

    def append(self, key, value) -> "Cache":
        """Write [B, T, K, S] at the end."""
        at = (0, self.length, 0, 0)
        write = lambda old, new: jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)
        return Cache(write(self.key, key), write(self.value, value), self.length + key.shape[1])


class Attention(nn.Module):
    """Multi-head self-attention with separate query, key, value and out projections.

    Attributes:
      num_heads: A; divides the width unless `head_width` is given.
      dropout: on the attention probabilities, in training only.
      implementation: of `jax.nn.dot_product_attention`: "xla" anywhere; "cudnn" (flash attention)
        on NVIDIA GPUs, with a 16-bit `dtype` and no dropout.
      num_kv_heads: K heads of key and value, each serving A / K heads of the query; 0 is A.
      head_width: S; 0 is D / A.
      biased: which projections have a bias.
      qk_norm: epsilon of an RMSNorm over each head of query and key; 0 is no norm.
      causal: a token attends to itself and those before it.
      window: tokens to either side a token may attend; 0 is all.
    """

    num_heads: int
    dropout: float = 0.0
    implementation: Literal["xla", "cudnn"] = "xla"
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    num_kv_heads: int = 0
    head_width: int = 0
    biased: tuple[str, ...] = ("query", "key", "value", "out")
    qk_norm: float = 0.0
    causal: bool = False
    window: int = 0
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x, mask=None, *, train=False, rope=None, cache=None):
        """Attend.

        Args:
          x: [B, T, D].
          mask: bool, True = may be attended: [B, T] for keys, or [B, T, T] for pairs (query, key);
            None attends all. With a cache the keys are its M.
          train: apply dropout.
          rope: rotary positions of query and key.
          cache: attend to its tokens and these; the mask then says all about who sees whom, and
            `causal` and `window` nothing.

        Returns:
          [B, T, D]; with a cache the pair of that and the longer cache.

        Raises:
          ValueError: if the heads do not divide D, or dropout is asked of cuDNN.
        """
        width = x.shape[-1]
        if not self.head_width and width % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide a width of {width}.")
        head_width = self.head_width or width // self.num_heads
        heads = {"query": self.num_heads, "key": self.num_kv_heads or self.num_heads}
        heads["value"] = heads["key"]
        query, key, value = (
            self._linear(name, count * head_width)(x, train=train).reshape(
                *x.shape[:-1], count, head_width
            )
            for name, count in heads.items()
        )  # [B, T, A, S], [B, T, K, S] twice
        if self.qk_norm:
            query = RMSNorm(self.qk_norm, self.dtype, name="query_norm")(query)
            key = RMSNorm(self.qk_norm, self.dtype, name="key_norm")(key)
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        if cache is not None:
            cache = cache.append(key, value)
            key, value = cache.key.astype(self.dtype), cache.value.astype(self.dtype)
        if mask is not None:
            mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]  # [B, 1, T, T]
        if train and self.dropout > 0:
            near = self._near(query.shape[1]) if cache is None else None
            y = self._attend_with_dropout(query, key, value, mask, near)
        else:
            y = jax.nn.dot_product_attention(
                query,
                key,
                value,
                mask=mask,
                is_causal=self.causal and cache is None,
                local_window_size=(self.window or None) if cache is None else None,
                implementation=self.implementation,
            )
        y = self._linear("out", width)(y.reshape(*x.shape[:-1], -1), train=train)
        return y if cache is None else (y, cache)

    def _linear(self, name, features):
        return Linear(
            features,
            name in self.biased,
            self.dtype,
            self.kernel_init,
            lora=self.lora,
            name=name,
        )

    def _attend_with_dropout(self, query, key, value, mask, near):
        if self.implementation != "xla":
            raise ValueError(
                f"Attention dropout {self.dropout} needs implementation 'xla', not "
                f"{self.implementation!r}; or set the dropout to 0."
            )
        repeats = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))  # [B, T, A, S]
        logits = jnp.einsum("btas,buas->batu", query, key, preferred_element_type=jnp.float32)
        logits *= query.shape[-1] ** -0.5
        if near is not None:
            mask = near if mask is None else mask & near
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        probabilities = nn.Dropout(self.dropout, deterministic=False)(jax.nn.softmax(logits))
        return jnp.einsum("batu,buas->btas", probabilities.astype(self.dtype), value)

    def _near(self, length):
        """Return which pairs [T, T] `causal` and `window` allow; None for all."""
        ahead = np.arange(length) - np.arange(length)[:, None]
        near = (np.abs(ahead) <= self.window) if self.window else np.full(ahead.shape, True)
        near &= (ahead <= 0) | (not self.causal)
        return None if near.all() else near


REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


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
      remat: what the backward pass recomputes: "none", "dots" (all but matrix products), "full".
    """

    block: type[nn.Module]
    fields: Mapping[str, Any]
    depth: int
    layout: Literal["unrolled", "scan"] = "unrolled"
    remat: Literal["none", "dots", "full"] = "none"

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

        def run(block, x, own):
            if each is None:
                return block(x, mask, train=train, **shared), None
            return block(x, mask, train=train, own=own, **shared)

        if self.remat != "none":
            # Inside a scan nothing can be merged across iterations, so the CSE barrier only costs.
            run = nn.remat(run, policy=REMAT[self.remat], prevent_cse=self.layout != "scan")
        if self.layout == "scan":
            scan = nn.scan(
                run,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.depth,
            )
            x, outputs = scan(self.block(**self.fields, name="blocks"), x, each)
            return x if each is None else (x, outputs)
        outputs = []
        for i in range(self.depth):
            own = jax.tree.map(lambda leaf: leaf[i], each)  # noqa: B023 - used at once
            x, output = run(self.block(**self.fields, name=f"block_{i}"), x, own)
            outputs.append(output)
        if each is None:
            return x
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
