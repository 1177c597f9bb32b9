"""What goes into an encoder and what comes out of it.

Several texts can lie behind one another in a row, told apart by segment ids [B, T] in [0, G); equal
ids are adjacent. What an encoder needs to know of them stands here.

Axis letters: B batch, N patches, T text tokens, G texts in a row, D width, H, W feature-map pixels,
C channels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from medvlp_jax.config import UserError, nearest


class Tokens(NamedTuple):
    """Token ids [B, T] int32 and their mask [B, T] bool, True = real."""

    ids: jax.Array
    mask: jax.Array


class Packed(NamedTuple):
    """Several texts a row, in g groups of r rows that hold the texts of n examples each.

    Attributes:
      ids: [g, r, T] int32.
      mask: [g, r, T] bool, True = real.
      segments: [g, r, T] int32, which text of its row a token belongs to.
      filled: [g, r, G] bool, which texts of a row there are.
      at: [g, n] or, with N phrases an example, [g, n, N] int32: where a text lies, row * G + which.
    """

    ids: jax.Array
    mask: jax.Array
    segments: jax.Array
    filled: jax.Array
    at: jax.Array


class Encoded(NamedTuple):
    """Output of every encoder; what an architecture does not have is None or empty.

    Attributes:
      pooled: one feature per example [B, D], or per packed text [B, G, D].
      tokens: patch or token features [B, N, D] or [B, T, D].
      mask: True where a token is real [B, T]; None when all are.
      levels: feature maps from fine to coarse, each [B, H, W, C].
    """

    pooled: jax.Array
    tokens: jax.Array | None = None
    mask: jax.Array | None = None
    levels: tuple[jax.Array, ...] = ()


def positions_of(segments):
    """Return the place [B, T] of each token in its own text."""
    steps = jnp.arange(segments.shape[1])
    begins = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    return steps - jax.lax.cummax(jnp.where(begins, steps, 0), axis=1)


def pairs_of(mask, segments):
    """Return which (query, key) [B, T, T] lie in one text, the key being real."""
    return (segments[:, :, None] == segments[:, None, :]) & mask[:, None, :]


def members_of(mask, segments, num_segments: int):
    """Return which tokens are real ones of each text of a row, [B, T, G]; G = 1 without segments.

    Args:
      mask: [B, T], True = real.
      segments: [B, T]; None where a row is one text.
      num_segments: G, given with `segments`.

    Raises:
      ValueError: if `segments` come without their number, or it without them.
    """
    if (segments is None) != (num_segments == 0):
        raise ValueError(f"segments and num_segments come together, got {num_segments} of them.")
    groups = jnp.zeros_like(mask, jnp.int32) if segments is None else segments
    return (groups[..., None] == jnp.arange(max(num_segments, 1))) & mask[..., None]


def pick(x, at, *, is_packed: bool):
    """Return the tokens of [B, T, D] at places [B, G]: [B, G, D], or [B, D] where not packed."""
    picked = jnp.take_along_axis(x, at[..., None], axis=1)
    return picked if is_packed else picked[:, 0]


def pool(x, mask, pooling: Literal["cls", "mean"], *, segments=None, num_segments: int = 0):
    """Pool each text of a row: its first real token, or the mean of its real tokens in float32.

    Args:
      x: [B, T, D].
      mask: [B, T], True = real.
      pooling: which of the two.
      segments: [B, T]; None where a row is one text.
      num_segments: G, given with `segments`.

    Returns:
      [B, D], or [B, G, D] with segments; of a text without a real token, values without meaning.

    Raises:
      ValueError: if `segments` come without their number, or it without them.
    """
    members = members_of(mask, segments, num_segments)
    is_packed = segments is not None
    if pooling == "cls":
        return pick(x, members.argmax(1), is_packed=is_packed)
    weight = members.astype(jnp.float32)
    total = jnp.einsum("btg,btd->bgd", weight, x.astype(jnp.float32))
    pooled = total / jnp.maximum(weight.sum(1)[..., None], 1.0)
    return pooled if is_packed else pooled[:, 0]


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def from_variant(
    module: type, variants: Mapping[str, Mapping[str, Any]], variant: str, overrides: Mapping
) -> Any:
    """Build a published size of an encoder, some fields overridden.

    Raises:
      UserError: for an unknown variant or field.
    """
    if variant not in variants:
        raise UserError(
            f"No {module.__name__} variant '{variant}'. {nearest(variant, list(variants))}"
        )
    return construct(module, {**variants[variant], **overrides})


def construct(module: type, fields: Mapping[str, Any]) -> Any:
    """Build an encoder from its fields.

    Raises:
      UserError: for an unknown field.
    """
    known = [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
    for field in fields:
        if field not in known:
            raise UserError(f"{module.__name__} has no '{field}'. {nearest(field, known)}")
    return module(**fields)


def normalise(images, *, mean=IMAGENET_MEAN, std=IMAGENET_STD, dtype=jnp.float32):
    """Turn uint8 pixels into the float images encoders take.

    Args:
      images: [..., H, W, C] uint8 in [0, 255], C = 1 (grey, replicated) or len(mean).
      mean: per-channel mean of pixels scaled to [0, 1].
      std: per-channel standard deviation, same scale.
      dtype: of the result; the arithmetic is float32.

    Returns:
      [..., H, W, len(mean)].
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"normalise takes uint8 pixels, got {images.dtype}")
    scaled = images.astype(jnp.float32) / 255.0
    return ((scaled - jnp.asarray(mean)) / jnp.asarray(std)).astype(dtype)


def encode_pixels(encoder, images, *, train=False):
    """Normalise uint8 images by ImageNet's numbers and encode them.

    An encoder with `folds_grey` gets grey images as one channel and normalises them in its first
    layer: to rounding the same, without three channels that say the same.

    Args:
      encoder: module of images.
      images: [B, H, W, C] uint8, C = 1 (grey) or 3.
      train: of the encoder.

    Returns:
      The encoder's Encoded.
    """
    if images.shape[-1] == 1 and getattr(encoder, "folds_grey", False):
        grey = normalise(images, mean=(0.0,), std=(1.0,))
        return encoder(grey, train=train, normalisation=(IMAGENET_MEAN, IMAGENET_STD))
    return encoder(normalise(images), train=train)
