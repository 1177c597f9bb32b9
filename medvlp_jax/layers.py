"""The few layers the encoders and heads are made of: Flax Linen, parameters in float32.

`dtype` is the type of the matrix products; norms, softmax and statistics are float32 in any case.

Axis letters: B batch, T tokens, D width, A heads, S head width, L layers; of images H, W pixels,
P patch size, N patches.
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


def quick_gelu(x):
    """x sigmoid(1.702 x), the GELU of OpenAI's CLIP (Hendrycks and Gimpel 2016, section 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {  # by the names of `transformers`
    "gelu": gelu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "silu": jax.nn.silu,
}


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


def rope_2d(
    rows: int, columns: int, head_width: int, *, base: float, shift=(0.0, 0.0), scale=(1.0, 1.0)
) -> Rope:
    """Return rotary positions of a grid of patches, row by row: DINOv3's axial ones.

    A patch's centre (y, x) lies in [-1, 1] whatever the grid. Frequency k = 0 ... S/4 - 1 is
    2 pi base^(-4k / S); of S/2 angles the first half turns with y, the second with x. Channel k
    turns together with channel k + S/2, as in `rope_1d`.

    Args:
      rows: patches along the height.
      columns: patches along the width.
      head_width: S, a multiple of 4.
      base: DINOv3's 100.
      shift: [2], added to the centres (y, x) ...
      scale: [2], ... which are then multiplied by this.

    Returns:
      Rope of [rows * columns, S].
    """
    centres = [
        (2 * (np.arange(n, dtype=np.float32) + 0.5) / np.float32(n) - 1 + shift[i]) * scale[i]
        for i, n in enumerate((rows, columns))
    ]
    exponents = np.arange(0, 1, 4 / head_width, dtype=np.float32)
    frequencies = 2 * np.pi * (1 / np.float32(base) ** exponents)
    y, x = (jnp.asarray(c, jnp.float32)[:, None] * frequencies for c in centres)  # [rows, S/4] ...
    y = jnp.broadcast_to(y[:, None], (rows, columns, y.shape[-1]))
    x = jnp.broadcast_to(x[None], (rows, columns, x.shape[-1]))
    angles = jnp.concatenate([y, x, y, x], axis=-1).reshape(rows * columns, head_width)
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
    def __call__(self, x, mask=None, *, train=False, rope=None, cache=None, context=None):
        """Attend.

        Args:
          x: [B, T, D].
          mask: bool, True = may be attended: [B, T] for keys, or [B, T, T] for pairs (query, key);
            None attends all. With a cache the keys are its M.
          train: apply dropout.
          rope: rotary positions of query and key.
          cache: attend to its tokens and these; the mask then says all about who sees whom, and
            `causal` and `window` nothing.
          context: [B, U, D], what is attended to instead of x itself.

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
        context = x if context is None else context
        query, key, value = (
            self._linear(name, count * head_width)(source, train=train).reshape(
                *source.shape[:-1], count, head_width
            )
            for source, (name, count) in zip((x, context, context), heads.items(), strict=True)
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


class PatchEmbedding(nn.Module):
    """Map patches of P x P pixels to D numbers each.

    A matrix product, which a convolution of stride P is: on CPU the value and the kernel's gradient
    take half the time (ViT-B/16, 32 images, median of 7 paired runs).

    Parameters: kernel [P, P, C, D], bias [D].
    """

    features: int
    patch_size: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, images):
        """Map [B, H, W, C] to [B, N, D], row by row; pixels beyond whole patches are not seen."""
        size, (batch, height, width, channels) = self.patch_size, images.shape
        rows, columns = height // size, width // size
        images = images[:, : rows * size, : columns * size].astype(self.dtype)
        patches = images.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
        shape = (size, size, channels, self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        x = patches.reshape(batch, rows * columns, -1) @ kernel.reshape(-1, self.features)
        if self.use_bias:
            x += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return x


def patch_grid(images, patch_size: int, *, partial: bool = False) -> tuple[int, int]:
    """Return how many patches lie along the height and the width of [B, H, W, 3].

    Raises:
      ValueError: if the images do not have three channels, or hold no patch, or (unless `partial`)
        do not tile into patches.
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"Images must be [B, H, W, 3], got {list(images.shape)}.")
    height, width = images.shape[1:3]
    if min(height, width) < patch_size:
        raise ValueError(
            f"Images of {height} x {width} pixels are smaller than a patch of {patch_size} x "
            f"{patch_size}."
        )
    if not partial and (height % patch_size or width % patch_size):
        raise ValueError(
            f"Images of {height} x {width} pixels do not tile into patches of {patch_size} x "
            f"{patch_size}: both sides must be multiples of {patch_size}."
        )
    return height // patch_size, width // patch_size


def resize_positions(
    positions, rows: int, columns: int, *, prefix: int = 1, antialias: bool = False
):
    """Resize a square table of positions to another grid, as the models of `transformers` do.

    Args:
      positions: [prefix + n * n, D], the first ones for tokens that are no patches and stay.
      rows: patches along the height.
      columns: patches along the width.
      prefix: how many stay.
      antialias: see `bicubic_matrix`.

    Returns:
      [prefix + rows * columns, D].
    """
    native = round((positions.shape[0] - prefix) ** 0.5)
    if (rows, columns) == (native, native):
        return positions
    grid = positions[prefix:].reshape(native, native, -1)
    down, across = (bicubic_matrix(native, n, antialias=antialias) for n in (rows, columns))
    grid = jnp.einsum("yi,xj,ijd->yxd", down, across, grid)
    return jnp.concatenate([positions[:prefix], grid.reshape(rows * columns, -1)])


def bicubic_matrix(old: int, new: int, *, antialias: bool = False) -> np.ndarray:
    """Return torch's bicubic resize (align_corners=False) as a [new, old] matrix.

    Keys' kernel has a = -0.75 there, and taps beyond the edge repeat it. Antialiased, a = -0.5, the
    kernel is as wide as the coarser grid's pixels, and taps beyond the edge are left out.
    `jax.image.resize` has a = -0.5 in both cases.
    """
    step = old / new
    centre = (np.arange(new)[:, None] + 0.5) * step - 0.5
    if antialias:
        matrix = _keys((np.arange(old) - centre) / max(step, 1.0), -0.5)
        return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)
    matrix = np.zeros((new, old))
    taps = np.floor(centre) + np.arange(-1, 3)  # [new, 4]
    columns = np.clip(taps, 0, old - 1).astype(int)
    np.add.at(matrix, (np.arange(new)[:, None], columns), _keys(taps - centre, -0.75))
    return matrix.astype(np.float32)


def _keys(t, a):
    """Keys' cubic convolution kernel (1981, Eq. 4, there with a = -0.5)."""
    t = np.abs(t)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))
