"""Read pools of rows in runs by several threads, one pool ahead of the consumer."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexcache.errors import DamagedError
from flexcache.store.read.store import Store
from flexcache.store.storage.backend import disk_path
from flexcache.training.order import Ints, Pool

ALIGNED = 4096
"""Reads that bypass the page cache start and end at multiples of this number of bytes."""
TOGETHER = 8
"""Number of runs that a thread reads as one job."""


@dataclass(frozen=True)
class ArraySource:
    """An array and layer from which rows are read.

    Attributes
    ----------
    store : Store
    site : str
    layer : int, or None
    match : ndarray of int64, or None
        Row of this store for each row of the stream, if they differ.
    """

    store: Store
    site: str
    layer: int | None
    match: Ints | None = None

    @property
    def features(self) -> int:
        """Number of features of a row."""
        return self.store.arrays[self.site].features

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row."""
        return self.store.arrays[self.site].row_bytes

    @property
    def bits(self) -> np.dtype:
        """Unsigned integer dtype with the size of a value as it is given: the stored size, or float32 for int8."""
        return np.dtype(f"<u{4 if self.scaled else self.store.reader(self.site).dtype.itemsize}")

    @property
    def scaled(self) -> bool:
        """True if rows are int8 and have to be multiplied by their scale."""
        return self.store.arrays[self.site].dtype == "int8"


