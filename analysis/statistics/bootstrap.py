"""Bootstrap over whole groups, such as all rows of a document, and percentile intervals."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

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

    >>> low, high = percentile_interval(np.arange(101.0), level=0.5)
    >>> float(low), float(high)
    (25.0, 75.0)
    """
    low, high = np.nanpercentile(values, [50 * (1 - level), 50 * (1 + level)], axis=-1)
    return low, high


def mean_interval(values: Floats, group: Ints, resamples: int, seed: int) -> tuple[Floats, Floats]:
    """Return the ends of a 95 % interval of the mean over documents, from draws of whole groups with replacement.

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
    means = np.empty((resamples, total.shape[1]))
    with np.errstate(invalid="ignore", divide="ignore"):
        for part, weights in resample_groups(len(total), resamples, seed):
            means[part] = (weights @ total) / (weights @ count)
    low, high = np.full((2, total.shape[1]), np.nan)
    enough = (count > 0).sum(0) > 1
    if enough.any():
        low[enough], high[enough] = percentile_interval(means[:, enough].T)
    return low.reshape(shape), high.reshape(shape)


def sum_by_group(values: Floats, group: Ints) -> tuple[Floats, Floats]:
    """Return sums and counts of the finite values of each group, ``(groups, …)`` each."""
    known = np.isfinite(values)
    total = np.zeros((int(group.max(initial=-1)) + 1, *values.shape[1:]))
    count = np.zeros_like(total)
    np.add.at(total, group, np.where(known, values, 0.0))
    np.add.at(count, group, known.astype(float))
    return total, count
