"""Metrics as ratios of sums over folds, with fold intervals, a group bootstrap and a band over layers.

Each metric has a numerator and a denominator in every fold, and the *pooled* value divides their sums. The quotient in
one fold is the value of scikit-learn for that fold; predictions of different folds are not ranked against each other.
Two metrics, ece and recall@1%, need more samples than a fold has. They are computed from all held-out samples together
(`analysis.probes.evaluation.pooled_metrics`); the value of a fold is the mean contribution of its samples.

===========  ==========================================  ==================================
metric       numerator                                   denominator
===========  ==========================================  ==================================
accuracy     correct samples                             samples
auroc        concordant pairs (a tie is a half)          pairs of a positive and a negative
f1           F1 · samples                                samples
log_loss     −log of the true class's probability        samples
brier        squared errors of the probabilities         samples
ece          shares in the gaps of 15 bins               samples
recall@1%    positives above the threshold               positives
r2           SST − SSE                                   SST, about the fold's own mean
pearson      correlation · samples                       samples
===========  ==========================================  ==================================

F1 is that of the second of two classes, or the mean over more than two. The expected calibration error follows Guo et
al. (2017, arXiv 1706.04599): the absolute gap between mean confidence and accuracy in 15 bins of equal width of the
probability of the most likely class, weighted by their samples. The recall is that of the second class, above the
threshold that at most one negative in a hundred reaches, with the decisions of all folds on one scale. Smaller is
better for log_loss, brier and ece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from analysis.probes.evaluation import pooled_metrics
from analysis.statistics.bootstrap import percentile_interval, resample_groups

Metric = Literal["accuracy", "auroc", "f1", "log_loss", "brier", "ece", "recall@1%", "r2", "pearson"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS = pooled_metrics.BINS
LOWER = ("log_loss", "brier", "ece")
POOLED = ("ece", "recall@1%")


@dataclass(frozen=True)
class Prediction:
    """Out-of-fold predictions.

    Attributes
    ----------
    predicted : (n_samples,)
        Codes of classes, or values.
    decision : (n_samples,)
        Score that ranks the second class above the first; the value itself in a regression.
    probability : (n_samples, n_classes), or None
    """

    predicted: NDArray[Any]
    decision: Floats
    probability: Floats | None = None

    def select_samples(self, at: NDArray[Any]) -> Prediction:
        """Return the predictions of some samples, by mask or number."""
        probability = None if self.probability is None else self.probability[at]
        return Prediction(self.predicted[at], self.decision[at], probability)


def metrics(task: str, classes: int, ranked: bool, probable: bool) -> tuple[Metric, ...]:
    """Return the metrics of a target for a probe with or without ranking decisions and probabilities."""
    if task == "regression":
        return ("r2", "pearson")
    found: tuple[Metric, ...] = ("accuracy",)
    found += ("auroc",) if classes == 2 and ranked else ()
    found += ("f1",)
    found += ("recall@1%",) if classes == 2 and ranked else ()
    return found + (("log_loss", "brier", "ece") if probable else ())


def parts(
    metric: Metric, y: NDArray, prediction: Prediction, fold: Ints, cv: int, group: Ints | None = None
) -> tuple[Floats, Floats]:
    """Return numerator and denominator in each fold, ``(cv,)`` each; without *group*, samples are independent."""
    if metric in POOLED:
        shares, counted = _shares(metric, y, prediction, fold, np.arange(len(y)) if group is None else group)
        top, bottom = (np.bincount(fold, values, cv).astype(np.float64) for values in (shares, counted))
        return top, bottom
    found = [_weighted(metric, y[at], prediction.select_samples(at), np.ones((1, at.sum()))) for at in _masks(fold, cv)]
    return np.array([top[0] for top, _ in found]), np.array([bottom[0] for _, bottom in found])


def ratio(top: NDArray, bottom: NDArray) -> NDArray:
    """Return top / bottom, and NaN where the denominator is 0.

    >>> ratio(np.array([1.0, 0.0]), np.array([2.0, 0.0])).tolist()
    [0.5, nan]
    """
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=np.asarray(bottom) > 0)


def fold_interval(values: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """Return the ends of the interval mean ± half width over the last dim, the folds.

    Student's t with the variance factor 1/K + 1/(K−1) instead of 1/K, because training sets overlap
    (Nadeau & Bengio 2003, "Inference for the generalization error").
    """
    cv = values.shape[-1]
    half = student.ppf((1 + level) / 2, cv - 1) * values.std(-1, ddof=1) * np.sqrt(1 / cv + 1 / (cv - 1))
    return values.mean(-1) - half, values.mean(-1) + half


def replicates(
    wanted: Sequence[Metric], y: NDArray, prediction: Prediction, fold: Ints, group: Ints, *, resamples: int, seed: int
) -> Floats:
    """Return replicates of the pooled metrics, ``(n_metrics, resamples)``, whose percentiles are an interval.

    Whole groups are drawn with replacement. Draws are equal for equal *seed*, so that predictions of different layers
    can be compared draw by draw; the fitted probes stay fixed (cluster bootstrap: Davison & Hinkley 1997, 3.8).
    recall@1% uses exponential weights of groups instead, and ece is corrected for the noise that resampling adds; see
    `analysis.probes.evaluation.pooled_metrics`.
    """
    values = np.full((len(wanted), resamples), np.nan)
    for number, metric in enumerate(wanted):
        if metric == "ece":
            values[number] = _ece_replicates(y, prediction, group, resamples, seed)
        elif metric == "recall@1%":
            values[number] = _recall_replicates(y, prediction, fold, group, resamples, seed)
    drawable = [number for number, metric in enumerate(wanted) if metric not in POOLED]
    cases = [(at, y[at], prediction.select_samples(at)) for at in _masks(fold, int(fold.max()) + 1)]
    for part, weights in resample_groups(int(group.max()) + 1, resamples, seed, n_samples=len(y)):
        top, bottom = np.zeros((2, len(wanted), len(weights)))
        for at, known, said in cases:
            drawn = weights[:, group[at]]
            for number in drawable:
                more = _weighted(wanted[number], known, said, drawn)
                top[number] += more[0]
                bottom[number] += more[1]
        values[drawable, part] = ratio(top, bottom)[drawable]
    return values


interval = percentile_interval


def band(pooled: Floats, values: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """Return a simultaneous band for the true scores of all layers, ``(n_layers,)`` each.

    *pooled* has shape ``(n_layers,)`` and *values* ``(n_layers, resamples)``. The width is the *level* quantile of the
    largest deviation over layers, in standard errors (the max-t band of Montiel Olea & Plagborg-Møller 2019).
    """
    if np.isnan(values).all():
        return np.full_like(pooled, np.nan), np.full_like(pooled, np.nan)
    error = np.nanstd(values, axis=1, ddof=1)
    away = np.abs(values - pooled[:, None]) / np.where(error > 0, error, np.inf)[:, None]
    away = away[:, ~np.isnan(away).all(axis=0)]  # a resample of one class only has no score at any layer
    reach = np.quantile(np.nanmax(away, axis=0), level)
    return pooled - reach * error, pooled + reach * error


def _masks(fold: Ints, cv: int) -> list[NDArray[np.bool_]]:
    return [fold == number for number in range(cv)]


def _shares(metric: Metric, y: NDArray, said: Prediction, fold: Ints, group: Ints) -> tuple[Floats, Floats]:
    """Return the contribution of each sample to numerator and denominator of a metric of all samples."""
    if metric == "ece":
        assert said.probability is not None
        return pooled_metrics.calibration_shares(y, said.probability), np.ones(len(y))
    standard = pooled_metrics.standardised(y, said.decision, fold, group)
    counted = (y == 1) & ~np.isnan(standard)
    return pooled_metrics.positives_above_threshold(y, standard).astype(float), counted.astype(float)


def _ece_replicates(y: NDArray, said: Prediction, group: Ints, resamples: int, seed: int) -> Floats:
    assert said.probability is not None
    gaps, size = pooled_metrics.bin_gaps(y, said.probability), np.bincount(group)
    by_group = np.zeros((len(size), gaps.shape[1]))
    np.add.at(by_group, group, gaps)
    drawn = np.empty((resamples, gaps.shape[1]))
    for part, weights in resample_groups(len(size), resamples, seed, n_samples=len(y)):
        drawn[part] = weights @ by_group / (weights @ size)[:, None]
    return pooled_metrics.calibration_replicates(gaps.mean(0), drawn)


def _recall_replicates(y: NDArray, said: Prediction, fold: Ints, group: Ints, resamples: int, seed: int) -> Floats:
    standard, values = pooled_metrics.standardised(y, said.decision, fold, group), np.empty(resamples)
    for part, weights in resample_groups(int(group.max()) + 1, resamples, seed, n_samples=len(y), smooth=True):
        values[part] = pooled_metrics.recall_replicates(y, standard, weights[:, group])
    return values


def _weighted(metric: Metric, y: NDArray, said: Prediction, weights: Floats) -> tuple[Floats, Floats]:
    """Return numerator and denominator of one fold under each row of weights ``(n, n_samples)``."""
    if metric == "accuracy":
        return weights @ (y == said.predicted).astype(float), weights.sum(1)
    if metric == "f1":
        return _f1(y, said.predicted, weights) * weights.sum(1), weights.sum(1)
    if metric == "r2":
        # About the observed mean of the fold: the mean of the resample would bias every R² downwards.
        sst = weights @ (y - y.mean()) ** 2
        return sst - weights @ (y - said.predicted) ** 2, sst
    if metric == "pearson":
        return _pearson(y, said.predicted, weights) * weights.sum(1), weights.sum(1)
    if metric == "auroc":
        return _auroc(y, said.decision, weights)
    assert said.probability is not None
    return weights @ _calibration(metric, y, said.probability), weights.sum(1)


def _calibration(metric: Metric, y: NDArray, probability: Floats) -> Floats:
    """Return the log-loss or Brier score of each sample; Brier sums over classes if there are more than two."""
    if metric == "log_loss":
        return np.asarray(-np.log(np.maximum(probability[np.arange(len(y)), y], np.finfo(np.float64).eps)))
    if probability.shape[1] == 2:
        return np.asarray((probability[:, 1] - y) ** 2)
    return np.asarray(((probability - (y[:, None] == np.arange(probability.shape[1]))) ** 2).sum(1))


def _f1(y: NDArray, predicted: NDArray, weights: Floats) -> Floats:
    classes = np.unique(np.concatenate([y, predicted]))
    classes = classes[classes == 1] if len(classes) <= 2 and classes.max(initial=0) <= 1 else classes
    if not len(classes):
        return np.zeros(len(weights))
    one = (y[:, None] == classes).astype(float)
    other = (predicted[:, None] == classes).astype(float)
    hit, size = weights @ (one * other), weights @ (one + other)
    return np.asarray(np.divide(2 * hit, size, out=np.zeros_like(size), where=size > 0).mean(1))


def _pearson(y: NDArray, predicted: NDArray, weights: Floats) -> Floats:
    share = weights / np.maximum(weights.sum(1, keepdims=True), 1e-300)
    one, two = y - (share @ y)[:, None], predicted - (share @ predicted)[:, None]
    shared = (share * one * two).sum(1)
    size = np.sqrt((share * one**2).sum(1) * (share * two**2).sum(1))
    return np.asarray(np.divide(shared, size, out=np.zeros_like(shared), where=size > 0))


def _auroc(y: NDArray, decision: Floats, weights: Floats) -> tuple[Floats, Floats]:
    _, tied = np.unique(decision, return_inverse=True)
    order = np.argsort(tied, kind="stable")
    tied, positive, weights = tied[order], y[order] == 1, weights[:, order]
    below = np.zeros((len(weights), len(y) + 1))
    np.cumsum(weights * ~positive, axis=1, out=below[:, 1:])
    left, right = (
        np.searchsorted(tied, tied[positive], "left"),
        np.searchsorted(tied, tied[positive], "right"),
    )
    won = (weights[:, positive] * (below[:, left] + below[:, right])).sum(1) / 2
    return won, weights[:, positive].sum(1) * below[:, -1]
