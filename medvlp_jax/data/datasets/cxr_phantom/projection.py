"""From thickness to pixels: attenuation, scatter, quantum noise and the display curve."""

import functools
from typing import NamedTuple

import numpy as np

from medvlp_jax.data.datasets.cxr_phantom import banks

SOFT = 0.19  # 1/cm, water-like tissue at about 110 kV
BONE = 0.30  # 1/cm, what cortical bone adds to that
AERATED = 0.27  # density of aerated lung relative to water


@functools.cache
def _low_pass(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrices (reduce [32, size / 2], expand [size, 32]) of a separable low pass of about 2 cm."""
    knots = (np.arange(32) + 0.5) * size / 32 - 0.5
    distance = (np.arange(size)[:, None] - knots) / (size / 32)
    expand = np.exp(-(distance**2) / 2).astype(np.float32)
    reduce = np.exp(-(distance[::2].T ** 2) / 3).astype(np.float32)
    return reduce / reduce.sum(1, keepdims=True), expand / expand.sum(1, keepdims=True)


class Exposure(NamedTuple):
    """How the image was taken and displayed."""

    scatter: float  # scattered / mean primary intensity
    noise: float  # relative standard deviation of the intensity where it is 1
    low: float  # attenuation shown as black, relative to the image's own percentile
    high: float  # attenuation shown as white, likewise
    detail: float  # share of the coarse structure that the console takes out
    bend: float  # of the display curve v + bend * v (1 - v)


def draw_exposure(rng: np.random.Generator) -> Exposure:
    """Draw exposure and display settings as they vary between rooms and machines."""
    return Exposure(
        scatter=rng.uniform(0.10, 0.45),
        noise=float(np.exp(rng.normal(np.log(0.0022), 0.45))),
        low=rng.normal(0.0, 0.12),
        high=rng.normal(0.0, 0.12),
        detail=rng.uniform(0.0, 0.55),
        bend=float(np.clip(rng.normal(0.0, 0.2), -0.5, 0.5)),
    )


def project(soft: np.ndarray, bone: np.ndarray, exposure: Exposure, rng) -> np.ndarray:
    """Expose the detector and display the result.

    Args:
      soft: water-equivalent path of tissue and lung, cm [H, W].
      bone: path through bone, cm [H, W].
      exposure: exposure and display settings.
      rng: chooses the noise.

    Returns:
      Grey levels [H, W] uint8, bone bright.
    """
    size = soft.shape[0]
    primary = np.exp(np.float32(-SOFT) * soft - np.float32(BONE) * bone)
    inner = primary[size // 4 : size - size // 4 : 8, size // 8 : size - size // 8 : 8]
    primary += np.float32(exposure.scatter * np.minimum(inner, 0.3).mean())
    grain = banks.crop(banks.noise(size), rng)
    attenuation = -np.log(primary)
    # Photon counts: the relative deviation of the intensity is noise / sqrt(intensity).
    attenuation += grain * (np.float32(exposure.noise) / np.sqrt(primary))
    return display(attenuation, exposure)


def display(attenuation: np.ndarray, exposure: Exposure) -> np.ndarray:
    """Even out, window and quantise attenuation [H, W]; overwrites it."""
    size = attenuation.shape[0]
    reduce, expand = _low_pass(size)
    coarse = reduce @ attenuation[::2, ::2] @ reduce.T
    attenuation -= (np.float32(exposure.detail) * expand) @ (coarse @ expand.T)
    every = max(1, size // 40)
    centre = attenuation[size // 6 : -(size // 10) : every, size // 10 : -(size // 10) : every]
    low, high = np.percentile(centre, (4, 97))
    span = high - low
    low += (exposure.low - 0.10) * span
    high += (exposure.high + 0.10) * span
    attenuation -= np.float32(low)
    attenuation *= np.float32(1 / (high - low))
    shown = np.clip(attenuation, 0, 1, out=attenuation)
    bend = np.float32(-243 * exposure.bend) * shown + np.float32(243 + 243 * exposure.bend)
    bend *= shown
    bend += np.float32(8)
    return bend.astype(np.uint8)
