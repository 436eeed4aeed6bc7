"""Ridge regression for numbers and classes."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.probes.estimators.design import Design, Floats
from analysis.probes.estimators.linear import LinearProbe, LinearSolutions
from analysis.probes.estimators.moments import gather_moments, solve_shifted
from flexcache.errors import AnalysisError

STRONGEST, WEAKEST = 5.0, 0.0
"""Powers of ten between which `alphas` lie if their count is given."""


class Ridge(LinearProbe):
    """Least squares with an L2 penalty on standardised features, solved in closed form in float64.

    Minimises ``‖y − Xw − b‖² + alpha · ‖w‖²``. Floating-point targets, one or several, are a regression. Other targets
    are classes, each coded −1 and 1; the largest decision wins (scikit-learn's `RidgeClassifier`). All folds and
    strengths are solved from sums over the rows of each fold, in one pass.

    >>> import numpy as np
    >>> X, y = np.array([[0.0, 1], [1, 1], [4, 1], [5, 2]] * 5), np.array([0, 0, 1, 1] * 5)
    >>> Ridge(alpha=1.0).fit(X, y).predict([[0.0, 1.0], [6.0, 1.0]]).tolist()
    [0, 1]

    Parameters
    ----------
    alpha
        Strength of the penalty relative to a sum over samples, as in scikit-learn, whose default is 1.
    alphas
        Several values to choose from inside the folds: numbers, or their count from 1 to 10⁵. *alpha* is then not used.

    Attributes
    ----------
    classes_ : ndarray, (n_classes,), or None after a regression
    coef_ : ndarray, (1 or n_classes or n_targets, n_features)
        In the units of the activations: ``X @ coef_.T + intercept_`` is the decision.
    intercept_ : ndarray, (1 or n_classes or n_targets,)
    mean_, scale_ : ndarray, (n_features,)
        Mean and scale of the standardisation.
    """

    strength_name: ClassVar[str] = "alphas"
    regresses: ClassVar[bool] = True

    def __init__(self, alpha: float = 100.0, *, alphas: int | ArrayLike | None = None) -> None:
        self.alpha = alpha
        self.alphas = alphas

    @property
    def strengths(self) -> Floats:
        """Values of alpha to try, the largest first."""
        if self.alphas is None:
            found = np.array([self.alpha], np.float64)
        elif isinstance(self.alphas, int):
            found = np.logspace(STRONGEST, WEAKEST, self.alphas)
        else:
            found = np.sort(np.asarray(self.alphas, np.float64).ravel())[::-1]
        if not len(found) or not (found > 0).all():
            raise AnalysisError("alpha is above 0", where="Ridge", found=str(found.tolist()))
        return found

    def solve(self, design: Design, targets: Floats, sets: NDArray[np.bool_], strengths: Floats) -> LinearSolutions:
        """Fit every training set at every strength; see `LinearProbe.solve`."""
        known = targets if self.classes_ is None else 2 * targets - 1
        moments = gather_moments(design, known, sets)
        scale = moments.scale
        self.mean_, self.scale_ = moments.middle + moments.mean[0], scale[0]
        coef = np.empty((len(sets), len(strengths), known.shape[1], design.shape[1]))
        for number, n in enumerate(moments.n):
            gram = moments.covariance(number) / scale[number, :, None] / scale[number] * n
            right = moments.shared[number].T / scale[number, :, None] * n
            found = solve_shifted(gram, right, np.ones(len(strengths)), strengths)
            coef[number] = found.transpose(0, 2, 1) / scale[number]
        middle = moments.middle + moments.mean
        return LinearSolutions(coef, moments.target[:, None] - np.einsum("slkd,sd->slk", coef, middle))
