"""Read rows of one array: gather them through mmap, or scan them with large reads."""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import zarr

from flexcache.errors import DamagedError
from flexcache.spec import DTYPES, ArraySpec
from flexcache.store.format.committed_units import CommittedUnits, shared_units
from flexcache.store.format.int8 import dequantize
from flexcache.store.format.reference import StoreReference
from flexcache.store.format.shard import ShardLayout, shard_name
from flexcache.store.read.virtual_layers import virtual_error
from flexcache.store.storage.backend import storage_of
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.path_safety import MOST_JSON, check_inside

OPEN_SHARDS = 256
SCAN_BYTES = 4 << 20
GATHER_BYTES = 256 << 10


class RowReader:
    """Reader of rows of one array of a store. Any number of threads may use one reader.

    It is pickled as the location of its store and the spec of its array. In each process, the unpickled readers of an
    array are one object, which opens files when it first reads.

    Gathers go through memory maps of the shard files, at most 256 of them open. Contiguous scans read the files
    in large pieces instead, since a Dask worker counts mapped pages as its own memory. Compressed arrays are
    read through zarr-python. Rows of int8 are multiplied by *scales*, the reader of another array.
    """

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
        self._maps: OrderedDict[StoreLocation, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._local = threading.local()

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
        out = np.empty((len(rows), self.array.features), self._bits if raw else np.float32)
        if len(rows):
            shards = rows // self.layout.shard_rows
            order = None
            if (np.diff(shards) < 0).any():
                order = np.argsort(shards, kind="stable")
                shards = shards[order]
            cuts = np.flatnonzero(np.diff(shards)) + 1
            self._units.require(np.unique(shards))
            for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)], strict=True):
                places: slice | np.ndarray = slice(start, stop) if order is None else order[start:stop]
                self._gather_shard(layer, int(shards[start]), rows[places], out, places)
        return out.view(self.dtype) if raw else out

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
        """Unmap the files. Arrays that were read remain valid, since they are copies."""
        with self._lock:
            self._maps.clear()

    def _gather_shard(
        self, layer: int | None, shard: int, rows: np.ndarray, out: np.ndarray, places: slice | np.ndarray
    ) -> None:
        local = rows - shard * self.layout.shard_rows
        if self.foreign is not None:
            check_inside(self.root, self.path(layer, shard))
            selection = (rows,) if layer is None else (layer, rows)
            values = np.asarray(self.foreign.oindex[(*selection, slice(None))]).view(self._bits)
            convert(values, out, places, self.dtype)
            return
        self._take_rows(self._map(layer, shard), local, out, places)

    def _take_rows(self, mapped: np.ndarray, local: np.ndarray, out: np.ndarray, places: slice | np.ndarray) -> None:
        """Copy rows of a mapped shard into some places of *out*."""
        if isinstance(places, slice):
            out, places = out[places], np.arange(len(local))
            if out.dtype == self._bits:
                np.take(mapped, local, axis=0, out=out, mode="clip")
                return
        step = max(1, GATHER_BYTES // self.layout.row_bytes)
        for start in range(0, len(local), step):  # through a buffer that stays in the CPU cache
            chosen = local[start : start + step]
            piece = self._buffer(len(chosen))
            np.take(mapped, chosen, axis=0, out=piece, mode="clip")
            convert(piece, out, places[start : start + step], self.dtype)

    def _scan_shard(self, layer: int | None, shard: int, first: int, out: np.ndarray) -> None:
        if self.foreign is not None:
            check_inside(self.root, self.path(layer, shard))
            start = shard * self.layout.shard_rows + first
            selection = slice(start, start + len(out))
            values = self.foreign[selection] if layer is None else self.foreign[layer, selection]
            convert(np.asarray(values).view(self._bits), out, slice(None), self.dtype)
            return
        path = self.path(layer, shard)
        self._check_size(path, shard)
        step = max(1, SCAN_BYTES // self.layout.row_bytes)
        raw = out.dtype == self._bits
        with open(str(path), "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            for begin in range(0, len(out), step):
                part = out[begin : begin + step]
                piece = part if raw else self._buffer(len(part))
                _read_into(file.fileno(), piece, (first + begin) * self.layout.row_bytes, path)
                if not raw:
                    convert(piece, part, slice(None), self.dtype)

    def _buffer(self, rows: int) -> np.ndarray:
        held: np.ndarray | None = getattr(self._local, "buffer", None)
        if held is None or len(held) < rows:
            held = self._local.buffer = np.empty((rows, self.array.features), self._bits)
        return held[:rows]

    def _map(self, layer: int | None, shard: int) -> np.ndarray:
        path = self.path(layer, shard)
        with self._lock:
            if path in self._maps:
                self._maps.move_to_end(path)
                return self._maps[path]
        self._check_size(path, shard)
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_RANDOM)
        rows = np.frombuffer(mapped, self._bits, len(self.layout.rows(shard)) * self.array.features)
        rows = rows.reshape(-1, self.array.features)
        with self._lock:
            self._maps[path] = rows
            while len(self._maps) > OPEN_SHARDS:
                self._maps.popitem(last=False)
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


def convert(bits: np.ndarray, out: np.ndarray, places: slice | np.ndarray, dtype: np.dtype) -> None:
    """Copy stored values, given as unsigned integers, into *out*, unchanged or converted exactly to float32."""
    if out.dtype == bits.dtype:
        out[places] = bits
    elif isinstance(places, slice):
        out[places] = bits.view(dtype)
    else:
        out[places] = bits.view(dtype).astype(np.float32)
