"""What goes into an encoder and what comes out of it.

Axis letters: B batch, N patches, T text tokens, D width, H, W feature-map pixels, C channels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from medvlp_jax.config import UserError, nearest


class Tokens(NamedTuple):
    """Token ids [B, T] int32 and their mask [B, T] bool, True = real."""

    ids: jax.Array
    mask: jax.Array


class Encoded(NamedTuple):
    """Output of every encoder; what an architecture does not have is None or empty.

    Attributes:
      pooled: one feature per example [B, D].
      tokens: patch or token features [B, N, D] or [B, T, D].
      mask: True where a token is real [B, T]; None when all are.
      levels: feature maps from fine to coarse, each [B, H, W, C].
    """

    pooled: jax.Array
    tokens: jax.Array | None = None
    mask: jax.Array | None = None
    levels: tuple[jax.Array, ...] = ()


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
