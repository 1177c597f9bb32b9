"""Multi-head attention, and the cache that lets it continue a sequence."""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medvlp_jax.layers.linear import Initializer, Linear, Lora, shared_low
from medvlp_jax.layers.norms import RMSNorm
from medvlp_jax.layers.rope import rotate


class Cache(NamedTuple):
    """Keys and values of the tokens so far, [B, M, K, S] with room for M, and their number.

    All three may have a leading axis of layers.
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array

    def append(self, key, value) -> "Cache":
        """Write [B, T, K, S] at the end; NaN where it turns out under `jit` that they do not fit.

        Raises:
          ValueError: as `check_room` does.
        """
        count, at = key.shape[1], (0, self.length, 0, 0)
        self.check_room(count)
        fits = self.length + count <= self.key.shape[1]

        def write(old, new):
            # A slice beyond the end would be moved back, over what is there, in silence.
            new = jnp.where(fits, new, jnp.nan).astype(old.dtype)
            return jax.lax.dynamic_update_slice(old, new, at)

        return Cache(write(self.key, key), write(self.value, value), self.length + count)

    def check_room(self, count: int) -> None:
        """Refuse `count` further tokens where it is known that they do not fit.

        Raises:
          ValueError: if they are more than the room; outside `jit`, than the room that is left.
        """
        room = self.key.shape[-3]
        taken = 0 if isinstance(self.length, jax.core.Tracer) else int(np.max(self.length))
        if taken + count > room:
            raise ValueError(
                f"A cache with room for {room} tokens, {taken} of it taken, cannot take {count} "
                "more: start with a larger one."
            )


class Attention(nn.Module):
    """Multi-head self-attention with separate query, key, value and out projections.

    Attributes:
      num_heads: A; divides the width unless `head_width` is given.
      dropout: on the attention probabilities, in training only.
      implementation: "xla" anywhere; "cudnn" (flash attention) on NVIDIA GPUs, with a 16-bit
        `dtype` and no dropout.
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
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(
        self, x, mask=None, *, train=False, rope=None, cache=None, context=None, shows=False
    ):
        """Attend.

        Args:
          x: [B, T, D].
          mask: bool, True = may be attended: [B, T] for keys, or [B, T, T] for pairs (query, key);
            or an int, that many keys from the first on; None attends all. With a cache the keys are
            its M.
          train: apply dropout.
          rope: rotary positions of query and key.
          cache: attend to its tokens and these; the mask then says all about who sees whom, and
            `causal` and `window` nothing.
          context: [B, U, D], what is attended to instead of x itself.
          shows: also return the attention [B, T, U], a mean over heads; "xla" alone.

        Returns:
          [B, T, D]; with a cache the pair of that and the longer cache, or with the attention.

        Raises:
          ValueError: if the heads do not divide D, or dropout or the attention is asked of cuDNN.
        """
        width = x.shape[-1]
        if not self.head_width and width % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide a width of {width}.")
        head_width = self.head_width or width // self.num_heads
        heads = {"query": self.num_heads, "key": self.num_kv_heads or self.num_heads}
        heads["value"] = heads["key"]
        low = shared_low(self, x, tuple(heads), train) if context is None else None
        context = x if context is None else context
        query, key, value = (
            self._linear(name, count * head_width)(source, train=train, low=low).reshape(
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
        if mask is not None and not isinstance(mask, int):
            mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]  # [B, 1, T, T]
        window = self.window if cache is None else 0
        is_causal = self.causal and cache is None
        drop = nn.Dropout(self.dropout, deterministic=not train)
        if self.implementation == "xla":
            near = _near(query.shape[1], is_causal, window)
            y, paid = _attend(query, key, value, _both(_first(mask, key), near), drop)
        elif shows:
            raise ValueError(
                f"Only implementation 'xla' shows its attention, not {self.implementation!r}."
            )
        elif train and self.dropout > 0:
            raise ValueError(
                f"Attention dropout {self.dropout} needs implementation 'xla', not "
                f"{self.implementation!r}; or set the dropout to 0."
            )
        else:
            y = _flash(query, key, value, mask, is_causal, window, self.implementation)
        y = self._linear("out", width)(y.reshape(*x.shape[:-1], -1), train=train)
        if shows:
            return y, paid
        return y if cache is None else (y, cache)

    def _linear(self, name, features):
        return Linear(
            features,
            name in self.biased,
            self.dtype,
            self.kernel_init,
            self.bias_init,
            self.lora,
            name=name,
        )


def _attend(query, key, value, mask, drop):
    """Compute drop(softmax(Q K^T / sqrt(S))) V; logits and softmax are float32.

    The heads stand in front in the matrix products, not between: XLA makes such products faster on
    CPU, and the same ones elsewhere.

    Args:
      query: [B, T, A, S].
      key: [B, U, K, S].
      value: [B, U, K, S].
      mask: bool, broadcasts to [B, 1, T, U]; or None.
      drop: on the probabilities.

    Returns:
      [B, T, A, S], and the attention [B, T, U]: the probabilities' mean over heads.
    """
    (batch, steps, _, width), (_, others, heads, _) = query.shape, key.shape
    groups = query.shape[2] // heads
    query = query.reshape(batch, steps, heads, groups, width).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, heads, groups * steps, width)  # [B, K, G T, S]
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)  # [B, K, S, U] [B, K, U, S]
    logits = jnp.matmul(query, key, preferred_element_type=jnp.float32) * width**-0.5
    logits = logits.reshape(batch, heads, groups, steps, others)  # [B, K, G, T, U]
    if mask is not None:
        logits = jnp.where(mask[:, :, None], logits, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(logits)
    paid = probabilities.mean((1, 2))
    probabilities = drop(probabilities).astype(value.dtype)
    y = probabilities.reshape(batch, heads, groups * steps, others) @ value  # [B, K, G T, S]
    y = y.reshape(batch, heads, groups, steps, width).transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, steps, heads * groups, width), paid


