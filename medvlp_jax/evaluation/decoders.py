"""From what an encoder gives to a map as large as the image: U-Net on levels, SETR-PUP on tokens.

U-Net (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597) with the skips of a ResNet's or
Swin's levels, SETR-PUP (Zheng et al. 2021, https://arxiv.org/abs/2012.15840, section 3.3.2), widths
as MGCA has them. No weight of a decoder is pretrained.

Axis letters: B batch, H, W pixels, h, w of a map, N tokens, C channels, K outputs.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from medvlp_jax.config import UserError
from medvlp_jax.encoders.base import Encoded
from medvlp_jax.layers import BatchNorm

UNET_WIDTHS = (256, 128, 64, 32, 16)  # from coarse to fine, as segmentation_models has them
PUP_WIDTHS = (512, 256, 128, 64)

kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class Convolution(nn.Module):
    """3x3 convolution, BatchNorm, ReLU."""

    features: int
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x, *, train=False):
        """Map [B, h, w, C] to [B, h / stride, w / stride, features]."""
        shape, strides = (self.size, self.size), (self.stride, self.stride)
        x = nn.Conv(self.features, shape, strides, use_bias=False, kernel_init=kaiming_normal)(x)
        return nn.relu(BatchNorm()(x, train=train))


class UNet(nn.Module):
    """Twice as large at every step, the level of that size beside it, two convolutions.

    Attributes:
      features: K.
      widths: of the steps; the last ones, for which there is no level, only enlarge.
    """

    features: int
    widths: tuple[int, ...] = UNET_WIDTHS

    @nn.compact
    def __call__(self, levels, size, *, train=False):
        """Map levels from fine to coarse, [B, h, w, C] each, to [B, H, W, K]."""
        *finer, x = levels
        for width in self.widths:
            if min(x.shape[1:3]) >= min(size):
                break
            if finer:
                skip = finer.pop()
                x = jnp.concatenate([resized(x, skip.shape[1:3], "nearest"), skip], axis=-1)
            else:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = Convolution(width)(Convolution(width)(x, train=train), train=train)
        return resized(nn.Conv(self.features, (3, 3), name="map")(x), size)


class Pup(nn.Module):
    """Progressive upsampling: a convolution, then twice as large, as often as there are widths.

    Attributes:
      features: K.
      widths: of the convolutions.
    """

    features: int
    widths: tuple[int, ...] = PUP_WIDTHS

    @nn.compact
    def __call__(self, grid, size, *, train=False):
        """Map patches [B, h, w, C] to [B, H, W, K]."""
        x = grid
        for width in self.widths:
            x = Convolution(width)(x, train=train)
            x = resized(x, [min(2 * s, whole) for s, whole in zip(x.shape[1:3], size, strict=True)])
        return resized(nn.Conv(self.features, (1, 1), name="map")(x), size)


class Pyramid(nn.Module):
    """Maps from coarse to fine, each twice as large as the one before: what detectors read.

    The last levels of an encoder that has some; of patches a simple pyramid (Li et al. 2022,
    https://arxiv.org/abs/2203.16527, section 3): halved, as they are, doubled.

    Attributes:
      scales: number of maps.
      width: of what is made of patches.
    """

    scales: int = 3
    width: int = 256

    @nn.compact
    def __call__(self, encoded: Encoded, size, *, train=False):
        """Return `scales` maps [B, h, w, C]."""
        if encoded.levels:
            return list(encoded.levels[: -self.scales - 1 : -1])
        grid = grid_of(encoded, size)
        x = Convolution(self.width, 1, name="lateral")(grid, train=train)
        coarse = Convolution(self.width, 3, 2, name="halved")(x, train=train)
        double = resized(x, (2 * x.shape[1], 2 * x.shape[2]))
        fine = Convolution(self.width, name="doubled")(double, train=train)
        return [coarse, x, fine][-self.scales :]


def segment(encoded: Encoded, size, features: int, widths=(), *, train: bool):
    """Apply the decoder that suits an encoder; inside a compact module.

    Args:
      encoded: of 2-D images.
      size: (H, W).
      features: K.
      widths: of the decoder's steps; () takes the published ones.
      train: whether BatchNorm reads the batch.

    Returns:
      [B, H, W, K].
    """
    if encoded.levels:
        unet = UNet(features, widths or UNET_WIDTHS, name="unet")
        return unet(encoded.levels, size, train=train)
    return Pup(features, widths or PUP_WIDTHS, name="pup")(
        grid_of(encoded, size), size, train=train
    )


def grid_of(encoded: Encoded, size):
    """Return tokens [B, N, C] as the grid they come from, [B, h, w, C] with h / w = H / W.

    Raises:
      UserError: where they are no such grid.
    """
    tokens = encoded.tokens
    batch, count, width = tokens.shape if tokens is not None else (0, 0, 0)
    rows = round((count * size[0] / size[1]) ** 0.5)
    if not rows or count % rows or rows * size[1] != count // rows * size[0]:
        raise UserError(
            f"The encoder gives {count} tokens for images of {size[0]} x {size[1]}: no grid of "
            "patches, and no levels; segmentation and detection need one of them."
        )
    return tokens.reshape(batch, rows, count // rows, width)


def resized(x, size, method: str = "bilinear"):
    """Resize maps [B, h, w, C] to size (H, W)."""
    if tuple(x.shape[1:3]) == tuple(size):
        return x
    shape = (x.shape[0], *size, x.shape[-1])
    return jax.image.resize(x.astype(jnp.float32), shape, method)
