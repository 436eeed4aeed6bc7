"""Sites of a store as lazy xarray objects with one Dask chunk per shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

import flexcache.store.format.bfloat16  # noqa: F401 - xarray imports every engine, and so knows the data type
from flexcache.store.read.shard_reader import RowReader


class SiteArray(BackendArray):
    """Lazy array of one site, of shape ([layers,] rows, features); the layer dim holds the captured layers only."""

    def __init__(self, reader: RowReader, raw: bool) -> None:
        self.reader = reader
        self.raw = raw
        array = reader.array
        self.stacked = array.layers is not None
        self.shape = (*((len(array.slices),) if self.stacked else ()), reader.layout.n_rows, array.features)
        self.dtype = reader.dtype if raw else np.dtype(np.float32)

    def __reduce__(self) -> tuple[Any, ...]:
        return SiteArray, (self.reader, self.raw)

    def __dask_tokenize__(self) -> Any:
        return SiteArray.__name__, self.reader.reference, self.reader.array, self.raw

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        layers_key, rows_key, features_key = key if self.stacked else (0, *key)
        slices = np.array(self.reader.array.slices, dtype=object)[layers_key]
        one_layer = not isinstance(slices, np.ndarray)
        parts = [self._rows(layer, rows_key) for layer in ([slices] if one_layer else slices)]
        values = parts[0] if one_layer or not self.stacked else np.stack(parts) if parts else self._empty(rows_key)
        return values[..., features_key]

    def _rows(self, layer: int | None, key: Any) -> np.ndarray:
        if isinstance(key, slice):
            return self.reader.read_slice(layer, key, self.raw)
        rows = np.asarray(key)
        found = self.reader.gather(layer, np.atleast_1d(rows) % max(1, self.reader.layout.n_rows), self.raw)
        return found[0] if rows.ndim == 0 else found

    def _empty(self, key: Any) -> np.ndarray:
        count = len(np.arange(self.reader.layout.n_rows)[key])
        return np.empty((0, count, self.reader.array.features), self.dtype)


def lazy_variable(reader: RowReader, raw: bool) -> xr.Variable:
    """Return a site as a Dask-backed variable with one chunk per shard."""
    array = SiteArray(reader, raw)
    variable = xr.Variable(reader.array.dims, indexing.LazilyIndexedArray(array), {"site": reader.array.site})
    rows = (reader.layout.shard_rows, -1)
    return variable.chunk(dict(zip(variable.dims, (1, *rows) if array.stacked else rows, strict=True)))


def data_array(
    reader: RowReader, coordinates: Mapping[str, xr.Variable], *, raw: bool = False, rows: np.ndarray | None = None
) -> xr.DataArray:
    """Return a site with its token coordinates, or only some of its *rows*."""
    result = xr.DataArray(lazy_variable(reader, raw), name=reader.array.name, coords=coordinates)
    if reader.array.layers is not None:
        result = result.assign_coords(layer=np.array(reader.array.layers, dtype=np.int64))
    return result if rows is None else result.isel(token=rows)
