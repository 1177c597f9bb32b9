"""The healthy chest: geometry of one patient in one pose, as thickness in cm along each ray.

A frontal radiograph is a map of line integrals. This file gives the integrand's parts: how many
centimetres of soft tissue, aerated lung and bone each ray crosses. Coordinates are centimetres with
the origin at the image centre, x to the right of the image and y downwards. The patient faces the
viewer: the patient's right lung lies at x < 0, on the left of the image.

Axis letters: H rows, w columns of one half of the image.
"""

import functools
from typing import NamedTuple

import numpy as np

from medvlp_jax.data.datasets.cxr_phantom import banks

SIDES = ("right", "left")  # of the patient; right is drawn first, on the left of the image


class Anatomy(NamedTuple):
    """Geometry of one chest, in cm unless said; `draw_anatomy` gives the distributions."""

    half_width: float  # of the rib cage's inside at its widest
    apex: float  # y of the lung apices
    dome: tuple[float, float]  # y of the diaphragm's top, right and left
    depth: float  # of the body, front to back
    middle: float  # x of the midline at y = 0
    tilt: float  # dx / dy of the midline: a rotation in the plane, written as a shear
    turn: float  # x by which heart and mediastinum shift when the patient is turned
    heart_ratio: float  # cardiothoracic ratio, heart width / inside width of the rib cage
    heart_angle: float  # radians below the horizontal of the heart's long axis
    knob: float  # x reach of the aortic knob from the midline
    rib_phase: float  # in [0, 1): where the ribs lie relative to the apex
    rib_slope: float  # how far a rib descends from the spine to its most lateral point
    bone: float  # density relative to the average
    gas: float  # thickness of the gas bubble in the stomach
    breast: float  # thickness of breast tissue, 0 for most men
    shoulder: float  # y of the top of the shoulders beside the neck
    clavicle: float  # y of the medial ends of the clavicles


def draw_anatomy(rng: np.random.Generator, *, male: bool, age: float) -> Anatomy:
    """Draw a healthy chest, posed straight; age thins the bone and widens the aortic knob."""
    scale = (1.03 if male else 0.94) * rng.normal(1, 0.035)
    half_width = float(np.clip(13.0 * scale, 10.8, 14.6))
    apex = -12.2 * scale + rng.normal(0, 0.5)
    dome = 7.8 * scale + rng.normal(0, 0.9)
    return Anatomy(
        half_width=half_width,
        apex=apex,
        dome=(dome, dome + rng.uniform(0.5, 1.6)),  # the liver holds the right dome higher
        depth=float(np.clip(rng.normal(21, 1.6), 17, 26)),
        middle=0.0,
        tilt=0.0,
        turn=0.0,
        heart_ratio=rng.uniform(0.39, 0.47),
        heart_angle=rng.uniform(0.45, 0.8),
        knob=float(np.clip(2.9 + 0.02 * (age - 50) + rng.normal(0, 0.25), 2.3, 4.4)),
        rib_phase=rng.random(),
        rib_slope=rng.uniform(3.8, 5.4),
        bone=float(np.clip(rng.normal(1.05 - 0.004 * (age - 50), 0.1), 0.65, 1.35)),
        gas=0.0,
        breast=0.0 if male else rng.uniform(0.8, 3.2),
        shoulder=apex - rng.uniform(2.5, 4.0),
        clavicle=apex + rng.uniform(1.8, 3.4),
    )


def pose(a: Anatomy, rng: np.random.Generator) -> Anatomy:
    """Place the patient before the detector: another position and breath at every visit."""
    down, breath = rng.normal(0, 0.5), rng.normal(0, 0.5)
    return a._replace(
        apex=a.apex + down,
        dome=tuple(d + down + breath for d in a.dome),
        shoulder=a.shoulder + down,
        clavicle=a.clavicle + down + rng.normal(0, 0.4),
        middle=rng.normal(0, 0.6),
        tilt=float(np.clip(rng.normal(0, 0.015), -0.035, 0.035)),
        turn=float(np.clip(rng.normal(0, 0.25), -0.5, 0.5)),
        gas=max(0.0, rng.normal(1.5, 3.0)),
    )


