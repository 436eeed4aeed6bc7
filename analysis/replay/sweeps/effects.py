"""Means of a sweep's values over documents, with intervals and tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from analysis.replay.sweeps.inference import sign_flip
from analysis.statistics.bootstrap import mean_interval
from analysis.sweep_results import names_along


def estimate_effects(
    results: xr.Dataset, group: NDArray[np.int64] | None = None, resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """Return means over documents with intervals, and tests against each baseline; see `Sweep.effect`.

    Parameters
    ----------
    results
        `Sweep.results`.
    group
        Number of each document's group, from 0 without gaps, shape (documents,). By default each document is its own
        group.
    """
    values = results["value"].transpose("document", ...)
    numbers = values.values.astype(np.float64)
    if group is None:
        group = np.arange(len(numbers))
    count = np.isfinite(numbers).sum(0)
    mean = np.where(np.isfinite(numbers), numbers, 0).sum(0) / np.where(count, count, np.nan)
    low, high = mean_interval(numbers, group, resamples, seed)
    dims = values.dims[1:]
    found: dict[str, Any] = {
        "mean": (dims, mean),
        "ci_low": (dims, low),
        "ci_high": (dims, high),
        "documents": (dims, count),
    }
    axis = values.get_axis_num("arm")
    edit: NDArray[np.float64] = numbers.take([0], axis=axis).squeeze(axis)
    for number, name in enumerate(names_along(results, "arm")[1:], start=1):
        baseline = numbers.take([number], axis=axis).squeeze(axis)
        p = sign_flip(np.subtract(edit, baseline), group, seed=seed)
        found[f"p_{name}"] = (tuple(dim for dim in dims if dim != "arm"), p)
    coords = {name: results[name] for name in dims}
    return xr.Dataset(found, coords, {"groups": "document", "resamples": resamples, **results.attrs})
