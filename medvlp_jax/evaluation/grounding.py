"""Phrase grounding: how well the similarity of a phrase to the patches of an image finds its boxes.

The map m of a phrase over an image is the inner product of its embedding with that of each patch,
made as large as the image; A are the pixels inside the union of the phrase's boxes, B those
outside, both without the pixels the model did not see.

  CNR       |mean_A - mean_B| / sqrt(var_A + var_B), population variances
  mIoU      mean over t of IoU({m > t}, A), t = .1 ... .5, negative values counting as 0
  pointing  is a largest pixel inside A; of several tied ones, the share that is

Boecking et al. 2022 (BioViL, https://arxiv.org/abs/2204.09817). A pair is an image with a phrase.
CNR and mIoU are means over the pairs of a category, then over categories, as published for MS-CXR;
`*_micro` is the mean over pairs. A map without any variation has CNR 0 and is counted as `flat`.
One with a single value in A and another in B has an infinite CNR: left out of CNR alone, counted as
`cnr_infinite`. What a meaningless map scores depends on how it varies over the image, so that mIoU
has no level of guessing, and of CNR the signed one alone, 0.
`Variant` has what other published code does instead; its numbers have an id of their own.

Axis letters: P pairs, C categories, H, W pixels, h, w patches.
"""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy.ndimage

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import statistics
from medvlp_jax.evaluation.results import Results, assemble, number

PROTOCOL = "grounding@clean-v1"
LEGACY = "grounding@legacy-v1"  # with a Variant other than the default
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
METRICS = ("cnr", "miou", "pointing")
ROUNDING = 1e-9  # what varies by less, relative to its size, does not vary
Box = tuple[float, float, float, float]


class Variant(NamedTuple):
    """Where published code differs; each setting makes other numbers.

    Attributes:
      signed: CNR keeps the sign of mean_A - mean_B (generate_to_ground, AFLoc).
      ddof: of the variances in CNR: 0, or 1 for unbiased ones.
      strict: IoU of {m > t}; else of {m >= t}, which moves coarse maps by points.
      scale: of the map before thresholds: "clamp" negative values to 0 (BioViL), or "min-max" each
        map to [0, 1] (AFLoc), a different number. CNR is the same under either.
    """

    signed: bool = False
    ddof: int = 0
    strict: bool = True
    scale: Literal["clamp", "min-max"] = "clamp"

    def check(self) -> "Variant":
        """Return itself.

        Raises:
          UserError: for a value that does not exist.
        """
        if self.ddof not in (0, 1) or self.scale not in ("clamp", "min-max"):
            raise UserError(
                f"evals.grounding has ddof={self.ddof} and scale={self.scale}: accepted are ddof 0 "
                "or 1, and scale clamp or min-max."
            )
        return self


class Pair(NamedTuple):
    """An image with one phrase.

    Attributes:
      row: of the image in its source.
      patient: whose it is.
      phrase: what to find.
      category: over which means are taken first.
      boxes: [n, 4], (ymin, xmin, ymax, xmax) as fractions of the stored image.
    """

    row: int
    patient: str
    phrase: str
    category: str
    boxes: np.ndarray


class Scores(NamedTuple):
    """What one map scores; `flat` where it does not vary, `area` the share of A in what is seen."""

    cnr: float
    miou: float
    pointing: float
    flat: bool
    area: float


