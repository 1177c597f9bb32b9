"""ResNet, bottleneck blocks (He et al. 2016, https://arxiv.org/abs/1512.03385).

* "v1.5": a stage's stride sits on the 3x3 convolution, as in torchvision and in ResNetModel.
* Channels last. Every convolution is followed by BatchNorm, synchronised over the global batch.
* `levels` are the four stage outputs at strides 4, 8, 16, 32; `tokens` are the pixels of the last.

Axis letters: B batch, H, W pixels, C channels, N = H/32 * W/32, D = width.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from medvlp_jax.encoders.base import Encoded, from_variant
from medvlp_jax.layers import BatchNorm, product

# He et al. 2016, Table 1, in the terms of ResNetConfig. "tiny" is our choice, for CPU demos.
VARIANTS = {
    "tiny": {"embedding_size": 16, "hidden_sizes": (32, 64, 128, 256), "depths": (1, 1, 1, 1)},
    "50": {"hidden_sizes": (256, 512, 1024, 2048), "depths": (3, 4, 6, 3)},
    "101": {"hidden_sizes": (256, 512, 1024, 2048), "depths": (3, 4, 23, 3)},
}

EXPANSION = 4  # channels of a bottleneck's output over those of its 3x3 convolution

kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def convolve(x, kernel, stride=1, padding=0):
    """Convolve [B, H, W, C] with [k, k, C, D], the same stride and zero padding on all sides."""
    pads = ((padding, padding),) * 2
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, pads, dimension_numbers=layout)


class Conv(nn.Module):
    """Convolution without bias, padded by size // 2 on both sides as in torch ("SAME" is not)."""

    features: int
    size: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Map [B, H, W, C] to [B, H/stride, W/stride, features]."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", kaiming_normal, shape)
        x, stride = x.astype(self.dtype), self.stride
        if self.size == 1:  # a matrix product: twice as fast on CPU, the same elsewhere
            return product(x[:, ::stride, ::stride], kernel[0, 0])
        return convolve(x, kernel.astype(self.dtype), stride, self.size // 2)


class Stem(nn.Module):
    """7x7 convolution with stride 2, without bias, padded by 3; grey images enter as one channel.

    A channel of a normalised grey image is (g - mean_c) / std_c, so that the kernels of the three
    add up to one of g and one of a constant image, which ends where the padding begins: two
    channels instead of three, the same to rounding.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, normalisation=None):
        """Map [B, H, W, 3], or [B, H, W, 1] with (mean, std) to come, to [B, H/2, W/2, D]."""
        kernel = self.param("kernel", kaiming_normal, (7, 7, 3, self.features))
        if normalisation is None:
            return convolve(x.astype(self.dtype), kernel.astype(self.dtype), 2, 3)
        mean, std = (jnp.asarray(values)[:, None] for values in normalisation)
        centre = mean.mean()  # what is added below is small then
        of_grey = (kernel / std).sum(2, keepdims=True)
        of_constant = (kernel * (centre - mean) / std).sum(2, keepdims=True)
        x = jnp.concatenate([x - centre, jnp.ones_like(x)], axis=-1)
        kernel = jnp.concatenate([of_grey, of_constant], axis=2)
        return halved_convolution(x.astype(self.dtype), kernel.astype(self.dtype))


def halved_convolution(x, kernel):
    """Convolve [B, H, W, C] with [7, 7, C, D], stride 2, padding 3: [B, H/2, W/2, D].

    2x2 pixels become channels, so that [7, 7] taps, and a zero, are [4, 4] without a stride. On a
    CPU up to twice as fast with two channels in and 16 out, and slower with three and 64, which do
    not come here; not measured elsewhere.
    """
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (3, 3 + height % 2), (3, 3 + width % 2), (0, 0)))
    x = rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=2, q=2)
    kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    kernel = rearrange(kernel, "(h p) (w q) c d -> h w (p q c) d", p=2, q=2)
    return convolve(x, kernel)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut, projected where the shape changes."""

    features: int
    stride: int = 1
    bn_momentum: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, train=False):
        """Map [B, H, W, C] to [B, H/stride, W/stride, features]."""
        conv = functools.partial(Conv, dtype=self.dtype)
        norm = functools.partial(BatchNorm, self.bn_momentum, dtype=self.dtype)
        inner = self.features // EXPANSION
        y = nn.relu(norm(name="norm1")(conv(inner, 1, name="conv1")(x), train=train))
        y = conv(inner, 3, self.stride, name="conv2")(y)
        y = nn.relu(norm(name="norm2")(y, train=train))
        y = norm(name="norm3")(conv(self.features, 1, name="conv3")(y), train=train)
        if x.shape != y.shape:
            x = conv(self.features, 1, self.stride, name="shortcut_conv")(x)
            x = norm(name="shortcut_norm")(x, train=train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Four stages of bottleneck blocks; `pooled` is the global average of the last.

    Attributes:
      embedding_size: channels of the stem.
      hidden_sizes: channels of each stage's output.
      depths: blocks of each stage.
      bn_momentum: weight of the new batch statistics in the running ones, torch's convention.
      dtype: of the convolutions.
    """

    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    bn_momentum: float = 0.1
    dtype: Any = jnp.float32

    folds_grey = True  # see base.encode_pixels

    @property
    def width(self) -> int:
        """Dimension of `pooled` and `tokens`."""
        return self.hidden_sizes[-1]

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Channels of each of `levels`."""
        return tuple(self.hidden_sizes)

    @nn.compact
    def __call__(self, images, *, train=False, normalisation=None) -> Encoded:
        """Encode images.

        Args:
          images: [B, H, W, 3] normalised, or [B, H, W, 1] grey in [0, 1] with `normalisation`.
          train: use and update batch statistics.
          normalisation: (mean, std), three numbers each, that the grey images have yet to get.

        Returns:
          Encoded with pooled [B, D], tokens [B, N, D] and four levels.

        Raises:
          ValueError: if the images have another number of channels.
        """
        channels = 1 if normalisation else 3
        if images.ndim != 4 or images.shape[-1] != channels:
            raise ValueError(
                f"ResNet takes images [B, H, W, {channels}], got {list(images.shape)}."
            )
        x = Stem(self.embedding_size, self.dtype, name="stem_conv")(images, normalisation)
        x = BatchNorm(self.bn_momentum, dtype=self.dtype, name="stem_norm")(x, train=train)
        x = max_pool(nn.relu(x))  # [B, H/4, W/4, C]
        levels = []
        for stage, (features, depth) in enumerate(zip(self.hidden_sizes, self.depths, strict=True)):
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                name = f"stage_{stage}_block_{i}"
                block = Bottleneck(features, stride, self.bn_momentum, self.dtype, name=name)
                x = block(x, train=train)
            levels.append(x)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, N, D]
        return Encoded(pooled=tokens.mean(1), tokens=tokens, levels=tuple(levels))


def max_pool(x):
    """3x3 maximum at stride 2, padding 1: [B, H, W, C] -> [B, H/2, W/2, C], of values >= 0.

    As maxima of shifted slices, rows then columns: on CPU three times faster than `reduce_window`,
    forward and backward. For such values padding with zeros equals torch's padding with -inf.
    """
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1] - 2, x.shape[2] - 2
    x = functools.reduce(jnp.maximum, [x[:, i : i + height : 2] for i in range(3)])
    return functools.reduce(jnp.maximum, [x[:, :, j : j + width : 2] for j in range(3)])


def make(variant: str = "50", **overrides: Any) -> ResNet:
    """Build a published size; `overrides` are fields of ResNet.

    Raises:
      UserError: for an unknown variant or field.
    """
    return from_variant(ResNet, VARIANTS, variant, overrides)
