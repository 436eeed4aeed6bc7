"""Intervals over whole groups, such as all rows of a document: bootstrap, and Student's t for few groups."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from scipy.stats import t as student

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

KURTOSIS = 6.0
"""Smallest kurtosis that is assumed of groups: that of a double exponential; a normal distribution has 3."""
CELLS = 512
"""Means whose draws are in memory at once."""
CHUNK = 2**22
"""Weights in memory at once, float64: 32 MiB."""


def resample_groups(
    n_groups: int, resamples: int, seed: int, *, n_samples: int = 0, smooth: bool = False
) -> Iterator[tuple[slice, Floats]]:
    """Yield slices of the resamples with the weight of each group in them, ``(≤ resamples, n_groups)``.

    A weight is the number of times that the group was drawn with replacement; the draws depend on *seed* alone.

    >>> [(part, weights)] = resample_groups(3, resamples=2, seed=0)
    >>> weights.sum(axis=1).tolist()
    [3.0, 3.0]

    Parameters
    ----------
    n_samples
        Samples to which the caller expands the weights; bounds the memory of a chunk.
    smooth
        Draw exponential weights instead of counts (Rubin 1981, "The Bayesian bootstrap").
    """
    rng = np.random.default_rng(seed)
    size = max(1, CHUNK // max(n_groups, n_samples))
    for low in range(0, resamples, size):
        n = min(size, resamples - low)
        if smooth:
            weights = rng.standard_exponential((n, n_groups))
        else:
            drawn = rng.integers(n_groups, size=(n, n_groups)) + n_groups * np.arange(n)[:, None]
            weights = np.bincount(drawn.ravel(), minlength=n * n_groups).reshape(n, n_groups).astype(float)
        yield slice(low, low + n), weights


def percentile_interval(values: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """Return the ends of the percentile interval over the last dim, the resamples; NaN is ignored.

    Both ends are NaN where no resample has a value.

    >>> low, high = percentile_interval(np.arange(101.0), level=0.5)
    >>> float(low), float(high)
    (25.0, 75.0)
    """
    values = np.asarray(values)
    found = np.full((2, *values.shape[:-1]), np.nan)
    some = ~np.isnan(values).all(-1)
    found[:, some] = np.nanpercentile(values[some], [50 * (1 - level), 50 * (1 + level)], axis=-1)
    return found[0], found[1]


def degrees_of_freedom(influence: Floats, size: Floats, *, kurtosis: bool = True) -> Floats:
    """Return the degrees of freedom of the variance between groups, ``(n,)``, at least 1.

    They are fewer than the groups − 1 if groups differ in size, or if few of them hold most of the variance
    (Satterthwaite 1946): the fourth moment of the influences gives the variance of their variance.

    >>> degrees_of_freedom(np.array([[-1.0], [0.0], [1.0]]), np.ones(3), kurtosis=False).tolist()
    [2.0]

    Parameters
    ----------
    influence : (groups, n)
        By how much each group moves the estimate, with mean 0.
    size : (groups,) or (groups, n)
        Samples of each group; groups of size 0 do not count.
    kurtosis
        Use the fourth moment. It is taken as at least `KURTOSIS`, because few groups show little of a long tail.
    """
    size = size.reshape(len(size), -1)
    count = (size > 0).sum(0)
    freedom = size.sum(0) ** 2 / (size**2).sum(0) - 1
    if kurtosis and (count > 1).all():
        square, fourth = (influence**2).sum(0) / count, (influence**4).sum(0) / count
        fourth = np.divide(fourth, square**2, out=np.zeros_like(square), where=square > 0)
        freedom = np.minimum(freedom, 2 * count / (np.maximum(fourth, KURTOSIS) - (count - 3) / (count - 1)))
    return np.asarray(np.maximum(freedom, 1.0))


def t_widening(freedom: ArrayLike) -> Floats:
    """Return by how much a variance is multiplied so that a 95 % interval of normal quantiles is that of Student's t.

    >>> round(float(t_widening(5)), 2)
    1.72
    """
    return np.asarray((student.ppf(0.975, freedom) / norm.ppf(0.975)) ** 2)


def mean_interval(values: Floats, group: Ints, resamples: int, seed: int) -> tuple[Floats, Floats]:
    """Return the ends of a 95 % interval of the mean over documents, from draws of whole groups with replacement.

    The interval is that of the studentized bootstrap (Davison & Hinkley 1997, 5.2), and at least that of Student's t,
    because the draws of few groups are too much alike.

    >>> low, high = mean_interval(np.array([1.0, 2.0, 3.0]), np.arange(3), resamples=100, seed=0)
    >>> bool(low < 2 < high)
    True

    Parameters
    ----------
    values : (documents, …)
        NaN is ignored.
    group : (documents,)
        The group of each document, from 0 without gaps.

    Returns
    -------
    low, high : (…)
        NaN where fewer than two groups have a value.
    """
    total, count = sum_by_group(values, group)
    shape = total.shape[1:]
    total, count = total.reshape(len(total), -1), count.reshape(len(count), -1)
    low, high = np.full((2, total.shape[1]), np.nan)
    enough = np.flatnonzero((count > 0).sum(0) > 1)
    for cells in np.array_split(enough, -(-len(enough) // CELLS)) if len(enough) else ():
        low[cells], high[cells] = _studentized(total[:, cells], count[:, cells], resamples, seed)
    return low.reshape(shape), high.reshape(shape)


def _studentized(total: Floats, count: Floats, resamples: int, seed: int) -> tuple[Floats, Floats]:
    """Return intervals of ratios of two sums over groups, (groups, cells) to (cells,)."""
    groups, mean = (count > 0).sum(0), total.sum(0) / count.sum(0)
    away = total - mean * count
    error = np.sqrt((away**2).sum(0)) / count.sum(0)
    rest = count.sum(0) - count
    influence = np.where(count > 0, mean - (total.sum(0) - total) / rest, 0.0)
    half = np.sqrt((groups - 1) / groups * (influence**2).sum(0))
    half *= student.ppf(0.975, degrees_of_freedom(influence, count))
    drawn = np.full((resamples, len(mean)), np.nan)
    least = (1e-6 * error * count.sum(0)) ** 2  # a draw of one group again and again has no spread
    for part, weights in resample_groups(len(total), resamples, seed):
        size = weights @ count
        with np.errstate(invalid="ignore", divide="ignore"):
            found = weights @ away / size
            spread = weights @ away**2 - 2 * found * (weights @ (away * count)) + found**2 * (weights @ count**2)
            drawn[part] = np.where(spread > least, found * size / np.sqrt(spread), np.nan)
    drawn[0, np.isnan(drawn).all(0)] = 0.0
    below, above = np.nanpercentile(drawn, [2.5, 97.5], axis=0) * error
    return mean - np.clip(above, half, 3 * half), mean + np.clip(-below, half, 3 * half)


def sum_by_group(values: Floats, group: Ints) -> tuple[Floats, Floats]:
    """Return sums and counts of the finite values of each group, ``(groups, …)`` each."""
    known = np.isfinite(values)
    total = np.zeros((int(group.max(initial=-1)) + 1, *values.shape[1:]))
    count = np.zeros_like(total)
    np.add.at(total, group, np.where(known, values, 0.0))
    np.add.at(count, group, known.astype(float))
    return total, count
