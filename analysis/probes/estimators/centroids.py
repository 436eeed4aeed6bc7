"""Probes from class means: mass-mean, nearest centroid, linear discriminants."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import lstsq
from sklearn.base import ClassifierMixin

from analysis.probes.estimators.design import Design, Floats
from analysis.probes.estimators.linear import LinearProbe, LinearSolutions, LogOdds
from analysis.probes.estimators.moments import gather_moments, solve_shifted
from flexcache.errors import AnalysisError


class _OfMeans(ClassifierMixin, LinearProbe):
    """Base of probes whose decision follows from class means, class shares and a covariance."""

    def solve(self, design: Design, targets: Floats, sets: NDArray[np.bool_], strengths: Floats) -> LinearSolutions:
        """Fit every training set at every strength; see `LinearProbe.solve`."""
        both = np.concatenate([1 - targets, targets], axis=1) if targets.shape[1] == 1 else targets
        moments = gather_moments(design, both, sets)
        if (moments.target == 0).any():
            raise AnalysisError("a class is missing from a training set", remedy="ask for fewer folds")
        coef = np.empty((len(sets), len(strengths), both.shape[1], design.shape[1]))
        intercept = np.empty(coef.shape[:3])
        for number, centre in enumerate(moments.middle + moments.mean):
            means, share = moments.means[number] - moments.mean[number], moments.target[number]
            w, b = self._decide(means, share, partial(moments.within, number), strengths)
            coef[number], intercept[number] = w, b - w @ centre
        if targets.shape[1] == 1:  # the second class against the first
            coef, intercept = coef[:, :, 1:] - coef[:, :, :1], intercept[..., 1:] - intercept[..., :1]
        return LinearSolutions(coef, intercept)

    @abstractmethod
    def _decide(
        self, means: Floats, share: Floats, within: Callable[[], Floats], strengths: Floats
    ) -> tuple[Floats, Floats]:
        """Return coefficients and intercepts for features relative to the mean.

        Their shapes are (strengths, classes, features) and (strengths, classes); the first may be 1 for all strengths.
        """


class NearestCentroid(_OfMeans):
    """Predict the class whose mean is nearest in Euclidean distance, as scikit-learn's `NearestCentroid` does.

    The decision is half the squared distance to the mean of the other class minus that to the own class, up to a term
    that all classes share.

    >>> import numpy as np
    >>> X, y = np.array([[0.0, 1], [1, 1], [4, 1], [5, 2]] * 5), np.array([0, 0, 1, 1] * 5)
    >>> NearestCentroid().fit(X, y).predict([[0.0, 1.0], [6.0, 1.0]]).tolist()
    [0, 1]
    """

    def _decide(
        self, means: Floats, share: Floats, within: Callable[[], Floats], strengths: Floats
    ) -> tuple[Floats, Floats]:
        return means[None], -(means**2).sum(1)[None] / 2


class MassMean(_OfMeans):
    """Use the difference of class means as the direction (Marks & Tegmark 2023, arXiv 2310.06824).

    With two classes the direction is exactly that of `NearestCentroid`; with more, each class is compared with the mean
    of all class means. With *iid*, the direction is multiplied by the inverse of the covariance within classes, as the
    paper does for in-distribution data; it is then that of `LDA` without shares.

    >>> import numpy as np
    >>> X, y = np.array([[0.0, 1], [1, 1], [4, 1], [5, 2]] * 5), np.array([0, 0, 1, 1] * 5)
    >>> MassMean().fit(X, y).coef_.tolist()
    [[4.0, 0.5]]

    Parameters
    ----------
    iid
        Multiply by the inverse covariance; needs more samples than features.
    """

    def __init__(self, *, iid: bool = False) -> None:
        self.iid = iid

    def _decide(
        self, means: Floats, share: Floats, within: Callable[[], Floats], strengths: Floats
    ) -> tuple[Floats, Floats]:
        centre = means.mean(0)
        coef = means - centre
        if self.iid:
            coef = lstsq(within(), coef.T, check_finite=False)[0].T
        return coef[None], -np.einsum("kd,kd->k", coef, means + centre)[None] / 2


class LDA(LogOdds, _OfMeans):
    """Linear discriminant analysis: Gaussian classes with one covariance, as scikit-learn's with ``solver="lsqr"``.

    >>> import numpy as np
    >>> X, y = np.array([[0.0, 1], [1, 1], [4, 1], [5, 2]] * 5), np.array([0, 0, 1, 1] * 5)
    >>> LDA().fit(X, y).predict([[0.0, 1.0], [6.0, 1.0]]).tolist()
    [0, 1]

    Parameters
    ----------
    shrinkage
        Share by which the covariance is shrunk towards a multiple of the identity; 0 means none and needs more samples
        than features.
    shrinkages
        Several values to choose from inside the folds: numbers, or their count from 1 to 10⁻³. *shrinkage* is then
        not used.
    """

    strength_name: ClassVar[str] = "shrinkages"

    def __init__(self, shrinkage: float = 0.1, *, shrinkages: int | ArrayLike | None = None) -> None:
        self.shrinkage = shrinkage
        self.shrinkages = shrinkages

    @property
    def strengths(self) -> Floats:
        """Shrinkages to try, the largest first."""
        if self.shrinkages is None:
            found = np.array([self.shrinkage], np.float64)
        elif isinstance(self.shrinkages, int):
            found = np.logspace(0, -3, self.shrinkages)
        else:
            found = np.sort(np.asarray(self.shrinkages, np.float64).ravel())[::-1]
        if not len(found) or not ((found >= 0) & (found <= 1)).all():
            raise AnalysisError("shrinkage lies from 0 to 1", where="LDA", found=str(found.tolist()))
        return found

    def _decide(
        self, means: Floats, share: Floats, within: Callable[[], Floats], strengths: Floats
    ) -> tuple[Floats, Floats]:
        matrix, (count, features) = within(), means.shape
        coef = np.empty((len(strengths), count, features))
        sizes, shrunk = strengths * np.trace(matrix) / features, strengths > 0
        if not shrunk.all():
            coef[~shrunk] = lstsq(matrix, means.T, check_finite=False)[0].T
        if shrunk.any():
            coef[shrunk] = solve_shifted(matrix, means.T, 1 - strengths[shrunk], sizes[shrunk]).transpose(0, 2, 1)
        return coef, np.log(share) - np.einsum("skd,kd->sk", coef, means) / 2
