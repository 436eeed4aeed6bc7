"""Logistic regression with a certified distance to the optimum."""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassifierMixin

from analysis.probes.estimators.design import Design, Floats
from analysis.probes.estimators.linear import LinearSolutions, LogOdds
from analysis.probes.estimators.newton import solve
from flexcache.errors import AnalysisError

STRONGEST, WEAKEST = -4.0, 0.0
"""Powers of ten between which `Cs` lie if their count is given."""


class Logistic(ClassifierMixin, LogOdds):
    """L2-regularised logistic regression on standardised features, binary or multinomial.

    Minimises ``‖w‖² / 2 + C · Σ log-loss`` over standardised features; the intercept is not regularised. Solved in
    float64, all folds and strengths at once: by Newton's method (`analysis.probes.estimators.newton`), or above 8,192
    rows by L-BFGS, block by block (`analysis.probes.estimators.quasi_newton`). The gradient bounds the distance of the
    coefficients from the optimum; a probe that does not reach it is an error, not a warning.

    >>> import numpy as np
    >>> X, y = np.array([[0.0, 1], [1, 1], [4, 1], [5, 2]] * 5), np.array([0, 0, 1, 1] * 5)
    >>> Logistic(C=1.0).fit(X, y).predict([[0.0, 1.0], [6.0, 1.0]]).tolist()
    [0, 1]

    Parameters
    ----------
    C
        Inverse strength of the penalty. The default is strong, for hundreds of correlated features; the default of
        scikit-learn is 1.
    Cs
        Several values to choose from inside the folds: numbers, or their count from 10⁻⁴ to 1. *C* is then not used.
    class_weight
        ``"balanced"`` gives every class the same weight in the loss of each training set, as in scikit-learn. The
        probabilities are then those of classes of one size, so that log-loss and calibration become worse.
    tol
        Largest distance of the standardised coefficients from the optimum, as a share of their length.
    max_iter
        Largest number of Newton steps; above 8,192 rows, a fiftieth of the largest number of passes over them.

    Attributes
    ----------
    classes_ : ndarray, (n_classes,)
    coef_ : ndarray, (1 or n_classes, n_features)
        In the units of the activations: ``X @ coef_.T + intercept_`` is the decision.
    intercept_ : ndarray, (1 or n_classes,)
    mean_, scale_ : ndarray, (n_features,)
        Mean and scale of the standardisation; the scale of a constant feature is 1.
    n_iter_ : int
        Number of Newton steps, or of passes over the rows.
    distance_ : float
        Bound of the distance from the optimum, at most `tol`.
    """

    strength_name: ClassVar[str] = "Cs"

    def __init__(
        self,
        C: float = 0.01,
        *,
        Cs: int | ArrayLike | None = None,
        class_weight: str | None = None,
        tol: float = 1e-6,
        max_iter: int = 200,
    ) -> None:
        self.C = C
        self.Cs = Cs
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter

    @property
    def strengths(self) -> Floats:
        """Values of C to try."""
        if self.Cs is None:
            found = np.array([self.C], np.float64)
        elif isinstance(self.Cs, int):
            found = np.logspace(STRONGEST, WEAKEST, self.Cs)
        else:
            found = np.sort(np.asarray(self.Cs, np.float64).ravel())
        if not len(found) or not (found > 0).all():
            raise AnalysisError("C is above 0", where="Logistic", found=str(found.tolist()))
        return found

    def fit(self, X: NDArray, y: NDArray) -> Self:
        """Fit to ``(n_samples, n_features)`` and ``(n_samples,)``.

        Raises
        ------
        AnalysisError
            The optimum was not reached, or the target has one class.
        """
        return super().fit(X, y)

    def solve(self, design: Design, targets: Floats, sets: NDArray[np.bool_], strengths: Floats) -> LinearSolutions:
        """Fit every training set at every strength; see `LinearProbe.solve`."""
        if self.class_weight not in (None, "balanced"):
            raise AnalysisError(
                "class_weight cannot be used",
                where="Logistic",
                expected='None or "balanced"',
                found=repr(self.class_weight),
            )
        weights = balanced_weights(targets, sets) if self.class_weight else None
        found = solve(design, targets, sets, strengths, tol=self.tol, max_iter=self.max_iter, weights=weights)
        away = float(found.distance.max())
        if not away <= self.tol:
            number, at = np.unravel_index(int(found.distance.argmax()), found.distance.shape)
            rows, features = int(sets[number].sum()), design.shape[1]
            raise AnalysisError(
                "the logistic probe did not converge",
                expected=f"coefficients within {self.tol:g} of the optimum",
                found=f"{away:.3g} after {found.steps} steps, C={strengths[at]:g}, on {rows} × {features} values",
                remedy="raise max_iter, regularise more (a smaller C), or allow a larger tol",
            )
        self.mean_, self.scale_ = found.mean[0], found.scale[0]
        self.n_iter_, self.distance_ = found.steps, away
        return LinearSolutions(found.coef, found.intercept)


def balanced_weights(targets: Floats, sets: NDArray[np.bool_]) -> Floats:
    """Return the weight of the rows of each class, (sets, classes), that gives all classes of a set one total."""
    both = np.concatenate([1 - targets, targets], axis=1) if targets.shape[1] == 1 else targets
    size = sets @ both
    if (size == 0).any():
        raise AnalysisError("a class is missing from a training set", remedy="ask for fewer folds")
    return np.asarray(sets.sum(1, keepdims=True) / both.shape[1] / size)
