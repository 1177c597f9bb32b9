"""How well the probabilities of a classifier's answers are what they say.

The expected calibration error over bins of like size (https://arxiv.org/abs/1706.04599, whose bins
are of like width), and what it would be of a calibrated model.
"""

import numpy as np


def bins(right, confidence, count: int = 8) -> np.ndarray:
    """Return (mean confidence, share right, rows) of bins of like size, [bins, 3]."""
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, count) if len(part)]
    return np.array([(confidence[p].mean(), right[p].mean(), len(p)) for p in parts])


def error(right, confidence) -> float:
    """Return the mean over rows of |confidence - share right| of the bin: the expected error."""
    found = bins(right, confidence)
    return float(np.average(np.abs(found[:, 0] - found[:, 1]), weights=found[:, 2]))


def chance_errors(confidence, *, draws: int = 200, seed: int = 0) -> np.ndarray:
    """Return the errors [draws] of a model that is right as often as it says, as drawn by lot.

    They are above 0, the more the fewer rows a bin has: bins compare a share with its expectation.
    """
    rng = np.random.default_rng(seed)
    confidence = np.asarray(confidence, np.float64)
    lots = (rng.random(len(confidence)) < confidence for _ in range(draws))
    return np.array([error(right, confidence) for right in lots])
