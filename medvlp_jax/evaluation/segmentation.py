"""Segmentation: a decoder on an encoder, Dice and IoU of every region of every image.

  loss  = BCE + soft Dice, 1 - (2 sum p t + 1) / (sum p + sum t + 1)
  Dice  = 2 |P and T| / (|P| + |T|),  IoU = |P and T| / |P or T|,  P = {p > 0.5}

of one region in one image. Where image and prediction have nothing of the region both are 1, where
only one has, 0: a false alarm on an image without the region costs all of it.

  dice, iou         mean over images, then over regions
  *_present         the same over the images that have the region
  *_micro           of all pixels of all images together, then mean over regions
  dice_mgca         MGCA's average: within batches of 16 in order, then over batches
  mdice_benchx      BenchX's mDice: mean of `dice_micro` and that of everything else, so that 0.5 is
                    little

The last two are these papers' averages of our training, not their protocols. `chance` is what a
picture-blind map scores: the mean mask of the training patients, cut at the threshold that suits
them best.

Axis letters: B, N images, H, W pixels, K regions, R resamples.
"""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from medvlp_jax.evaluation import decoders, metrics, statistics
from medvlp_jax.evaluation.results import Results, assemble, number, task_name

PROTOCOL = {False: "segment@clean-v1", True: "segment-train-encoder@clean-v1"}
THRESHOLDS = tuple(np.round(np.arange(0.1, 0.95, 0.1), 1).tolist())
MGCA_BATCH = 16
COUNTED = ("predicted", "truth", "both", "pixels")
SMOOTH = 1.0


class Segmenter(nn.Module):
    """The decoder that suits the encoder, and its loss; see `adaptation`.

    Attributes:
      regions: K.
      widths: of the decoder's steps; () takes the published ones.
    """

    regions: int
    widths: tuple[int, ...] = ()
    targets = ("mask",)
    weights = {"bce": 1.0, "dice": 1.0}  # noqa: RUF012 (read, never written)

    @nn.compact
    def __call__(self, encoded, size, *, train=False):
        """Return logits [B, H, W, K]."""
        return decoders.segment(encoded, size, self.regions, self.widths, train=train)

    def losses(self, outputs, batch):
        """Return {"bce", "dice"}, means over pixels, images and regions."""
        return {"bce": bce(outputs, batch["mask"]), "dice": soft_dice(outputs, batch["mask"])}

    def predict(self, outputs, batch):
        """Return the pixels of prediction, truth and both, see `counts`."""
        return counts(outputs > 0, batch["mask"])


def bce(logits, mask):
    """Return the mean binary cross-entropy of logits [B, H, W, K] in float32."""
    loss = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), mask.astype(jnp.float32))
    return loss.mean()


def soft_dice(logits, mask):
    """Return 1 - soft Dice of every region of every image, averaged."""
    p, t = jax.nn.sigmoid(logits.astype(jnp.float32)), mask.astype(jnp.float32)
    both, each = (p * t).sum((1, 2)), (p + t).sum((1, 2))  # [B, K]
    return (1 - (2 * both + SMOOTH) / (each + SMOOTH)).mean()


def counts(predicted, mask) -> dict:
    """Return {"predicted", "truth", "both"}, pixels [B, K], and "pixels" [B] of an image."""
    area = lambda x: x.astype(jnp.float32).sum((1, 2))
    return {
        "predicted": area(predicted),
        "truth": area(mask),
        "both": area(predicted & mask),
        "pixels": jnp.full(len(mask), mask.shape[1] * mask.shape[2], jnp.float32),
    }


def dice(found: Mapping) -> np.ndarray:
    """Return Dice of every region of every image [N, K]; 1 where both are empty."""
    return _ratio(2 * _f64(found["both"]), _f64(found["predicted"]) + _f64(found["truth"]))


def iou(found: Mapping) -> np.ndarray:
    """Return IoU [N, K], likewise."""
    both = _f64(found["both"])
    return _ratio(both, _f64(found["predicted"]) + _f64(found["truth"]) - both)


def value(found: Mapping) -> float:
    """Return the validation score: Dice over images, then over regions the images have."""
    there = (found["truth"] > 0).any(0)
    there = there if there.any() else np.ones_like(there)
    return float(dice(found)[:, there].mean())


