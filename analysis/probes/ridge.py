"""Ridge regression, for numbers and for classes."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.linear_model import Ridge as LeastSquares
from sklearn.metrics import accuracy_score, r2_score
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted, validate_data

from flexcache.errors import AnalysisError


class Ridge(BaseEstimator):
    """Least squares with an L2 penalty on standardised features, solved in closed form in float64.

    Minimises ``‖y − Xw − b‖² + alpha · ‖w‖²``. A floating-point target is a regression. Any other is a set of
    classes, each coded −1 and 1; the largest decision wins (scikit-learn's `RidgeClassifier`).

    Parameters
    ----------
    alpha
        Strength of the penalty; it weighs against a sum over samples, as in scikit-learn, whose default is 1.

    Attributes
    ----------
    classes_ : ndarray, (n_classes,), or None after a regression
    coef_ : ndarray, (1 or n_classes, n_features)
        In the units of the activations: ``X @ coef_.T + intercept_`` is the decision.
    intercept_ : ndarray, (1 or n_classes,)
    mean_, scale_ : ndarray, (n_features,)
        What the features were standardised by.
    """

    classes_: NDArray[Any] | None
    coef_: NDArray[np.float64]
    intercept_: NDArray[np.float64]

    def __init__(self, alpha: float = 100.0) -> None:
        self.alpha = alpha

    def fit(self, X: NDArray, y: NDArray) -> Self:
        """Fit to ``(n_samples, n_features)`` and ``(n_samples,)``.

        Raises
        ------
        AnalysisError
            A target of one class.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        scaler = StandardScaler().fit(X)
        if np.issubdtype(y.dtype, np.floating):
            self.classes_, coded = None, y[:, None]
        else:
            self.classes_, codes = np.unique(y, return_inverse=True)
            if len(self.classes_) < 2:
                raise AnalysisError("a ridge probe needs two classes", found=f"only {self.classes_[0]!r}")
            coded = 2.0 * (codes[:, None] == np.arange(len(self.classes_))) - 1
            coded = coded[:, 1:] if len(self.classes_) == 2 else coded
        model = LeastSquares(alpha=self.alpha, solver="cholesky").fit(scaler.transform(X), coded)
        self.mean_, self.scale_ = scaler.mean_, scaler.scale_
        self.coef_ = np.atleast_2d(model.coef_) / self.scale_
        self.intercept_ = model.intercept_ - self.coef_ @ self.mean_
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return ``(n_samples,)``, or with three and more classes ``(n_samples, n_classes)``."""
        check_is_fitted(self)
        found = validate_data(self, X, reset=False, dtype=np.float64) @ self.coef_.T + self.intercept_
        return found[:, 0] if found.shape[1] == 1 else found

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return values, or the class with the largest decision, ``(n_samples,)``."""
        decision = self.decision_function(X)
        if self.classes_ is None:
            return decision
        return self.classes_[decision.argmax(1) if decision.ndim == 2 else (decision > 0).astype(int)]

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """Return R² after a regression, accuracy otherwise."""
        return float((r2_score if self.classes_ is None else accuracy_score)(y, self.predict(X)))
