"""How far an effect is to be believed: intervals and tests over whole groups of documents."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

EXACT = 12
"""Groups up to which all assignments of signs are tried."""


def group_bootstrap(
    values: NDArray[np.float64], group: NDArray[np.int64], resamples: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the 2.5 % and 97.5 % points of the mean over documents when whole groups are drawn with replacement.

    Parameters
    ----------
    values
        Shape (documents, …); NaN is left out.
    group
        Number of each document's group, from 0 without gaps, shape (documents,).

    Returns
    -------
    low, high : ndarray, shape (…); NaN where there are fewer than two groups
    """
    total, count = _by_group(values, group)
    drawn = np.random.default_rng(seed).integers(len(total), size=(resamples, len(total)))
    weights = np.zeros((resamples, len(total)))
    np.add.at(weights, (np.arange(resamples)[:, None], drawn), 1)
    shape = total.shape[1:]
    total, count = total.reshape(len(total), -1), count.reshape(len(count), -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (weights @ total) / (weights @ count)
    low, high = np.full((2, total.shape[1]), np.nan)
    enough = (count > 0).sum(0) > 1
    if enough.any():
        low[enough], high[enough] = np.nanquantile(means[:, enough], [0.025, 0.975], axis=0)
    return low.reshape(shape), high.reshape(shape)


def sign_flip(
    values: NDArray[np.float64], group: NDArray[np.int64], flips: int = 2000, seed: int = 0
) -> NDArray[np.float64]:
    """Return p-values, two-sided, of the hypothesis that differences are symmetric about zero.

    The signs of whole groups are flipped: all ways for up to `EXACT` groups, else *flips* at random, the observed one
    among them (Phipson & Smyth 2010).

    Parameters
    ----------
    values
        Differences, shape (documents, …); NaN is left out.
    """
    total, count = _by_group(values, group)
    shape = total.shape[1:]
    flat = total.reshape(len(total), -1)
    if len(flat) <= EXACT:
        signs = np.array(list(product((1, -1), repeat=len(flat))), float)
    else:
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(flips, len(flat)))
        signs[0] = 1
    reached = np.abs(signs @ flat) >= np.abs(flat.sum(0)) * (1 - 1e-12)
    p = reached.mean(0)
    p[count.reshape(len(count), -1).sum(0) == 0] = np.nan
    return p.reshape(shape)


def _by_group(values: NDArray[np.float64], group: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return sums and counts of what is not NaN, shape (groups, …)."""
    known = np.isfinite(values)
    total = np.zeros((int(group.max(initial=-1)) + 1, *values.shape[1:]))
    count = np.zeros_like(total)
    np.add.at(total, group, np.where(known, values, 0.0))
    np.add.at(count, group, known.astype(float))
    return total, count
