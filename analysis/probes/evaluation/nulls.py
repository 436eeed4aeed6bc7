"""Distributions of the baselines of a layer over many draws: shuffled labels, control tasks, random directions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from analysis.probes.evaluation import score
from analysis.probes.evaluation.score import Prediction

ENDS = (0.025, 0.975)
"""Quantiles of the draws that bound their middle 95 %."""


class NullScores:
    """Scores of every draw, collected layer by layer.

    Parameters
    ----------
    arms
        Names of the baselines.
    metrics
        Metrics of the sweep.
    fold, group : (n_samples,)
        Test fold and group of each sample.
    layers, draws
        Numbers of layers and of draws.
    """

    def __init__(
        self,
        arms: Sequence[str],
        metrics: Sequence[score.Metric],
        fold: NDArray[np.int64],
        group: NDArray[np.int64],
        layers: int,
        draws: int,
    ) -> None:
        self.arms, self.metrics, self.fold, self.group = list(arms), metrics, fold, group
        self.cv = int(fold.max()) + 1
        self.by_fold = np.full((len(self.arms), layers, len(metrics), self.cv, draws), np.nan)
        self.pooled = np.full((len(self.arms), layers, len(metrics), draws), np.nan)

    def add_scores(self, arm: str, layer: int, draw: int, y: NDArray, prediction: Prediction) -> None:
        """Add the scores of the out-of-fold predictions of one draw, in the layer at index *layer*."""
        for number, metric in enumerate(self.metrics):
            if prediction.probability is None and metric in score.LOWER:
                continue
            at = self.arms.index(arm), layer, number
            parts = score.parts(metric, y, prediction, self.fold, self.cv, self.group)
            self.by_fold[(*at, slice(None), draw)] = score.ratio(*parts)
            self.pooled[(*at, draw)] = score.pooled(metric, y, prediction, self.fold, self.group)

    def to_dataset(self, data: xr.Dataset) -> xr.Dataset:
        """Return the scores of a sweep with the distribution of its baselines.

        The baselines' scores become means over draws, their ``ci_low, ci_high`` the middle 95 % of the draws.
        ``null_p`` is the share of draws that reach the probe's score, (1 + count) / (1 + draws), and
        ``null_p_corrected`` that of draws whose best layer reaches it (single-step maxT, Westfall & Young 1993).
        """
        low, high = np.quantile(self.pooled, ENDS, axis=-1)
        sign = np.array([float(score.sign(metric)) for metric in self.metrics])
        probe = sign * data["pooled"].sel(arm="probe").values
        drawn = sign[:, None] * self.pooled
        reached = drawn >= probe[..., None]
        best_reached = drawn.max(axis=1, keepdims=True) >= probe[..., None]
        p, corrected = ((1 + hit.sum(-1)) / (1 + drawn.shape[-1]) for hit in (reached, best_reached))
        undefined = np.isnan(probe + drawn.sum(-1))
        dims = ("baseline", "layer", "metric")
        found = data.assign(
            null_score=((*dims, "draw"), self.pooled),
            null_low=(dims, low),
            null_high=(dims, high),
            null_p=(dims, np.where(undefined, np.nan, p)),
            null_p_corrected=(dims, np.where(undefined, np.nan, corrected)),
        ).assign_coords(baseline=self.arms, draw=np.arange(drawn.shape[-1]))
        by_fold = self.by_fold.mean(-1)
        fold_low, fold_high = score.fold_interval(by_fold)
        own = {"arm": self.arms}
        for name, values in (
            ("score", by_fold),
            ("mean", by_fold.mean(-1)),
            ("fold_low", fold_low),
            ("fold_high", fold_high),
            ("pooled", self.pooled.mean(-1)),
            ("ci_low", low),
            ("ci_high", high),
        ):
            found[name].loc[own] = values
        return found


def selectivity(data: xr.Dataset) -> xr.Dataset:
    """Return by how much the probe beats the control task, by the first metric: mean and middle 95 % of draws."""
    sign = score.sign(str(data["metric"].values[0]))
    probe = data["pooled"].sel(arm="probe").isel(metric=0)
    if "null_score" not in data:
        control = data["pooled"].sel(arm="control").isel(metric=0)
        return data.assign(selectivity=("layer", sign * (probe - control).values))
    over = sign * (probe - data["null_score"].sel(baseline="control").isel(metric=0)).transpose("layer", "draw").values
    low, high = np.quantile(over, ENDS, axis=-1)
    return data.assign(
        selectivity=("layer", over.mean(-1)),
        selectivity_low=("layer", low),
        selectivity_high=("layer", high),
        selectivity_sd=("layer", over.std(-1, ddof=1)),
    )
