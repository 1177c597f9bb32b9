"""Zero-shot scoring flavours: from unit-norm images and prompts to a score an image and class.

A class has P prompts, cosines c_1 ... c_P with an image. The flavours differ in three places.

  pool          mean_p c_p; max_p c_p; or cos(image, unit(mean_p prompt_p)), the ensemble
  compare       of the pooled cosines a of a class and b of its absence: a - b, or the softmax
                e^a / (e^a + e^b) without a temperature
  standardise   each class column to mean 0 and population deviation 1, over all images or a batch

  clean         ensemble, a - b; `zero_shot.ranked` is what images of one class each are ranked by
  gloria        max, over all images. Huang et al. 2021 pools 1/2 (local + global); no recipe here
                returns word embeddings beside regions, so the global cosine alone is scored. Its
                word-range bug, characters counted for words, is in the local term: not copied.
  benchx        max, over each batch of evals.batch_size, so that the numbers depend on the batch
                size and on the order of images. Zhou et al. 2024.
  cxrclip       mean, a - b. You et al. 2023.
  medclip       mean; medclip-max the maximum; a - b where a set has negatives. Wang et al. 2022.
  chexzero      softmax of the pair. Tiu et al. 2022. It averages probabilities over checkpoints; a
                run here is one.
  biovil        ensemble of a positive and of a negative set, a - b. Boecking et al. 2022.

Everything is computed from features [N, E]; the largest array is the cosines [N, P] of one class.

Axis letters: N images, C classes, P prompts of a class, E joint width.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from medvlp_jax.config import UserError, nearest


class Flavour(NamedTuple):
    """How one published protocol scores.

    Attributes:
      pool: of the cosines of a class' prompts.
      negatives: "needed" where a finding has to have prompts of its absence; "used" where they are
        subtracted if there are any; "none" where the published protocol has none.
      compare: of a class and its absence.
      standardise: "" where no image changes the score of another.
      single: whether tasks of one class an image are scored.
    """

    pool: Literal["ensemble", "mean", "max"]
    negatives: Literal["needed", "used", "none"]
    compare: Literal["difference", "softmax"] = "difference"
    standardise: Literal["", "all", "batch"] = ""
    single: bool = True


FLAVOURS = {
    "clean": Flavour("ensemble", "needed"),
    "gloria": Flavour("max", "none", standardise="all"),
    "benchx": Flavour("max", "none", standardise="batch"),
    "cxrclip": Flavour("mean", "used"),
    "medclip": Flavour("mean", "used"),
    "medclip-max": Flavour("max", "used"),
    "chexzero": Flavour("ensemble", "needed", compare="softmax", single=False),
    "biovil": Flavour("ensemble", "needed", single=False),
}


def find(name: str) -> Flavour:
    """Return a flavour.

    Raises:
      UserError: for an unknown one.
    """
    if name not in FLAVOURS:
        raise UserError(f"No zero-shot flavour '{name}'. {nearest(name, list(FLAVOURS))}")
    return FLAVOURS[name]


def check(name: str, task: str, *, multi_label: bool, has_negatives: bool) -> None:
    """Refuse a task that a flavour does not define a score for.

    Raises:
      UserError: with what would be accepted.
    """
    flavour = find(name)
    if not multi_label:
        if not flavour.single:
            known = ", ".join(k for k, f in FLAVOURS.items() if f.single)
            raise UserError(
                f"zero_shot@{name} compares a finding with its absence, and images of task {task} "
                f"have one class each; accepted are {known}."
            )
        return
    wrong = "none" if has_negatives else "needed"
    if flavour.negatives == wrong:
        known = ", ".join(k for k, f in FLAVOURS.items() if f.negatives != wrong)
        has = "prompts" if has_negatives else "no prompts"
        raise UserError(
            f"zero_shot@{name} does not score task {task}, which has {has} of the absence of a "
            f"finding; accepted are {known}."
        )


def unit(x) -> np.ndarray:
    """Scale to unit norm along the last axis."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def pooled(image, groups: Sequence[np.ndarray], pool: str) -> np.ndarray:
    """Return the pooled cosine of every image and class [N, C].

    Args:
      image: [N, E] unit norm.
      groups: the prompts of each class, [P, E] unit norm.
      pool: see `Flavour`.
    """
    if pool == "ensemble":
        return image @ unit(np.stack([group.mean(0) for group in groups])).T
    reduce = {"mean": np.mean, "max": np.max}[pool]
    return np.stack([reduce(image @ group.T, axis=1) for group in groups], axis=1)


def standardised(scores: np.ndarray) -> np.ndarray:
    """Shift and scale each column to mean 0 and population deviation 1; a constant one to 0.

    A single row stays as it is, as in GLoRIA: of all zeros the first class would be the answer.
    """
    if len(scores) < 2:
        return scores
    centred, spread = scores - scores.mean(0), scores.std(0)
    varies = spread > 1e-9 * np.abs(scores).max(0)  # but for rounding
    return np.where(varies, centred / np.where(varies, spread, 1.0), 0.0)


def scores(
    name: str,
    image,
    positive: Sequence[np.ndarray],
    negative: Sequence[np.ndarray] = (),
    *,
    batch_size: int = 0,
) -> np.ndarray:
    """Return the score of every image and class [N, C].

    Args:
      name: of the flavour.
      image: [N, E] unit norm, all test images.
      positive: prompts of each class, [P, E] unit norm.
      negative: those of its absence; () where there are none.
      batch_size: over which "benchx" standardises, in the order of `image`; 0 = all at once.
    """
    flavour = find(name)
    image = np.asarray(image, np.float64)
    values = pooled(image, positive, flavour.pool)
    if len(negative):
        values = values - pooled(image, negative, flavour.pool)
    if flavour.compare == "softmax":
        values = 1 / (1 + np.exp(-values))  # the softmax of two depends on their difference alone
    if flavour.standardise == "all":
        values = standardised(values)
    if flavour.standardise == "batch":
        size = batch_size or len(values)
        starts = range(0, len(values), size)
        values = np.concatenate([standardised(values[s : s + size]) for s in starts])
    return values
