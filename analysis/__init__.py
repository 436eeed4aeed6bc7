"""Analyse stores offline, on Dask, without the model: statistics, readouts, probes, replay and reports.

    from analysis import moments, probes
    moments.compute(store, "resid_post")        # xarray.Dataset
    probes.sweep(store, target="label", site="resid_post").table()

The package belongs to FlexCache (``flexcache-activations``).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "codecs": "statistics",
    "erasure": "statistics",
    "examples": "readout",
    "geometry": "statistics",
    "lens": "readout",
    "logit_attribution": "readout",
    "moments": "statistics",
    "onepass": "statistics",
    "outliers": "statistics",
    "probe_dataset": "dataset",
    "quantiles": "statistics",
    "similarity": "statistics",
    "targets": "dataset",
    "tokens": "dataset",
}
_PACKAGES = ("comparison", "dataset", "probes", "readout", "replay", "report", "statistics", "survey")
__all__ = sorted([*_MODULES, *_PACKAGES])


def __getattr__(name: str) -> Any:
    """Import public modules when they are first used; `analysis.moments` is `analysis.statistics.moments`."""
    if name in _MODULES:
        return import_module(f"analysis.{_MODULES[name]}.{name}")
    if name in _PACKAGES:
        return import_module(f"analysis.{name}")
    raise AttributeError(f"module 'analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
