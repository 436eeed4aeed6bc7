"""Metrics of all held-out samples at once: expected calibration error, and recall at a false positive rate.

Bins of confidence and the top one percent of negatives hold too few samples of one fold for an estimate per fold.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.stats import beta, norm

from analysis.statistics.bootstrap import CHUNK, degrees_of_freedom, resample_groups, t_widening

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


def debiased_error(gaps: Floats, group: Ints) -> float:
    """Return the calibration error without the noise of the bins; about 0 for a calibrated probe.

    Noise makes a sum of absolute gaps too large. The true gaps are taken as normal with one variance, which is
    estimated from all bins together, and the mean of the sum is returned, given the gaps of the sample (empirical
    Bayes: Efron & Morris 1975).

    Parameters
    ----------
    gaps : (n_samples, BINS)
        From `bin_gaps`.
    group : (n_samples,)
        Samples of one group may depend on each other.

    Returns
    -------
    float
        NaN for a single group.
    """
    found = gaps.mean(0)
    by_group, size = _sum_groups(gaps, group)
    if len(size) < 2:
        return float("nan")
    noise = ((by_group - size[:, None] * found) ** 2).sum(0) / len(gaps) ** 2 * len(size) / (len(size) - 1)
    share = (gaps != 0).mean(0)
    spread = max(0.0, (found**2 - noise).sum() / max(float((share**2).sum()), 1e-300)) * share**2
    kept = np.divide(spread, spread + noise, out=np.zeros_like(spread), where=spread > 0)
    middle, error = kept * found, np.sqrt(kept * noise)
    away = np.divide(middle, error, out=np.full_like(middle, np.inf), where=error > 0)
    return float((np.abs(middle) * (1 - 2 * norm.cdf(-np.abs(away))) + 2 * error * norm.pdf(away)).sum())


def calibration_replicates(gaps: Floats, group: Ints, resamples: int, seed: int) -> Floats:
    """Return replicates of the calibration error whose percentiles are an interval, ``(resamples,)``.

    Noise makes the sum of absolute gaps too large: by nothing if every gap is clear, and at most by its value without
    any gap. That maximum is subtracted from half of the replicates, so that the interval reaches from the low end of
    one case to the high end of the other. Signs stay as observed, because resampling adds noise once more.

    Parameters
    ----------
    gaps : (n_samples, BINS)
        From `bin_gaps`.
    """
    by_group, size = _sum_groups(gaps, group)
    in_bin = np.maximum(_sum_groups((gaps != 0) * 1.0, group)[0], 1e-9)
    count, gaps = len(size), gaps.mean(0)
    if count < 2:
        return np.full(resamples, np.nan)
    noise = np.empty((resamples, len(gaps)))
    for part, weights in resample_groups(count, resamples, seed):
        noise[part] = weights @ by_group / (weights @ size)[:, None] - gaps
    noise *= _widening(in_bin) ** 0.5
    error = noise.std(0)
    clear = np.maximum(np.abs(gaps) - 2 * error, 0)  # the smallest gap that is compatible with the sample
    excess = (np.abs(clear + noise).mean(0) - clear).clip(0).sum()
    values = (gaps + noise) @ np.sign(gaps)
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


def recall_replicates(y: NDArray, standard: Floats, weights: Floats, group: Ints) -> Floats:
    """Return the recall at a false positive rate of `RATE` under each row of weights ``(resamples, n_groups)``.

    With exponential weights, the weight of the negatives that reach a score is distributed like the false positive rate
    there (Rubin 1981, "The Bayesian bootstrap"). The recall is interpolated between negatives; above the largest one
    it falls linearly to 0, so that few negatives give a wide interval.
    """
    kept = ~np.isnan(standard)
    order = np.flatnonzero(kept)[np.argsort(-standard[kept], kind="stable")]
    positive, values, group = y[order] == 1, standard[order], group[order]
    if positive.all() or not positive.any():
        return np.full(len(weights), np.nan)
    total, allowed = (weights @ np.bincount(group[at], minlength=weights.shape[1]) for at in (positive, ~positive))
    allowed *= RATE
    negative = ~positive & np.asarray((weights > 0).any(0))[group]
    wanted = 4 * RATE
    while True:  # only the largest values matter
        last = values[np.flatnonzero(negative)[: int(wanted * negative.sum()) + 2][-1]]
        stop = np.searchsorted(-values, -last, "right")
        ends = np.searchsorted(-values, np.unique(-values[:stop][negative[:stop]]), "right")  # of equal negatives
        reached = np.zeros((2, len(weights), len(ends) + 1))
        for chunk in np.array_split(np.arange(len(weights)), -(-len(weights) * stop // (CHUNK // 4))):
            above = np.ascontiguousarray(weights[chunk].T)[group[:stop]]
            for at, chosen in enumerate((~positive, positive)):
                sums = np.cumsum(above * chosen[:stop, None], axis=0)[ends - 1]
                reached[at, chunk, 1:] = sums.T
        negatives, positives = reached
        if stop == len(values) or wanted >= 1 or (negatives[:, -1] > allowed).all():
            break
        wanted *= 4
    above = (negatives <= allowed[:, None]).sum(1)  # the first node beyond the rate
    line = np.arange(len(weights))
    low, high = negatives[line, above - 1], negatives[line, above]
    part = (allowed - low) / (high - low)
    return np.asarray(((1 - part) * positives[line, above - 1] + part * positives[line, above]) / total)


def recall_distributions(y: NDArray, standard: Floats, group: Ints, resamples: int, seed: int) -> tuple[Floats, Floats]:
    """Return draws for the lower and the upper end of an interval of the recall, ``(resamples,)`` each.

    The false positive rates at n independent negatives in order are distributed like the sums of exponential weights,
    of which there are n + 1. Groups of similar samples are worth fewer: consecutive negatives share one weight, so many
    that the number of weights is that of the negatives divided by their design effect (Kish 1965). The rate of 1 %
    lies between two negatives: the recall is interpolated for the lower end, to 0 above the largest negative, and is
    that of the smaller one for the upper end. The share of positives above the threshold is drawn from the exact
    distribution of a proportion (Clopper & Pearson 1934), of as many positives as the groups are worth. NaN without
    positives or negatives.
    """
    kept = ~np.isnan(standard)
    positive, values, group = y[kept] == 1, standard[kept], group[kept]
    if positive.all() or not positive.any():
        return np.full(resamples, np.nan), np.full(resamples, np.nan)
    rng = np.random.default_rng(seed)
    negatives, positives = np.sort(values[~positive])[::-1], np.sort(-values[positive])
    many, hits = (max(1, round(at.sum() / design_effect(values[at], group[at]))) for at in (~positive, positive))
    first = (np.arange(many) * len(negatives) / many).astype(int)
    last = np.append(first[1:], len(negatives)) - 1
    above, before, after = np.zeros(resamples, np.int64), np.zeros(resamples), np.ones(resamples)
    size = max(1, CHUNK // 4 // (many + 1))
    for start in range(0, resamples, size):
        reached = np.cumsum(rng.standard_exponential((min(size, resamples - start), many + 1)), axis=1)
        reached /= reached[:, -1:]
        line = np.arange(len(reached))
        chosen = np.minimum((reached <= RATE).sum(1), many - 1)  # the first negative beyond the rate
        at = slice(start, start + len(reached))
        above[at], after[at] = chosen, reached[line, chosen]
        before[at] = np.where(chosen > 0, reached[line, chosen - 1], 0.0)
    inner, outer = (
        np.append(0.0, np.searchsorted(positives, -negatives[at], "left") / len(positives)) for at in (first, last)
    )
    part = np.minimum((RATE - before) / (after - before), 1.0)
    found = hits * ((1 - part) * inner[above] + part * inner[above + 1]), hits * outer[above + 1]
    chance = rng.random(resamples)
    low = beta.ppf(chance, np.maximum(found[0], 1e-9), hits - found[0] + 1)
    high = beta.ppf(chance, found[1] + 1, np.maximum(hits - found[1], 1e-9))
    return np.asarray(low), np.asarray(high)


def proportion_quantiles(value: float, samples: float, levels: Floats) -> Floats:
    """Return quantiles of the exact interval of a proportion (Clopper & Pearson 1934; Korn & Graubard 1998).

    >>> proportion_quantiles(1.0, 10, np.array([0.025, 0.975])).round(3).tolist()
    [0.692, 1.0]
    """
    hits = value * samples
    low = beta.ppf(levels, hits, samples - hits + 1) if hits > 0 else np.zeros(len(levels))
    high = beta.ppf(levels, hits + 1, samples - hits) if hits < samples else np.ones(len(levels))
    return np.where(levels < 0.5, low, high)


def design_effect(values: Floats, group: Ints) -> float:
    """Return how many samples in groups are worth one independent sample, at least 1.

    The variance of the mean over groups is widened as Student's t is, because few groups tell it badly.
    """
    by_group, size = _sum_groups((values - values.mean())[:, None], group)
    if len(size) < 2:
        return float(len(values))
    spread = float(((values - values.mean()) ** 2).sum())
    effect = float((by_group**2).sum()) * float(_widening(size)[0]) / spread if spread > 0 else 1.0
    return min(max(effect, 1.0), len(values))


def _sum_groups(values: Floats, group: Ints) -> tuple[Floats, Floats]:
    """Return the sums of each group that occurs, ``(groups, n)``, and its samples."""
    place, size = np.unique(group, return_inverse=True, return_counts=True)[1:]
    return sum_groups(values, place, len(size)), size.astype(float)


def sum_groups(values: Floats, group: Ints, count: int) -> Floats:
    """Return the sums of the samples of each group, ``(n_samples, n)`` to ``(count, n)``."""
    member = csr_array((np.ones(len(group)), group, np.arange(len(group) + 1)), shape=(len(group), count))
    return np.asarray(member.T @ values)


def _widening(size: Floats) -> Floats:
    """Return how much the variance between groups must be multiplied so that normal quantiles are those of t."""
    count = (size.reshape(len(size), -1) > 0).sum(0)
    freedom = degrees_of_freedom(np.ones((len(size), 1)), size, kurtosis=False)
    return t_widening(freedom) * count / np.maximum(count - 1, 1)
