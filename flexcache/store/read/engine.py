"""Register stores as an xarray engine."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import xarray as xr
from xarray.backends import BackendEntrypoint

from flexcache.store.read.store import Store


class FlexCacheEngine(BackendEntrypoint):
    """Engine for ``xarray.open_dataset("run.zarr", engine="flexcache")``, with the result of `Store.dataset`."""

    description = "Activation stores written by FlexCache"
    open_dataset_parameters = ("filename_or_obj", "drop_variables")

    def open_dataset(self, filename_or_obj: Any, *, drop_variables: str | Iterable[str] | None = None) -> xr.Dataset:
        """Open a store as one dataset."""
        dataset = Store(os.fspath(filename_or_obj)).dataset()
        dropped = [drop_variables] if isinstance(drop_variables, str) else list(drop_variables or ())
        return dataset.drop_vars(dropped, errors="ignore")

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Return False: a store is opened by this engine only on request, since plain Zarr readers open stores too."""
        return False
