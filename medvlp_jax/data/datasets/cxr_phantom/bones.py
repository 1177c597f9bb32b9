"""Bones of the chest as centimetres of cortical-equivalent bone along each ray.

A rib is a tilted ring: seen from the front its two halves are the two arcs of an ellipse,
y = y0 + slope * (1 -/+ sqrt(1 - (x / wall)^2)), the upper one posterior, the lower one anterior.
All ribs of one kind are therefore one periodic profile over a warped y, and cost one look-up.
"""

import functools

import numpy as np

from medvlp_jax.data.datasets.cxr_phantom.anatomy import (
    Anatomy,
    Half,
    coarse,
    fine,
    ramp,
    step,
    window,
)

BINS = 512  # of a rib's profile
RIBS = 9.0  # drawn per side; the two floating ribs lie below the diaphragm


def _tube(d: np.ndarray, radius: float, cortex: float) -> np.ndarray:
    """Path through a hollow tube at distance d from its axis, with some spongy bone inside."""
    outer = np.sqrt(np.clip(radius**2 - d**2, 0, None))
    inner = np.sqrt(np.clip((radius - cortex) ** 2 - d**2, 0, None))
    return 2 * (outer - inner) + 0.30 * inner


@functools.cache
def _profile(radius: float, cortex: float) -> np.ndarray:
    """One period of ribs [BINS]; the centre of a rib at bin BINS / 2, period 1 = 2.6 cm."""
    d = (np.linspace(-0.5, 0.5, BINS) * 2.6).astype(np.float32)
    path = _tube(d, radius, cortex)
    path *= 1 + 0.25 * d / radius  # the lower border is the denser one
    return np.convolve(np.pad(path, 12, mode="wrap"), np.hanning(25) / 12, "valid").astype(
        np.float32
    )


def _comb(warped: np.ndarray, profile: np.ndarray, a: Anatomy, sharp: np.ndarray) -> np.ndarray:
    """Look up the rib under each warped y; ribs lie closer at the apex."""
    k = (warped - np.float32(a.apex - 1.3)) * np.float32(1 / 2.3)
    k -= np.float32(0.010) * k * np.abs(k)
    visible = ramp(k - np.float32(0.3), 0.3)
    visible *= ramp(RIBS - k, 0.3)
    k += np.float32(a.rib_phase)
    k *= np.float32(BINS)
    bins = k.astype(np.int32)
    bins &= BINS - 1
    comb = np.take(profile, bins)
    mean = np.float32(profile.mean())  # where rings are seen edge-on, pixels hold several ribs
    comb -= mean
    comb *= sharp
    comb += mean
    return np.multiply(comb, visible, out=comb)


def ribs(a: Anatomy, half: Half) -> np.ndarray:
    """Posterior and anterior arcs of the ribs [H, w]."""
    ring, lean = half.ring, np.float32(0.10) * half.x
    slope = np.float32(a.rib_slope)
    middle, drop = half.y - lean - slope, slope * ring
    sharp = ramp(ring - np.float32(0.34), 0.12)
    posterior = _comb(middle + drop, _profile(0.72, 0.14), a, sharp)
    posterior *= ramp(half.x - np.float32(1.6), 0.7)
    anterior = _comb(middle - drop, _profile(0.80, 0.08), a, sharp)
    anterior *= np.float32(0.6) * ramp(half.x * (1 / half.wall) - np.float32(0.52), 0.12)
    posterior += anterior
    posterior *= np.clip(np.float32(0.9) / ring, 0, np.float32(1.8))  # rays along the lateral wall
    posterior *= ramp(half.edge + np.float32(0.75), 0.3)
    return posterior


