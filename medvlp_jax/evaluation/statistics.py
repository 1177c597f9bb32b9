"""Uncertainty of a number and of a difference: cluster bootstrap, DeLong, Holm.

Several images of one patient are not independent, so the bootstrap draws patients, not rows. A
statistic is a function of row weights [R, N] (`metrics` computes all R resamples in one go); the
difference of two statistics under the same weights is the paired bootstrap.

How often the intervals hold the truth is measured by benchmarks/coverage.py: 95 +- 2 of 100 with 30
patients or more of the rarer class; 91 with ten of a hundred.

Axis letters: N rows, G groups (patients), R resamples, J jackknife samples, K statistics, M models.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from scipy import special, stats

# A resample in which a class has one label is drawn again, up to this many times `resamples` draws.
REDRAW_LIMIT = 5
# Elements of one block of row weights: 2**21 float64 values are 16 MiB.
BLOCK_ELEMENTS = 2**21
METHOD = "bca"  # of every interval in results.json; a setting that the protocol hash covers
# Samples of the jackknife behind BCa: each leaves out one group, or one of so many parts of them.
JACKKNIFE = 200


class Interval(NamedTuple):
    """Point values [K] and bounds [K]; a bound is NaN where no interval could be had."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Comparison(NamedTuple):
    """Difference a - b [K], its bounds [K] and two-sided p values [K]."""

    difference: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray


class DeLong(NamedTuple):
    """AUROC [M] of several scores on the same rows and their covariance [M, M]."""

    auroc: np.ndarray
    covariance: np.ndarray


class DeLongTest(NamedTuple):
    """AUROC difference a - b of two paired scores, its z and two-sided p."""

    difference: float
    z: float
    p: float


Statistic = Callable[[np.ndarray], np.ndarray]  # row weights [R, N] -> [R, K]


def group_index(groups, n: int) -> tuple[np.ndarray, int]:
    """Return the group number of every row [N] and G; `groups` None makes every row its own group.

    Raises:
      ValueError: if there is not one group a row.
    """
    if groups is None:
        return np.arange(n), n
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    if index.shape != (n,):
        raise ValueError(
            f"groups has shape {index.shape}; one group for each of {n} rows is needed"
        )
    return index, len(names)


