"""The coordinates of a store's rows: token id, position and document, read where they are used."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
import zarr
from xarray.backends import BackendArray
from xarray.core import indexing

from flexcache.errors import DamagedError, StoreError, UnreachableError
from flexcache.store.inside import check_tree_inside
from flexcache.store.place import Place, zarr_source

DENSE = 4
"""Where at least every fourth row of a span is asked for, all of the span is read."""


class CoordinateArray(BackendArray):
    """One coordinate of the rows of a store, as xarray indexes it.

    Raises
    ------
    DamagedError
        It is not of its type, shorter than the rows, or cannot be read.
    """

    def __init__(self, path: Place, dtype: np.dtype, n_rows: int) -> None:
        self.path, self.dtype, self.shape = path, dtype, (n_rows,)
        check_tree_inside(path.parent, path)
        try:
            self._zarr = zarr.open_array(zarr_source(path), mode="r")
            whole = self._zarr.ndim == 1 and self._zarr.shape[0] >= n_rows  # longer where the store has grown meanwhile
            if not whole or np.dtype(self._zarr.dtype) != dtype:
                raise ValueError(f"it is {self._zarr.dtype} of shape {self._zarr.shape}")
        except Exception as error:  # zarr and its codecs raise many kinds
            raise unreadable("coordinate", path, error) from error

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        count = self.shape[0]
        if isinstance(key[0], slice):
            return self._span(range(count)[key[0]])
        rows = np.asarray(key[0]) % max(1, count)
        if not rows.size:
            return np.zeros(rows.shape, self.dtype)
        low, high = int(rows.min()), int(rows.max()) + 1
        try:
            if high - low <= DENSE * rows.size:
                return np.asarray(self._zarr[low:high])[rows - low]
            return np.asarray(self._zarr.oindex[(np.atleast_1d(rows),)]).reshape(rows.shape)
        except Exception as error:  # zarr and its codecs raise many kinds
            raise unreadable("coordinate", self.path, error) from error

    def _span(self, rows: range) -> np.ndarray:
        if not len(rows):
            return np.zeros(0, self.dtype)
        low, high = min(rows[0], rows[-1]), max(rows[0], rows[-1]) + 1
        try:
            return np.asarray(self._zarr[low:high])[:: rows.step]
        except Exception as error:  # zarr and its codecs raise many kinds
            raise unreadable("coordinate", self.path, error) from error


def coordinate_variable(path: Place, dtype: np.dtype, n_rows: int) -> xr.Variable:
    """Return a coordinate of *n_rows* rows, kept in memory once all of it was read; a part of it is read by itself."""
    lazy = indexing.LazilyIndexedArray(CoordinateArray(path, dtype, n_rows))
    return xr.Variable(("token",), indexing.MemoryCachedArray(lazy))


def unreadable(kind: str, path: Place, error: Exception) -> StoreError:
    """Return the error for a table or coordinate of a store that its reader refused."""
    if isinstance(error, UnreachableError):
        return error
    return DamagedError(
        f"a {kind} of the store cannot be read",
        where=str(path),
        found=f"{type(error).__name__}: {error}",
        remedy="run flexcache verify to see what else is damaged",
    )
