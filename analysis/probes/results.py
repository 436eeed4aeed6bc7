"""What a sweep found."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from analysis.rescue import rescued
from flexcache.errors import AnalysisError, nearest
from flexcache.paths import local_path
from flexcache.store.storage.atomic_files import write_durably

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

    from analysis.probes.direction import Direction

FORMAT = "flexcache probe sweep 2"
FILE, WEIGHTS = "sweep.json", "weights.safetensors"


@dataclass(frozen=True)
class Best:
    """The best layer, and what the choice is worth."""

    layer: int | None
    """Best by cross-validation over all documents; the one to use. None for a site without layers."""
    metric: str
    score: float
    """Pooled over test folds, each scored by the layer that was chosen without it."""
    ci_low: float
    ci_high: float
    """95 % group bootstrap of ``score``."""
    chosen: tuple[int, ...]
    """The layer that was chosen for each test fold."""
    on_layer: float
    """The plain cross-validated score of ``layer``: flattering, because it is why the layer was chosen."""
    nested: bool
    """False where the layer was chosen on the scores that are reported; ``score`` is then ``on_layer``."""

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"layer {self.layer}: "
        text = f"{layer}{self.metric} {self.score:.3f} [{self.ci_low:.3f}, {self.ci_high:.3f}]"
        if len(set(self.chosen)) == 1 and not self.nested and self.layer is not None:
            return text + " (chosen on these very scores: too high)"
        return text


@dataclass(frozen=True)
class Sweep:
    """Scores of one probe by layer, beside its baselines; made by `sweep`, read again by `load`.

    ``results`` is an `xarray.Dataset`:

    ====================================  ========================  ==========================================
    variable                              dims                      meaning
    ====================================  ========================  ==========================================
    ``score``                             arm, layer, metric, fold  on each test fold
    ``mean, fold_low, fold_high``         arm, layer, metric        mean over folds, 95 % t interval
    ``pooled, ci_low, ci_high``           arm, layer, metric        over all samples, 95 % group bootstrap
    ``band_low, band_high``               layer, metric             95 % for all layers at once
    ``strength``                          layer, fold               chosen without that fold, where several were tried
    ``final_strength``                    layer                     chosen by all folds, of the weights that are kept
    ``selectivity``                       layer                     above the control task, by the first metric
    ``codelength, compression``           layer                     bits by online coding; even code ÷ codelength
    ``confusion``                         truth, said               of the nested predictions
    ``chosen_layer``                      fold                      chosen without that fold
    ``best_score``                        metric, fold              of the chosen layer
    ``best_mean, best_fold_low, …_high``  metric                    as above, layer choice included
    ``best_pooled, best_ci_low, …_high``  metric                    as above, layer choice included
    ====================================  ========================  ==========================================

    *arm* is ``probe`` and the baselines. Those that read no activation, ``majority`` and ``tfidf``, have the
    same value at every layer. *layer* is −1 for a module path. What was asked is in ``results.attrs``.
    """

    results: xr.Dataset
    coef: NDArray[np.float64] | None = None
    """Weights fitted to all samples, (n_layers, outputs, features); None for probes that are not linear."""
    intercept: NDArray[np.float64] | None = None
    """(n_layers, outputs)"""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers; −1 for a module path."""
        return tuple(self.results["layer"].values.tolist())

    @property
    def arms(self) -> tuple[str, ...]:
        """``probe`` and the baselines."""
        return tuple(self.results["arm"].values.tolist())

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics, the one that layers are chosen by first."""
        return tuple(self.results["metric"].values.tolist())

    @property
    def best(self) -> Best:
        """The best layer by the first metric; the lower of two equals."""
        metric, data = self.metrics[0], self.results.isel(metric=0)
        curve = data["pooled"].sel(arm="probe").values
        at = int(curve.argmax())
        layer = int(data["layer"].values[at])
        return Best(
            layer=None if layer < 0 else layer,
            metric=metric,
            score=float(data["best_pooled"]),
            ci_low=float(data["best_ci_low"]),
            ci_high=float(data["best_ci_high"]),
            chosen=tuple(data["chosen_layer"].values.tolist()),
            on_layer=float(curve[at]),
            nested=self.results.attrs["layer_chosen"] != "on these scores",
        )

    def metric(self, name: str | None) -> str:
        """Return *name* if it was measured, the first metric if it is None.

        Raises
        ------
        AnalysisError
            It was not measured.
        """
        if name is not None and name not in self.metrics:
            raise AnalysisError(f"the sweep did not measure {name!r}", remedy=nearest(name, self.metrics))
        return name or self.metrics[0]

    def to_direction(self, layer: int | None = None, output: int = 0) -> Direction:
        """Return a layer's weights, fitted to all samples, as a direction in the units of the activations.

        Parameters
        ----------
        layer
            By default the best.
        output
            Which class, where there are more than two.

        Raises
        ------
        AnalysisError
            The probe is not linear, or has no such layer or class.
        """
        from analysis.probes.direction import of_sweep

        return of_sweep(self, layer, output)

    def table(self) -> Table:
        """Return a `rich.table.Table` of the layers and baselines."""
        from analysis.probes.table import table

        return table(self)

    def plot(self, to: str | Path | Axes | None = None, *, metric: str | None = None) -> Figure:
        """Draw the score against the layer, with bootstrap intervals and baselines.

        Parameters
        ----------
        to
            Where to draw: the path of an image (png, svg, pdf), matplotlib axes, or nothing for a new figure.
        metric
            By default the first.

        Raises
        ------
        AnalysisError
            The metric was not measured.
        """
        from analysis.probes.plot import plot

        return plot(self, to, metric=metric)

    def save(self, folder: str | Path) -> Path:
        """Write ``sweep.json``, and ``weights.safetensors`` of a linear probe, into *folder*, made if need be.

        Returns the path of the former; no bit is lost.

        Raises
        ------
        OutputError
            The folder cannot be written; the error says where the results are.
        """
        return rescued(self._write, local_path(folder))

    def _write(self, folder: Path) -> Path:
        path = folder / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        save_dataset(self.results, path)
        if self.coef is not None and self.intercept is not None:
            tensors = {"coef": np.ascontiguousarray(self.coef), "intercept": np.ascontiguousarray(self.intercept)}
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
    """Read what `Sweep.save` wrote.

    Raises
    ------
    AnalysisError
        There is no sweep in the folder, or it was written by another version.
    """
    path = local_path(folder) / FILE
    try:
        data = json.loads(path.read_text("utf-8"))
        dims, attrs = data["dims"], data["attrs"]
        if attrs["format"] != FORMAT:
            raise AnalysisError(
                "the sweep was saved in another format",
                where=str(path),
                expected=FORMAT,
                found=str(attrs["format"]),
            )
        variables = {
            kind: {name: (v["dims"], _array(v, dims), v["attrs"]) for name, v in data[kind].items()}
            for kind in ("data_vars", "coords")
        }
    except FileNotFoundError as error:
        raise AnalysisError(
            "there is no saved sweep", where=str(path), remedy="give the folder of Sweep.save"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise AnalysisError("the saved sweep cannot be read", where=str(path), found=str(error)) from error
    found = xr.Dataset(variables["data_vars"], variables["coords"], attrs)
    weights = path.with_name(WEIGHTS)
    if not weights.is_file():
        return Sweep(found)
    try:
        tensors = load_file(weights)
        return Sweep(found, tensors["coef"], tensors["intercept"])
    except (SafetensorError, KeyError, OSError) as error:
        raise AnalysisError("the saved weights cannot be read", where=str(weights), found=str(error)) from error


def save_dataset(found: xr.Dataset, path: str | Path) -> None:
    """Write a dataset as JSON; no bit is lost."""
    data = found.to_dict()
    for name, variable in (data["coords"] | data["data_vars"]).items():
        variable["dtype"] = found[name].dtype.str
    local_path(path).write_text(json.dumps(_plain(data), indent=1, allow_nan=False) + "\n", "utf-8")


def _array(variable: dict[str, Any], dims: dict[str, int]) -> np.ndarray:
    return np.array(variable["data"], variable["dtype"]).reshape([dims[dim] for dim in variable["dims"]])


def _plain(value: Any) -> Any:
    """Return *value* in JSON's own types; NaN is null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