def resample_blocks(index, num_groups: int, *, at_most: int, seed: int):
    """Yield row weights [r, N], r <= at_most, without end: G groups drawn with replacement."""
    rng = np.random.default_rng(seed)
    rows = max(1, min(at_most, BLOCK_ELEMENTS // len(index)))
    offset = np.arange(rows)[:, None] * num_groups
    while True:
        draws = rng.integers(num_groups, size=(rows, num_groups)) + offset
        counts = np.bincount(draws.ravel(), minlength=rows * num_groups)
        yield counts.reshape(rows, num_groups)[:, index].astype(np.float64)


def _defined(draws: np.ndarray, resamples: int) -> np.ndarray | None:
    """Return the first `resamples` finite draws [resamples], or None if there are fewer."""
    finite = draws[np.isfinite(draws)][:resamples]
    return finite if len(finite) == resamples else None


def _varies(sample: np.ndarray, value: float) -> bool:
    """Say whether a draw differs from the value by more than rounding."""
    return bool(np.abs(sample - value).max() > 1e-12 * max(1.0, abs(value)))


def _draw(statistic: Statistic, value, index, num_groups: int, *, resamples: int, seed: int):
    """Draw until each defined statistic has `resamples` finite draws or the limit is met."""
    wanted = np.isfinite(value)
    blocks, drawn = [], 0
    have = np.zeros(len(value), int)
    for weights in resample_blocks(index, num_groups, at_most=resamples, seed=seed):
        if drawn >= REDRAW_LIMIT * resamples or not np.any(have[wanted] < resamples):
            break
        blocks.append(statistic(weights))
        drawn += len(blocks[-1])
        have += np.isfinite(blocks[-1]).sum(0)
    return np.concatenate(blocks) if blocks else np.empty((0, len(value)))


def acceleration(statistic: Statistic, index, num_groups: int, *, seed: int) -> np.ndarray:
    """Return a [K], how fast the spread of a statistic changes with its value.

    a = sum_j d_j^3 / (6 (sum_j d_j^2)^(3/2)), d_j = mean - statistic without part j of the groups
    (Efron & Tibshirani 1993, eq. 14.15). Parts without which the statistic is undefined do not
    count. |a| <= 1/6.
    """
    order = np.random.default_rng(seed).permutation(num_groups)
    part = np.empty(num_groups, int)
    part[order] = np.arange(num_groups) * min(num_groups, JACKKNIFE) // num_groups
    rows, parts = part[index], np.arange(part.max() + 1)
    at_most = max(1, BLOCK_ELEMENTS // len(index))
    blocks = (parts[i : i + at_most] for i in range(0, len(parts), at_most))
    left = [statistic((rows != block[:, None]).astype(np.float64)) for block in blocks]
    left = np.concatenate(left)  # [J, K]
    known = np.isfinite(left)
    mean = np.where(known, left, 0).sum(0) / np.maximum(known.sum(0), 1)
    d = np.where(known, mean - left, 0)
    spread = (d**2).sum(0) ** 1.5
    return np.divide((d**3).sum(0), 6 * spread, out=np.zeros_like(mean), where=spread > 0)


def corrected_levels(sample, value, a: float, levels) -> np.ndarray:
    """Return which quantiles of the draws bound the truth at `levels`.

    Phi(z0 + (z0 + z) / (1 - a (z0 + z))), z the normal quantile of the level, z0 that of the share
    of draws below the value, ties half: it is not 0 where the statistic is biased. BCa, Efron &
    Tibshirani 1993, eq. 14.10.
    """
    below = (np.sum(sample < value) + np.sum(sample == value) / 2) / len(sample)
    edge = 0.5 / len(sample)
    z0 = stats.norm.ppf(np.clip(below, edge, 1 - edge))
    shifted = z0 + stats.norm.ppf(levels)
    return stats.norm.cdf(z0 + shifted / np.maximum(1 - a * shifted, edge))


def bootstrap(
    statistic: Statistic,
    n: int,
    *,
    groups=None,
    resamples=2000,
    seed=0,
    level=0.95,
    method: Literal["bca", "percentile"] = METHOD,
) -> Interval:
    """Bootstrap that draws whole groups (patients) with replacement.

    Percentile intervals of an AUROC near 1 lie too high: with ten positives at .9 the truth is
    below them one time in ten. Bias correction and acceleration (BCa) put most of that right.

    Each of the K statistics uses its first `resamples` draws in which it is defined: a resample in
    which a class has lost all its positives is drawn again for that class only. A statistic that is
    defined in less than 1 / REDRAW_LIMIT of the draws gets no interval. Nor does one that is the
    same in all draws: an AUROC of 1 of ten patients is not known to be 1, as [1, 1] would say.

    Args:
      statistic: row weights [R, N] -> [R, K]; NaN where undefined.
      n: number of rows N.
      groups: [N] patient of each row; None = rows are independent.
      resamples: number of resamples; 0 gives the point value alone (quick looks in training).
      seed: of the draws; the same seed pairs two calls.
      level: coverage, in (0, 1).
      method: "bca", or "percentile", which most published intervals are.

    Returns:
      Interval with arrays [K]; no bounds, NaN, from fewer than 2 groups.
    """
    index, num_groups = group_index(groups, n)
    value = statistic(np.ones((1, n)))[0]
    low, high = np.full_like(value, np.nan), np.full_like(value, np.nan)
    if resamples and num_groups > 1:
        draws = _draw(statistic, value, index, num_groups, resamples=resamples, seed=seed)
        a = acceleration(statistic, index, num_groups, seed=seed) if method == "bca" else None
        for k in range(len(value)):
            sample = _defined(draws[:, k], resamples)
            if sample is not None and _varies(sample, value[k]):
                levels = np.array([(1 - level) / 2, (1 + level) / 2])
                if method == "bca":
                    levels = corrected_levels(sample, value[k], a[k], levels)
                low[k], high[k] = np.quantile(sample, levels)
    return Interval(value, low, high)


def compare(
    a: Statistic, b: Statistic, n: int, *, groups=None, resamples=2000, seed=0, level=0.95
) -> Comparison:
    """Paired bootstrap of a - b: both statistics see the same resamples.

    p = 2 min(P(d <= 0), P(d >= 0)) over the draws, with one added to counts and draws so that it is
    never 0. Args as in `bootstrap`.

    Raises:
      ValueError: for fewer than 2 groups or no resamples.
    """
    index, num_groups = group_index(groups, n)
    if num_groups < 2 or resamples < 1:
        raise ValueError(f"compare needs 2 groups and 1 resample, got {num_groups} and {resamples}")

    def difference(weights):
        return a(weights) - b(weights)

    value = difference(np.ones((1, n)))[0]
    draws = _draw(difference, value, index, num_groups, resamples=resamples, seed=seed)
    low, high, p = (np.full_like(value, np.nan) for _ in range(3))
    for k in range(len(value)):
        if (sample := _defined(draws[:, k], resamples)) is not None:
            low[k], high[k] = np.quantile(sample, [(1 - level) / 2, (1 + level) / 2])
            tail = min(np.sum(sample <= 0), np.sum(sample >= 0))
            p[k] = min(1.0, 2 * (tail + 1) / (resamples + 1))
    return Comparison(value, low, high, p)


def delong(labels, scores) -> DeLong:
    """AUROC and its covariance between correlated scores, from mid-ranks in O(N log N).

    V10_i is the share of negatives that positive i beats, V01_j the share of positives that beat
    negative j; S = cov(V10) / m + cov(V01) / n. DeLong et al. 1988,
    https://doi.org/10.2307/2531595; mid-ranks: Sun & Xu 2014,
    https://doi.org/10.1109/LSP.2014.2337313. Rows are taken as independent: with several rows a
    patient use `compare`.

    Args:
      labels: [N], true = positive.
      scores: [M, N].

    Raises:
      ValueError: with fewer than 2 positives or 2 negatives.
    """
    labels, scores = np.asarray(labels).astype(bool), np.atleast_2d(np.asarray(scores, np.float64))
    x, y = scores[:, labels], scores[:, ~labels]  # [M, m], [M, n]
    m, n = x.shape[1], y.shape[1]
    if min(m, n) < 2:
        raise ValueError(f"DeLong needs 2 positives and 2 negatives, got {m} and {n}")
    ranks = stats.rankdata(np.concatenate([x, y], axis=1), axis=1)
    v10 = (ranks[:, :m] - stats.rankdata(x, axis=1)) / n
    v01 = 1.0 - (ranks[:, m:] - stats.rankdata(y, axis=1)) / m
    covariance = np.atleast_2d(np.cov(v10)) / m + np.atleast_2d(np.cov(v01)) / n
    return DeLong(v10.mean(1), covariance)


def delong_interval(
    result: DeLong, *, level=0.95, scale: Literal["logit", "linear"] = "logit"
) -> Interval:
    """Normal interval of each AUROC A.

    On the logit scale, logit(A) +- z s / (A (1 - A)), it stays inside (0, 1) and leans away from
    the nearer end as the sampling distribution does (Pepe 2003); the linear one,
    A +- z s, is clipped. An AUROC of 0 or 1 has no spread and no interval: NaN.
    """
    z, s = stats.norm.ppf((1 + level) / 2), np.sqrt(np.diagonal(result.covariance))
    auroc = np.where(s > 0, result.auroc, np.nan)
    if scale == "linear":
        low, high = np.clip([auroc - z * s, auroc + z * s], 0.0, 1.0)
        return Interval(result.auroc, low, high)
    half = z * s / (auroc * (1 - auroc))
    return Interval(result.auroc, *special.expit(special.logit(auroc) + np.array([-half, half])))


def delong_test(labels, a, b) -> DeLongTest:
    """Test whether two scores [N] on the same rows have the same AUROC.

    z = (A - B) / sqrt(S_aa + S_bb - 2 S_ab); identical rankings give z = 0, p = 1.
    """
    auroc, s = delong(labels, np.stack([a, b]))
    difference = float(auroc[0] - auroc[1])
    variance = s[0, 0] + s[1, 1] - 2 * s[0, 1]
    if variance <= 0:  # the same order, or both perfect
        same = difference == 0
        return DeLongTest(difference, 0.0 if same else np.copysign(np.inf, difference), float(same))
    z = difference / np.sqrt(variance)
    return DeLongTest(difference, float(z), float(2 * stats.norm.sf(abs(z))))


def holm(p) -> np.ndarray:
    """Adjust p values [K] for K comparisons (Holm 1979): step down, monotone, at most 1."""
    p = np.asarray(p, np.float64)
    order = np.argsort(p, kind="stable")
    steps = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted
