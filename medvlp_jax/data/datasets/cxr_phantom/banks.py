"""Precomputed random material that records crop from: detector noise, lung texture, vessel trees.

Drawing 65,536 normal deviates or a hundred vessels for each image would cost more than the rest of
the renderer. Each bank is a pure function of the image size (its generator has a fixed seed), made
on first use and cached; a record chooses its crop or tree with its own random stream.
"""

import functools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

FIELD_OF_VIEW = 32.0  # cm, both axes: collimated to the thorax
BANK = 4  # a bank holds BANK x BANK images
TREES = 48  # vessel trees in the bank
TREE_WIDTH, TREE_UP, TREE_DOWN = 14.0, 13.0, 15.0  # cm covered by a tree, from its hilum
VESSEL_SCALE = 2.0 / 255  # cm of blood a grey level while a tree is drawn
VESSEL_GAIN = 400  # grey levels a cm; three times a cylinder, as consoles enhance edges


def _spectral(side: int, low: float, high: float, seed: int) -> np.ndarray:
    """Periodic Gaussian noise [side, side], unit variance, between two spatial frequencies.

    Args:
      side: pixels.
      low: cycles per pixel below which power falls off.
      high: cycles per pixel above which power falls off.
      seed: of the white noise.
    """
    white = np.random.default_rng(seed).standard_normal((side, side), dtype=np.float32)
    fy = np.fft.fftfreq(side)[:, None]
    fx = np.fft.rfftfreq(side)[None, :]
    f2 = fx**2 + fy**2
    gain = np.exp(-f2 / (2 * high**2)) * (1 - np.exp(-f2 / (2 * low**2)))
    noise = np.fft.irfft2(np.fft.rfft2(white) * gain, s=(side, side))
    return (noise / noise.std()).astype(np.float32)


@functools.cache
def noise(size: int) -> np.ndarray:
    """Quantum noise after the detector's blur, [BANK * size, BANK * size], unit variance."""
    return _spectral(BANK * size, 1e-3, 0.28, seed=1)


@functools.cache
def clouds(size: int) -> np.ndarray:
    """Blotches of 1-4 cm with some finer grain, unit variance: the substance of opacities."""
    pixel = FIELD_OF_VIEW / size
    coarse = _spectral(BANK * size, 0.03 * pixel, 0.14 * pixel, seed=2)
    fine = _spectral(BANK * size, 0.2 * pixel, 0.5 * pixel, seed=3)
    return 0.85 * coarse + 0.5 * fine


@functools.cache
def texture(size: int) -> np.ndarray:
    """Fine lung markings of 2-8 mm, unit variance."""
    pixel = FIELD_OF_VIEW / size
    return _spectral(BANK * size, 0.25 * pixel, 1.0 * pixel, seed=4)


def crop(bank: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random window [size, size] of a bank, as a view."""
    size = bank.shape[0] // BANK
    y, x = rng.integers(0, bank.shape[0] - size, 2)
    return bank[y : y + size, x : x + size]


def _branch(rng, start, angle, width, length, segments):
    """Grow one vessel from `start`: short segments that bend, then two or three children."""
    x, y = start
    for _ in range(3):
        step = length / 3
        end = (x + step * math.cos(angle), y + step * math.sin(angle))
        segments.append((x, y, *end, width))
        (x, y), width = end, width * 0.95
        angle += rng.normal(0, 0.10)
        if width > 0.12 and rng.random() < 0.35:  # a small side branch
            turn = rng.choice((-1, 1)) * rng.uniform(0.5, 1.0)
            _branch(rng, end, angle + turn, width * 0.45, length * 0.55, segments)
    if width < 0.09:
        return
    spread = rng.uniform(0.22, 0.45)
    share = rng.uniform(0.35, 0.65)
    for sign, part in ((-1, share), (1, 1 - share)):
        child = width * max(part, 0.35) ** 0.4  # Murray's law has exponent 1/3
        _branch(rng, (x, y), angle + sign * spread, child * 0.9, length * 0.84, segments)


def _tree(rng: np.random.Generator) -> list[tuple[float, ...]]:
    """Segments (x0, y0, x1, y1, width) in cm; hilum at the origin, x lateral, y down."""
    segments = []
    trunks = (  # angle, width, length: three to the upper lobe, two to the middle, three down
        (-1.45, 0.50, 3.2),
        (-1.05, 0.45, 3.0),
        (-0.65, 0.40, 3.2),
        (-0.15, 0.42, 3.4),
        (0.30, 0.42, 3.6),
        (0.70, 0.50, 4.0),
        (1.05, 0.60, 4.2),
        (1.35, 0.70, 4.0),
    )
    for angle, width, length in trunks:
        bend = rng.normal(0, 0.12)
        grown = width * rng.uniform(0.85, 1.15)
        start = (rng.uniform(-0.4, 0.4), angle * 0.5 + rng.normal(0, 0.2))
        _branch(rng, start, angle + bend, grown, length, segments)
    return segments


def _draw(segments, pixel: float) -> np.ndarray:
    """Rasterise a tree at four times the resolution, thick vessels last, and reduce.

    Returns:
      cm of blood along the ray, [rows, columns] float32, hilum at (TREE_UP, 1 cm).
    """
    fine = 4
    scale = fine / pixel
    canvas = Image.new("L", (int(TREE_WIDTH * scale), int((TREE_UP + TREE_DOWN) * scale)))
    draw = ImageDraw.Draw(canvas)
    for x0, y0, x1, y1, w in sorted(segments, key=lambda s: s[-1]):
        ends = [((x + 1) * scale, (y + TREE_UP) * scale) for x, y in ((x0, y0), (x1, y1))]
        level = min(255, int(VESSEL_GAIN * w**0.8))
        draw.line(ends, fill=level, width=max(1, round(w * scale)))
    canvas = canvas.reduce(fine).filter(ImageFilter.GaussianBlur(0.08 / pixel))
    return np.asarray(canvas, dtype=np.float32) * np.float32(VESSEL_SCALE)


@functools.cache
def vessels(size: int) -> tuple[np.ndarray, ...]:
    """Vessel trees of a left lung, from small to large ones."""
    rng = np.random.default_rng(5)
    pixel = FIELD_OF_VIEW / size
    grown = np.linspace(0.85, 1.2, TREES)  # pixels a cm, so that nothing is resampled later
    return tuple(_draw(_tree(rng), pixel / float(growth)) for growth in grown)


def place_tree(tree: np.ndarray, hilum: tuple[int, int], shape: tuple[int, int], *, mirror: bool):
    """Put a stored tree into an image.

    Args:
      tree: [rows, columns], one of `vessels(size)`.
      hilum: (row, column) pixel of the tree's hilum in the result.
      shape: (rows, columns) of the result.
      mirror: True for a right lung, which extends to the left of its hilum.

    Returns:
      cm of blood along the ray, [rows, columns] float32.
    """
    height, width = tree.shape
    top = hilum[0] - round(height * TREE_UP / (TREE_UP + TREE_DOWN))
    margin = round(width / TREE_WIDTH)  # 1 cm medial of the hilum
    left = hilum[1] - (width - margin if mirror else margin)
    placed = np.zeros(shape, np.float32)
    rows = slice(max(0, top), max(0, min(shape[0], top + height)))
    columns = slice(max(0, left), max(0, min(shape[1], left + width)))
    source = tree[:, ::-1] if mirror else tree
    placed[rows, columns] = source[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
    return placed
