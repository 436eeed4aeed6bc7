"""Scores and intervals of a sweep, collected layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from analysis.dataset.probe_dataset import ProbeDataset
from analysis.probes.evaluation import score
from analysis.probes.evaluation.score import Prediction
from analysis.probes.options import SweepOptions
from analysis.statistics.bootstrap import percentile_interval


class LayerScores:
    """Scores of every arm and layer; arms other than the probe have intervals of the first metric only.

    Bootstrap replicates of the probe are kept, ``(n_layers, n_metrics, resamples)``, for the band over layers.

    Parameters
    ----------
    dataset
        Samples with targets and groups.
    fold : (n_samples,)
        The fold in which each sample is tested.
    arms
        ``"probe"`` and the names of the baselines.
    metrics
        Metrics of the target, the one that layers are chosen by first.
    options
        Number of folds and resamples, and the seed.
    """

    def __init__(
        self,
        dataset: ProbeDataset,
        fold: NDArray[np.int64],
        arms: Sequence[str],
        metrics: Sequence[score.Metric],
        options: SweepOptions,
    ) -> None:
        self.dataset, self.fold, self.arms, self.metrics = dataset, fold, list(arms), metrics
        self.cv, self.resamples, self.seed = options.cv, options.resamples, options.seed
        shape = (len(self.arms), len(dataset.layers), len(metrics))
        self.by_fold = np.full((*shape, self.cv), np.nan)
        self.pooled, self.low, self.high = (np.full(shape, np.nan) for _ in range(3))
        self.replicates = np.full((*shape[1:], self.resamples), np.nan)

    def add_scores(self, arm: str, layer: int | slice, y: NDArray, prediction: Prediction) -> None:
        """Add the scores of an arm's out-of-fold predictions, in the layer at index *layer* or in all layers."""
        at = self.arms.index(arm)
        self.by_fold[at, layer], self.pooled[at, layer] = self._values(y, prediction)
        measured = self._measurable(prediction) if arm == "probe" else self.metrics[:1]
        drawn = self._draw(measured, y, prediction)
        places = [self.metrics.index(metric) for metric in measured]
        if arm == "probe":
            self.replicates[layer, places] = drawn
        self.low[at, layer, places], self.high[at, layer, places] = (
            end if isinstance(layer, int) else end[:, None] for end in percentile_interval(drawn)
        )

    def to_dataset(self) -> xr.Dataset:
        """Return the scores by arm, layer, metric and fold."""
        dims = ("arm", "layer", "metric")
        low, high = score.fold_interval(self.by_fold)
        ends = [score.band(self.pooled[0, :, m], self.replicates[:, m]) for m in range(len(self.metrics))]
        return xr.Dataset(
            {
                "score": ((*dims, "fold"), self.by_fold),
                "mean": (dims, self.by_fold.mean(-1)),
                "fold_low": (dims, low),
                "fold_high": (dims, high),
                "pooled": (dims, self.pooled),
                "ci_low": (dims, self.low),
                "ci_high": (dims, self.high),
                "band_low": (("layer", "metric"), np.stack([low for low, _ in ends], axis=1)),
                "band_high": (("layer", "metric"), np.stack([high for _, high in ends], axis=1)),
            },
            {
                "arm": self.arms,
                "layer": [-1 if layer is None else layer for layer in self.dataset.layers],
                "metric": list(self.metrics),
                "fold": np.arange(self.cv),
                "fold_samples": ("fold", np.bincount(self.fold, minlength=self.cv)),
            },
        )

    def nested_scores(self, prediction: Prediction, chosen: NDArray) -> xr.Dataset:
        """Return the scores of predictions whose layer differs between folds: the layer at index ``chosen[fold]``."""
        by_fold, pooled = self._values(self.dataset.y, prediction)
        low, high = np.full((2, len(self.metrics)), np.nan)
        measured = self._measurable(prediction)
        places = [self.metrics.index(metric) for metric in measured]
        low[places], high[places] = percentile_interval(self._draw(measured, self.dataset.y, prediction))
        fold_low, fold_high = score.fold_interval(by_fold)
        layers = [-1 if layer is None else layer for layer in self.dataset.layers]
        return xr.Dataset(
            {
                "chosen_layer": ("fold", np.array(layers)[chosen]),
                "best_score": (("metric", "fold"), by_fold),
                "best_mean": ("metric", by_fold.mean(-1)),
                "best_fold_low": ("metric", fold_low),
                "best_fold_high": ("metric", fold_high),
                "best_pooled": ("metric", pooled),
                "best_ci_low": ("metric", low),
                "best_ci_high": ("metric", high),
            }
        )

    def _measurable(self, prediction: Prediction) -> list[score.Metric]:
        return [m for m in self.metrics if prediction.probability is not None or m not in score.LOWER]

    def _values(self, y: NDArray, prediction: Prediction) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        by_fold, pooled = np.full((len(self.metrics), self.cv), np.nan), np.full(len(self.metrics), np.nan)
        for metric in self._measurable(prediction):
            top, bottom = score.parts(metric, y, prediction, self.fold, self.cv, self.dataset.group)
            at = self.metrics.index(metric)
            by_fold[at], pooled[at] = score.ratio(top, bottom), score.ratio(top.sum(), bottom.sum())
        return by_fold, pooled

    def _draw(self, wanted: Sequence[score.Metric], y: NDArray, prediction: Prediction) -> NDArray[np.float64]:
        return score.replicates(
            wanted, y, prediction, self.fold, self.dataset.group, resamples=self.resamples, seed=self.seed
        )