def step(distance: np.ndarray, softness: float) -> np.ndarray:
    """Rise smoothly from 0 to 1 as `distance` goes from -softness to +softness, float32."""
    t = ramp(distance, softness)
    smooth = t * np.float32(-2)
    smooth += np.float32(3)
    smooth *= t
    smooth *= t
    return smooth


def ramp(distance: np.ndarray, softness: float) -> np.ndarray:
    """The linear, cheaper cousin of `step`, for borders too faint to show their shape."""
    t = distance * np.float32(0.5 / softness)
    t += np.float32(0.5)
    return np.clip(t, 0, 1, out=t)


@functools.cache
def axis(size: int) -> np.ndarray:
    """Pixel centres along one axis, in cm [size] float32."""
    pixel = banks.FIELD_OF_VIEW / size
    return ((np.arange(size) + 0.5) * pixel - banks.FIELD_OF_VIEW / 2).astype(np.float32)


class Half(NamedTuple):
    """Maps of one side of the chest; arrays are [H, w] float32 unless said.

    Attributes:
      side: "right" or "left" of the patient.
      columns: of the image that this half covers.
      y: rows in cm [H, 1].
      x: distance from the midline in cm, positive away from it.
      wall: x of the chest wall's inside in each row [H, 1].
      edge: distance inside the lung's outer and upper border, in cm, < 0 outside.
      ring: sqrt(1 - (x / wall)^2): a rib ring or lung seen from the front.
      diaphragm: y of the diaphragm in each column [w].
      lung: 1 inside the lung field, heart and mediastinum included.
    """

    side: str
    columns: slice
    y: np.ndarray
    x: np.ndarray
    wall: np.ndarray
    edge: np.ndarray
    ring: np.ndarray
    diaphragm: np.ndarray
    lung: np.ndarray


def window(half: Half, *, y=(-99.0, 99.0), x=(-99.0, 99.0)) -> tuple[tuple[slice, slice], Half]:
    """Cut out the part of a half where rows lie in `y` and distances from the midline in `x`.

    Returns:
      The index into arrays of the half, and the smaller half.
    """
    first = float(half.y[0, 0])
    pixel = float(half.y[1, 0]) - first
    top, bottom = _span(y, first, pixel, half.x.shape[0])
    sign = -1 if half.side == "right" else 1  # x falls from left to right in the right half
    ends = sign * float(half.x[0, 0]), sign * float(half.x[-1, 0])  # the midline is straight
    reach = sorted((sign * x[0], sign * x[1]))
    left, right = _span(reach, max(ends), pixel, half.x.shape[1])
    right = min(right + round(abs(ends[0] - ends[1]) / pixel), half.x.shape[1])
    rows, columns = slice(top, bottom), slice(left, right)
    cut = (rows, columns)
    part = Half(
        half.side, half.columns, half.y[rows], half.x[cut], half.wall[rows], half.edge[cut],
        half.ring[cut], half.diaphragm[columns], half.lung[cut],
    )  # fmt: skip
    return cut, part


def _span(limits: tuple[float, float], first: float, pixel: float, count: int) -> tuple[int, int]:
    """Indices [start, stop) within `count` samples first, first + pixel ... inside the limits."""
    start, stop = (int((limit - first) / pixel) for limit in limits)
    return min(max(start, 0), count), min(max(stop + 1, 0), count)


def coarse(half: Half, rows: int, columns: int) -> Half:
    """Keep every `rows`-th row and `columns`-th column of a half, for maps without fine detail."""
    cut = (slice(None, None, rows), slice(None, None, columns))
    maps = {key: getattr(half, key)[cut] for key in ("x", "edge", "ring", "lung")}
    lines = {key: getattr(half, key)[cut[0]] for key in ("y", "wall")}
    return half._replace(**maps, **lines, diaphragm=half.diaphragm[cut[1]])