def spine(a: Anatomy, half: Half) -> np.ndarray:
    """Vertebral bodies with end plates, pedicles and spinous processes [H, w]."""
    y, x = half.y, half.x
    period = 2.1 + 0.02 * (y - a.apex)
    phase = ((y - a.apex) / period + a.rib_phase) % np.float32(1)
    off = np.abs(phase - np.float32(0.5))
    body = 0.55 + 0.45 * np.exp(-((off - np.float32(0.36)) ** 2) * 250)
    body = np.float32(0.7) * body * (0.25 + 0.75 * (off < 0.42))
    pedicle = np.exp(-((x - np.float32(1.1)) ** 2) * 11) * np.exp(-((phase - 0.35) ** 2) * 80)
    process = np.exp(-(x * x) * 16) * np.exp(-((phase - 0.7) ** 2) * 50)
    column = ramp(np.float32(1.75) - x, 0.25) * body.astype(np.float32)
    return column + np.float32(0.3) * (pedicle + process)


def _clavicle_axis(a: Anatomy, half: Half) -> np.ndarray:
    """Height y of the clavicle's axis in each column [w]: an S from sternum to acromion."""
    start = 1.7 + (-1 if half.side == "right" else 1) * a.turn
    t = np.clip((half.x[0] - start) / (a.half_width - 1.0), 0, 1.15)
    return (a.clavicle - 2.2 * t + 0.75 * np.sin(2 * np.pi * t) * (1 - 0.4 * t)).astype(np.float32)


def clavicle(a: Anatomy, half: Half) -> np.ndarray:
    """The clavicle, thicker at its medial end [H, w]."""
    x = half.x[0]
    inner = 1.7 + (-1 if half.side == "right" else 1) * a.turn
    radius = 0.62 + 0.25 * np.clip(1 - (x - inner) / (a.half_width - 1.0), 0, 1) ** 3
    d = (half.y - _clavicle_axis(a, half)) * (0.66 / radius).astype(np.float32)
    return _tube(d, 0.66, 0.12) * (ramp(x - inner, 0.3) * ramp(a.half_width + 2.6 - x, 0.4))


def scapula(a: Anatomy, half: Half) -> np.ndarray:
    """Blade of the scapula with its denser border, and the head of the humerus [H, w]."""
    y, x = half.y, half.x
    top = a.apex + 2.0
    along = np.clip((y - top) * np.float32(1 / 13), 0, 1)
    distance = x - np.float32(a.half_width) * (0.78 + 0.22 * along * np.sqrt(along))
    blade = np.float32(0.3) * step(distance, 0.25) * ramp(3.6 - distance, 1.2)
    edge = np.float32(0.35) * np.exp(np.float32(-9) * (distance - np.float32(0.25)) ** 2)
    r2 = (x - np.float32(a.half_width + 4.6)) ** 2 + (y - np.float32(a.apex + 2.0)) ** 2
    head = np.float32(1.2) * np.sqrt(np.sqrt(np.clip(1 - r2 * np.float32(1 / 6), 0, 1)))
    return (blade + edge) * (ramp(y - top, 0.8) * ramp(top + 13 - y, 1.2)) + head


def skeleton(a: Anatomy, half: Half) -> np.ndarray:
    """All bones of one side, scaled by the patient's bone density [H, w]."""
    total = np.zeros_like(half.x)
    axis = _clavicle_axis(a, half)
    parts = (  # each is drawn where it lies, on every n-th (row, column) that its detail needs
        (ribs, (1, 2), {"y": (a.apex - 2.5, 99), "x": (0.5, a.half_width + 1.6)}),
        (spine, (1, 1), {"x": (-9, 2.3)}),
        (clavicle, (1, 2), {"y": (axis.min() - 0.9, axis.max() + 0.9), "x": (1.0, 99)}),
        (scapula, (2, 2), {"y": (a.apex - 1.5, a.apex + 17), "x": (0.75 * a.half_width, 99)}),
    )
    for draw, every, where in parts:
        index, part = window(half, **where)
        total[index] += fine(draw(a, coarse(part, *every)), part.x.shape)
    return np.multiply(total, np.float32(a.bone), out=total)
