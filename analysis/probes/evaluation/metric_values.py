"""Values of metrics: in each fold, over all held-out samples, and under weights of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from analysis.probes.evaluation import pooled_metrics
from analysis.probes.evaluation.pooled_metrics import sum_groups
from analysis.statistics.bootstrap import CHUNK

Metric = Literal[
    "accuracy",
    "auroc",
    "f1",
    "balanced_accuracy",
    "recall@1%",
    "log_loss",
    "brier",
    "ece",
    "ece_debiased",
    "r2",
    "pearson",
]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS = pooled_metrics.BINS
LOWER: tuple[Metric, ...] = ("log_loss", "brier", "ece", "ece_debiased")
"""Metrics of probabilities; smaller is better."""
POOLED = ("ece", "ece_debiased", "recall@1%")
"""Metrics that need more samples than a fold has; a fold has its share of the pooled value."""


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
    found += ("f1", "balanced_accuracy")
    found += ("recall@1%",) if classes == 2 and ranked else ()
    return found + (LOWER if probable else ())


def sign(metric: str) -> int:
    """Return 1, or −1 for a metric that is better if it is smaller.

    >>> sign("accuracy"), sign("log_loss")
    (1, -1)
    """
    return -1 if metric in LOWER else 1


def selection_metric(metrics: Sequence[Metric]) -> Metric:
    """Return the metric that layers and strengths are chosen by, unless another one is named.

    The log-loss of a probe with probabilities, because it sees more than right and wrong, and does not depend on the
    share of a class as accuracy does; else AUROC, then balanced accuracy; R² of a regression.

    >>> selection_metric(metrics("classification", 2, ranked=True, probable=False))
    'auroc'
    """
    return next(metric for metric in ("log_loss", "auroc", "balanced_accuracy", "r2") if metric in metrics)


def parts(
    metric: Metric, y: NDArray, prediction: Prediction, fold: Ints, cv: int, group: Ints | None = None
) -> tuple[Floats, Floats]:
    """Return numerator and denominator in each fold, ``(cv,)`` each; without *group*, samples are independent.

    Their quotient is the value in the fold. See `pooled` for the value of all folds.
    """
    if metric in POOLED:
        shares, counted = _shares(metric, y, prediction, fold, np.arange(len(y)) if group is None else group)
        top, bottom = (np.bincount(fold, values, cv).astype(np.float64) for values in (shares, counted))
        return top, bottom
    found = [_weighted(metric, y[at], prediction.select_samples(at), *_alike(int(at.sum()))) for at in _masks(fold, cv)]
    return np.array([top[0] for top, _ in found]), np.array([bottom[0] for _, bottom in found])


def ratio(top: NDArray, bottom: NDArray) -> NDArray:
    """Return top / bottom, and NaN where the denominator is 0.

    >>> ratio(np.array([1.0, 0.0]), np.array([2.0, 0.0])).tolist()
    [0.5, nan]
    """
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=np.asarray(bottom) > 0)


def pooled(metric: Metric, y: NDArray, prediction: Prediction, fold: Ints, group: Ints | None = None) -> float:
    """Return the value over all held-out samples; NaN if it is undefined.

    >>> y = np.array([0, 1, 1, 0])
    >>> said = Prediction(np.array([0, 1, 0, 0]), np.array([-1.0, 2.0, -1.0, -3.0]))
    >>> pooled("balanced_accuracy", y, said, np.array([0, 0, 1, 1]))
    0.75
    """
    if metric in POOLED:
        top, bottom = parts(metric, y, prediction, fold, int(fold.max()) + 1, group)
        return float(ratio(top.sum(), bottom.sum()))
    return float(weighted_values(metric, y, prediction, fold, *_alike(len(y)))[0])


def weighted_values(metric: Metric, y: NDArray, said: Prediction, fold: Ints, weights: Floats, group: Ints) -> Floats:
    """Return the value over all held-out samples under each row of weights of groups, ``(n, n_groups)`` to ``(n,)``.

    Not for the metrics in `POOLED`. All samples of a group have its weight, so that sums over groups are enough.
    """
    if metric == "f1":
        return _f1(y, said.predicted, weights, group)
    if metric == "balanced_accuracy":
        return _balanced(y, said.predicted, weights, group)
    if metric == "r2":  # about the observed mean: the mean of a resample would bias every R² downwards
        squares = np.stack([(y - said.predicted) ** 2, (y - y.mean()) ** 2], axis=1)
        return 1 - ratio(*(weights @ sum_groups(squares, group, weights.shape[1])).T)
    masks = [at for at in _masks(fold, int(fold.max()) + 1) if at.any()]
    if metric == "pearson":
        sums = np.sum([_products(y[at], said.predicted[at], weights, group[at]) for at in masks], axis=0)
        return ratio(sums[0], np.sqrt(sums[1] * sums[2]))
    if metric != "auroc":  # a mean over samples, whose folds need not be told apart
        return ratio(*_weighted(metric, y, said, weights, group))
    found = [_auroc(y[at], said.decision[at], weights, group[at]) for at in masks]
    return ratio(*np.sum(found, axis=0))  # pairs within a fold, whose decisions can be compared


def _alike(count: int) -> tuple[Floats, Ints]:
    """Return weight and group of samples that are one group."""
    return np.ones((1, 1)), np.zeros(count, np.int64)


def _masks(fold: Ints, cv: int) -> list[NDArray[np.bool_]]:
    return [fold == number for number in range(cv)]


def _shares(metric: Metric, y: NDArray, said: Prediction, fold: Ints, group: Ints) -> tuple[Floats, Floats]:
    """Return the contribution of each sample to numerator and denominator of a metric of all samples."""
    if metric != "recall@1%":
        assert said.probability is not None
        shares = pooled_metrics.calibration_shares(y, said.probability)
        if metric == "ece_debiased" and shares.any():
            shares *= pooled_metrics.debiased_error(pooled_metrics.bin_gaps(y, said.probability), group) / shares.mean()
        return shares, np.ones(len(y))
    standard = pooled_metrics.standardised(y, said.decision, fold, group)
    counted = (y == 1) & ~np.isnan(standard)
    return pooled_metrics.positives_above_threshold(y, standard).astype(float), counted.astype(float)


def _weighted(metric: Metric, y: NDArray, said: Prediction, weights: Floats, group: Ints) -> tuple[Floats, Floats]:
    """Return numerator and denominator of one fold under each row of weights ``(n, n_groups)``."""
    if metric == "auroc":
        return _auroc(y, said.decision, weights, group)
    total = weights @ np.bincount(group, minlength=weights.shape[1])
    if metric == "f1":
        return _f1(y, said.predicted, weights, group) * total, total
    if metric == "balanced_accuracy":
        return _balanced(y, said.predicted, weights, group) * total, total
    if metric == "pearson":
        shared, *squares = _products(y, said.predicted, weights, group)
        return np.nan_to_num(ratio(shared, np.sqrt(np.prod(squares, axis=0)))) * total, total
    if metric == "r2":
        away = np.stack([(y - y.mean()) ** 2, (y - said.predicted) ** 2], axis=1)
        sst, rest = (weights @ sum_groups(away, group, weights.shape[1])).T
        return sst - rest, sst
    values = y == said.predicted if metric == "accuracy" else _calibration(metric, y, said.probability)
    return weights @ sum_groups(values[:, None] * 1.0, group, weights.shape[1])[:, 0], total


def _calibration(metric: Metric, y: NDArray, probability: Floats | None) -> Floats:
    """Return the log-loss or Brier score of each sample; Brier sums over classes if there are more than two."""
    assert probability is not None
    if metric == "log_loss":
        return np.asarray(-np.log(np.maximum(probability[np.arange(len(y)), y], np.finfo(np.float64).eps)))
    if probability.shape[1] == 2:
        return np.asarray((probability[:, 1] - y) ** 2)
    return np.asarray(((probability - (y[:, None] == np.arange(probability.shape[1]))) ** 2).sum(1))


def _f1(y: NDArray, predicted: NDArray, weights: Floats, group: Ints) -> Floats:
    classes = np.unique(np.concatenate([y, predicted]))
    classes = classes[classes == 1] if len(classes) <= 2 and classes.max(initial=0) <= 1 else classes
    if not len(classes):
        return np.zeros(len(weights))
    one, other = y[:, None] == classes, predicted[:, None] == classes
    hit, size = (
        weights @ sum_groups(values * 1.0, group, weights.shape[1]) for values in (one & other, one + 1 * other)
    )
    return np.asarray(np.divide(2 * hit, size, out=np.zeros_like(size), where=size > 0).mean(1))


def _balanced(y: NDArray, predicted: NDArray, weights: Floats, group: Ints) -> Floats:
    """Return the mean over classes of the share of each class that is right; classes without weight are left out."""
    one = (y[:, None] == np.unique(y)).astype(float)
    right = one * (y == predicted)[:, None]
    hit, size = (weights @ sum_groups(values, group, weights.shape[1]) for values in (right, one))
    return ratio(ratio(hit, size).sum(1, where=size > 0), (size > 0).sum(1))


def _products(y: NDArray, predicted: NDArray, weights: Floats, group: Ints) -> Floats:
    """Return the weighted sums of products about the weighted means: of both, of *y*, of *predicted*; ``(3, n)``."""
    a, b = y - y.mean(), predicted - predicted.mean()
    sums = weights @ sum_groups(np.stack([np.ones(len(y)), a, b, a * b, a * a, b * b], axis=1), group, weights.shape[1])
    total, one, two, *products = sums.T
    means = np.stack([one * two, one**2, two**2]) / np.maximum(total, 1e-300)
    return np.asarray(products - means)


def _auroc(y: NDArray, decision: Floats, weights: Floats, group: Ints) -> tuple[Floats, Floats]:
    """Return the weight of concordant pairs, a tie being a half, and of all pairs.

    The pairs of each two groups are counted once if there are more rows of weights than groups.
    """
    present, group = np.unique(group, return_inverse=True)
    weights = weights[:, present]
    order = np.argsort(decision, kind="stable")
    ranked, positive, group = decision[order], y[order] == 1, group[order]
    starts = np.append(True, np.diff(ranked) != 0)  # of equal decisions
    ends = np.append(np.flatnonzero(starts)[1:], len(ranked))
    several = len(weights) > len(present)
    basis = np.eye(len(present)) if several else weights.T
    won = np.empty((len(present), basis.shape[1]))  # weight of the negatives below the positives of each group
    for at in np.array_split(np.arange(basis.shape[1]), -(-basis.shape[1] * len(y) // (CHUNK // 4))):
        below = np.zeros((len(y) + 1, len(at)))
        np.cumsum(basis[:, at][group] * ~positive[:, None], axis=0, out=below[1:])
        tie = np.cumsum(starts)[positive] - 1
        counted = below[np.flatnonzero(starts)[tie]]
        if not starts.all():
            counted = (counted + below[ends[tie]]) / 2
        won[:, at] = sum_groups(counted, group[positive], len(present))
    total = [weights @ np.bincount(group[at], minlength=len(present)) for at in (positive, ~positive)]
    return (weights * (weights @ won.T if several else won.T)).sum(1), total[0] * total[1]