def fine(sampled: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Interpolate a map of a `coarse` half linearly to the shape it had before."""
    for axis, (count, kept) in enumerate(zip(shape, sampled.shape, strict=True)):
        if count != kept:
            weights = _interpolation(count, kept)
            sampled = weights @ sampled if axis == 0 else sampled @ weights.T
    return sampled


@functools.lru_cache(maxsize=128)  # one a width: halves and windows differ by a few pixels
def _interpolation(count: int, kept: int) -> np.ndarray:
    """Matrix [count, kept] that interpolates linearly between every (count / kept)-th sample."""
    stride = -(-count // kept)
    at = np.minimum(np.arange(count) / stride, kept - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(kept)), 0).astype(np.float32)


def _wall(a: Anatomy, y: np.ndarray, *, lower: float = 0.0, inset: float = 0.0):
    """Return the lung's lateral border at rows y, and the slope that turns dx into a distance.

    Args:
      a: the chest.
      y: rows in cm.
      lower: cm by which the apex is pulled down (pneumothorax).
      inset: cm by which the side is pulled in (pneumothorax).
    """
    apex = a.apex + lower
    u = (y - apex) / np.float32(18.0)
    shape = 1 - np.clip(1 - u, 0, 1) ** 2
    crown = np.float32(3.0)  # cm from the midline to the apex
    wall = crown + (a.half_width - inset - crown) * np.sqrt(shape)
    wall = np.where(u > 0, wall, crown + 6 * (y - apex))  # above the apex: outside, steeply
    slope = np.diff(wall, axis=0, append=wall[-1:]) / (y[1, 0] - y[0, 0])
    return wall.astype(np.float32), (1 / np.sqrt(1 + slope**2)).astype(np.float32)


def inside(half: Half, a: Anatomy, *, lower: float = 0.0, inset: float = 0.0) -> np.ndarray:
    """Distance in cm inside a lung whose apex is pulled down and whose side is pulled in."""
    wall, cosine = _wall(a, half.y, lower=lower, inset=inset)
    return (wall - half.x) * cosine


def _diaphragm(a: Anatomy, side: str, x: np.ndarray) -> np.ndarray:
    """Height y of the diaphragm's dome at distance x from the midline."""
    top = a.dome[SIDES.index(side)]
    z = (x - 0.45 * a.half_width) / (0.55 * a.half_width)
    return top + 0.9 * z**2 + np.where(z > 0, 2.6 * np.abs(z) ** 3.5, 0.6 * z**2)


def half(a: Anatomy, side: str, size: int) -> Half:
    """Lay out one side of the chest."""
    grid = axis(size)
    y = grid[:, None]
    split = int(np.searchsorted(grid, a.middle))
    columns = slice(0, split) if side == "right" else slice(split, size)
    sign = np.float32(-1 if side == "right" else 1)
    x = sign * (grid[None, columns] - (a.middle + a.tilt * y).astype(np.float32))
    wall, cosine = _wall(a, y)
    edge = (wall - x) * cosine
    ratio = x / np.maximum(wall + np.float32(0.5), np.float32(1))
    ring = np.sqrt(np.clip(1 - ratio * ratio, np.float32(0.004), None))
    low = sign * (grid[columns] - a.middle - a.tilt * a.dome[0])
    diaphragm = _diaphragm(a, side, low).astype(np.float32)
    lung = step(edge, 0.18)
    base = slice(int(np.searchsorted(grid, a.dome[SIDES.index(side)] - 0.5)), None)
    lung[base] *= step(diaphragm - y[base], 0.14)
    return Half(side, columns, y, x, wall, edge, ring, diaphragm, lung)


class Heart(NamedTuple):
    """The heart's ellipse in cm; `reach` is half its width."""

    x: float
    y: float
    long: float
    reach: float


FLAT = 0.70  # short axis / long axis of the heart


def heart(a: Anatomy) -> Heart:
    """Place the heart on the left dome, two thirds of it left of the midline.

    The long axis points down to the patient's left. Half the ellipse's width is
    sqrt(long^2 cos^2 + short^2 sin^2) = heart_ratio * half_width, which fixes both axes.
    """
    cos, sin = np.cos(a.heart_angle), np.sin(a.heart_angle)
    reach = a.heart_ratio * a.half_width
    long = float(reach / np.sqrt(cos**2 + (FLAT * sin) ** 2))
    x = a.turn + 0.115 * a.half_width + 0.25 * (reach - 0.43 * a.half_width)
    return Heart(x, a.dome[1] - 0.52 * long, long, reach)


def heart_radius2(a: Anatomy, half: Half) -> np.ndarray:
    """Squared radius in the heart's ellipse [H, w]: < 1 inside."""
    h = heart(a)
    cos, sin = np.cos(a.heart_angle), np.sin(a.heart_angle)
    sign = -1 if half.side == "right" else 1
    dx, dy = sign * half.x - np.float32(h.x), half.y - np.float32(h.y)
    along = dx * np.float32(cos / h.long) + dy * np.float32(sin / h.long)
    across = dy * np.float32(cos / (FLAT * h.long)) - dx * np.float32(sin / (FLAT * h.long))
    return along * along + across * across


def mediastinum(a: Anatomy, half: Half) -> np.ndarray:
    """Border of the mediastinum: distance from the midline in each row [H, 1].

    Down the right: neck, superior vena cava, right atrium. Down the left: neck, subclavian artery,
    aortic knob, pulmonary artery, then the straight upper border of the left ventricle.
    """
    h, top = heart(a), a.apex
    if half.side == "right":
        atrium = h.reach - h.x
        ys = (top - 4, top, top + 4, top + 8, h.y - 0.62 * h.long, h.y - 0.3 * h.long, h.y + 4)
        xs = (3.0, 2.2, 2.4, 2.6 - a.turn, 2.5 - a.turn, 0.88 * atrium, 0.9 * atrium)
    else:
        ys = (-4, 0, 3.4, 4.6, 5.8, 7.0, 8.0, 9.2)
        xs = (3.0, 2.0, 2.1, 0.8 * a.knob, a.knob, 0.93 * a.knob, 0.80 * a.knob, 0.4 + 0.8 * a.knob)
        ys = (*(top + d for d in ys), h.y - 0.1 * h.long, h.y + 4)
        xs = (*(v + 0.6 * a.turn for v in xs), 0.80 * (h.reach + h.x), 0.9 * (h.reach + h.x))
    border = np.interp(half.y[:, 0], ys, xs)
    kernel = _bell(float(half.y[1, 0] - half.y[0, 0]))
    edge = np.ones(len(kernel) // 2)
    smooth = np.convolve(np.r_[edge * border[0], border, edge * border[-1]], kernel, "valid")
    return smooth[:, None].astype(np.float32)


@functools.cache
def _bell(pixel: float) -> np.ndarray:
    """Smoothing kernel 1.6 cm long, of odd length, for rows `pixel` cm apart."""
    window = np.hanning(max(3, round(1.6 / pixel) | 1) + 2)[1:-1]
    return window / window.sum()


def body(a: Anatomy, half: Half) -> np.ndarray:
    """Soft tissue along each ray if the lungs were solid, less other air, in cm [H, w]."""
    tissue = fine(_trunk(a, coarse(half, 4, 4)), half.x.shape)
    tube, middle = window(half, x=(-9, 4), y=(-99, a.apex + 13))
    tissue[tube] -= _airways(a, middle)
    if half.side == "left":
        stomach, upper = window(half, y=(a.dome[1], a.dome[1] + 6), x=(2, 12))
        tissue[stomach] -= _gas(a, upper)
    return np.clip(tissue, 0, None, out=tissue)


def _trunk(a: Anatomy, half: Half) -> np.ndarray:
    """Trunk, neck, shoulders and breasts, all smooth over 1 cm [H, w]."""
    y, x = half.y, half.x
    width = a.half_width + 3.2 + 2.5 * step(-5 - y, 4.0)  # the shoulders are wider
    depth = a.depth * (1 - np.float32(0.42) * step(a.apex + 2.5 - y, 5.0))  # and thinner
    ratio = x * (1 / width)
    tissue = depth * np.sqrt(np.clip(1 - ratio * ratio, 0, None))
    # The trapezius falls from the neck to the acromion; above it is air.
    line = a.shoulder + 0.42 * np.clip(x[0] - 4.6, 0, 20) - 9 * step(4.4 - x[0], 1.8)
    tissue *= step(y - line.astype(np.float32), 1.2)
    return tissue + _breast(a, half) if a.breast > 0 else tissue


def _breast(a: Anatomy, half: Half) -> np.ndarray:
    """Breast tissue with a sharper lower fold, in cm [H, w]."""
    down = half.y - np.float32(a.dome[0] - 2.6)
    down = np.where(down > 0, down * np.float32(1.9), down)
    out = half.x - np.float32(0.56 * a.half_width)
    return np.float32(a.breast) * np.clip(1 - (out * out + down * down) * np.float32(1 / 36), 0, 1)


def _airways(a: Anatomy, half: Half) -> np.ndarray:
    """Air in the trachea and main bronchi along each ray, in cm [H, w]."""
    y, sign = half.y, (-1 if half.side == "right" else 1)
    carina = a.apex + 8.2
    centre = np.float32(-0.15 + 0.6 * a.turn) + 0.02 * (y - a.apex)
    tube = np.clip(1 - ((sign * half.x - centre) * np.float32(1 / 0.95)) ** 2, 0, 1)
    main = (half.x - (y - carina) * np.float32(0.65 if half.side == "right" else 1.1)) * 1.3
    bronchus = np.clip(1 - main * main, 0, 1) * ramp(y - carina, 0.5) * ramp(carina + 3.5 - y, 1)
    return 1.6 * np.sqrt(tube) * step(carina - y, 0.7) + 0.9 * np.sqrt(bronchus)


def _gas(a: Anatomy, half: Half) -> np.ndarray:
    """Gas in the stomach under the left dome, in cm [H, w]."""
    dx, dy = half.x - np.float32(5.5 + a.turn), half.y - np.float32(a.dome[1] + 2.2)
    r2 = dx * dx * np.float32(1 / 9) + dy * dy * np.float32(1 / 1.6)
    return np.float32(a.gas) * np.sqrt(np.clip(1 - r2, 0, 1))


def lung_depth(a: Anatomy, half: Half) -> np.ndarray:
    """Aerated lung along each ray before any disease, in cm [H, w].

    The chest is an elliptic cylinder (`ring`), the lung thins towards the apex, and heart and
    mediastinum displace it.
    """
    thin = np.sqrt(np.clip((half.y - a.apex) * np.float32(1 / 9), 0, 1))
    depth = half.ring * ((a.depth - 5.5) * (0.45 + 0.55 * thin)) * half.lung
    index, near = window(half, x=(-9, 12))
    depth[index] *= step(near.x - mediastinum(a, half), 0.30)
    h = heart(a)
    index, near = window(half, y=(h.y - h.long, h.y + h.long), x=(-9, h.reach + abs(h.x)))
    solid = np.clip(1 - heart_radius2(a, near), 0, 1)
    depth[index] -= np.float32(1.1 * a.depth) * np.sqrt(np.sqrt(solid))
    return np.clip(depth, 0, None, out=depth)
