"""Means of a sweep's values over documents, with intervals and tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from analysis.replay.sweeps.inference import sign_flip
from analysis.statistics.bootstrap import mean_interval
from analysis.sweep_results import names_along

CELL = ("layer", "position", "edit", "alpha")
"""The dims of a map: one cell is one edit at one place and strength."""


def estimate_effects(
    results: xr.Dataset,
    group: NDArray[np.int64] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    groups: str = "document",
) -> xr.Dataset:
    """Return means over documents with intervals, and tests against each baseline; see `Sweep.effect`.

    Parameters
    ----------
    results
        `Sweep.results`.
    group
        Number of each document's group, from 0 without gaps, shape (documents,). By default each document is its own
        group.
    groups
        Name of the groups.
    """
    values = results["value"].transpose("document", "metric", ...)
    numbers = values.values.astype(np.float64)
    if group is None:
        group = np.arange(len(numbers))
    dims = values.dims[1:]
    low, high = mean_interval(numbers, group, resamples, seed)
    found: dict[str, Any] = {
        "mean": values.mean("document"),
        "change": (values - results["unedited"]).mean("document"),
        "ci_low": (dims, low),
        "ci_high": (dims, high),
        "documents": values.notnull().sum("document"),
        "noise_floor": results["noise_floor"],
    }
    one_sided = np.isin(results["metric"].values, results.attrs["one_sided"])
    edit = values.sel(arm="edit")
    for name in names_along(results, "arm")[1:]:
        difference = edit - values.sel(arm=name)
        tests = [sign_flip(difference.sel(metric=metric).values, group, seed=seed) for metric in values["metric"]]
        for what in ("p", "p_adjusted"):
            p = np.stack([test.p if what == "p" else test.adjusted for test in tests])
            if name == "identity":
                p[one_sided] = np.nan
            found[f"{what}_{name}"] = (difference.dims[1:], p)
    coords = {name: results[name] for name in dims}
    attrs = {"groups": groups, "resamples": resamples, "tests": describe_tests(results, group), **results.attrs}
    return xr.Dataset(found, coords, attrs).transpose("arm", *CELL, "metric")


def describe_tests(results: xr.Dataset, group: NDArray[np.int64]) -> str:
    """Return sentences about the tests: the hypothesis, the correction, and the metrics that are not tested."""
    groups = int(group.max(initial=-1)) + 1
    cells = int(results["value"].sel(arm="edit").notnull().any(["document", "metric"]).sum())
    text = (
        f"p is of a sign-flip test over {groups} groups of the difference between the edit and the baseline; "
        f"p adjusted is corrected for all {cells} cells of the map by the step-down max-T procedure of Westfall and "
        "Young, for each metric and baseline by itself."
    )
    one_sided = [str(name) for name in results.attrs["one_sided"]]
    if one_sided and "identity" in names_along(results, "arm"):
        text += (
            f" {', '.join(one_sided)}: not tested against no edit, whose value is an end of the range, so that any "
            "edit differs in one direction; compare with the noise floor, and with baselines that edit."
        )
    return text


def largest_cells(effect: xr.Dataset, metric: str, count: int) -> Iterator[xr.Dataset]:
    """Yield the cells whose mean differs most from that without an edit, by one metric, largest first.

    Cells are left out if they have no value, or if their change is within the noise floor, as at strength 0.
    """
    change = abs(effect["change"].sel(arm="edit", metric=metric)).transpose(*CELL)
    above = (change > effect["noise_floor"].sel(metric=metric)).values
    order = np.argsort(np.where(above, -change.values, np.inf), axis=None, kind="stable")
    for place in order[: min(count, int(above.sum()))]:
        yield effect.isel(dict(zip(CELL, map(int, np.unravel_index(place, change.shape)))))
