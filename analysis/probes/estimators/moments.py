"""Sums over rows from which the closed forms follow, for every training set by adding up the parts it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from analysis.probes.estimators.design import Design, Floats


@dataclass(frozen=True)
class Moments:
    """Counts, sums and products of the rows of some training sets, about `middle`; what a closed form needs of them.

    Attributes
    ----------
    middle : (features,)
        What features are less by, so that a large mean does not cancel.
    n : (sets,)
    mean : (sets, features)
        Less `middle`.
    target : (sets, targets)
        Means of the targets; of classes coded 0 and 1, their shares.
    cross : (sets, targets, features)
        Mean product of each target with the features, less `middle`.
    gram : (sets, features, features)
        Mean product of the features, less `middle`.
    """

    middle: Floats
    n: Floats
    mean: Floats
    target: Floats
    cross: Floats
    gram: Floats

    @cached_property
    def covariance(self) -> Floats:
        """Of the features, divided by n, (sets, features, features)."""
        return self.gram - self.mean[:, :, None] * self.mean[:, None, :]

    @property
    def scale(self) -> Floats:
        """Deviation of the features, (sets, features); 1 where there is next to none."""
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
        """Of targets coded 0 and 1: the mean of each class, less `middle`, (sets, classes, features)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.cross / self.target[:, :, None]

    @cached_property
    def within(self) -> Floats:
        """Of targets coded 0 and 1: the covariance within classes, divided by n, (sets, features, features)."""
        means = np.nan_to_num(self.means)
        return self.gram - np.einsum("sc,sci,scj->sij", self.target, means, means)


def gather(design: Design, targets: Floats, sets: NDArray[np.bool_]) -> Moments:
    """Return the moments of every set in one pass over the rows.

    Rows that the same sets hold are one part: for the folds of a cross-validation and every pair of them left out, the
    parts are the folds, and each is summed up once.
    """
    middle = design.middle
    kinds, part_of = np.unique(sets, axis=1, return_inverse=True)
    count, features, many = kinds.shape[1], design.shape[1], targets.shape[1]
    n, total = np.zeros(count), np.zeros((count, features))
    target, cross = np.zeros((count, many)), np.zeros((count, many, features))
    gram = np.zeros((count, features, features))
    for place, block in design.blocks():
        inside = part_of[place]
        for part in np.unique(inside):
            rows, known = block[inside == part] - middle, targets[place][inside == part]
            n[part] += len(rows)
            total[part] += rows.sum(0)
            target[part] += known.sum(0)
            cross[part] += known.T @ rows
            gram[part] += rows.T @ rows
    held = kinds.astype(np.float64)
    size = held @ n
    return Moments(
        middle,
        size,
        held @ total / size[:, None],
        held @ target / size[:, None],
        np.tensordot(held, cross, 1) / size[:, None, None],
        np.tensordot(held, gram, 1) / size[:, None, None],
    )
