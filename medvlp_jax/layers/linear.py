"""Matrix products, with or without a low-rank branch, and the two kinds of Mlp."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from medvlp_jax.layers.layout import sum_of_rows

Initializer = Callable[..., jax.Array]


@jax.custom_vjp
def gelu(x):
    """x Φ(x), exact (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415), in float32.

    Its backward pass keeps x alone, and works the rest out again: what XLA would keep is as large.
    No forward-mode derivative.
    """
    return _gelu_forward(x)[0]


def _gelu_forward(x):
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype), x


def _gelu_backward(x, dy):
    wide = x.astype(jnp.float32)
    # Φ(x) with other signs: else the compiler finds the forward pass' again, and keeps it.
    cdf = 0.5 - 0.5 * jax.lax.erf(wide * -(0.5**0.5))
    slope = cdf + wide * jax.scipy.stats.norm.pdf(wide)
    return ((dy.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def quick_gelu(x):
    """x sigmoid(1.702 x), the GELU of OpenAI's CLIP (Hendrycks and Gimpel 2016, section 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {  # by the names of `transformers`
    "gelu": gelu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "silu": jax.nn.silu,
}


@jax.custom_vjp
def product(x, kernel, bias=None):
    """x W + b over the last axis, in the type of x; the gradients of W and b are in their own.

    The backward pass is its own for two reasons. A bfloat16 layer's weights are float32, and so are
    their gradients then, which many devices add up. And XLA would work out dy once for each of the
    three that read it, on a CPU for the gradient of W transposed: up to a quarter of a
    transformer's step (docs/performance.md). Its price: no forward-mode derivative (jax.jvp).

    Args:
      x: [..., in].
      kernel: [in, features].
      bias: [features] or None.
    """
    return _product_forward(x, kernel, bias)[0]


def _product_forward(x, kernel, bias):
    y = x @ kernel.astype(x.dtype)
    return (y if bias is None else y + bias.astype(y.dtype)), (x, kernel, bias)


def _product_backward(seen, dy):
    x, kernel, bias = seen
    # Behind a layer that widens lies an activation, whose gradient and the sum of it a GPU has in
    # one pass.
    if jax.default_backend() == "cpu" or kernel.shape[0] >= kernel.shape[1]:
        dy = jax.lax.optimization_barrier(dy)  # is written once
    rows = lambda array: array.reshape(-1, array.shape[-1])
    dx = dy @ kernel.astype(dy.dtype).T
    wide = jnp.promote_types(dy.dtype, kernel.dtype)
    dkernel = jnp.matmul(rows(x).T, rows(dy), preferred_element_type=wide).astype(kernel.dtype)
    dbias = None if bias is None else sum_of_rows(dy.astype(bias.dtype))
    return dx.astype(x.dtype), dkernel, dbias


product.defvjp(_product_forward, _product_backward)


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
      fused: query, key and value share one A, as gate and up do: the factors of what in PyTorch is
        one Linear, such as ModernBERT's.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    layers: str = ""
    fused: bool = False

    @property
    def scale(self) -> float:
        """What multiplies A B."""
        return self.alpha / self.rank


class Linear(nn.Module):
    """x W + b over the last axis, plus a low-rank branch where `lora` covers this layer.

    Parameters: kernel [in, features], bias [features]; lora_a [in, rank], lora_b [rank, features].
    Where `low` is given, lora_a is the caller's, see `shared_low`.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x, *, train=False, low=None):
        """Map [..., in] to [..., features]; `train` switches the low-rank branch's dropout on."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
        x = x.astype(self.dtype)
        y = product(x, kernel, bias)
        if covers(self.lora, self.path):
            low = _low(self, x, self.lora, train) if low is None else low
            up = self.param("lora_b", nn.initializers.zeros, (self.lora.rank, self.features))
            y += product(low.astype(self.dtype), up) * self.lora.scale
        return y


def covers(lora: Lora | None, path: Sequence[str]) -> bool:
    """Say whether the Linear at a path has low-rank factors."""
    return lora is not None and re.search(lora.layers, "/".join(path)) is not None


def shared_low(module: nn.Module, x, names: Sequence[str], train: bool):
    """Return dropout(x) A for several Linears of a compact module, A being its own parameter.

    Args:
      module: with `lora`.
      x: what all of them read.
      names: of the Linears.
      train: apply the dropout.

    Returns:
      [..., rank]; None where each has its own A.
    """
    lora = module.lora
    if lora is None or not lora.fused:
        return None
    if not all(covers(lora, (*module.path, name)) for name in names):
        return None
    return _low(module, x.astype(module.dtype), lora, train)


def _low(module, x, lora, train):
    # torch's Kaiming uniform with a = sqrt(5), as PEFT starts A.
    down = module.param("lora_a", torch_uniform(x.shape[-1]), (x.shape[-1], lora.rank))
    x = nn.Dropout(lora.dropout, deterministic=not train)(x)
    return product(x, down)


def torch_linear(x, features: int, name: str):
    """Apply a Linear drawn as torch draws it: weight and bias uniform in ±1/sqrt(fan in)."""
    init = torch_uniform(x.shape[-1])
    return Linear(features, kernel_init=init, bias_init=init, name=name)(x)


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
        low = shared_low(self, x, ("gate", "up"), train)
        gate = self.activation(linear(self.mlp_dim, name="gate")(x, train=train, low=low))
        y = gate * linear(self.mlp_dim, name="up")(x, train=train, low=low)
        return linear(x.shape[-1], name="down")(y, train=train)
