"""Metrics as ratios of sums over folds, with fold intervals and a group bootstrap.

Each metric is a numerator and a denominator in every fold. A fold's value, their quotient, is what
scikit-learn gives for that fold. The *pooled* value divides the sums over folds, so predictions of
different folds are never ranked against each other.

===========  ==================================  ==============================
metric       numerator                           denominator
===========  ==================================  ==============================
accuracy     correct samples                     samples
auroc        concordant pairs (a tie is a half)  pairs of a positive and a negative
r2           SST − SSE                           SST, about the fold's own mean
===========  ==================================  ==============================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Metric = Literal["accuracy", "auroc", "r2"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CHUNK = 2**22  # float64 values of bootstrap weights in memory at once: 32 MiB


def parts(
    metric: Metric, y: NDArray, predicted: NDArray, decision: Floats, fold: Ints, cv: int
) -> tuple[Floats, Floats]:
    """Return numerator and denominator in each fold, ``(cv,)`` each.

    *predicted* are class codes or values, *decision* what ranks the second class above the first; both
    ``(n_samples,)``.
    """
    found = [_weighted(metric, y[at], predicted[at], decision[at], np.ones((1, at.sum()))) for at in _masks(fold, cv)]
    return np.array([top[0] for top, _ in found]), np.array([bottom[0] for _, bottom in found])


def ratio(top: NDArray, bottom: NDArray) -> NDArray:
    """Return top / bottom, NaN where there was nothing to measure."""
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=np.asarray(bottom) > 0)


def fold_interval(values: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """Return the ends of mean ± half width over the last dim, the folds.

    Student's t with the variance factor 1/K + 1/(K−1) in place of 1/K, because training sets overlap
    (Nadeau & Bengio 2003, "Inference for the generalization error").
    """
    cv = values.shape[-1]
    half = student.ppf((1 + level) / 2, cv - 1) * values.std(-1, ddof=1) * np.sqrt(1 / cv + 1 / (cv - 1))
    return values.mean(-1) - half, values.mean(-1) + half


def bootstrap(
    metric: Metric,
    y: NDArray,
    predicted: NDArray,
    decision: Floats,
    fold: Ints,
    group: Ints,
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> tuple[Floats, Floats]:
    """Return the percentile interval of the pooled metric of each arm, ``(n_arms,)`` each.

    *predicted* and *decision* are ``(n_arms, n_samples)``. Whole groups are drawn with replacement, the same
    draws for every arm; the fitted probes stay as they are (cluster bootstrap: Davison & Hinkley 1997, 3.8).
    """
    cv, values = int(fold.max()) + 1, np.full((len(predicted), resamples), np.nan)
    masks, done = _masks(fold, cv), 0
    for weights in _resamples(int(group.max()) + 1, len(y), resamples, seed):
        for arm in range(len(predicted)):
            top, bottom = np.zeros(len(weights)), np.zeros(len(weights))
            for at in masks:
                drawn = weights[:, group[at]]
                more = _weighted(metric, y[at], predicted[arm, at], decision[arm, at], drawn)
                top, bottom = top + more[0], bottom + more[1]
            values[arm, done : done + len(weights)] = ratio(top, bottom)
        done += len(weights)
    low, high = np.nanpercentile(values, [50 * (1 - level), 50 * (1 + level)], axis=1)
    return low, high


def _masks(fold: Ints, cv: int) -> list[NDArray[np.bool_]]:
    return [fold == number for number in range(cv)]


def _resamples(n_groups: int, n_samples: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield how often each group was drawn, ``(≤ resamples, n_groups)``."""
    rng = np.random.default_rng(seed)
    size = max(1, CHUNK // max(n_groups, n_samples))
    for low in range(0, resamples, size):
        n = min(size, resamples - low)
        drawn = rng.integers(n_groups, size=(n, n_groups)) + n_groups * np.arange(n)[:, None]
        yield np.bincount(drawn.ravel(), minlength=n * n_groups).reshape(n, n_groups).astype(float)


def _weighted(
    metric: Metric, y: NDArray, predicted: NDArray, decision: Floats, weights: Floats
) -> tuple[Floats, Floats]:
    """Return numerator and denominator of one fold under each row of weights ``(n, n_samples)``."""
    if metric == "accuracy":
        return weights @ (y == predicted).astype(float), weights.sum(1)
    if metric == "r2":
        # About the fold's mean as it was observed: a resample's own mean would bias every R² downwards.
        sst = weights @ (y - y.mean()) ** 2
        return sst - weights @ (y - predicted) ** 2, sst
    _, tied = np.unique(decision, return_inverse=True)
    order = np.argsort(tied, kind="stable")
    tied, positive, weights = tied[order], y[order] == 1, weights[:, order]
    below = np.zeros((len(weights), len(y) + 1))
    np.cumsum(weights * ~positive, axis=1, out=below[:, 1:])
    left, right = (
        np.searchsorted(tied, tied[positive], "left"),
        np.searchsorted(tied, tied[positive], "right"),
    )
    won = (weights[:, positive] * (below[:, left] + below[:, right])).sum(1) / 2
    return won, weights[:, positive].sum(1) * below[:, -1]
