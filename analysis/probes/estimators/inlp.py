"""Iterative null-space projection: fit probes one after another, each without the directions of the earlier ones."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin, clone
from sklearn.utils.validation import check_is_fitted, validate_data

from analysis.probes.estimators.logistic import Logistic


class INLP(ClassifierMixin, TransformerMixin, BaseEstimator):
    """Iterative null-space projection (Ravfogel et al. 2020, arXiv 2004.07667).

    Each round fits the probe to activations without the directions of the rounds before. Predictions are those of the
    first round; `transform` removes all directions.

    ::

        inlp = probes.INLP(rounds=4).fit(X, y)
        inlp.transform(X)           # activations without the directions

    Parameters
    ----------
    rounds
        Largest number of rounds. Stops earlier if the probe is no better in sample than the most common class.
    probe
        A linear probe; `Logistic` by default.

    Attributes
    ----------
    classes_ : ndarray, (n_classes,)
    directions_ : ndarray, (n_directions, n_features)
        Orthonormal directions, in the order of the rounds.
    accuracies_ : ndarray, (n_rounds,)
        In-sample accuracy of each round.
    """

    def __init__(self, rounds: int = 8, probe: Any = None) -> None:
        self.rounds = rounds
        self.probe = probe

    def fit(self, X: NDArray, y: NDArray) -> Self:
        """Fit to ``(n_samples, n_features)`` and classes ``(n_samples,)``."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        self.classes_, counts = np.unique(y, return_counts=True)
        directions, accuracies = np.zeros((0, X.shape[1])), []
        middle = X.mean(0)
        for number in range(self.rounds):
            rest = X - (X - middle) @ directions.T @ directions
            fitted = clone(self.probe if self.probe is not None else Logistic()).fit(rest, y)
            accuracies.append(fitted.score(rest, y))
            if number == 0:
                self.first_ = fitted
            new = fitted.coef_ - fitted.coef_ @ directions.T @ directions
            _, sizes, basis = np.linalg.svd(new, full_matrices=False)
            found = basis[sizes > 1e-9 * max(np.linalg.norm(fitted.coef_), np.finfo(np.float64).tiny)]
            if not len(found) or (number and accuracies[-1] <= counts.max() / len(y)):
                break
            directions = np.concatenate([directions, found])
        self.mean_, self.directions_, self.accuracies_ = middle, directions, np.array(accuracies)
        return self

    def transform(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return activations without the directions, relative to the mean of the fitted activations."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return np.asarray(X - (X - self.mean_) @ self.directions_.T @ self.directions_)

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the decisions of the first round."""
        check_is_fitted(self)
        return np.asarray(self.first_.decision_function(X))

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the classes predicted by the first round."""
        check_is_fitted(self)
        return np.asarray(self.first_.predict(X))