def blind(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mask [H, W, K] that is drawn without looking: the mean one, cut.

    The threshold of each region is that of THRESHOLDS with the best Dice on these masks.

    Args:
      masks: of the training patients, [H, W, K] bool each.
    """
    mean = sum(mask.astype(np.float64) for mask in masks) / len(masks)
    cuts = np.stack([mean > t * mean.max((0, 1)) for t in THRESHOLDS])  # [T, H, W, K]
    totals = np.zeros((len(THRESHOLDS), mean.shape[-1]))
    for mask in masks:
        area = cuts.sum((1, 2)) + mask.sum((0, 1))
        totals += _ratio(2 * (cuts & mask).sum((1, 2)), area)
    best = totals.argmax(0)
    return np.stack([cuts[t, ..., k] for k, t in enumerate(best)], axis=-1)


def scored(found: Mapping, names: Sequence[str], weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return every number but `dice_mgca` under row weights [R, N]: [R] by metric name.

    Args:
      found: counts [N, K] of images in which every region is at least once.
      names: K regions.
      weights: [R, N].
    """
    numbers: dict[str, np.ndarray] = {}
    present = found["truth"] > 0
    totals = {k: weights @ _f64(found[k]) for k in ("predicted", "truth", "both")}  # [R, K]
    pixels = weights @ _f64(found["pixels"])  # [R]
    per_region: dict[str, np.ndarray] = {}
    for name, of in (("dice", dice), ("iou", iou)):
        each = of(found)
        with np.errstate(invalid="ignore"):  # a resample may have lost the region
            there = weights @ (each * present) / (weights @ present)
        per_region[name] = metrics.weighted_mean(each, weights)  # [R, K]
        numbers[name] = per_region[name].mean(-1)
        numbers[f"{name}_present"] = there.mean(-1)
        numbers[f"{name}_micro"] = of(totals).mean(-1)
    rest = {k: pixels[:, None] - totals[k] for k in ("predicted", "truth")}
    rest["both"] = pixels[:, None] - (totals["predicted"] + totals["truth"] - totals["both"])
    numbers["mdice_benchx"] = ((dice(totals) + dice(rest)) / 2).mean(-1)
    for name, values in per_region.items() if len(names) > 1 else ():
        numbers |= {f"{name}/{region}": values[:, k] for k, region in enumerate(names)}
    return numbers


def mgca_dice(found: Mapping, batch: int = MGCA_BATCH) -> float:
    """Return Dice averaged within batches of images in order, then over batches and regions."""
    each = dice(found)
    starts = range(0, len(each), batch)
    return float(np.mean([each[start : start + batch].mean(0) for start in starts]))


def run(
    found: Mapping,
    control: Mapping,
    names: Sequence[str],
    *,
    fraction: float,
    settings: Mapping,
    notes: Mapping,
    train_encoder: bool = False,
    **bootstrap,
) -> Results:
    """Score the counts of the test images.

    Args:
      found: counts of N images, [N, K], and `patient_id`.
      control: counts of the picture-blind map.
      names: K regions; those that no image has are skipped and listed.
      fraction: share of the training patients.
      settings: what else decides what the numbers mean.
      notes: what the reader must know.
      train_encoder: whether the encoder was trained: another protocol.
      **bootstrap: resamples, seed, level.
    """
    there, n, groups = (found["truth"] > 0).any(0), len(found["truth"]), found["patient_id"]
    kept = [name for name, is_there in zip(names, there, strict=True) if is_there]
    cut = lambda counted: {
        k: counted[k] if k == "pixels" else counted[k][:, there] for k in COUNTED
    }
    found, control, numbers = cut(found), cut(control), {}
    if kept:
        keys = list(scored(found, kept, np.ones((1, n))))
        column = lambda weights: np.stack([*scored(found, kept, weights).values()], axis=-1)
        interval = statistics.bootstrap(column, n, groups=groups, **bootstrap)
        chance = scored(control, kept, np.ones((1, n)))
        bounds = dict(zip(keys, zip(*interval, strict=True), strict=True))
        numbers = {k: number(*b, n=n, chance=chance[k][0]) for k, b in bounds.items()}
        numbers["dice_mgca"] = number(mgca_dice(found), n=n, chance=mgca_dice(control))
    skipped = [name for name in names if name not in kept]
    notes = {"patients": len({*map(str, groups)}), "skipped": skipped, **notes}
    settings = {"regions": list(names), "fraction": fraction, **settings, **bootstrap}
    name = task_name(names[0] if len(names) == 1 else "regions", fraction)
    return assemble(PROTOCOL[train_encoder], name, numbers, settings=settings, notes=notes)


def _f64(x):
    return np.asarray(x, np.float64)


def _ratio(numerator, denominator):
    """Return the ratio, 1 where both are 0."""
    empty = denominator == 0
    return np.where(empty, 1.0, numerator / np.where(empty, 1.0, denominator))
