"""Metrics that need all held-out samples at once: expected calibration error, recall at a false positive rate.

Bins of confidence and the top one percent of negatives hold too few samples of a single fold to be estimated there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS = 15
RATE = 0.01
"""Share of negatives that may be above the threshold of the recall."""


def bin_gaps(y: NDArray, probability: Floats) -> Floats:
    """Return confidence − correctness of each sample in the column of its bin, ``(n_samples, BINS)``.

    Bins have equal width over [0, 1]; the confidence is the probability of the likeliest class.
    """
    confidence = probability.max(1)
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    return np.asarray((confidence - (probability.argmax(1) == y))[:, None] * (place[:, None] == np.arange(BINS)))


def calibration_shares(y: NDArray, probability: Floats) -> Floats:
    """Return the share of each sample in the calibration error, ``(n_samples,)``; their mean is the error.

    A share is negative where a sample is on the other side than its bin.
    """
    gaps = bin_gaps(y, probability)
    return np.asarray(gaps @ np.sign(gaps.sum(0)))


def calibration_replicates(gaps: Floats, drawn: Floats) -> Floats:
    """Return replicates of the calibration error whose percentiles are an interval, ``(resamples,)``.

    The sum of absolute gaps is too large by what noise adds: nothing where every gap is clear, and at most what it
    would be without any gap. Half of the replicates are less this most, so that the interval reaches from the low end
    of the one case to the high end of the other. Signs stay as observed, because resampling adds noise once more.

    Parameters
    ----------
    gaps
        Mean gaps of the sample, ``(BINS,)``.
    drawn
        Those of each resample, ``(resamples, BINS)``.
    """
    noise = np.nan_to_num(drawn - gaps)
    error = noise.std(0)
    clear = np.maximum(np.abs(gaps) - 2 * error, 0)  # the smallest gap that is compatible with the sample
    excess = (np.abs(clear + noise).mean(0) - clear).clip(0).sum()
    values = drawn @ np.sign(gaps)
    values[::2] -= excess
    return np.maximum(values, 0)


def standardised(y: NDArray, decision: Floats, fold: Ints, group: Ints) -> Floats:
    """Return decisions less a location and divided by a scale of their fold, so that folds may be ranked together.

    Probes of different folds may differ in both. They are the mean and the standard deviation of the fold's negatives,
    shrunk towards those of all folds as far as folds differ by the chance of which groups they hold. The false positive
    rate is then of all folds together (covariate-adjusted ROC curve, Janes & Pepe 2009). NaN in a fold without
    negatives, which has no threshold.
    """
    negative = y != 1
    folds = np.unique(fold[negative])
    moments = np.array([_moments(decision[at], group[at]) for at in (negative & (fold == k) for k in folds)])
    found = np.full(len(y), np.nan)
    if not len(moments):
        return found
    mean, variance, mean_error, variance_error = moments.T
    varied, scale = variance > 0, np.ones(len(folds))
    scale[varied] = np.exp(_shrunk(np.log(variance[varied]), variance_error[varied] / variance[varied] ** 2) / 2)
    for k, location, spread in zip(folds, _shrunk(mean, mean_error), scale, strict=True):
        found[fold == k] = (decision[fold == k] - location) / spread
    return found


def _moments(values: Floats, group: Ints) -> tuple[float, float, float, float]:
    """Return mean and variance, and the squared standard error of each when whole groups are sampled."""
    mean, variance = float(values.mean()), float(values.var())
    place = np.unique(group, return_inverse=True)[1]
    count = int(place.max()) + 1
    if count < 2:
        return mean, variance, np.inf, np.inf
    by_group = [np.bincount(place, away) / len(values) for away in (values - mean, (values - mean) ** 2 - variance)]
    one, two = (float((sums**2).sum()) * count / (count - 1) for sums in by_group)
    return mean, variance, one, two


def _shrunk(values: Floats, error: Floats) -> Floats:
    """Return values shrunk towards their mean by their squared errors (random effects, DerSimonian & Laird 1986)."""
    weight = 1 / (error + 1e-100)  # 0 where the error is unknown
    if len(values) < 2 or not weight.any():
        return np.full_like(values, values.mean()) if len(values) else values
    total = weight.sum()
    mean = weight @ values / total
    room = total - weight @ weight / total
    excess = weight @ (values - mean) ** 2 - ((weight > 0).sum() - 1)
    between = max(0.0, excess / room) if room > 0 else 0.0
    return np.asarray(mean + between / (between + error + 1e-100) * (values - mean))


def found_positives(y: NDArray, standard: Floats) -> NDArray[np.bool_]:
    """Return which positives are above the threshold that at most `RATE` of the negatives reach, ``(n_samples,)``."""
    negatives = np.sort(standard[(y != 1) & ~np.isnan(standard)])[::-1]
    if not len(negatives):
        return np.zeros(len(y), bool)
    threshold = negatives[int(RATE * len(negatives) + 1e-9)]  # the first one that may not be above it
    return np.asarray((y == 1) & (standard > threshold))


def recall_replicates(y: NDArray, standard: Floats, weights: Floats) -> Floats:
    """Return the recall at a false positive rate of `RATE` under each row of weights ``(resamples, n_samples)``.

    With weights that are exponential, the weight of the negatives that reach a score is distributed as the false
    positive rate there (Rubin 1981, "The Bayesian bootstrap"). The recall is interpolated between negatives; above the
    largest of them it falls linearly to 0, so that few negatives give a wide interval.
    """
    kept = ~np.isnan(standard)
    order = np.flatnonzero(kept)[np.argsort(-standard[kept], kind="stable")]
    positive, values = y[order] == 1, standard[order]
    if positive.all() or not positive.any():
        return np.full(len(weights), np.nan)
    ends = np.searchsorted(-values, np.unique(-values[~positive]), "right")  # how many samples reach each negative
    reached = np.zeros((2, len(weights), len(ends) + 1))
    for at, chosen in enumerate((~positive, positive)):
        reached[at, :, 1:] = np.cumsum(weights[:, order] * chosen, axis=1)[:, ends - 1]
    negatives, positives = reached
    allowed = RATE * negatives[:, -1]
    above = (negatives <= allowed[:, None]).sum(1)  # the first node beyond the rate
    line = np.arange(len(weights))
    low, high = negatives[line, above - 1], negatives[line, above]
    part = (allowed - low) / (high - low)
    total = (weights[:, order] * positive).sum(1)
    return np.asarray(((1 - part) * positives[line, above - 1] + part * positives[line, above]) / total)
