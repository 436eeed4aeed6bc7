"""Read the coordinates of rows lazily: token id, position and document; and select rows by them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xarray as xr
import zarr
from xarray.backends import BackendArray
from xarray.core import indexing

from flexcache.errors import DamagedError, StoreError, UnreachableError
from flexcache.store.format.reference import StoreReference
from flexcache.store.storage.backend import storage_of
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.path_safety import check_tree_inside

DENSE = 4
"""If at least one of so many rows of a span is requested, the whole span is read."""


class CoordinateArray(BackendArray):
    """Lazy array of one coordinate of the rows; kept in memory once all of it has been read.

    It is pickled as its location, without values.
    """

    def __init__(self, reference: StoreReference, name: str, dtype: np.dtype) -> None:
        self.reference, self.name, self.dtype = reference, name, dtype
        self.path, self.shape = reference.path / name, (reference.n_rows,)
        self._values: np.ndarray | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return shared_coordinate, (self.reference, self.name, self.dtype)

    @cached_property
    def zarr(self) -> zarr.Array:
        """The array, opened by zarr-python.

        Raises
        ------
        DamagedError
            The array has another type, is shorter than the rows, or cannot be read.
        """
        check_tree_inside(self.path.parent, self.path)
        try:
            found = zarr.open_array(storage_of(self.path).zarr_store(), mode="r")
            whole = found.ndim == 1 and found.shape[0] >= self.shape[0]  # longer if the store was extended meanwhile
            if not whole or np.dtype(found.dtype) != self.dtype:
                raise ValueError(f"it is {found.dtype} of shape {found.shape}")
        except Exception as error:  # zarr and its codecs raise many kinds
            raise unreadable("coordinate", self.path, error) from error
        return found

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        count = self.shape[0]
        if self._values is not None:
            return self._values[key[0]]
        if isinstance(key[0], slice):
            span = range(count)[key[0]]
            ends = (min(span[0], span[-1]), max(span[0], span[-1]) + 1) if span else (0, 0)
            found = self._load(slice(*ends))[:: span.step]
            if len(found) == count and key[0].step in (None, 1):
                self._values = found
            return found
        rows = np.asarray(key[0]) % max(1, count)
        if not rows.size:
            return np.zeros(rows.shape, self.dtype)
        low, high = int(rows.min()), int(rows.max()) + 1
        if high - low <= DENSE * rows.size:
            return self._load(slice(low, high))[rows - low]
        return self._load(np.atleast_1d(rows)).reshape(rows.shape)

    def _load(self, rows: slice | np.ndarray) -> np.ndarray:
        try:
            return np.asarray(self.zarr[rows] if isinstance(rows, slice) else self.zarr.oindex[(rows,)])
        except Exception as error:  # zarr and its codecs raise many kinds
            raise unreadable("coordinate", self.path, error) from error


@lru_cache(maxsize=16)
def shared_coordinate(reference: StoreReference, name: str, dtype: np.dtype) -> CoordinateArray:
    """Return a coordinate of an unpickled store, one object for all tasks of a process. Nothing is read yet."""
    return CoordinateArray(reference, name, dtype)


def coordinate_variable(reference: StoreReference, name: str, dtype: np.dtype) -> xr.Variable:
    """Return a coordinate of the rows, which is opened now and read when used, in part if only a part is used.

    DamagedError if the array has another type, is shorter than the rows, or cannot be read.
    """
    array = CoordinateArray(reference, name, dtype)
    _ = array.zarr
    return xr.Variable(("token",), indexing.LazilyIndexedArray(array))


def unreadable(kind: str, path: StoreLocation, error: Exception) -> StoreError:
    """Return the error for a table or coordinate that its library cannot read."""
    if isinstance(error, UnreachableError):
        return error
    return DamagedError(
        f"a {kind} of the store cannot be read",
        where=str(path),
        found=f"{type(error).__name__}: {error}",
        remedy="run flexcache verify to see what else is damaged",
    )


def document_numbers(document: Any, documents: pa.Table, where: StoreLocation) -> np.ndarray:
    """Return documents, given by id or number, as indices into the table of documents; None selects all.

    Raises
    ------
    StoreError
        There is no such document.
    """
    count = len(documents)
    if document is None:
        return np.arange(count)
    asked = [document] if isinstance(document, str) or not isinstance(document, Iterable) else list(document)
    if asked and all(isinstance(item, str) for item in asked):
        found = pc.index_in(pa.array(asked), value_set=documents.column("id").combine_chunks())
        if found.null_count:
            missing = asked[found.to_pylist().index(None)]
            raise StoreError(f"the store has no document {missing!r}", where=str(where))
        return found.to_numpy(zero_copy_only=False).astype(np.int64)
    numbers = np.array([int(item) for item in asked], dtype=np.int64)
    if len(numbers) and not (-count <= numbers.min() and numbers.max() < count):
        raise StoreError(f"documents are numbered 0 to {count - 1}", found=str(document))
    return numbers % max(1, count)


def select_positions(found: np.ndarray, position: int | slice, lengths: np.ndarray) -> np.ndarray:
    """Return a mask of the rows at a position, or in a slice of positions.

    Parameters
    ----------
    found, lengths : ndarray of shape (rows,)
        Position of each row in its document, and number of tokens of that document.
    """
    if not isinstance(position, slice):
        return found == (position + lengths if position < 0 else position)
    if position.step not in (None, 1):
        raise ValueError("a slice of positions has no step")
    low, high = (np.where(e < 0, e + lengths, e) if e is not None else None for e in (position.start, position.stop))
    return (found >= (0 if low is None else low)) & (found < (lengths if high is None else high))
