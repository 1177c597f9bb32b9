"""Boxes against boxes: NMS, matching, average precision, FROC.

Boxes are (ymin, xmin, ymax, xmax). A detection, best first, takes the true box of its image and
class that it overlaps most, if by at least t and not taken yet (COCO's matching). A resample of
images is a weight a row, see `statistics`: an image of weight 2 is there twice.

Which of equally good detections comes first would be the order of the images, which says nothing
and can say all: equal boxes in every image tie everywhere. So they enter together: precision and
recall are taken, and a point of FROC set, where a run of equal scores ends. COCO's code takes them
one by one in the order of its images; without ties the two agree.

Axis letters: N images, D detections of one class in all images, G true boxes of one class, T IoU
thresholds, R resamples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from medvlp_jax.evaluation.yolo import box_iou

COCO_RECALLS = np.linspace(0, 1, 101)
FROC_RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false positives an image


class Boxes(NamedTuple):
    """Boxes of one image: [n, 4], their class [n] and score [n] (1 for true ones)."""

    boxes: np.ndarray
    kinds: np.ndarray
    scores: np.ndarray


class Matched(NamedTuple):
    """All detections of one class, best first, and what they match.

    Attributes:
      scores: [D], falling.
      images: [D] row of each.
      hits: [T, D] bool, whether it takes a true box.
      truth: [N] true boxes of each image.
      reached: [G] score of the best detection whose centre lies in this box; -inf for none.
      owners: [G] row of each true box.
      false: [D] bool, the centre lies in no true box.
    """

    scores: np.ndarray
    images: np.ndarray
    hits: np.ndarray
    truth: np.ndarray
    reached: np.ndarray
    owners: np.ndarray
    false: np.ndarray


def suppress(found: Boxes, threshold: float, *, limit: int) -> Boxes:
    """Return detections less those that overlap a better one of their class by more: greedy NMS.

    Args:
      found: of one image.
      threshold: IoU.
      limit: at most so many, best first.
    """
    left = np.argsort(-found.scores, kind="stable")
    kept: list[int] = []
    while len(left) and len(kept) < limit:
        best, left = left[0], left[1:]
        kept.append(best)
        overlap = box_iou(found.boxes[best][None], found.boxes[left])
        left = left[(overlap <= threshold) | (found.kinds[left] != found.kinds[best])]
    return Boxes(*(field[kept] for field in found))


def match(
    found: Sequence[Boxes], truth: Sequence[Boxes], kind: int, thresholds: Sequence[float]
) -> Matched:
    """Match the detections of one class in N images."""
    scores, images, hits, false, reached, owners = [], [], [], [], [], []
    for row, (ours, theirs) in enumerate(zip(found, truth, strict=True)):
        order = np.flatnonzero(ours.kinds == kind)
        order = order[np.argsort(-ours.scores[order], kind="stable")]
        boxes, true = ours.boxes[order], theirs.boxes[theirs.kinds == kind]
        overlap = box_iou(boxes[:, None], true[None])  # [d, g]
        hits.append(np.stack([_taken(overlap, t) for t in thresholds]))
        centre = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
        inside = ((centre >= true[None, :, :2]) & (centre <= true[None, :, 2:])).all(-1)
        false.append(~inside.any(1))
        values = np.where(inside, ours.scores[order][:, None], -np.inf)
        reached.append(values.max(0, initial=-np.inf))
        scores.append(ours.scores[order])
        images.append(np.full(len(order), row))
        owners.append(np.full(len(true), row))
    scores, images = np.concatenate(scores), np.concatenate(images)
    order = np.argsort(-scores, kind="stable")
    return Matched(
        scores[order],
        images[order],
        np.concatenate(hits, axis=1)[:, order],
        np.array([len(o) for o in owners]),
        np.concatenate(reached),
        np.concatenate(owners),
        np.concatenate(false)[order],
    )


def _taken(overlap: np.ndarray, threshold: float) -> np.ndarray:
    """Return which detections [d], best first, take a true box; overlap [d, g] is used up."""
    free, taken = np.ones(overlap.shape[1], bool), np.zeros(len(overlap), bool)
    for i, row in enumerate(overlap):
        fits = np.where(free & (row >= threshold), row, -1.0)
        if len(fits) and fits.max() >= 0:
            free[fits.argmax()], taken[i] = False, True
    return taken


def average_precision(matched: Matched, weights: np.ndarray) -> np.ndarray:
    """Return COCO's AP, [R, T]: precision, made to fall, averaged over 101 recalls; NaN without G.

    Precision is that at the ends of runs of equal scores.

    Args:
      matched: of one class.
      weights: [R, N].
    """
    values = np.full((len(weights), len(matched.hits)), np.nan)
    ends = run_ends(matched.scores)
    for r, weight in enumerate(weights):
        total = weight @ matched.truth
        if total == 0:
            continue
        each = weight[matched.images]
        seen = np.cumsum(each)[ends]
        for t, hits in enumerate(matched.hits):
            true = np.cumsum(each * hits)[ends]
            precision = np.divide(true, seen, out=np.zeros(len(seen)), where=seen > 0)
            falling = np.maximum.accumulate(precision[::-1])[::-1]
            # A recall that is a multiple of 1/100 must not be missed by rounding.
            at = np.searchsorted(true / total, COCO_RECALLS - 1e-12)
            values[r, t] = np.append(falling, 0.0)[at].mean()
    return values


def run_ends(scores: np.ndarray) -> np.ndarray:
    """Return the places where runs of equal scores end; scores [D] fall."""
    return np.flatnonzero(np.diff(scores, append=-np.inf))


def froc(matched: Sequence[Matched], weights: np.ndarray) -> np.ndarray:
    """Return the share of true boxes found at FROC_RATES false positives an image, [R, 7].

    A box is found by a detection of its class whose centre lies in it; one whose centre lies in no
    box of its class is a false positive; a second one in the same box is neither (LUNA16). Classes
    are pooled: their detections are held against one threshold. Between two thresholds the share is
    taken from the straight line, as if a part of the detections that tie had been drawn by lot.

    Args:
      matched: of every class.
      weights: [R, N].
    """
    owners = np.concatenate([m.owners for m in matched])
    # What counts at a threshold: false positives and boxes, best first.
    scores = np.concatenate([m.scores[m.false] for m in matched] + [m.reached for m in matched])
    images = np.concatenate([m.images[m.false] for m in matched] + [owners])
    is_box = np.arange(len(scores)) >= len(scores) - len(owners)
    order = np.argsort(-scores, kind="stable")
    order = order[np.isfinite(scores[order])]  # less the boxes that nothing reaches
    images, is_box, ends = images[order], is_box[order], run_ends(scores[order])
    values = np.full((len(weights), len(FROC_RATES)), np.nan)
    for r, weight in enumerate(weights):
        total, each = weight[owners].sum(), weight[images]
        if not total:
            continue
        found, false = (np.append(0, np.cumsum(each * x)[ends]) for x in (is_box, ~is_box))
        # Of several thresholds with as many false positives np.interp takes the last, the lowest.
        values[r] = np.interp(np.array(FROC_RATES) * weight.sum(), false, found / total)
    return values


def legacy_map(
    found: Sequence[Boxes], truth: Sequence[Boxes], thresholds: Sequence[float]
) -> tuple[float, int]:
    """Return MGCA's "mAP" and the number of images in it.

    AP within each image, over classes it has, thresholds and then images; an image without a
    detection or without a true box is left out of the mean, which misses and false alarms on
    normal images therefore do not lower.

    Args:
      found: after its score floor and NMS.
      truth: of the same images.
      thresholds: IoU.
    """
    values = []
    for ours, theirs in zip(found, truth, strict=True):
        if len(ours.boxes) and len(theirs.boxes):
            each = [
                average_precision(match([ours], [theirs], kind, thresholds), np.ones((1, 1)))
                for kind in np.unique(theirs.kinds)
            ]
            values.append(np.mean(each))
    return (float(np.mean(values)) if values else float("nan")), len(values)
