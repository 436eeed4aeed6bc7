"""Moments of the rows of every training set, for probes with a closed form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, lapack, solveh_banded

from analysis.probes.estimators.design import Design, Floats, split_rows
from flexcache.errors import AnalysisError


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
    kinds : (sets, parts)
        1 for the parts that belong to a set.
    products : (parts, features, features)
        Sums of the products of the features in each part, relative to `middle`.
    """

    middle: Floats
    n: Floats
    mean: Floats
    target: Floats
    cross: Floats
    kinds: Floats
    products: Floats

    def gram(self, number: int) -> Floats:
        """Return the mean product of the features of a set, (features, features)."""
        return np.asarray(np.tensordot(self.kinds[number] / self.n[number], self.products, 1))

    def covariance(self, number: int) -> Floats:
        """Return the covariance of the features of a set, divided by n, (features, features)."""
        return self.gram(number) - np.outer(self.mean[number], self.mean[number])

    @property
    def scale(self) -> Floats:
        """Standard deviation of the features, (sets, features); 1 for constant features."""
        whole = self.kinds @ np.einsum("pii->pi", self.products) / self.n[:, None]
        square = whole - self.mean**2
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

    def within(self, number: int) -> Floats:
        """Return the covariance within the classes of a set, divided by n, for targets coded 0 and 1."""
        means = np.nan_to_num(self.means[number])
        return np.asarray(self.gram(number) - (self.target[number, :, None] * means).T @ means)


def gather_moments(design: Design, targets: Floats, sets: NDArray[np.bool_]) -> Moments:
    """Return the moments of every set in one pass over the rows.

    Rows that belong to the same sets form one part, and each part is summed once (`split_rows`).
    """
    kinds, part_of = split_rows(sets)
    count, features, many = kinds.shape[1], design.shape[1], targets.shape[1]
    n, total = np.zeros(count), np.zeros((count, features))
    target, cross = np.zeros((count, many)), np.zeros((count, many, features))
    products = np.zeros((count, features, features))
    for at, part, rows in design.parts(part_of):
        known = targets[at]
        n[part] += len(rows)
        total[part] += rows.sum(0)
        target[part] += known.sum(0)
        cross[part] += known.T @ rows
        products[part] += rows.T @ rows
    held = kinds.astype(np.float64)
    size = held @ n
    return Moments(
        design.middle,
        size,
        held @ total / size[:, None],
        held @ target / size[:, None],
        np.tensordot(held, cross, 1) / size[:, None, None],
        held,
        products,
    )


def solve_shifted(matrix: Floats, right: Floats, factors: Floats, shifts: Floats) -> Floats:
    """Solve ``(factor · matrix + shift · 1) x = right`` for several positive shifts at once.

    The symmetric matrix, without negative eigenvalues, is made tridiagonal once; then each shift costs little (Golub &
    Van Loan 2013, section 8.3).

    >>> matrix, right = np.array([[2.0, 1], [1, 2]]), np.array([[1.0], [0]])
    >>> solve_shifted(matrix, right, np.array([1.0, 1.0]), np.array([1.0, 2.0]))[..., 0].round(3).tolist()
    [[0.375, -0.125], [0.267, -0.067]]

    Parameters
    ----------
    matrix : (features, features)
        Overwritten.
    right : (features, n)
    factors, shifts : (shifts,)

    Returns
    -------
    ndarray, (shifts, features, n)

    Raises
    ------
    AnalysisError
        A shift is lost in the rounding of a matrix without an inverse.
    """
    size, scale = len(matrix), float(np.trace(matrix)) / len(matrix)
    if not right.any():  # features without variance, or without relation to the targets
        return np.zeros((len(shifts), *right.shape))
    if size < 2:
        divisor = factors * matrix[0, 0] + shifts
        if not (divisor > 0).all():
            raise _singular(float(shifts[divisor.argmin()]), scale)
        return right / divisor[:, None, None]
    reduced, diagonal, beside, tau, _ = lapack.dsytrd(
        matrix.T, lower=1, lwork=int(lapack.dsytrd_lwork(size, lower=1)[0]), overwrite_a=1
    )
    mirrors = np.asfortranarray(reduced[1:, :-1])

    def turn(values: Floats, way: str) -> Floats:
        """Return values times the orthogonal factor, or its transpose."""
        rest = np.asfortranarray(values[1:])
        work = int(lapack.dormqr("L", way, mirrors, tau, rest, -1)[1][0])
        return np.concatenate([values[:1], lapack.dormqr("L", way, mirrors, tau, rest, work)[0]])

    turned = turn(right, "T")
    found = np.empty((len(shifts), *right.shape))
    for x, factor, shift in zip(found, factors, shifts, strict=True):
        band = np.stack([factor * diagonal + shift, np.append(factor * beside, 0.0)])
        try:
            x[:] = solveh_banded(band, turned, lower=True, check_finite=False)
        except LinAlgError:
            raise _singular(float(shift), scale) from None
    together = turn(np.concatenate(list(found), axis=1), "N")
    return np.stack(np.split(together, len(shifts), axis=1))


def _singular(shift: float, scale: float) -> AnalysisError:
    return AnalysisError(
        "the regularisation is lost in rounding, and the covariance of the features has no inverse",
        expected="features that vary independently, or a stronger regularisation",
        found=f"{shift:.3g} added to variances of about {scale:.3g}",
        remedy="raise alpha (Ridge) or shrinkage (LDA), or use NearestCentroid if features do not vary in a class",
    )
