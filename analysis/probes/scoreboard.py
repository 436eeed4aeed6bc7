"""The scores of a sweep as they come in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from analysis.dataset.view import View
from analysis.probes import score
from analysis.probes.score import Prediction


class Scoreboard:
    """Scores of every arm and layer as they come in; of arms other than the probe, intervals of the first metric only.

    Bootstrap replicates of the probe are kept, ``(n_layers, n_metrics, resamples)``, for the band over layers.
    """

    def __init__(
        self,
        view: View,
        fold: NDArray[np.int64],
        cv: int,
        arms: Sequence[str],
        metrics: Sequence[score.Metric],
        resamples: int,
        seed: int,
    ) -> None:
        self.view, self.fold, self.cv, self.arms, self.metrics = view, fold, cv, list(arms), metrics
        self.resamples, self.seed = resamples, seed
        shape = (len(self.arms), len(view.layers), len(metrics))
        self.by_fold = np.full((*shape, cv), np.nan)
        self.pooled, self.low, self.high = (np.full(shape, np.nan) for _ in range(3))
        self.drawn = np.full((*shape[1:], resamples), np.nan)

    def add(self, arm: str, layer: int | slice, y: NDArray, said: Prediction) -> None:
        """Score an arm's out-of-fold predictions in one layer, given by its place, or in all of them."""
        at = self.arms.index(arm)
        self.by_fold[at, layer], self.pooled[at, layer] = self._values(y, said)
        wanted = self._known(said) if arm == "probe" else self.metrics[:1]
        drawn = self._draw(wanted, y, said)
        places = [self.metrics.index(metric) for metric in wanted]
        if arm == "probe":
            self.drawn[layer, places] = drawn
        self.low[at, layer, places], self.high[at, layer, places] = (
            end if isinstance(layer, int) else end[:, None] for end in score.interval(drawn)
        )

    def dataset(self) -> xr.Dataset:
        """Return what was added, by arm, layer, metric and fold."""
        dims = ("arm", "layer", "metric")
        low, high = score.fold_interval(self.by_fold)
        ends = [score.band(self.pooled[0, :, m], self.drawn[:, m]) for m in range(len(self.metrics))]
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
                "layer": [-1 if layer is None else layer for layer in self.view.layers],
                "metric": list(self.metrics),
                "fold": np.arange(self.cv),
                "fold_samples": ("fold", np.bincount(self.fold, minlength=self.cv)),
            },
        )

    def nested(self, said: Prediction, chosen: NDArray) -> xr.Dataset:
        """Return the scores of predictions whose layer, ``chosen[fold]`` by place, differs between folds."""
        by_fold, pooled = self._values(self.view.y, said)
        low, high = np.full((2, len(self.metrics)), np.nan)
        known = self._known(said)
        places = [self.metrics.index(metric) for metric in known]
        low[places], high[places] = score.interval(self._draw(known, self.view.y, said))
        fold_low, fold_high = score.fold_interval(by_fold)
        layers = [-1 if layer is None else layer for layer in self.view.layers]
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

    def _known(self, said: Prediction) -> list[score.Metric]:
        return [m for m in self.metrics if said.probability is not None or m not in score.LOWER]

    def _values(self, y: NDArray, said: Prediction) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        by_fold, pooled = np.full((len(self.metrics), self.cv), np.nan), np.full(len(self.metrics), np.nan)
        for metric in self._known(said):
            top, bottom = score.parts(metric, y, said, self.fold, self.cv, self.view.group)
            at = self.metrics.index(metric)
            by_fold[at], pooled[at] = score.ratio(top, bottom), score.ratio(top.sum(), bottom.sum())
        return by_fold, pooled

    def _draw(self, wanted: Sequence[score.Metric], y: NDArray, said: Prediction) -> NDArray[np.float64]:
        return score.replicates(wanted, y, said, self.fold, self.view.group, resamples=self.resamples, seed=self.seed)