class PoolReader:
    """Read the pools of one consumer in an epoch, one pool ahead, into two alternating buffers.

    Parameters
    ----------
    rows
        The rows that runs are indices into.
    sources
        Sources; each gives an array (rows of the pool, features) of stored bits.
    keep_cache
        Keep pages in the page cache. Otherwise reads bypass it (O_DIRECT), so that an epoch larger than memory
        displaces nothing; if the file system refuses that, pages are dropped after they were read.
    threads
        Number of runs that are read at the same time.
    buffers
        Buffers of an earlier epoch, or an empty list: fresh memory costs as much time as reading.
    """

    def __init__(
        self, rows: Ints, sources: Sequence[ArraySource], keep_cache: bool, threads: int, buffers: list[list[NDArray]]
    ) -> None:
        self.rows, self.sources, self.keep_cache, self.buffers = rows, sources, keep_cache, buffers
        self._direct, self._held = not keep_cache and hasattr(os, "O_DIRECT"), threading.local()
        self._paths: dict[tuple[int, int], Any] = {}
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="flexcache-runs")
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="flexcache-pool")
        self._end = weakref.finalize(
            self, _end_threads, self._ahead, self._readers
        )  # at exit, while modules still exist

    def read_pools(self, pools: Iterable[Pool]) -> Iterator[tuple[Pool, Ints, list[NDArray]]]:
        """Yield each pool with its rows and their bits in each source, which are valid until the next pool."""
        pending: Future[tuple[Pool, Ints, list[NDArray]]] | None = None
        for number, pool in enumerate(pools):
            ahead = self._ahead.submit(self._read_pool, pool, number % 2)
            if pending is not None:
                yield pending.result()
            pending = ahead
        if pending is not None:
            yield pending.result()

    def close(self) -> None:
        """Stop the threads; further calls do nothing."""
        self._end()

    def _read_pool(self, pool: Pool, number: int) -> tuple[Pool, Ints, list[NDArray]]:
        sizes = np.diff(pool.runs, axis=1)[:, 0]
        starts = np.cumsum(sizes) - sizes
        rows = np.concatenate([self.rows[:0], *(self.rows[low:high] for low, high in pool.runs)])
        arrays = [buffer[: len(rows)] for buffer in self._buffer(number, len(rows))]
        self._prefetch(rows)
        # in the order of the store, so that the disk finds neighbours near each other in time
        spans = [slice(starts[at], starts[at] + sizes[at]) for at in np.argsort(pool.runs[:, 0])]
        jobs = [
            self._readers.submit(self._runs, source, array, rows, spans[first : first + TOGETHER])
            for source, array in zip(self.sources, arrays, strict=True)
            for first in range(0, len(spans), TOGETHER)
        ]
        for job in jobs:
            job.result()
        return pool, rows, arrays

    def _prefetch(self, rows: Ints) -> None:
        """Recompute virtual layers of the sources in one walk."""
        layers: dict[tuple[int, str], list[int]] = {}
        for source in self.sources:
            if source.store.attached is not None and source.layer is not None:
                layers.setdefault((id(source.store), source.site), []).append(source.layer)
        for source in self.sources:
            found = layers.pop((id(source.store), source.site), None)
            if found:
                source.store.prefetch(source.site, found, rows if source.match is None else source.match[rows])

    def _buffer(self, number: int, size: int) -> list[NDArray]:
        """Return one of the two buffers, with room for *size* rows."""
        while len(self.buffers) <= number:
            self.buffers.append([])
        if not self.buffers[number] or len(self.buffers[number][0]) < size:
            self.buffers[number] = [_aligned((size, source.features), source.bits) for source in self.sources]
        return self.buffers[number]

    def _runs(self, source: ArraySource, out: NDArray, rows: Ints, spans: Sequence[slice]) -> None:
        for span in spans:
            self._run(source, out[span], rows[span])

    def _run(self, source: ArraySource, out: NDArray, rows: Ints) -> None:
        """Read the sorted rows of a run; a few unneeded rows between them are read as well."""
        wanted = rows if source.match is None else source.match[rows]
        reader, first, last = source.store.reader(source.site), int(wanted[0]), int(wanted[-1]) + 1
        near = last - first <= 2 * len(wanted) + 16 and (source.match is None or bool((np.diff(wanted) > 0).all()))
        unit = first // source.store.shard_rows
        path = self._path(source, unit)
        scattered = not near or (last - 1) // source.store.shard_rows != unit or not reader.is_stored(source.layer)
        if source.store.compressed or source.scaled or scattered or disk_path(path) is None:
            out[:] = reader.gather(source.layer, wanted, not source.scaled).view(source.bits)
            return
        whole = last - first == len(wanted)
        into = out if whole else np.empty((last - first, source.features), source.bits)
        start = first - reader.layout.rows(unit).start
        self._pread(path, into, start * source.row_bytes)
        if not whole:
            out[:] = into[wanted - first]

    def _path(self, source: ArraySource, unit: int) -> Any:
        found = self._paths.get((id(source), unit))
        if found is None:
            found = self._paths[id(source), unit] = source.store.reader(source.site).path(source.layer, unit)
        return found

    def _pread(self, path: Path, into: NDArray, offset: int) -> None:
        view = into.data.cast("B")
        try:
            if self._direct:
                try:
                    found = self._past_cache(path, view, offset)
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                        raise
                    self._direct = False
            if not self._direct:
                found = self._through_cache(path, view, offset)
        except FileNotFoundError as error:
            raise DamagedError(
                "a shard of the store is missing", where=str(path), remedy="run flexcache verify"
            ) from error
        if not found:
            raise DamagedError("a shard of the store ended early", where=str(path), remedy="run flexcache verify")

    def _through_cache(self, path: Path, view: memoryview, offset: int) -> bool:
        """Read bytes of a file into *view*; return False if the file is too short."""
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
            count = _fill(handle, view, offset, len(view))
            if not self.keep_cache:
                os.posix_fadvise(handle, offset, count, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
        return count >= len(view)

    def _past_cache(self, path: Path, view: memoryview, offset: int) -> bool:
        """Read bytes of a file into *view* past the page cache; return False if the file is too short.

        Such reads must be aligned: unaligned rows go through an aligned buffer of the thread, aligned ones do not.
        """
        address = np.frombuffer(view, np.uint8).ctypes.data
        skip = offset % ALIGNED
        room = -(-(skip + len(view)) // ALIGNED) * ALIGNED
        into = view
        if skip or address % ALIGNED or room != len(view):
            held = getattr(self._held, "memory", None)
            if held is None or len(held) < room:
                held = self._held.memory = mmap.mmap(-1, room)
            into = memoryview(held)[:room]
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        try:
            count = _fill(handle, into, offset - skip, skip + len(view))
        finally:
            os.close(handle)
        if count < skip + len(view):
            return False
        if into is not view:
            view[:] = into[skip : skip + len(view)]
        return True


def _end_threads(*executors: ThreadPoolExecutor) -> None:
    for executor in executors:
        executor.shutdown(cancel_futures=True)


def _aligned(shape: tuple[int, int], dtype: np.dtype) -> NDArray:
    """Return fresh memory that is aligned for reads past the page cache."""
    size = shape[0] * shape[1] * dtype.itemsize
    memory = np.empty(size + ALIGNED, np.uint8)
    skip = -memory.ctypes.data % ALIGNED
    return memory[skip : skip + size].view(dtype).reshape(shape)


def _fill(handle: int, view: memoryview, offset: int, wanted: int) -> int:
    """Read into *view* until it has *wanted* bytes or the file ends; return the number of bytes."""
    at = 0
    while at < wanted and (count := os.preadv(handle, [view[at:]], offset + at)):
        at += count
    return at
