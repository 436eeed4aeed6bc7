"""The scores of a sweep as they come in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from analysis.probes import score
from analysis.probes.baselines import Prediction
from analysis.view import View


class Scoreboard:
    """Scores of every arm and layer as they come in."""

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

    def _score(self, y: NDArray, prediction: Prediction) -> Iterable[tuple[NDArray, float, float, float]]:
        predicted, decision = prediction
        for metric in self.metrics:
            top, bottom = score.parts(metric, y, predicted, decision, self.fold, self.cv)
            low, high = score.bootstrap(
                metric, y, predicted[None], decision[None], self.fold, self.view.group,
                resamples=self.resamples, seed=self.seed,
            )  # fmt: skip
            yield score.ratio(top, bottom), float(score.ratio(top.sum(), bottom.sum())), low[0], high[0]

    def add(self, arm: str, layer: int | slice, y: NDArray, prediction: Prediction) -> None:
        """Score an arm's out-of-fold predictions in one layer, given by its place, or in all of them."""
        at = self.arms.index(arm)
        for m, (values, pooled, low, high) in enumerate(self._score(y, prediction)):
            self.by_fold[at, layer, m] = values
            self.pooled[at, layer, m], self.low[at, layer, m], self.high[at, layer, m] = pooled, low, high

    def dataset(self) -> xr.Dataset:
        """Return what was added, by arm, layer, metric and fold."""
        dims = ("arm", "layer", "metric")
        low, high = score.fold_interval(self.by_fold)
        return xr.Dataset(
            {
                "score": ((*dims, "fold"), self.by_fold),
                "mean": (dims, self.by_fold.mean(-1)),
                "fold_low": (dims, low),
                "fold_high": (dims, high),
                "pooled": (dims, self.pooled),
                "ci_low": (dims, self.low),
                "ci_high": (dims, self.high),
            },
            {
                "arm": self.arms,
                "layer": [-1 if layer is None else layer for layer in self.view.layers],
                "metric": list(self.metrics),
                "fold": np.arange(self.cv),
                "fold_samples": ("fold", np.bincount(self.fold, minlength=self.cv)),
            },
        )

    def nested(self, prediction: Prediction, chosen: NDArray) -> xr.Dataset:
        """Return the scores of predictions whose layer, ``chosen[fold]`` by place, differs between folds."""
        values, pooled, low, high = zip(*self._score(self.view.y, prediction))
        by_fold = np.stack(values)
        fold_low, fold_high = score.fold_interval(by_fold)
        layers = [-1 if layer is None else layer for layer in self.view.layers]
        return xr.Dataset(
            {
                "chosen_layer": ("fold", np.array(layers)[chosen]),
                "best_score": (("metric", "fold"), by_fold),
                "best_mean": ("metric", by_fold.mean(-1)),
                "best_fold_low": ("metric", fold_low),
                "best_fold_high": ("metric", fold_high),
                "best_pooled": ("metric", np.array(pooled)),
                "best_ci_low": ("metric", np.array(low)),
                "best_ci_high": ("metric", np.array(high)),
            }
        )
