"""Intervals of scores: over whole groups of samples, over folds, and for all layers at once.

The interval of a score answers what the same probes would score on other groups. Its standard error is that of the
delete-a-group jackknife (Efron & Stein 1981), its quantiles are those of Student's t, on a scale on which the score is
closer to normal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from analysis.probes.evaluation import pooled_metrics
from analysis.probes.evaluation.metric_values import POOLED, Floats, Ints, Metric, Prediction, pooled, weighted_values
from analysis.statistics.bootstrap import degrees_of_freedom, percentile_interval, resample_groups, t_widening

SHARES = ("accuracy", "auroc", "f1", "balanced_accuracy")
"""Metrics from 0 to 1 whose interval is that of a proportion."""
CALIBRATION = ("ece", "ece_debiased")
"""Metrics whose interval is the percentiles of draws."""
MOST = 400
"""Largest number of jackknife deletions; more groups are joined at random into this many."""
Scale = tuple[Callable[[Floats], Floats], Callable[[Floats], Floats]]

interval = percentile_interval


def _log(values: Floats) -> Floats:
    return np.log(np.maximum(values, np.finfo(np.float64).tiny))


def _exp(values: Floats) -> Floats:
    return np.exp(np.minimum(values, 100.0))


LOG: Scale = (_log, _exp)
SCALES: dict[str, Scale] = {
    "log_loss": LOG,
    "brier": LOG,
    "r2": (lambda values: _log(1 - values), lambda values: 1 - _exp(values)),
    "pearson": (lambda values: np.arctanh(np.clip(values, -1 + 1e-12, 1 - 1e-12)), np.tanh),
}
"""Scale on which the interval of a metric is symmetric, and its inverse."""


def fold_interval(values: Floats, level: float = 0.95, cv: int | None = None) -> tuple[Floats, Floats]:
    """Return the ends of the interval mean ± half width over the last dim, the folds.

    Student's t with the variance factor 1/n + 1/(cv − 1) instead of 1/n for n folds, because training sets overlap
    (Nadeau & Bengio 2003, "Inference for the generalization error").

    >>> low, high = fold_interval(np.array([0.7, 0.8, 0.9]))
    >>> round(float(low), 3), round(float(high), 3)
    (0.407, 1.193)

    Parameters
    ----------
    cv
        Folds of each cross-validation, if *values* are those of several. Degrees of freedom are cv − 1 all the same,
        because repeats use the same samples: with those of all folds, few groups are covered too rarely.
    """
    count = values.shape[-1]
    cv = cv or count
    half = student.ppf((1 + level) / 2, cv - 1) * values.std(-1, ddof=1) * np.sqrt(1 / count + 1 / (cv - 1))
    return values.mean(-1) - half, values.mean(-1) + half


def replicates(
    wanted: Sequence[Metric], y: NDArray, prediction: Prediction, fold: Ints, group: Ints, *, resamples: int, seed: int
) -> Floats:
    """Return replicates of the pooled metrics, ``(n_metrics, resamples)``, whose percentiles are an interval.

    They are bootstrap draws of whole groups (`draw_scores`) in their order, but with the values of an interval that
    covers the truth for few groups as well: the percentiles of plain draws are too narrow. Draws are equal for equal
    *seed*, so that predictions of different layers can be compared draw by draw; the fitted probes stay fixed.

    Accuracy, AUROC, F1 and balanced accuracy have the interval of a proportion from as many samples as would give their
    standard error (Korn & Graubard 1998). Other metrics have that of Student's t on the scale in `SCALES`. For
    recall@1% and calibration errors see `analysis.probes.evaluation.pooled_metrics`. NaN without two groups of each
    class.

    >>> y, said = np.arange(40) % 2, Prediction(np.arange(40) // 2 % 2, np.arange(40.0))
    >>> drawn = replicates(["accuracy"], y, said, np.zeros(40, int), np.arange(40), resamples=400, seed=0)
    >>> low, high = interval(drawn)
    >>> round(float(low[0]), 2), round(float(high[0]), 2)
    (0.33, 0.67)
    """
    drawn = draw_scores(wanted, y, prediction, fold, group, resamples=resamples, seed=seed)
    # percentiles interpolate between the first and last of the sorted replicates
    levels = np.clip(np.arange(resamples) / max(resamples - 1, 1), 0.5 / resamples, 1 - 0.5 / resamples)
    for values, metric in zip(drawn, wanted, strict=True):
        if metric in CALIBRATION:
            continue
        found = _quantiles(metric, y, prediction, fold, group, levels, resamples, seed)
        values[np.argsort(values, kind="stable")] = found
    return drawn


def covering_interval(
    wanted: Sequence[Metric], y: NDArray, prediction: Prediction, fold: Ints, group: Ints, *, resamples: int, seed: int
) -> tuple[Floats, Floats]:
    """Return the ends of the 95 % interval of each pooled metric, ``(n_metrics,)`` each.

    They are those of `replicates`, without the draws, which only a comparison of layers draw by draw needs.
    """
    levels = np.array([0.025, 0.975])
    found = np.full((len(wanted), 2), np.nan)
    for ends, metric in zip(found, wanted, strict=True):
        if metric in CALIBRATION:
            drawn = draw_scores([metric], y, prediction, fold, group, resamples=resamples, seed=seed)
            ends[:] = np.concatenate(percentile_interval(drawn))
        else:
            ends[:] = _quantiles(metric, y, prediction, fold, group, levels, resamples, seed)
    return found[:, 0], found[:, 1]


def draw_scores(
    wanted: Sequence[Metric], y: NDArray, prediction: Prediction, fold: Ints, group: Ints, *, resamples: int, seed: int
) -> Floats:
    """Return the pooled metrics of samples whose groups are drawn with replacement, ``(n_metrics, resamples)``.

    This is the cluster bootstrap (Davison & Hinkley 1997, 3.8). recall@1% uses exponential weights of groups instead.
    """
    values = np.full((len(wanted), resamples), np.nan)
    for number, metric in enumerate(wanted):
        if metric == "recall@1%":
            standard = pooled_metrics.standardised(y, prediction.decision, fold, group)
            for part, weights in resample_groups(int(group.max()) + 1, resamples, seed, smooth=True):
                values[number, part] = pooled_metrics.recall_replicates(y, standard, weights, group)
        elif metric in POOLED:
            assert prediction.probability is not None
            gaps = pooled_metrics.bin_gaps(y, prediction.probability)
            values[number] = pooled_metrics.calibration_replicates(gaps, group, resamples, seed)
    drawable = [number for number, metric in enumerate(wanted) if metric not in POOLED]
    for part, weights in resample_groups(int(group.max()) + 1, resamples, seed):
        for number in drawable:
            values[number, part] = weighted_values(wanted[number], y, prediction, fold, weights, group)
    return values


def band(value: Floats, values: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """Return a simultaneous band for the true scores of all layers, ``(n_layers,)`` each.

    *value* has shape ``(n_layers,)`` and *values*, its replicates, ``(n_layers, resamples)``. The width is the *level*
    quantile of the largest deviation over layers, in standard errors (the max-t band of Montiel Olea & Plagborg-Møller
    2019).
    """
    if np.isnan(values).all():
        return np.full_like(value, np.nan), np.full_like(value, np.nan)
    error = np.nanstd(values, axis=1, ddof=1)
    away = np.abs(values - value[:, None]) / np.where(error > 0, error, np.inf)[:, None]
    away = away[:, ~np.isnan(away).all(axis=0)]  # a resample of one class only has no score at any layer
    reach = np.quantile(np.nanmax(away, axis=0), level)
    return value - reach * error, value + reach * error


def _quantiles(
    metric: Metric, y: NDArray, said: Prediction, fold: Ints, group: Ints, levels: Floats, resamples: int, seed: int
) -> Floats:
    """Return quantiles of the confidence distribution of a metric at *levels*; only some metrics need *resamples*."""
    if metric == "recall@1%":
        return _recall_quantiles(y, said, fold, group, levels, max(resamples, 400), seed)
    value = pooled(metric, y, said, fold, group)
    if np.isnan(value) or _fewest_groups(metric, y, group) < 2:
        return np.full(len(levels), np.nan)
    if metric == "balanced_accuracy":
        # each class has its own interval, and their distances add as variances do (MOVER, Zou & Donner 2008)
        classes = [y == code for code in np.unique(y)]
        each = [(y[at], said.select_samples(at), fold[at], group[at]) for at in classes]
        away = [_quantiles("accuracy", *one, levels, resamples, seed) - pooled("accuracy", *one) for one in each]
        width = np.sqrt((np.stack(away) ** 2).sum(0)) / len(each)
        return np.clip(value + np.where(levels < 0.5, -width, width), 0, 1)
    left, size = leave_groups_out(metric, y, said, fold, group, seed)
    scale, inverse = SCALES.get(metric, (np.asarray, np.asarray))
    away = scale(np.where(np.isnan(left), value, left))
    away = away - away.mean()
    count = len(away)
    error = float(np.sqrt((count - 1) / count * (away**2).sum()))
    freedom = degrees_of_freedom(away[:, None], size, kurtosis=metric not in SHARES).min()
    if metric not in SHARES:
        turned = -1 if metric == "r2" else 1  # its scale turns the order round
        return np.asarray(inverse(scale(np.array(value)) + turned * error * student.ppf(levels, freedom)))
    groups = _fewest_groups(metric, y, group)
    certain = value in (0, 1) or error == 0  # no spread to learn from
    samples = groups if certain else min(value * (1 - value) / error**2, len(y)) / float(t_widening(freedom))
    return pooled_metrics.proportion_quantiles(value, samples, levels)


def _fewest_groups(metric: Metric, y: NDArray, group: Ints) -> int:
    """Return the number of groups, of those with the rarest class if the metric compares classes."""
    if metric in ("auroc", "balanced_accuracy"):
        return min(len(np.unique(group[y == code])) for code in np.unique(y))
    return len(np.unique(group))


def leave_groups_out(
    metric: Metric, y: NDArray, said: Prediction, fold: Ints, group: Ints, seed: int
) -> tuple[Floats, Floats]:
    """Return the pooled value without each group, and the samples of each group.

    Returns
    -------
    values : (n_groups,)
        More than `MOST` groups are joined at random into this many.
    samples : (n_groups, n_classes) if the metric compares classes, else (n_groups, 1)
    """
    place = np.unique(group, return_inverse=True)[1]
    count = int(place.max()) + 1
    if count > MOST:
        place, count = (np.random.default_rng(seed).permutation(count) % MOST)[place], MOST
    found = weighted_values(metric, y, said, fold, 1 - np.eye(count), place)
    compared = [y == code for code in np.unique(y)] if metric == "auroc" else [np.ones(len(y), bool)]
    size = [np.bincount(place[at], minlength=count).astype(np.float64) for at in compared]
    return found, np.stack(size, axis=1)


def _recall_quantiles(
    y: NDArray, said: Prediction, fold: Ints, group: Ints, levels: Floats, resamples: int, seed: int
) -> Floats:
    standard = pooled_metrics.standardised(y, said.decision, fold, group)
    ends = pooled_metrics.recall_distributions(y, standard, group, resamples, seed)
    low, high = (np.quantile(drawn, levels) for drawn in ends)
    return np.asarray(np.where(levels < 0.5, low, np.maximum(low, high)))
