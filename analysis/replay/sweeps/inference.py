"""Tests of effects over whole groups of documents."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

from analysis.statistics.bootstrap import sum_by_group

EXACT = 12
"""Largest number of groups for which all combinations of signs are tried."""


def sign_flip(
    values: NDArray[np.float64], group: NDArray[np.int64], flips: int = 2000, seed: int = 0
) -> NDArray[np.float64]:
    """Return two-sided p-values of the hypothesis that differences are symmetric about zero: a sign-flip test.

    The signs of whole groups are flipped: all combinations for up to `EXACT` groups, otherwise *flips* random ones that
    include the observed one (Phipson & Smyth 2010).

    Parameters
    ----------
    values
        Differences, shape (documents, …); NaN is left out.
    """
    total, count = sum_by_group(values, group)
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
