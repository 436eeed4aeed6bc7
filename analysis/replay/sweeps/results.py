"""Results of a sweep of edits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from analysis.dataset.document_columns import joined_labels
from analysis.replay.edits.held_out import document_groups
from analysis.replay.sweeps.effects import estimate_effects
from analysis.sweep_results import SweepResults, check_format, no_saved_sweep
from flexcache.errors import AnalysisError
from flexcache.paths import local_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from rich.table import Table

    from flexcache.store.read.store import Store

FORMAT = "flexcache replay sweep 2"
FILE = "results.zarr"


@dataclass(frozen=True)
class Sweep(SweepResults):
    """Effects of edits and their controls by document; made by `sweep`, read again by `load`.

    ::

        found = replay.sweep(store, model, edit=replay.Zero())
        found.effect().sel(arm="edit", metric="kl_sum")

    ``results`` is an `xarray.Dataset`:

    ===========================  =======================================================  ==============================
    variable                     dims                                                     meaning
    ===========================  =======================================================  ==============================
    ``value``                    arm, layer, position, edit, alpha, document, metric      NaN if the edit was not made
    ``identity_error``           layer                                                    largest logit difference
    ``identity_error_relative``  layer                                                    of root mean squares
    ``skipped``                  layer                                                    blocks that did not run
    ``unedited``                 edit, document, metric                                   of the forward without an edit
    ``noise_floor``              layer, metric                                            see `effect`
    ===========================  =======================================================  ==============================

    *arm* is ``edit`` and the baselines; *alpha* is the strength, 1 for an edit that has none; *layer* is −1 for a
    module path. ``results.attrs`` holds the plan of the sweep, and notes on values that are not exact.
    """

    def effect(
        self, store: Store | None = None, groups: str = "document", resamples: int = 1000, seed: int = 0
    ) -> xr.Dataset:
        """Return means over documents with intervals, and tests against each baseline.

        Parameters
        ----------
        groups
            ``"document"``, or a column of *store*'s documents: documents of equal value are resampled and flipped
            together. A document without a value is its own group.

        Returns
        -------
        Dataset with dims (arm, layer, position, edit, alpha, metric):

        - ``mean``; ``ci_low, ci_high``, the 95 % interval over groups: the studentized bootstrap, or Student's t if
          it is wider; ``documents``, the number of values;
        - ``change``: the mean less that of the same documents without an edit;
        - ``noise_floor``, for layer and metric: the largest distance over documents between the values of a replay that
          changes nothing and of the forward. A change up to it is rounding;
        - without arm, ``p_<baseline>``: the two-sided p-value of a sign-flip test of the edit against the baseline, one
          cell by itself; ``p_adjusted_<baseline>``: corrected for all cells of the map (layer × position × edit ×
          strength), for each metric and baseline by itself, by the step-down max-T procedure (Westfall & Young 1993).
          ``p_identity`` is NaN for a metric that is `Metric.one_sided`, such as ``kl``: compare such a metric with the
          noise floor, and with baselines that edit. ``attrs["tests"]`` says all this in words

        Raises
        ------
        AnalysisError
            There is no such column, no store was given, or the store lacks a document of the sweep.
        """
        group = _groups(self.results["document"].values, store, groups)
        found = estimate_effects(self.results, group, resamples, seed, groups)
        return found.assign_attrs(joined_labels(store, (groups,)))

    def to_dataframe(self) -> DataFrame:
        """Return a row for each arm, layer, position, edit, alpha and document, with a column for each metric."""
        frame = self.results["value"].to_dataset("metric").to_dataframe()
        return frame.dropna(how="all").reset_index()

    def plot(self, path: str | Path | None = None, metric: str | None = None) -> Figure:
        """Draw a metric: heat maps of layer × position, or curves over strengths or layers; see `make_charts`."""
        from analysis.replay.sweeps.charts import plot

        return plot(self.results, path, metric=metric)

    def table(self, rows: int = 20) -> Table:
        """Return a `rich.table.Table` of the largest effects by the first metric."""
        from analysis.replay.sweeps.table import table

        return table(self.results, rows)

    def _write(self, folder: Path) -> Path:
        path = folder / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        self.results.to_zarr(path, mode="w", zarr_format=3, consolidated=False)
        return path

    def __repr__(self) -> str:
        sizes = ", ".join(f"{size} {name}" for name, size in self.results["value"].sizes.items())
        error = float(self.results["identity_error"].max())
        name = f"<Sweep of {self.results.attrs['question']['site']}: {sizes}; identity error {error:.3g}>"
        return "\n".join([name, *self.results.attrs["notes"]])


def load(folder: str | Path) -> Sweep:
    """Return the sweep that `Sweep.save` wrote.

    ::

        replay.load("replayed")

    Raises
    ------
    AnalysisError
        There is no sweep in the folder, or another version wrote it.
    """
    path = local_path(folder) / FILE
    if not (path / "zarr.json").is_file():
        raise no_saved_sweep(path)
    data = xr.open_zarr(path, consolidated=False, chunks=None).load()
    check_format(path, str(data.attrs.get("format")), FORMAT)
    text = {name: data[name].astype(object) for name in ("arm", "position", "edit", "document", "metric")}
    return Sweep(data.assign_coords(text))


def _groups(documents: np.ndarray, store: Store | None, groups: str) -> np.ndarray:
    if groups == "document":
        return np.arange(len(documents))
    if store is None:
        raise AnalysisError(
            f"documents cannot be grouped by {groups!r}",
            expected="a column of the store's documents, and the store",
            remedy="give store= as well",
        )
    of = dict(zip(store.documents["id"].to_pylist(), document_groups(store, groups).tolist()))
    missing = [name for name in documents if name not in of]
    if missing:
        raise AnalysisError(
            "the store does not have the documents of the sweep",
            where=str(store.path),
            found=f"{len(missing)} of {len(documents)} missing, such as {missing[0]!r}",
            remedy="give the store that was replayed",
        )
    return np.unique([of[name] for name in documents], return_inverse=True)[1]
