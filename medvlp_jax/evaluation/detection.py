"""Detection: YOLOv3 heads on an encoder, scored as COCO does, as readers do, and as MGCA did.

  map         mean AP over IoU .40:.05:.75, then over classes; all images, no floor on the score
  ap50        AP at IoU .5, likewise; ap/<class>, ap50/<class> of one class
  froc        mean of froc/<r>, the share of lesions found at r = 1/8 ... 8 false positives an image
  legacy_map  MGCA's: detections above .5, images without detection or lesion left out

The floor of the clean numbers is 0.001, 100 detections an image, NMS at IoU 0.5. `chance` is what
the same boxes in every image score: those that hit most boxes of the training patients.

Axis letters: N images, C classes, M true boxes of an image, Q candidates, R resamples.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from medvlp_jax.evaluation import average_precision as ap
from medvlp_jax.evaluation import statistics, yolo
from medvlp_jax.evaluation.average_precision import Boxes
from medvlp_jax.evaluation.results import Results, assemble, number, task_name

PROTOCOL = {False: "detect@clean-v1", True: "detect-train-encoder@clean-v1"}
IOUS = tuple(np.round(np.arange(0.4, 0.76, 0.05), 2).tolist())
HALF = IOUS.index(0.5)
NMS, FLOOR, LEGACY_FLOOR = 0.5, 0.001, 0.5
BLIND_BOXES, BLIND_CANDIDATES = 5, 200


def predictions(found: Mapping, *, floor: float = FLOOR) -> list[Boxes]:
    """Return the detections of each image after the floor and NMS.

    Args:
      found: "boxes" [N, Q, 4], "scores" [N, Q], "kinds" [N, Q].
      floor: smallest score.
    """
    rows = []
    for boxes, scores, kinds in zip(found["boxes"], found["scores"], found["kinds"], strict=True):
        above = scores >= floor
        fields = (np.asarray(x)[above] for x in (boxes.astype(np.float64), kinds, scores))
        rows.append(ap.suppress(Boxes(*fields), NMS, limit=yolo.KEPT))
    return rows


def truth(found: Mapping) -> list[Boxes]:
    """Return the true boxes of each image, of "true_boxes" [N, M, 4] and "true_kinds" [N, M]."""
    pairs = zip(found["true_boxes"], found["true_kinds"], strict=True)
    return [
        Boxes(boxes[kinds >= 0].astype(np.float64), kinds[kinds >= 0], np.ones((kinds >= 0).sum()))
        for boxes, kinds in pairs
    ]


def value(found: Mapping) -> float:
    """Return the validation score: AP at IoU .5 over the classes that are there; 0 without one."""
    ours, theirs = predictions(found), truth(found)
    kinds = {int(k) for boxes in theirs for k in boxes.kinds}
    each = [
        ap.average_precision(ap.match(ours, theirs, k, (0.5,)), np.ones((1, len(ours))))[0, 0]
        for k in sorted(kinds)
    ]
    return float(np.mean(each)) if each else 0.0


def blind(boxes: Sequence[Boxes], classes: int, *, seed: int = 0) -> Boxes:
    """Return the boxes that hit most of those of the training images: a detector without eyes.

    Of each class up to BLIND_BOXES, one after the other: the box with IoU >= .5 to most boxes that
    those before it do not hit; their share is its score.

    Args:
      boxes: true ones of the training images.
      classes: C.
      seed: of the BLIND_CANDIDATES boxes that are tried.
    """
    places, kinds = (
        np.concatenate([getattr(b, name) for b in boxes]) for name in ("boxes", "kinds")
    )
    rng, chosen = np.random.default_rng(seed), []
    for kind in range(classes):
        own = places[kinds == kind]
        if not len(own):
            continue
        tried = own[rng.permutation(len(own))[:BLIND_CANDIDATES]]
        hit = yolo.box_iou(tried[:, None], own[None]) >= 0.5  # [tried, own]
        left = np.ones(len(own), bool)
        for _ in range(BLIND_BOXES):
            gain = (hit & left).sum(1)
            best = gain.argmax()
            if not gain[best]:
                break
            chosen.append((tried[best], kind, gain[best] / len(own)))
            left &= ~hit[best]
    if not chosen:
        return Boxes(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
    return Boxes(*(np.array(field) for field in zip(*chosen, strict=True)))


def scored(ours: Sequence[Boxes], theirs: Sequence[Boxes], kinds: Mapping[int, str]):
    """Return (names, statistic): row weights [R, N] -> the clean numbers [R, K] of these names."""
    matched = {k: ap.match(ours, theirs, k, IOUS) for k in kinds}
    names = ["map", "ap50", "froc", *(f"froc/{r:g}" for r in ap.FROC_RATES)]
    own = len(kinds) > 1  # of one class they are map and ap50
    names += [f"{m}/{name}" for m in ("ap", "ap50") for name in kinds.values() if own]

    def statistic(weights):
        each = np.stack([ap.average_precision(m, weights) for m in matched.values()])  # [C, R, T]
        mean, half = each.mean(-1), each[..., HALF]
        found = ap.froc([*matched.values()], weights)  # [R, 7]
        summary = [mean.mean(0), half.mean(0), found.mean(-1)]
        each = [mean, half] if own else []
        return np.concatenate([np.stack(summary), found.T, *each]).T

    return names, statistic


def run(
    found: Mapping,
    control: Boxes,
    names: Sequence[str],
    *,
    fraction: float,
    settings: Mapping,
    notes: Mapping,
    train_encoder: bool = False,
    **bootstrap,
) -> Results:
    """Score the candidates of the test images.

    Args:
      found: what `predict` gave of N images, and `patient_id`.
      control: the boxes of `blind`.
      names: C classes; those that no image has are skipped and listed.
      fraction: share of the training patients.
      settings: what else decides what the numbers mean.
      notes: what the reader must know.
      train_encoder: whether the encoder was trained: another protocol.
      **bootstrap: resamples, seed, level.
    """
    ours, theirs, n = predictions(found), truth(found), len(found["true_kinds"])
    groups = found["patient_id"]
    there = {k: name for k, name in enumerate(names) if (found["true_kinds"] == k).any()}
    numbers = {}
    if there:
        keys, statistic = scored(ours, theirs, there)
        interval = statistics.bootstrap(statistic, n, groups=groups, **bootstrap)
        chance = scored([control] * n, theirs, there)[1](np.ones((1, n)))[0]
        bounds = zip(*interval, strict=True)
        numbers = {
            key: number(*b, n=n, chance=c) for key, b, c in zip(keys, bounds, chance, strict=True)
        }
        confident = predictions(found, floor=LEGACY_FLOOR)
        legacy, counted = ap.legacy_map(confident, theirs, IOUS)
        if counted:
            numbers["legacy_map"] = number(legacy, n=counted)
    notes = {
        "patients": len({*map(str, groups)}),
        "skipped": [name for k, name in enumerate(names) if k not in there],
        "boxes": {name: int((found["true_kinds"] == k).sum()) for k, name in there.items()},
        "images_with_boxes": int((found["true_kinds"] >= 0).any(1).sum()),
        **notes,
    }
    settings = {
        **{"classes": list(names), "ious": IOUS, "nms": NMS, "floor": FLOOR, "kept": yolo.KEPT},
        **{"ties": "together", "fraction": fraction, **settings, **bootstrap},
    }
    name = task_name(names[0] if len(names) == 1 else "boxes", fraction)
    return assemble(PROTOCOL[train_encoder], name, numbers, settings=settings, notes=notes)
