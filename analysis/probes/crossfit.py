"""Out-of-fold predictions of one layer."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import ConvergenceWarning

from analysis.probes import score
from analysis.probes.baselines import Prediction
from analysis.view import View
from flexcache.errors import AnalysisError


def outer(
    probe: BaseEstimator, view: View, X: NDArray, y: NDArray, fold: NDArray, cv: int, layer: int | None
) -> Prediction:
    """Predict each fold by a probe that was trained on the others."""
    predicted, decision = np.empty_like(y), np.empty(len(y))
    for number in range(cv):
        test = fold == number
        predicted[test], decision[test] = fit_predict(probe, view, X, y, ~test, test, f"layer {layer}, fold {number}")
    return predicted, decision


def inner(
    probe: BaseEstimator,
    view: View,
    X: NDArray,
    fold: NDArray,
    cv: int,
    metric: score.Metric,
    layer: int | None,
) -> NDArray:
    """Return the layer's score within the training side of each fold, ``(cv,)``.

    The inner folds of test fold *k* are the other outer folds. A probe trained without folds *j* and *k*
    serves both, so cv·(cv−1)/2 fits do for cv·(cv−1) scores.
    """
    top, bottom = np.zeros(cv), np.zeros(cv)
    for j, k in itertools.combinations(range(cv), 2):
        test = (fold == j) | (fold == k)
        where = f"layer {layer}, folds {j} and {k} left out"
        predicted, decision = fit_predict(probe, view, X, view.y, ~test, test, where)
        parts = score.parts(metric, view.y[test], predicted, decision, (fold[test] == k).astype(np.int64), 2)
        for outer, inside in ((j, 1), (k, 0)):
            top[outer] += parts[0][inside]
            bottom[outer] += parts[1][inside]
    return score.ratio(top, bottom)


def fit_predict(
    probe: BaseEstimator, view: View, X: NDArray, y: NDArray, train: NDArray, test: NDArray, where: str
) -> Prediction:
    """Fit a clone in float64 and predict; what scikit-learn has to say becomes an error with a place."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            fitted: Any = clone(probe).fit(X[train].astype(np.float64), y[train])
        except AnalysisError as error:
            error.where = f"{view.site}, {where}"
            raise
        except ConvergenceWarning as error:
            raise AnalysisError(
                "the probe did not converge",
                where=f"{view.site}, {where}",
                found=str(error).splitlines()[0],
                remedy="raise its max_iter, standardise the features, or regularise more",
            ) from error
        except (ValueError, TypeError) as error:
            raise AnalysisError(
                f"{type(probe).__name__} could not be fitted", where=f"{view.site}, {where}", found=str(error)
            ) from error
    asked = X[test].astype(np.float64)
    predicted = np.asarray(fitted.predict(asked)).reshape(len(asked), -1)[:, 0]
    if len(view.classes) != 2:
        return predicted, predicted.astype(float)
    if hasattr(fitted, "decision_function"):
        return predicted, fitted.decision_function(asked)
    if hasattr(fitted, "predict_proba"):
        return predicted, fitted.predict_proba(asked)[:, 1]
    return predicted, np.zeros(len(asked))
