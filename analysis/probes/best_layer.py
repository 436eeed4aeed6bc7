"""The best layer of a sweep."""

from __future__ import annotations

from dataclasses import dataclass

import xarray as xr

from analysis.probes.evaluation.metric_values import sign
from analysis.sweep_results import names_along


@dataclass(frozen=True)
class Best:
    """The best layer of a sweep and its score.

    ::

        best = sweep.best
        best.layer, best.score, best.ci_low, best.ci_high
    """

    layer: int | None
    """Best layer by cross-validation over all documents; the one to use. None for a site without layers."""
    metric: str
    score: float
    """Score pooled over test folds, each scored by the layer that was chosen without that fold."""
    ci_low: float
    ci_high: float
    """95 % interval of ``score`` over groups."""
    chosen: tuple[int, ...]
    """The layer that was chosen for each test fold."""
    on_layer: float
    """The plain cross-validated score of ``layer``; too good, because the layer was chosen on these folds."""
    nested: bool
    """False if the layer was chosen on the scores that are reported; ``score`` is then ``on_layer``."""

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"layer {self.layer}: "
        text = f"{layer}{self.metric} {self.score:.3f} [{self.ci_low:.3f}, {self.ci_high:.3f}]"
        if len(set(self.chosen)) == 1 and not self.nested and self.layer is not None:
            return text + " (chosen on these very scores: too high)"
        return text


def best_layer(results: xr.Dataset) -> Best:
    """Return the best layer by the metric of the choice, with its first metric; the lower one of two equal layers."""
    data = results.isel(metric=0)
    curve = data["pooled"].sel(arm="probe").values
    chosen_by = results.attrs.get("selection_metric", names_along(results, "metric")[0])
    at = int((sign(chosen_by) * results["pooled"].sel(arm="probe", metric=chosen_by).values).argmax())
    layer = int(data["layer"].values[at])
    return Best(
        layer=None if layer < 0 else layer,
        metric=names_along(results, "metric")[0],
        score=float(data["best_pooled"]),
        ci_low=float(data["best_ci_low"]),
        ci_high=float(data["best_ci_high"]),
        chosen=tuple(data["chosen_layer"].values.tolist()),
        on_layer=float(curve[at]),
        nested=results.attrs["layer_chosen"] != "on these scores",
    )
