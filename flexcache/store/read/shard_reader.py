"""Read rows of one array: gather them through mmap, or scan them with large reads."""

from __future__ import annotations

import math
import mmap
import os
import threading
import weakref
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
import zarr
from numpy.lib.stride_tricks import as_strided

from flexcache.array_spec import DTYPES, ArraySpec
from flexcache.errors import DamagedError
from flexcache.store.format.committed_units import CommittedUnits, shared_units
from flexcache.store.format.int8 import dequantize
from flexcache.store.format.reference import StoreReference
from flexcache.store.format.shard import ShardLayout, shard_name
from flexcache.store.read.selection import virtual_error
from flexcache.store.storage.backend import storage_of
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.open_files import MOST_OPEN, OpenFile, numbers, open_files
from flexcache.store.storage.path_safety import MOST_JSON, check_inside

TOGETHER = MOST_OPEN // 2
"""Shards whose rows are gathered together."""
SCAN_BYTES = 4 << 20
GATHER_BYTES = 256 << 10


class RowReader:
    """Reader of rows of one array of a store. Any number of threads may use one reader.

    It is pickled as the location of its store and the spec of its array. In each process, the unpickled readers of an
    array are one object, which opens files when it first reads.

    Gathers go through memory maps of the shard files. Contiguous scans read the files in large pieces instead, since a
    Dask worker counts mapped pages as its own memory. All readers of a process together keep at most 256 files open.
    Compressed arrays are read through zarr-python. Rows of int8 are multiplied by *scales*, the reader of another
    array.
    """

    mapped: ClassVar[bool] = True
    """True if the shards of an array that is not compressed are files that can be mapped."""

    def __init__(
        self,
        reference: StoreReference,
        array: ArraySpec,
        compressed: bool,
        units: CommittedUnits,
        scales: RowReader | None = None,
    ) -> None:
        self.reference, self.root, self.array = reference, reference.path, array
        self.layout = ShardLayout(reference.n_rows, reference.shard_rows, array.row_bytes)
        self.compressed = compressed
        self.dtype = DTYPES[array.dtype]
        self._bits = np.dtype(f"<u{self.dtype.itemsize}")
        self._units = units
        self._scales = scales
        self._local = threading.local()
        self._number = next(numbers)
        weakref.finalize(self, open_files.forget, self._number).atexit = False

    def __reduce__(self) -> tuple[Any, ...]:
        scales = None if self._scales is None else self._scales.array
        return shared_reader, (type(self), self.reference, self.array, self.compressed, scales)

    @cached_property
    def foreign(self) -> zarr.Array | None:
        """The array opened by zarr-python if it is compressed, otherwise None.

        Raises
        ------
        DamagedError
            The array cannot be read, or its shape differs from that in the metadata.
        """
        if not self.compressed:
            return None
        where = self.root / self.array.name
        check_inside(self.root, where / "zarr.json", MOST_JSON)
        try:
            found = zarr.open_array(storage_of(where).zarr_store(), mode="r")
        except Exception as error:  # zarr and its codecs raise many kinds
            raise DamagedError(
                "an array of the store cannot be read",
                where=str(where),
                found=f"{type(error).__name__}: {error}",
                remedy="run flexcache verify to see what else is damaged",
            ) from error
        shape = (self.layout.n_rows, self.array.features)
        expected = shape if self.array.depth is None else (self.array.depth, *shape)
        longer = (
            found.ndim == len(expected) and found.shape[-2] >= self.layout.n_rows
        )  # the store was extended meanwhile
        if not longer or (*found.shape[:-2], found.shape[-1]) != (*expected[:-2], expected[-1]):
            raise DamagedError(
                "an array of the store has another shape than in the metadata",
                where=str(where),
                expected=str(expected),
                found=str(found.shape),
            )
        return found

    def path(self, layer: int | None, shard: int) -> StoreLocation:
        """Return the path of a shard; raise SiteError if the layer is virtual."""
        if layer in self.array.virtual:
            raise virtual_error(self.array, [layer], self.root)
        return self.root / shard_name(self.array.name, layer, shard)

    def is_stored(self, layer: int | None) -> bool:
        """Return True if a layer is on disk; False if it is recomputed when it is read."""
        return True

    def gather(self, layer: int | None, rows: np.ndarray, raw: bool) -> np.ndarray:
        """Return rows in the requested order, shape (rows, features), as stored or as float32."""
        found = self._gather(layer, rows, raw)
        if self._scales is not None and not raw:
            dequantize(found, self._scales.gather(layer, rows, raw=True))
        return found

    def _gather(self, layer: int | None, rows: np.ndarray, raw: bool) -> np.ndarray:
        if not len(rows):
            return np.empty((0, self.array.features), self.dtype if raw else np.float32)
        if rows.min() < 0 or rows.max() >= self.layout.n_rows:  # maps are read without further checks
            raise IndexError(f"row numbers are 0 to {self.layout.n_rows - 1}")
        shards = rows // self.layout.shard_rows
        present = np.zeros(self.layout.n_shards, bool)
        present[shards] = True
        wanted = np.flatnonzero(present)
        self._units.require(wanted)
        mapped = self.mapped and self.foreign is None
        if mapped and len(wanted) <= TOGETHER:
            return self._gather_mapped(layer, wanted, rows, raw)
        out = np.empty((len(rows), self.array.features), self.dtype if raw else np.float32)
        groups = wanted[:: TOGETHER if mapped else 1]
        order = np.argsort(shards, kind="stable")
        for places in np.split(order, np.searchsorted(shards[order], groups[1:])):
            if mapped:
                some = wanted[slice(*np.searchsorted(wanted, shards[places[[0, -1]]] + [0, 1]))]
                out[places] = self._gather_mapped(layer, some, rows[places], raw)
            else:
                self._gather_shard(layer, int(shards[places[0]]), rows[places], out, places)
        return out

    def _gather_mapped(self, layer: int | None, shards: np.ndarray, rows: np.ndarray, raw: bool) -> np.ndarray:
        """Return rows of some shards by one index into all of their maps.

        The maps lie in one address space. Counted from the lowest of them, each row begins at a multiple of the largest
        power of two that divides both a page and a row, so that one strided array has all of them.
        """
        maps = [self._map(layer, shard) for shard in shards.tolist()]  # which stay while their addresses are in use
        addresses = np.array([held.__array_interface__["data"][0] for held in maps])
        lowest, grid = int(addresses.argmin()), math.gcd(mmap.PAGESIZE, self.layout.row_bytes)
        before = np.zeros(int(shards[-1]) + 1, np.int64)  # of the first row of the store, seen from each shard
        before[shards] = (
            addresses - addresses[lowest] - shards * self.layout.shard_rows * self.layout.row_bytes
        ) // grid
        places = before[rows // self.layout.shard_rows] + rows * (self.layout.row_bytes // grid)
        strides = (grid, self.dtype.itemsize)
        all_rows = as_strided(maps[lowest], (int(places.max()) + 1, self.array.features), strides, writeable=False)
        if raw or self.dtype == np.float32:
            return all_rows[places].view(self.dtype)
        out = np.empty((len(rows), self.array.features), np.float32)
        step = max(1, GATHER_BYTES // self.layout.row_bytes)
        for start in range(0, len(rows), step):  # through a copy that stays in the CPU cache
            out[start : start + step] = all_rows[places[start : start + step]].view(self.dtype)
        return out

    def read_slice(self, layer: int | None, rows: slice, raw: bool) -> np.ndarray:
        """Return the rows of a slice, shape (rows, features), as stored or as float32."""
        start, stop, step = rows.indices(self.layout.n_rows)
        if step == 1:
            return self.scan(layer, start, stop, raw)
        return self.gather(layer, np.arange(start, stop, step), raw)

    def scan(self, layer: int | None, start: int, stop: int, raw: bool, out: np.ndarray | None = None) -> np.ndarray:
        """Return rows *start* … *stop*, shape (rows, features), by sequential reads; into *out* if given."""
        dtype = self._bits if raw else np.dtype(np.float32)
        shape = (max(0, stop - start), self.array.features)
        out = np.empty(shape, dtype) if out is None else out[: shape[0]].view(dtype)
        if len(out):
            first, last = start // self.layout.shard_rows, (stop - 1) // self.layout.shard_rows
            self._units.require(np.arange(first, last + 1))
            for shard in range(first, last + 1):
                held = self.layout.rows(shard)
                low, high = max(start, held.start), min(stop, held.stop)
                self._scan_shard(layer, shard, low - held.start, out[low - start : high - start])
        if self._scales is not None and not raw:
            dequantize(out, self._scales.scan(layer, start, stop, raw=True))
        return out.view(self.dtype) if raw else out

    def close(self) -> None:
        """Close the files. Arrays that were read remain valid, since they are copies."""
        open_files.forget(self._number)

    def _gather_shard(
        self, layer: int | None, shard: int, rows: np.ndarray, out: np.ndarray, places: np.ndarray
    ) -> None:
        """Read rows of a shard that is not mapped into *out* at *places*."""
        assert self.foreign is not None
        check_inside(self.root, self.path(layer, shard))
        selection = (rows,) if layer is None else (layer, rows)
        out[places] = np.asarray(self.foreign.oindex[(*selection, slice(None))]).view(self.dtype)

    def _scan_shard(self, layer: int | None, shard: int, first: int, out: np.ndarray) -> None:
        if self.foreign is not None:
            check_inside(self.root, self.path(layer, shard))
            start = shard * self.layout.shard_rows + first
            selection = slice(start, start + len(out))
            values = self.foreign[selection] if layer is None else self.foreign[layer, selection]
            out[:] = np.asarray(values).view(self._bits if out.dtype == self._bits else self.dtype)
            return
        path = self.path(layer, shard)
        file = open_files.get(self._number, threading.get_ident())
        if file is None or not file.is_current(str(path)):
            self._check_size(path, shard)
            file = open_files.put(self._number, threading.get_ident(), OpenFile(str(path)))
        step = max(1, SCAN_BYTES // self.layout.row_bytes)
        raw = out.dtype == self._bits
        for begin in range(0, len(out), step):
            part = out[begin : begin + step]
            piece = part if raw else self._buffer(len(part))
            _read_into(file.handle, piece, (first + begin) * self.layout.row_bytes, path)
            if not raw:
                part[:] = piece.view(self.dtype)

    def _buffer(self, rows: int) -> np.ndarray:
        held: np.ndarray | None = getattr(self._local, "buffer", None)
        if held is None or len(held) < rows:
            held = self._local.buffer = np.empty((rows, self.array.features), self._bits)
        return held[:rows]

    def _map(self, layer: int | None, shard: int) -> np.ndarray:
        rows: np.ndarray | None = open_files.get(self._number, (layer, shard))
        if rows is None:
            path = self.path(layer, shard)
            self._check_size(path, shard)
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped.madvise(mmap.MADV_RANDOM)
            rows = np.frombuffer(mapped, self._bits, len(self.layout.rows(shard)) * self.array.features)
            rows = open_files.put(self._number, (layer, shard), rows.reshape(-1, self.array.features))
        return rows

    def _check_size(self, path: StoreLocation, shard: int) -> None:
        check_inside(self.root, path)
        expected = self.layout.file_bytes(shard)
        try:
            found = path.stat().st_size
        except OSError:
            found = -1
        if found != expected and not self.layout.was_extended(shard, found):
            raise DamagedError(
                "a shard of the store is " + ("missing" if found < 0 else "not as long as it was written"),
                where=str(path),
                expected=f"{expected} bytes",
                found="no file" if found < 0 else f"{found} bytes",
                remedy="run flexcache verify to see what else is damaged; to recompute the unit, delete its record"
                f" ledger/0/{shard}.json and run the same capture again",
            )


@lru_cache(maxsize=64)
def shared_reader(
    kind: Any, reference: StoreReference, array: ArraySpec, compressed: bool, scales: ArraySpec | None
) -> RowReader:
    """Return the reader of an array of an unpickled store, one object for all tasks of a process."""
    of_scales = None if scales is None else shared_reader(kind, reference, scales, compressed, None)
    reader: RowReader = kind(reference, array, compressed, shared_units(reference), of_scales)
    return reader


def _read_into(handle: int, target: np.ndarray, offset: int, path: StoreLocation) -> None:
    view = target.data.cast("B")
    while len(view):
        count = os.preadv(handle, [view], offset)
        if not count:
            raise DamagedError("a shard of the store ended early", where=str(path), remedy="run flexcache verify")
        view = view[count:]
        offset += count