def _flash(query, key, value, mask, is_causal, window, implementation):
    """Compute what `_attend` does by `jax.nn.dot_product_attention`, in shapes cuDNN takes.

    Lengths become even: JAX refuses others in training. A mask becomes a bias with a row for each
    query, since JAX takes no other. cuDNN looks to one side only, so a window to both is a mask.

    Args:
      query: [B, T, A, S].
      key: [B, U, K, S].
      value: [B, U, K, S].
      mask: bool, broadcasts to [B, 1, T, U]; an int, that many keys from the first on; or None.
      is_causal: a query sees no key behind it.
      window: keys to either side a query sees; 0 is all.
      implementation: of jax.nn.dot_product_attention.

    Returns:
      [B, T, A, S].
    """
    (batch, steps, *_), others = query.shape, key.shape[1]
    if window and not is_causal:
        mask, window = _both(_first(mask, key), _near(steps, is_causal, window)), 0
    odd = steps % 2, others % 2
    if mask is None and odd[1]:
        mask = others
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value)
    )
    limits = {}
    if isinstance(mask, int):
        limits["key_value_seq_lengths"] = jnp.full(batch, mask, jnp.int32)
    elif mask is not None:
        mask = jnp.broadcast_to(mask, (batch, 1, steps, others))
        limits["mask"] = jnp.pad(mask, ((0, 0), (0, 0), (0, odd[0]), (0, odd[1])))
    y = jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=is_causal,
        local_window_size=(window, 0) if window else None,  # of a causal one
        implementation=implementation,
        **limits,
    )
    return y[:, :steps]


def _near(length, is_causal, window):
    """Return which pairs [1, 1, T, T] `is_causal` and `window` allow; None for all."""
    if not (is_causal or window):
        return None
    ahead = jnp.arange(length) - jnp.arange(length)[:, None]
    near = (jnp.abs(ahead) <= window) if window else True
    return (near & (ahead <= 0) if is_causal else near)[None, None]


def _first(mask, key):
    """Return a mask [1, 1, 1, U] where it is the number of keys, else as it is."""
    return jnp.arange(key.shape[1])[None, None, None] < mask if isinstance(mask, int) else mask


def _both(mask, near):
    """Return what two masks allow, either of which may be None."""
    return near if mask is None else mask if near is None else mask & near
