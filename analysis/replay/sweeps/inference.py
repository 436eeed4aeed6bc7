"""Tests of effects over whole groups of documents, corrected for the number of cells."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.statistics.bootstrap import sum_by_group

EXACT = 12
"""Largest number of groups for which all combinations of signs are tried."""
BLOCK = 2**22
"""Statistics in memory at once, float64: 32 MiB."""

Floats = NDArray[np.float64]


class SignFlipTest(NamedTuple):
    """Two-sided p-values of cells: each by itself, and adjusted for all cells of the map."""

    p: Floats
    adjusted: Floats


def sign_flip(values: Floats, group: NDArray[np.int64], flips: int = 2000, seed: int = 0) -> SignFlipTest:
    """Test by sign flips, cell by cell, that differences are symmetric about zero.

    The signs of whole groups are flipped, in all cells alike: all combinations for up to `EXACT` groups, otherwise
    *flips* random ones that include the observed one (Phipson & Smyth 2010). The smallest possible p-value is 2 / 2ⁿ of
    n groups, or 1 / *flips*.

    ``adjusted`` is the step-down max-T procedure of Westfall & Young (1993, "Resampling-based multiple testing",
    algorithm 2.8): the chance of any false finding among all cells is at most the level, whatever the dependence of
    the cells. Its statistic is the sum over groups, divided by the root of the sum of squares.

    >>> test = sign_flip(np.array([[1.0, 1.0], [2.0, -1.0], [1.5, 1.0], [1.0, -1.0]]), np.arange(4))
    >>> test.p.tolist(), test.adjusted.tolist()
    ([0.125, 1.0], [0.25, 1.0])

    Parameters
    ----------
    values
        Differences, shape (documents, …); NaN is left out.
    group
        Number of each document's group, from 0 without gaps, shape (documents,).

    Returns
    -------
    SignFlipTest
        Arrays of the shape of a document's values; NaN in a cell without a value.
    """
    total, count = sum_by_group(values, group)
    shape = total.shape[1:]
    flat = total.reshape(len(total), -1)
    scale = np.sqrt((flat**2).sum(0))
    flat = np.divide(flat, scale, out=np.zeros_like(flat), where=scale > 0)
    if len(flat) <= EXACT:
        signs = np.array(list(product((1, -1), repeat=len(flat))), float)
    else:
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(flips, len(flat)))
        signs[0] = 1
    observed = np.abs(flat.sum(0))
    order = np.argsort(observed, kind="stable")  # ascending, so that a running maximum is that of the cells below
    least = observed[order] * (1 - 1e-12)
    reached, exceeded = np.zeros((2, len(order)))
    size = max(1, BLOCK // max(1, len(order)))
    for first in range(0, len(signs), size):
        drawn = np.abs(signs[first : first + size] @ flat[:, order])
        reached += (drawn >= least).sum(0)
        exceeded += (np.maximum.accumulate(drawn, axis=1) >= least).sum(0)
    p, adjusted = np.full((2, len(order)), np.nan)
    p[order] = reached / len(signs)
    adjusted[order] = np.maximum.accumulate((exceeded / len(signs))[::-1])[::-1]
    unknown = count.reshape(len(count), -1).sum(0) == 0
    p[unknown] = adjusted[unknown] = np.nan
    return SignFlipTest(p.reshape(shape), adjusted.reshape(shape))
