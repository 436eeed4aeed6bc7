"""Scores and intervals of a sweep, collected layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from analysis.dataset.probe_dataset import ProbeDataset
from analysis.probes.evaluation import score
from analysis.probes.evaluation.score import Prediction
from analysis.probes.options import SweepOptions
from analysis.probes.results import Sweep

LEAST = 3
"""Smallest number of groups in a fold for which there is an interval over folds."""


class LayerScores:
    """Scores of every arm and layer; arms other than the probe have intervals of the first metric only.

    Replicates of the probe are kept, ``(n_layers, n_metrics, resamples)``, for the band over layers.

    Parameters
    ----------
    dataset
        Samples with targets and groups.
    fold : (n_samples,)
        The fold in which each sample is tested.
    arms
        ``"probe"`` and the names of the baselines.
    metrics
        Metrics of the target, the one of tables and baselines first.
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
        places = [self.metrics.index(metric) for metric in measured]
        asked = (measured, y, prediction, self.fold, self.dataset.group)
        if arm == "probe":
            drawn = score.replicates(*asked, resamples=self.resamples, seed=self.seed)
            self.replicates[layer, places] = drawn
            ends = score.interval(drawn)
        else:
            ends = score.covering_interval(*asked, resamples=self.resamples, seed=self.seed)
        self.low[at, layer, places], self.high[at, layer, places] = (
            end if isinstance(layer, int) else end[:, None] for end in ends
        )

    def to_dataset(self) -> xr.Dataset:
        """Return the scores by arm, layer, metric and fold."""
        dims = ("arm", "layer", "metric")
        low, high = _over_folds(self.by_fold, self.cv, self.dataset.n_groups)
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
        asked = (measured, self.dataset.y, prediction, self.fold, self.dataset.group)
        low[places], high[places] = score.covering_interval(*asked, resamples=self.resamples, seed=self.seed)
        fold_low, fold_high = _over_folds(by_fold, self.cv, self.dataset.n_groups)
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
            at = self.metrics.index(metric)
            by_fold[at] = score.ratio(*score.parts(metric, y, prediction, self.fold, self.cv, self.dataset.group))
            pooled[at] = score.pooled(metric, y, prediction, self.fold, self.dataset.group)
        return by_fold, pooled


def _over_folds(values: NDArray[np.float64], cv: int, groups: int) -> tuple[NDArray[np.float64], ...]:
    """Return the ends of the interval over folds; NaN if folds have fewer than `LEAST` groups each."""
    return tuple(np.where(groups < LEAST * cv, np.nan, end) for end in score.fold_interval(values, cv=cv))


def join_repeats(sweeps: Sequence[Sweep]) -> Sweep:
    """Return the first of several cross-validations, with the mean and interval over the folds of all of them."""
    first = sweeps[0].results
    if len(sweeps) == 1:
        return sweeps[0]
    added = {}
    for name, prefix, dims in (("score", "", ("layer", "metric")), ("best_score", "best_", ("metric",))):
        values = [sweep.results[name] if prefix else sweep.results[name].sel(arm="probe") for sweep in sweeps]
        together = np.concatenate([value.transpose(*dims, "fold").values for value in values], axis=-1)
        for end, found in zip(
            ("low", "high"), _over_folds(together, first.sizes["fold"], first.attrs["groups_found"]), strict=True
        ):
            added[f"{prefix}repeat_{end}"] = (dims, found)
        added[f"{prefix}repeat_mean"] = (dims, together.mean(-1))
    return replace(sweeps[0], results=first.assign(added))
