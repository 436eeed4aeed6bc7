"""Fit a probe to training sets at several strengths, and predict the samples that each set left out."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import ConvergenceWarning

from analysis.dataset.probe_dataset import ProbeDataset
from analysis.probes.estimators import LinearProbe
from analysis.probes.estimators.design import Design, Floats, split_rows
from analysis.probes.estimators.linear import LinearSolutions, coded, one_hot
from analysis.probes.evaluation import score
from analysis.probes.evaluation.score import Prediction
from flexcache.errors import AnalysisError


def without_each(fold: NDArray[np.int64], cv: int) -> NDArray[np.bool_]:
    """Return the training side of each fold, ``(cv, n_samples)``."""
    return fold != np.arange(cv)[:, None]


def without_pairs(fold: NDArray[np.int64], cv: int) -> NDArray[np.bool_]:
    """Return the samples outside each pair of folds, ``(cv·(cv−1)/2, n_samples)``, pairs in order."""
    pairs = np.array(list(itertools.combinations(range(cv), 2)))
    return (fold != pairs[:, :1]) & (fold != pairs[:, 1:])


class FittedProbes:
    """One probe, fitted to several training sets at each of its strengths.

    Parameters
    ----------
    rows
        The samples of a layer: a `Design` for linear probes, else an array that the probe's ``fit`` takes.
    y : (n_samples,)
        Codes of classes, or values.
    sets : (sets, n_samples)
        Members of each training set.
    where
        The layer, named in errors.
    strengths
        Strengths of a linear probe; its own by default.

    Raises
    ------
    AnalysisError
        The probe cannot be fitted, or did not converge.
    """

    def __init__(
        self,
        probe: BaseEstimator,
        dataset: ProbeDataset,
        rows: Design | NDArray[Any],
        y: NDArray[Any],
        sets: NDArray[np.bool_],
        where: str,
        strengths: Floats | None = None,
    ) -> None:
        self.probe, self.dataset, self.rows, self.sets = probe, dataset, rows, sets
        self.classes = len(dataset.classes)
        self.where = f"{dataset.site}, {where}"
        self.strengths = np.zeros(1)
        self.solved: LinearSolutions | None = None
        self._others: list[Any] = []
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            try:
                if isinstance(probe, LinearProbe):
                    self._solve(probe, y, strengths)
                else:
                    self._others = [clone(probe).fit(self._select(held), y[held]) for held in sets]
            except AnalysisError as error:
                raise AnalysisError(
                    error.message,
                    where=", ".join(filter(None, (self.where, error.where))),
                    expected=error.expected,
                    found=error.found,
                    remedy=error.remedy,
                ) from error
            except ConvergenceWarning as error:
                raise AnalysisError(
                    "the probe did not converge",
                    where=self.where,
                    found=str(error).splitlines()[0],
                    remedy="raise max_iter, standardise the features, or regularise more",
                ) from error
            except (ValueError, TypeError, np.linalg.LinAlgError) as error:
                raise AnalysisError(
                    f"{type(probe).__name__} could not be fitted", where=self.where, found=str(error)
                ) from error

    def predict(self, number: int, at: int, chosen: NDArray[np.int64]) -> Prediction:
        """Return the predictions of training set *number* at strength index *at* for the samples *chosen*."""
        if self.solved is None:
            return self._predict_other(self._others[number], chosen)
        assert isinstance(self.rows, Design)
        decision = self._decision[number][at][self._place[number][chosen]]
        probe: Any = self.probe
        if not self.classes:
            return Prediction(decision[:, 0], decision[:, 0])
        probability = probe.probabilities(decision) if hasattr(probe, "probabilities") else None
        codes = coded(decision)
        return Prediction(codes, decision[:, 0] if self.classes == 2 else codes.astype(float), probability)

    def _solve(self, probe: LinearProbe, y: NDArray[Any], strengths: Floats | None) -> None:
        assert isinstance(self.rows, Design)
        fitted: LinearProbe = clone(probe)
        fitted.classes_ = np.arange(self.classes) if self.classes else None
        targets = one_hot(y, self.classes) if self.classes else y[:, None].astype(np.float64)
        self.strengths = fitted.strengths if strengths is None else strengths
        self.solved = fitted.solve(self.rows, targets, self.sets, self.strengths)
        self._decide(self.solved)

    def apply_to(self, rows: Design | NDArray[Any]) -> FittedProbes:
        """Return the same probes, for predictions of the same samples from other activations."""
        found = copy.copy(self)
        found.rows = rows
        if found.solved is not None:
            found._decide(found.solved)
        return found

    def _decide(self, solved: LinearSolutions) -> None:
        """Compute the decisions on the samples that each set left out, in one pass over the rows."""
        assert isinstance(self.rows, Design)
        sets, strengths, outputs, features = solved.coef.shape
        kinds, part_of = split_rows(self.sets)
        self._place = np.where(self.sets, -1, np.cumsum(~self.sets, axis=1) - 1)
        self._decision = [np.empty((strengths, int((~held).sum()), outputs)) for held in self.sets]
        intercept = solved.intercept + solved.coef @ self.rows.middle
        without = [np.flatnonzero(~held) for held in kinds.T]
        chosen = [np.ascontiguousarray(solved.coef[one].reshape(-1, features)) for one in without]
        for at, part, rows in self.rows.parts(part_of, sets * strengths * outputs):
            found = (chosen[part] @ rows.T).reshape(-1, strengths, outputs, len(at))
            for number, decision in zip(without[part], found, strict=True):
                shifted = decision + intercept[number][..., None]
                self._decision[number][:, self._place[number][at]] = shifted.transpose(0, 2, 1)

    def _select(self, chosen: NDArray[Any]) -> NDArray[Any]:
        assert isinstance(self.rows, np.ndarray)
        found = self.rows[chosen]
        return found if found.dtype == object else found.astype(np.float64)

    def _predict_other(self, fitted: Any, chosen: NDArray[np.int64]) -> Prediction:
        asked = self._select(chosen)
        predicted = np.asarray(fitted.predict(asked)).reshape(len(asked), -1)[:, 0]
        if not self.classes:
            return Prediction(predicted, predicted.astype(float))
        probability = fitted.predict_proba(asked) if hasattr(fitted, "predict_proba") else None
        if self.classes != 2:
            return Prediction(predicted, predicted.astype(float), probability)
        if hasattr(fitted, "decision_function"):
            return Prediction(predicted, fitted.decision_function(asked), probability)
        return Prediction(predicted, np.zeros(len(asked)) if probability is None else probability[:, 1], probability)


def gather_predictions(parts: Iterator[tuple[NDArray[np.int64], Prediction]], count: int) -> Prediction:
    """Return predictions for parts of the samples as one prediction for all of them."""
    found = list(parts)
    order = np.argsort(np.concatenate([chosen for chosen, _ in found]), kind="stable")
    assert len(order) == count
    probabilities = [prediction.probability for _, prediction in found]
    return Prediction(
        np.concatenate([prediction.predicted for _, prediction in found])[order],
        np.concatenate([prediction.decision for _, prediction in found])[order],
        None if any(p is None for p in probabilities) else np.concatenate(probabilities)[order],  # type: ignore[arg-type]
    )


def outer(fitted: FittedProbes, fold: NDArray[np.int64], cv: int, chosen: NDArray[np.int64]) -> Prediction:
    """Return out-of-fold predictions: each fold by the set without it (the first *cv* sets), at its chosen strength."""
    tests = [np.flatnonzero(fold == number) for number in range(cv)]
    return gather_predictions(
        ((test, fitted.predict(number, int(chosen[number]), test)) for number, test in enumerate(tests)), len(fold)
    )


def inner(
    fitted: FittedProbes, first: int, y: NDArray[Any], fold: NDArray[np.int64], cv: int, metric: score.Metric
) -> NDArray[np.float64]:
    """Return the cross-validated score inside the training side of each fold, ``(n_strengths, cv)``.

    The inner folds of test fold *k* are the other outer folds. A probe trained without folds *j* and *k* serves both,
    so cv·(cv−1)/2 fits do for cv·(cv−1) scores; they are the sets from *first* on. Larger is better: a metric that is
    better if smaller has its sign changed.
    """
    top, bottom = np.zeros((2, len(fitted.strengths), cv))
    for number, (j, k) in enumerate(itertools.combinations(range(cv), 2)):
        test = np.flatnonzero((fold == j) | (fold == k))
        for at in range(len(fitted.strengths)):
            prediction = fitted.predict(first + number, at, test)
            found = score.parts(metric, y[test], prediction, (fold[test] == k).astype(np.int64), 2)
            for without, inside in ((j, 1), (k, 0)):
                top[at, without] += found[0][inside]
                bottom[at, without] += found[1][inside]
    return score.sign(metric) * score.ratio(top, bottom)
