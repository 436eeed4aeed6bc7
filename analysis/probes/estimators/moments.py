"""Moments of the rows of every training set, for probes with a closed form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from analysis.probes.estimators.design import Design, Floats, split_rows


@dataclass(frozen=True)
class Moments:
    """Moments of the rows of some training sets, relative to `middle`.

    Attributes
    ----------
    middle : (features,)
        Offset that is subtracted from features, to avoid cancellation by a large mean.
    n : (sets,)
    mean : (sets, features)
        Means of the features, relative to `middle`.
    target : (sets, targets)
        Means of the targets; the class shares, for classes coded 0 and 1.
    cross : (sets, targets, features)
        Mean product of each target with the features, relative to `middle`.
    gram : (sets, features, features)
        Mean product of the features, relative to `middle`.
    """

    middle: Floats
    n: Floats
    mean: Floats
    target: Floats
    cross: Floats
    gram: Floats

    @cached_property
    def covariance(self) -> Floats:
        """Covariance of the features, divided by n, (sets, features, features)."""
        return self.gram - self.mean[:, :, None] * self.mean[:, None, :]

    @property
    def scale(self) -> Floats:
        """Standard deviation of the features, (sets, features); 1 for constant features."""
        square = np.einsum("sii->si", self.covariance)
        whole = np.einsum("sii->si", self.gram)
        floor = (10 * np.finfo(np.float64).eps * np.abs(self.middle)) ** 2 + 1e-13 * whole
        return np.where(square > floor, np.sqrt(np.where(square > floor, square, 1.0)), 1.0)

    @property
    def shared(self) -> Floats:
        """Covariance of the targets with the features, (sets, targets, features)."""
        return self.cross - self.target[:, :, None] * self.mean[:, None, :]

    @cached_property
    def means(self) -> Floats:
        """Mean of each class relative to `middle`, (sets, classes, features), for targets coded 0 and 1."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.cross / self.target[:, :, None]

    @cached_property
    def within(self) -> Floats:
        """Covariance within classes, divided by n, (sets, features, features), for targets coded 0 and 1."""
        means = np.nan_to_num(self.means)
        return self.gram - np.einsum("sc,sci,scj->sij", self.target, means, means)


def gather_moments(design: Design, targets: Floats, sets: NDArray[np.bool_]) -> Moments:
    """Return the moments of every set in one pass over the rows.

    Rows that belong to the same sets form one part, and each part is summed once (`split_rows`).
    """
    kinds, part_of = split_rows(sets)
    count, features, many = kinds.shape[1], design.shape[1], targets.shape[1]
    n, total = np.zeros(count), np.zeros((count, features))
    target, cross = np.zeros((count, many)), np.zeros((count, many, features))
    gram = np.zeros((count, features, features))
    for at, part, rows in design.parts(part_of):
        known = targets[at]
        n[part] += len(rows)
        total[part] += rows.sum(0)
        target[part] += known.sum(0)
        cross[part] += known.T @ rows
        gram[part] += rows.T @ rows
    held = kinds.astype(np.float64)
    size = held @ n
    return Moments(
        design.middle,
        size,
        held @ total / size[:, None],
        held @ target / size[:, None],
        np.tensordot(held, cross, 1) / size[:, None, None],
        np.tensordot(held, gram, 1) / size[:, None, None],
    )
