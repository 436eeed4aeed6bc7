"""Base of linear probes: decisions, and solutions for many training sets at once."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.utils.validation import check_is_fitted, validate_data

from analysis.probes.estimators.design import Design, Floats
from flexcache.errors import AnalysisError


@dataclass(frozen=True)
class LinearSolutions:
    """Solutions of linear probes, one for each training set and strength.

    Attributes
    ----------
    coef : (sets, strengths, outputs, features)
        In the units of the activations. One output for two classes, else one per class, or one per regression target.
    intercept : (sets, strengths, outputs)
    """

    coef: Floats
    intercept: Floats


class LinearProbe(BaseEstimator):
    """Base of probes whose decision is ``X @ coef_.T + intercept_``, in the units of the activations.

    ::

        probe = probes.Logistic().fit(X, y)         # Ridge, MassMean, NearestCentroid and LDA are others
        probe.coef_, probe.intercept_

    Attributes
    ----------
    classes_ : ndarray, (n_classes,), or None after a regression
    coef_ : ndarray, (1 or n_classes or n_targets, n_features)
    intercept_ : ndarray, (1 or n_classes or n_targets,)
    strength_ : float
        Strength that was used; if several are given, chosen by cross-validation over the fitted rows.
    """

    strength_name: ClassVar[str] = ""
    """Name of the parameter that is the regularisation strength, or an empty text."""

    classes_: NDArray[Any] | None
    coef_: Floats
    intercept_: Floats

    @abstractmethod
    def solve(self, design: Design, targets: Floats, sets: NDArray[np.bool_], strengths: Floats) -> LinearSolutions:
        """Fit every training set at every strength.

        Parameters
        ----------
        targets : (rows, outputs)
            Numbers; or classes as 0 and 1, one column for two classes, else one per class.
        sets : (sets, rows)
            Members of each training set.

        Raises
        ------
        AnalysisError
            A problem has no solution, or its solution was not found.
        """

    @property
    def strengths(self) -> Floats:
        """Strengths to try, the strongest regularisation first; 0 for a probe without one."""
        value = getattr(self, self.strength_name) if self.strength_name else 0.0
        return np.atleast_1d(np.asarray(value, np.float64))

    def fit(self, X: NDArray, y: NDArray) -> Self:
        """Fit to ``(n_samples, n_features)`` and ``(n_samples,)``; numbers may be ``(n_samples, n_targets)``.

        Raises
        ------
        AnalysisError
            The target has one class, or the solution was not found.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True)
        targets = self._targets(y)
        design, everything = Design(X), np.ones((1, len(X)), bool)
        strengths = self.strengths
        if len(strengths) > 1:
            strengths = strengths[[self._choose(X, y, design, targets)]]
        found = self.solve(design, targets, everything, strengths)
        self.strength_ = float(strengths[0])
        self.coef_, self.intercept_ = found.coef[0, 0], found.intercept[0, 0]
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return decisions, ``(n_samples,)``, or ``(n_samples, n)`` for three or more classes, or several targets."""
        check_is_fitted(self)
        found = validate_data(self, X, reset=False, dtype=np.float64) @ self.coef_.T + self.intercept_
        return found[:, 0] if found.shape[1] == 1 else found

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return values, or the class with the largest decision, ``(n_samples,)``."""
        decision = self.decision_function(X)
        return decision if self.classes_ is None else self.classes_[coded(decision)]

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """Return R² after a regression, accuracy otherwise."""
        return float((r2_score if self.classes_ is None else accuracy_score)(y, self.predict(X)))

    def _targets(self, y: NDArray) -> Floats:
        if np.issubdtype(y.dtype, np.floating) or y.ndim > 1:
            if not hasattr(self, "regresses"):
                raise AnalysisError(f"{type(self).__name__} needs classes", found="numbers")
            self.classes_ = None
            return np.asarray(y, np.float64).reshape(len(y), -1)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise AnalysisError("a probe needs two classes", found=f"only {self.classes_[0]!r}")
        return one_hot(codes, len(self.classes_))

    def _choose(self, X: Floats, y: NDArray, design: Design, targets: Floats) -> int:
        """Return the index of the strength with the best score in five folds of the rows."""
        kind = KFold if self.classes_ is None else StratifiedKFold
        splits = list(kind(5, shuffle=True, random_state=0).split(X, y))
        sets = np.ones((len(splits), len(X)), bool)
        for held, (_, test) in zip(sets, splits, strict=True):
            held[test] = False
        found = self.solve(design, targets, sets, self.strengths)
        scores = np.zeros(len(self.strengths))
        for number, (_, test) in enumerate(splits):
            for at in range(len(scores)):
                decision = X[test] @ found.coef[number, at].T + found.intercept[number, at]
                if self.classes_ is None:
                    scores[at] -= ((decision - targets[test]) ** 2).sum()
                else:
                    scores[at] += (self.classes_[coded(decision)] == y[test]).sum()
        return int(scores.argmax())


class LogOdds(LinearProbe):
    """A linear probe whose decisions are log-odds, so that it gives probabilities."""

    @staticmethod
    def probabilities(decision: Floats) -> Floats:
        """Return the probability of each class, (rows, classes), from decisions."""
        if decision.ndim == 2 and decision.shape[1] > 1:
            return np.asarray(softmax(decision, axis=1))
        flat = decision.reshape(len(decision))
        return np.stack([expit(-flat), expit(flat)], axis=1)

    def predict_proba(self, X: ArrayLike) -> Floats:
        """Return the probability of each class, ``(n_samples, n_classes)``."""
        return self.probabilities(self.decision_function(X))


def one_hot(codes: NDArray[np.int64], classes: int) -> Floats:
    """Return classes as 0 and 1, (rows, classes), or (rows, 1) for two."""
    found = (codes[:, None] == np.arange(classes)).astype(np.float64)
    return found[:, 1:] if classes == 2 else found


def coded(decision: Floats) -> NDArray[np.int64]:
    """Return the class of each decision, (rows,) or (rows, classes)."""
    if decision.ndim == 2 and decision.shape[1] > 1:
        return np.asarray(decision.argmax(1))
    return (decision.reshape(len(decision)) > 0).astype(np.int64)
