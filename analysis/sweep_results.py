"""The part that probe sweeps and replay sweeps share: scores by arm and metric, saved in a folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import xarray as xr

from analysis.rescue import write_or_rescue
from flexcache.errors import AnalysisError, nearest
from flexcache.paths import local_path


@dataclass(frozen=True)
class SweepResults(ABC):
    """Results of a sweep as an `xarray.Dataset` with the dims ``arm`` and ``metric``."""

    results: xr.Dataset

    @property
    def arms(self) -> tuple[str, ...]:
        """The arm of interest, then its baselines."""
        return names_along(self.results, "arm")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics; the first one decides."""
        return names_along(self.results, "metric")

    def metric(self, name: str | None) -> str:
        """Return *name* if it was measured, or the first metric for None.

        Raises
        ------
        AnalysisError
            The metric was not measured.
        """
        return check_metric(self.results, name)

    def save(self, folder: str | Path) -> Path:
        """Write the results into *folder*, which is made if needed, and return the path of their file.

        No bit is lost.

        Raises
        ------
        OutputError
            The folder cannot be written; the error names the temporary folder that holds the results.
        """
        return write_or_rescue(self._write, local_path(folder))

    @abstractmethod
    def _write(self, folder: Path) -> Path:
        """Write the results into *folder* and return the path of their file."""


def names_along(results: xr.Dataset, dim: str) -> tuple[str, ...]:
    """Return the coordinates of a dim as text, such as the names of the metrics."""
    return tuple(map(str, results[dim].values))


def check_metric(results: xr.Dataset, name: str | None) -> str:
    """Return *name* if it was measured, or the first metric for None; raise AnalysisError otherwise."""
    names = names_along(results, "metric")
    if name is not None and name not in names:
        raise AnalysisError(f"the sweep did not measure {name!r}", remedy=nearest(name, names))
    return name or names[0]


def check_format(path: Path, found: str, expected: str) -> None:
    """Raise AnalysisError if the sweep saved at *path* has another format than *expected*."""
    if found != expected:
        raise AnalysisError("the sweep was saved in another format", where=str(path), expected=expected, found=found)


def no_saved_sweep(path: Path) -> AnalysisError:
    """Return the error for a folder without a saved sweep."""
    return AnalysisError("there is no saved sweep", where=str(path), remedy="give the folder of Sweep.save")
