"""Scores of a probe sweep by layer, saved and loaded."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from analysis.probes.best_layer import Best, best_layer
from analysis.probes.comparison import compare
from analysis.probes.direction import Direction
from analysis.probes.held_out_predictions import HeldOutPredictions
from analysis.sweep_results import SweepResults, check_format, no_saved_sweep
from flexcache.errors import AnalysisError
from flexcache.paths import local_path
from flexcache.store.storage.atomic_files import write_durably

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

FORMAT = "flexcache probe sweep 2"
FILE, WEIGHTS = "sweep.json", "weights.safetensors"
PROVENANCE = (
    *("target", "task", "classes", "rows", "probe", "documents", "samples", "labels"),
    *("model", "weights", "model_record"),
)
"""Attributes of a sweep that its directions keep."""


@dataclass(frozen=True)
class Sweep(SweepResults):
    """Scores of one probe by layer, with its baselines; returned by `sweep` and `load`.

    ::

        sweep = probes.sweep(store, target="label", site="resid_post")
        sweep.results["pooled"].sel(arm="probe", metric="accuracy")
        sweep.plot("curve.svg")
        sweep.save("results")       # sweep.json, and weights.safetensors with weights and out-of-fold predictions
        probes.load("results")

    ``results`` is an `xarray.Dataset`:

    ====================================  ========================  ==========================================
    variable                              dims                      meaning
    ====================================  ========================  ==========================================
    ``score``                             arm, layer, metric, fold  on each test fold
    ``mean, fold_low, fold_high``         arm, layer, metric        mean over folds, 95 % t interval
    ``repeat_mean, repeat_low, …_high``   layer, metric             over the folds of all repeats, 95 % corrected t
    ``pooled, ci_low, ci_high``           arm, layer, metric        over all samples, 95 % over groups
    ``band_low, band_high``               layer, metric             95 % for all layers at once
    ``strength``                          layer, fold               chosen without that fold, if several were tried
    ``final_strength``                    layer                     chosen by all folds; that of the kept weights
    ``selectivity``                       layer                     score above the control task, by the first metric
    ``selectivity_low, _high, _sd``       layer                     middle 95 % and deviation over draws
    ``null_score``                        baseline, layer, metric,  every draw of shuffled labels, control task and
                                          draw                      random direction
    ``null_low, null_high``               baseline, layer, metric   middle 95 % of the draws
    ``null_p, null_p_corrected``          baseline, layer, metric   share of draws that reach the probe, and of draws
                                                                    whose best layer does
    ``codelength, compression``           layer                     bits by online coding; uniform code ÷ codelength
    ``confusion``                         truth, said               of the nested predictions
    ``chosen_layer``                      fold                      chosen without that fold
    ``best_score``                        metric, fold              of the chosen layer
    ``best_mean, best_fold_low, …_high``  metric                    as above, layer choice included
    ``best_repeat_mean, …_low, …_high``   metric                    as above, layer choice included
    ``best_pooled, best_ci_low, …_high``  metric                    as above, layer choice included
    ====================================  ========================  ==========================================

    *arm* is ``probe`` and the baselines. Baselines that read no activation, such as ``majority`` and ``tfidf``, have
    the same value at every layer. The draws are there if *nulls* is above 1; then the scores of these baselines are
    means over draws, and their ``ci_low, ci_high`` the middle 95 % of the draws. *layer* is −1 for a module path.
    ``results.attrs`` holds the options of the sweep.
    """

    coef: NDArray[np.float64] | None = None
    """Weights fitted to all samples, (n_layers, outputs, features); None for probes that are not linear."""
    intercept: NDArray[np.float64] | None = None
    """(n_layers, outputs)"""
    predictions: HeldOutPredictions | None = field(default=None, repr=False)
    """Out-of-fold predictions of every layer, for `compare`."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers; −1 for a module path."""
        return tuple(self.results["layer"].values.tolist())

    @property
    def best(self) -> Best:
        """The best layer by the metric of the choice, ``results.attrs["selection_metric"]``, and its first metric."""
        return best_layer(self.results)

    def to_direction(self, layer: int | None = None, output: int = 0) -> Direction:
        """Return the weights of a layer, fitted to all samples, as a direction in the units of the activations.

        Parameters
        ----------
        layer
            The best one by default.
        output
            Index of the class, if there are more than two.

        Raises
        ------
        AnalysisError
            The probe is not linear, or has no such layer or class.
        """
        asked = self.results.attrs
        if self.coef is None or self.intercept is None:
            raise AnalysisError(
                "the probe has no direction",
                found=asked["probe"],
                remedy="use a linear probe: Logistic, Ridge, MassMean, LDA",
            )
        wanted = self.best.layer if layer is None else layer
        number = -1 if wanted is None else wanted
        if number not in self.layers:
            raise AnalysisError(
                f"layer {layer} was not probed",
                expected=f"one of {', '.join(map(str, self.layers))}",
                found=str(layer),
            )
        at = self.layers.index(number)
        if not 0 <= output < self.coef.shape[1]:
            raise AnalysisError("there is no such output", expected=f"0 to {self.coef.shape[1] - 1}", found=str(output))
        provenance = {key: asked[key] for key in PROVENANCE if key in asked}
        return Direction(
            self.coef[at, output].copy(),
            float(self.intercept[at, output]),
            asked["site"],
            wanted,
            {**provenance, "output": output},
        )

    def compare(
        self, first: int | Sweep, second: int | Sweep | None = None, *, metric: str | None = None
    ) -> xr.Dataset:
        """Compare two layers, or sweeps of the same samples and folds, by the paired difference of their scores.

        ::

            sweep.compare(3, 9)["difference"]       # layers of this sweep
            sweep.compare(other)                    # the best layer of this sweep and of another

        Parameters
        ----------
        first, second
            A layer of this sweep; or a sweep, which stands for its best layer. Without *second*, this sweep's best
            layer is compared with *first*. For more than two, see `analysis.probes.compare`.
        metric
            The first one by default.

        Returns
        -------
        Dataset with dim (pair,)
            See `analysis.probes.compare`, which also raises the same errors.
        """
        told: dict[str, Sweep | tuple[Sweep, int]] = {}
        for name, asked in zip(("first", "second"), (self, first) if second is None else (first, second), strict=True):
            if isinstance(asked, Sweep):
                told[name if asked is not self else "best"] = asked
            else:
                told[f"layer {asked}"] = (self, asked)
        return compare(told, metric=metric)

    def table(self) -> Table:
        """Return a `rich.table.Table` of the layers and baselines."""
        from analysis.probes.table import table

        return table(self.results)

    def plot(self, to: str | Path | Axes | None = None, *, metric: str | None = None) -> Figure:
        """Draw the score against the layer, with intervals over groups, and baselines.

        Parameters
        ----------
        to
            Path of an image (png, svg, pdf), or matplotlib axes; a new figure by default.
        metric
            The first one by default.

        Raises
        ------
        AnalysisError
            The metric was not measured.
        """
        from analysis.probes.plot import plot

        return plot(self.results, to, metric=metric)

    def _write(self, folder: Path) -> Path:
        path = folder / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        save_dataset(self.results, path)
        tensors = {} if self.predictions is None else self.predictions.tensors()
        if self.coef is not None and self.intercept is not None:
            tensors |= {"coef": np.ascontiguousarray(self.coef), "intercept": np.ascontiguousarray(self.intercept)}
        if tensors:
            write_durably(path.with_name(WEIGHTS), save(tensors, {"format": FORMAT}))
        else:
            path.with_name(WEIGHTS).unlink(missing_ok=True)
        return path

    def __repr__(self) -> str:
        asked = self.results.attrs
        return (
            f"<Sweep of {asked['target']} on {asked['site']}: {self.results.sizes['layer']} layers, "
            f"{asked['documents']} documents; best {self.best}>"
        )


