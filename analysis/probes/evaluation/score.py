"""Metrics of probes, with intervals over groups and folds, and a band over layers.

Each metric has a value on every test fold, which is that of scikit-learn for the fold, and a *pooled* value over all
held-out samples.

==================  =====================================================================================
metric              pooled value
==================  =====================================================================================
accuracy            correct samples ÷ samples
auroc               concordant pairs (a tie is a half) ÷ pairs of a positive and a negative in one fold
f1                  from the counts of all samples; of the second of two classes, else the mean over classes
balanced_accuracy   mean over classes of the share of the class that is right
recall@1%           positives above the threshold that at most 1 % of the negatives reach ÷ positives
log_loss            mean of −log of the true class's probability
brier               mean squared error of the probabilities
ece                 sum over 15 bins of share · \\|confidence − accuracy\\|, as the calibration figure shows them
ece_debiased        the same without the noise of the bins
r2                  1 − squared errors ÷ squared deviations from the mean
pearson             correlation of deviations from the means of the fold
==================  =====================================================================================

Predictions of different folds are not ranked against each other, except for recall@1%, which standardises them first.
F1 is not the mean of the folds, which is biased if folds hold few positives (Forman & Scholz 2010). The expected
calibration error follows Guo et al. (2017, arXiv 1706.04599): bins of equal width of the probability of the most likely
class. It and recall@1% need more samples than a fold has: the value of a fold is the mean contribution of its samples
(`analysis.probes.evaluation.pooled_metrics`). Smaller is better for log_loss, brier, ece and ece_debiased.
"""

from __future__ import annotations

from analysis.probes.evaluation.intervals import (
    band,
    covering_interval,
    draw_scores,
    fold_interval,
    interval,
    replicates,
)
from analysis.probes.evaluation.metric_values import (
    BINS,
    LOWER,
    POOLED,
    Metric,
    Prediction,
    metrics,
    parts,
    pooled,
    ratio,
    selection_metric,
    sign,
)

__all__ = [
    "BINS",
    "LOWER",
    "POOLED",
    "Metric",
    "Prediction",
    "band",
    "covering_interval",
    "draw_scores",
    "fold_interval",
    "interval",
    "metrics",
    "parts",
    "pooled",
    "ratio",
    "replicates",
    "selection_metric",
    "sign",
]
