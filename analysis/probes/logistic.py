"""Logistic regression, certified to be at its optimum."""

from __future__ import annotations

import warnings
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted, validate_data
from threadpoolctl import ThreadpoolController

from flexcache.errors import AnalysisError

NEWTON = 4096  # coefficients up to which a Hessian is worth its memory, 128 MiB

BLAS = ThreadpoolController()  # finding the loaded libraries anew takes longer than a small fit


class Logistic(ClassifierMixin, BaseEstimator):
    """L2-regularised logistic regression on standardised features, binary or multinomial.

    Minimises ``‖w‖² / 2 + C · Σ log-loss`` over standardised features; the intercept is not regularised. The
    fit is scikit-learn's `LogisticRegression` by L-BFGS, finished by Newton's method where needed, in
    float64. Its gradient is then checked: a probe that is not at its optimum is an error, not a warning.

    Parameters
    ----------
    C
        Inverse strength of the penalty. The default is strong, for hundreds of features that are correlated;
        scikit-learn's own is 1.
    tol
        Largest absolute gradient of the mean loss at which a fit counts as converged.
    max_iter
        Iterations of either solver.

    Attributes
    ----------
    classes_ : ndarray, (n_classes,)
    coef_ : ndarray, (1 or n_classes, n_features)
        In the units of the activations: ``X @ coef_.T + intercept_`` is the decision.
    intercept_ : ndarray, (1 or n_classes,)
    mean_, scale_ : ndarray, (n_features,)
        What the features were standardised by; the scale of a constant feature is 1.
    n_iter_ : int
    gradient_ : float
        Largest absolute gradient of the mean loss at the fit.
    """

    classes_: NDArray[Any]
    coef_: NDArray[np.float64]
    intercept_: NDArray[np.float64]

    def __init__(self, C: float = 0.01, *, tol: float = 1e-7, max_iter: int = 1000) -> None:
        self.C = C
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: NDArray, y: NDArray) -> Self:
        """Fit to ``(n_samples, n_features)`` and ``(n_samples,)``.

        Raises
        ------
        AnalysisError
            Both solvers stopped before the gradient was small enough.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        scaler = StandardScaler().fit(X)
        scaled = scaler.transform(X)
        # The products are small: one BLAS thread is many times faster than several that wait for each other.
        with BLAS.limit(limits=1, user_api="blas"):
            model = self._solve("lbfgs", scaled, y)
            gradient, steps = self._gradient(model, scaled, y), int(model.n_iter_.max())
            if gradient > self.tol and model.coef_.size <= NEWTON:
                model = self._solve("newton-cholesky", scaled, y)
                gradient, steps = self._gradient(model, scaled, y), steps + int(model.n_iter_.max())
        if not gradient <= self.tol:
            raise AnalysisError(
                "the logistic probe did not converge",
                expected=f"a gradient of the mean loss of at most {self.tol:g}",
                found=f"{gradient:.3g} after {steps} iterations on {X.shape[0]} × {X.shape[1]} values",
                remedy="raise max_iter, regularise more (a smaller C), or allow a larger tol",
            )
        self.classes_, self.n_iter_, self.gradient_ = model.classes_, steps, gradient
        self.mean_, self.scale_ = scaler.mean_, scaler.scale_
        self.coef_ = model.coef_ / self.scale_
        self.intercept_ = model.intercept_ - self.coef_ @ self.mean_
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return log-odds of the second class, ``(n_samples,)``, or scores ``(n_samples, n_classes)``."""
        check_is_fitted(self)
        found = validate_data(self, X, reset=False, dtype=np.float64) @ self.coef_.T + self.intercept_
        return found[:, 0] if len(self.classes_) == 2 else found

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the probability of each class, ``(n_samples, n_classes)``."""
        decision = self.decision_function(X)
        if decision.ndim == 2:
            return np.asarray(softmax(decision, axis=1))
        return np.stack([expit(-decision), expit(decision)], axis=1)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the likeliest class of each sample, ``(n_samples,)``."""
        decision = self.decision_function(X)
        return self.classes_[decision.argmax(1) if decision.ndim == 2 else (decision > 0).astype(int)]

    def _solve(self, solver: str, X: NDArray, y: NDArray) -> LogisticRegression:
        tol = self.tol if solver == "lbfgs" else self.tol / 10
        model = LogisticRegression(C=self.C, solver=solver, tol=tol, max_iter=self.max_iter)
        with warnings.catch_warnings():  # the gradient decides, in `fit`
            warnings.simplefilter("ignore", ConvergenceWarning)
            return model.fit(X, y)

    def _gradient(self, model: LogisticRegression, X: NDArray, y: NDArray) -> float:
        decision = X @ model.coef_.T + model.intercept_
        truth = (y[:, None] == model.classes_).astype(float)
        wrong = expit(decision) - truth[:, 1:] if len(model.classes_) == 2 else softmax(decision, axis=1) - truth
        slope = wrong.T @ X / len(X) + model.coef_ / (self.C * len(X))
        return float(max(np.abs(slope).max(), np.abs(wrong.mean(0)).max()))
