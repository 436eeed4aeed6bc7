"""Metrics of all held-out samples at once: expected calibration error, and recall at a false positive rate.

Bins of confidence and the top one percent of negatives hold too few samples of one fold for an estimate per fold.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS = 15
RATE = 0.01
"""Largest share of negatives above the threshold of the recall."""


def bin_gaps(y: NDArray, probability: Floats) -> Floats:
    """Return confidence − correctness of each sample in the column of its bin, ``(n_samples, BINS)``.

    Bins have equal width over [0, 1]; the confidence is the probability of the most likely class.
    """
    confidence = probability.max(1)
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    return np.asarray((confidence - (probability.argmax(1) == y))[:, None] * (place[:, None] == np.arange(BINS)))


def calibration_shares(y: NDArray, probability: Floats) -> Floats:
    """Return the contribution of each sample to the calibration error, ``(n_samples,)``; their mean is the error.

    A contribution is negative if the gap of the sample has the opposite sign to that of its bin.
    """
    gaps = bin_gaps(y, probability)
    return np.asarray(gaps @ np.sign(gaps.sum(0)))


def calibration_replicates(gaps: Floats, drawn: Floats) -> Floats:
    """Return replicates of the calibration error whose percentiles are an interval, ``(resamples,)``.

    Noise makes the sum of absolute gaps too large: by nothing if every gap is clear, and at most by its value without
    any gap. That maximum is subtracted from half of the replicates, so that the interval reaches from the low end of
    one case to the high end of the other. Signs stay as observed, because resampling adds noise once more.

    Parameters
    ----------
    gaps
        Mean gaps of the sample, ``(BINS,)``.
    drawn
        Mean gaps of each resample, ``(resamples, BINS)``.
    """
    noise = np.nan_to_num(drawn - gaps)
    error = noise.std(0)
    clear = np.maximum(np.abs(gaps) - 2 * error, 0)  # the smallest gap that is compatible with the sample
    excess = (np.abs(clear + noise).mean(0) - clear).clip(0).sum()
    values = drawn @ np.sign(gaps)
    values[::2] -= excess
    return np.maximum(values, 0)


def standardised(y: NDArray, decision: Floats, fold: Ints, group: Ints) -> Floats:
    """Return decisions standardised by location and scale of their fold, so that folds can be ranked together.

    Location and scale are mean and standard deviation of the negatives of the fold, because probes of different folds
    may differ in both. They are shrunk towards those of all folds as far as folds differ by chance, through the groups
    that they hold. The false positive rate is then that of all folds together (covariate-adjusted ROC curve, Janes &
    Pepe 2009). NaN in a fold without negatives, which has no threshold.
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
    """Return mean and variance, and their squared standard errors when whole groups are sampled."""
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
    weight = 1 / (error + 1e-100)  # 0 if the error is unknown
    if len(values) < 2 or not weight.any():
        return np.full_like(values, values.mean()) if len(values) else values
    total = weight.sum()
    mean = weight @ values / total
    room = total - weight @ weight / total
    excess = weight @ (values - mean) ** 2 - ((weight > 0).sum() - 1)
    between = max(0.0, excess / room) if room > 0 else 0.0
    return np.asarray(mean + between / (between + error + 1e-100) * (values - mean))


def positives_above_threshold(y: NDArray, standard: Floats) -> NDArray[np.bool_]:
    """Return a mask of the positives above the threshold that at most `RATE` of the negatives reach."""
    negatives = np.sort(standard[(y != 1) & ~np.isnan(standard)])[::-1]
    if not len(negatives):
        return np.zeros(len(y), bool)
    threshold = negatives[int(RATE * len(negatives) + 1e-9)]  # the first negative that must not be above the threshold
    return np.asarray((y == 1) & (standard > threshold))


def recall_replicates(y: NDArray, standard: Floats, weights: Floats) -> Floats:
    """Return the recall at a false positive rate of `RATE` under each row of weights ``(resamples, n_samples)``.

    With exponential weights, the weight of the negatives that reach a score is distributed like the false positive rate
    there (Rubin 1981, "The Bayesian bootstrap"). The recall is interpolated between negatives; above the largest one
    it falls linearly to 0, so that few negatives give a wide interval.
    """
    kept = ~np.isnan(standard)
    order = np.flatnonzero(kept)[np.argsort(-standard[kept], kind="stable")]
    positive, values = y[order] == 1, standard[order]
    if positive.all() or not positive.any():
        return np.full(len(weights), np.nan)
    ends = np.searchsorted(
        -values, np.unique(-values[~positive]), "right"
    )  # number of samples that reach each negative
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