def load(folder: str | Path) -> Sweep:
    """Load a sweep that `Sweep.save` wrote.

    ::

        probes.load("results").best

    Raises
    ------
    AnalysisError
        The folder holds no sweep, or one that another version wrote.
    """
    path = local_path(folder) / FILE
    try:
        data = json.loads(path.read_text("utf-8"))
        dims, attrs = data["dims"], data["attrs"]
        check_format(path, str(attrs["format"]), FORMAT)
        variables = {
            kind: {name: (v["dims"], _array(v, dims), v["attrs"]) for name, v in data[kind].items()}
            for kind in ("data_vars", "coords")
        }
    except FileNotFoundError as error:
        raise no_saved_sweep(path) from error
    except (ValueError, KeyError, TypeError) as error:
        raise AnalysisError("the saved sweep cannot be read", where=str(path), found=str(error)) from error
    found = xr.Dataset(variables["data_vars"], variables["coords"], attrs)
    weights = path.with_name(WEIGHTS)
    if not weights.is_file():
        return Sweep(found)
    try:
        tensors = load_file(weights)
        told = HeldOutPredictions.from_tensors(tensors)
        return Sweep(found, tensors.get("coef"), tensors.get("intercept"), told)
    except (SafetensorError, KeyError, OSError) as error:
        raise AnalysisError("the saved weights cannot be read", where=str(weights), found=str(error)) from error


def save_dataset(found: xr.Dataset, path: str | Path) -> None:
    """Write a dataset as JSON; no bit is lost.

    ::

        probes.save_dataset(probes.transfer(sweep, other), "transfer.json")
    """
    data = found.to_dict()
    for name, variable in (data["coords"] | data["data_vars"]).items():
        variable["dtype"] = found[name].dtype.str
    local_path(path).write_text(json.dumps(_plain(data), indent=1, allow_nan=False) + "\n", "utf-8")


def _array(variable: dict[str, Any], dims: dict[str, int]) -> np.ndarray:
    return np.array(variable["data"], variable["dtype"]).reshape([dims[dim] for dim in variable["dims"]])


def _plain(value: Any) -> Any:
    """Return *value* in the types of JSON; NaN becomes null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