def pairs_of(
    row: int, patient: str, phrases: Sequence[str], categories: Sequence[str], boxes
) -> list[Pair]:
    """Return the pairs of one image: boxes of the same phrase are one."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    at: dict[tuple[str, str], list[int]] = {}
    for i, key in enumerate(zip(phrases, categories, strict=True)):
        at.setdefault(key, []).append(i)
    return [Pair(row, patient, *key, boxes[places]) for key, places in at.items()]


def shuffled(pairs: Sequence[Pair], seed: int = 0) -> list[Pair]:
    """Give each pair the phrase of another category, the control "shuffled_phrases".

    Boxes and category stay, so that the numbers differ by the phrase alone. With one category the
    phrase is that of another pair.
    """
    rng, kinds = np.random.default_rng(seed), np.array([pair.category for pair in pairs])
    changed = []
    for i, pair in enumerate(pairs):
        others = np.flatnonzero(kinds != pair.category)
        others = others if len(others) else np.delete(np.arange(len(pairs)), i)
        other = int(rng.choice(others)) if len(others) else i
        changed.append(pair._replace(phrase=pairs[other].phrase))
    return changed


def region(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the union [H, W] bool of boxes in pixels: those whose centre lies in one of them.

    A box too small to hold a centre is the pixel its own centre lies in.
    """
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    union = np.zeros((height, width), bool)
    for top, left, bottom, right in boxes:
        inside = np.outer((rows >= top) & (rows <= bottom), (columns >= left) & (columns <= right))
        y, x = int((top + bottom) // 2), int((left + right) // 2)
        if not inside.any() and 0 <= y < height and 0 <= x < width:
            inside[y, x] = True
        union |= inside
    return union


def heatmap(
    patches: np.ndarray,
    side: int,
    *,
    smoothing: float = 0.0,
    interpolation: Literal["bilinear", "nearest"] = "bilinear",
) -> np.ndarray:
    """Return a map [side, side] from one value a patch [h, w].

    Args:
      patches: the values.
      side: pixels.
      smoothing: standard deviation of a Gaussian on the grid, in patches, mirrored at its edges so
        that the mean stays; BioViL's is 1.5.
      interpolation: "bilinear" between the patches' centres, constant beyond the outermost; or
        "nearest", BioViL's.
    """
    patches = np.asarray(patches, np.float64)
    if smoothing:
        patches = scipy.ndimage.gaussian_filter(patches, smoothing, mode="reflect")
    places = [(np.arange(side) + 0.5) * n / side - 0.5 for n in patches.shape]  # pixel centres
    if interpolation == "nearest":
        near = [np.arange(side) * n // side for n in patches.shape]
        return patches[np.ix_(*near)]
    weights = [_linear(p, n) for p, n in zip(places, patches.shape, strict=True)]
    return weights[0] @ patches @ weights[1].T


def _linear(places: np.ndarray, count: int) -> np.ndarray:
    """Return the weight [side, count] of each patch at each place along one axis."""
    places = np.clip(places, 0, count - 1)
    return np.maximum(1 - np.abs(places[:, None] - np.arange(count)), 0)


def centred(values: np.ndarray, side: int) -> np.ndarray:
    """Return a map pasted into the middle of [side, side], NaN around it: what was not seen."""
    canvas = np.full((side, side), np.nan)
    top, left = ((side - n) // 2 for n in values.shape)
    canvas[top : top + values.shape[0], left : left + values.shape[1]] = values
    return canvas


def contrast_to_noise(values, inside, *, signed: bool = False, ddof: int = 0) -> float:
    """Return the CNR of a map [H, W]; NaN pixels do not count; 0 for a map that does not vary.

    Infinite where A and B have one value each, but for rounding; NaN where one of them was not
    seen, or has too few pixels for its variance.

    Args:
      values: the map.
      inside: A, bool [H, W].
      signed: keep the sign of mean_A - mean_B; published numbers do not.
      ddof: 0 population variances, 1 unbiased ones.
    """
    seen = np.isfinite(values)
    a, b = values[inside & seen], values[~inside & seen]
    if min(len(a), len(b)) <= ddof:
        return float("nan")
    difference = a.mean() - b.mean()
    noise = np.sqrt(a.var(ddof=ddof) + b.var(ddof=ddof))
    if is_flat(values):
        return 0.0
    contrast = difference if signed else abs(difference)
    if noise <= ROUNDING * abs(difference):
        return float(np.copysign(np.inf, contrast))
    return float(contrast / noise)


def is_flat(values) -> bool:
    """Say whether a map has one value wherever it was seen, but for rounding."""
    seen = values[np.isfinite(values)]
    return bool(np.ptp(seen) <= ROUNDING * np.abs(seen).max())


def mean_iou(values, inside, *, thresholds=THRESHOLDS, strict: bool = True) -> float:
    """Return the mean over t of IoU({m > t}, A), or of {m >= t} where not strict."""
    seen = np.isfinite(values)
    values, inside = values[seen], inside[seen]
    found = []
    for t in thresholds:
        above = values > t if strict else values >= t
        union = (above | inside).sum()
        found.append((above & inside).sum() / union if union else 0.0)
    return float(np.mean(found))


def scaled(values, scale: str) -> np.ndarray:
    """Return a map as thresholds see it; see `Variant`. A flat map becomes 0 under "min-max"."""
    if scale == "clamp":
        return np.where(values < 0, 0.0, values)  # NaN stays
    low, high = np.nanmin(values), np.nanmax(values)
    return (values - low) / (high - low) if high > low else values * 0.0


def pointing(values, inside) -> float:
    """Return the share of the largest pixels that lie inside A: 1 or 0 where there is one."""
    best = values == np.nanmax(values)
    return float((best & inside).sum() / best.sum())


def score(values, inside, variant: Variant = Variant()) -> Scores:  # noqa: B008 (immutable)
    """Score one map [H, W]; NaN CNR where nothing of A, or nothing outside it, was seen."""
    seen = np.isfinite(values)
    return Scores(
        contrast_to_noise(values, inside, signed=variant.signed, ddof=variant.ddof),
        mean_iou(scaled(values, variant.scale), inside, strict=variant.strict),
        pointing(values, inside),
        is_flat(values),
        float(inside[seen].mean()),
    )


def run(
    pairs: Sequence[Pair],
    scores: Sequence[Scores],
    *,
    task: str,
    settings=None,
    variant: Variant = Variant(),  # noqa: B008 (immutable)
    **bootstrap,
) -> Results:
    """Return means with intervals from draws of whole patients.

    Args:
      pairs: P of them.
      scores: of their maps.
      task: middle part of the result keys, such as the name of the map.
      settings: what else decides what the numbers mean.
      variant: by which the maps were scored.
      **bootstrap: resamples (2,000), seed, level.

    Returns:
      cnr, miou and pointing, each also `_micro` and per category; the mean `area` is what a random
      pixel hits. No number where nothing of any pair was seen; a pair with an infinite CNR counts
      in all but CNR, and a category of such pairs alone is none of CNR's.
    """
    seen = np.array([not np.isnan(s.cnr) for s in scores], bool)
    kept = [pair for pair, is_seen in zip(pairs, seen, strict=True) if is_seen]
    values = np.array([s[:3] for s in scores], np.float64).reshape(-1, 3)[seen]
    areas = np.array([s.area for s in scores])[seen]
    notes = {
        "patients": len({pair.patient for pair in kept}),
        "left_out": int((~seen).sum()),
        "flat": int(sum(s.flat for s in scores)),
        "cnr_infinite": int(np.isinf(values[:, 0]).sum()),
    }
    protocol = PROTOCOL if variant == Variant() else LEGACY
    settings = {"thresholds": THRESHOLDS, **(settings or {}), **bootstrap}
    settings |= {} if variant == Variant() else variant._asdict()
    if not kept:
        return assemble(protocol, task, {}, settings=settings, notes=notes)
    kinds, kind = np.unique([pair.category for pair in kept], return_inverse=True)
    members = np.eye(len(kinds))[kind]  # [P, C]
    found = statistics.bootstrap(
        functools.partial(_means, values, members),
        len(kept),
        groups=[pair.patient for pair in kept],
        **bootstrap,
    )
    names = [""] + ["_micro"] + [f"/{name.replace('/', ' ')}" for name in kinds]
    hit = [float(np.mean(members.T @ areas / np.maximum(members.sum(0), 1)))]
    hit += [float(areas.mean()), *(members.T @ areas / members.sum(0))]
    numbers = {}
    for m, metric in enumerate(METRICS):
        of_kind = members[np.isfinite(values[:, m])].sum(0).astype(int)
        counts = [of_kind.sum(), of_kind.sum(), *of_kind]
        for i, name in enumerate(names):
            at = m * len(names) + i
            chance = {"cnr": 0.0 if variant.signed else np.nan, "pointing": hit[i]}
            numbers[f"{metric}{name}"] = number(
                *(bound[at] for bound in found), n=counts[i], chance=chance.get(metric, np.nan)
            )
    return assemble(protocol, task, numbers, settings=settings, notes=notes)


def _means(values: np.ndarray, members: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return [R, 3 (2 + C)] weighted means: over categories, over pairs, of each category.

    A metric's are over the pairs where it is finite and over the categories that have such a pair.
    """
    columns = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for column in values.T:
            finite = np.isfinite(column)
            own, kinds = weights[:, finite], members[finite]
            there = kinds.any(0)  # else the mean over categories were never defined
            by_kind = (own * column[finite]) @ kinds / (own @ kinds)  # [R, C]
            over_kinds = by_kind[:, there].sum(1) / there.sum()
            micro = own @ column[finite] / own.sum(1)
            columns += [over_kinds[:, None], micro[:, None], by_kind]
    return np.concatenate(columns, axis=1)
