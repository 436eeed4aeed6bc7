"""Fill one shard: copy rows into slabs, and pass full slabs to the writer."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numcodecs.zstd import Zstd

from flexcache.store.format.shard import ShardLayout
from flexcache.store.write.row_encoding import first_nonfinite
from flexcache.store.write.slabs import Slab, SlabPool

ZSTD_LEVEL = 1

Copy = Callable[[Slab, int, Any, int, int], None]
"""``copy(slab, at, source, start, count)`` copies bytes *start* … *start + count* of a source to *at* in a slab."""


def copy_bytes(slab: Slab, at: int, source: np.ndarray, start: int, count: int) -> None:
    """Copy from a one-dimensional uint8 array, synchronously."""
    slab.array[at : at + count] = source[start : start + count]


@dataclass
class NonFinite(Exception):  # noqa: N818 - it carries the place to the recorder, which raises the RangeError
    """A value at this row of this array is NaN or infinite; raised in the writer thread."""

    array: str
    layer: int | None
    row: int
    feature: int
    value: float


class Sink(Protocol):
    """Receiver of the slabs of a shard file: the writer."""

    folder: Path
    pool: SlabPool

    def submit(self, job: Callable[..., None], *arguments: Any) -> None:
        """Queue a job."""

    def check(self) -> None:
        """Raise the error of an earlier job, if there is one."""

    def write(self, file: ShardFile, slab: Slab) -> None:
        """Write one slab of a file."""

    def close(self, file: ShardFile) -> None:
        """Complete a file."""

    def discard(self, files: Sequence[ShardFile]) -> None:
        """Remove abandoned files."""


class ShardFile:
    """One shard that is being filled; rows are appended in order, at most as many as the layout has."""

    def __init__(
        self,
        sink: Sink,
        name: str,
        layout: ShardLayout,
        shard: int,
        dtype: np.dtype,
        array: str,
        layer: int | None,
        compressed: bool,
    ) -> None:
        self.name, self.layout, self.shard = name, layout, shard
        self.dtype, self.array, self.layer = dtype, array, layer
        self.codec = Zstd(level=ZSTD_LEVEL) if compressed else None
        self.rows_left = len(layout.rows(shard))
        self.temporary = sink.folder / f"{uuid.uuid4().hex}"
        self.handle = -1
        self.checked = 0  # bytes of rows that went through the writer
        self.size = 0  # bytes of the file so far
        self.hasher = xxhash.xxh3_128()
        self.lengths: list[int] = []  # of compressed inner chunks
        self._sink = sink
        self._slab: Slab | None = None
        self._capacity = layout.chunk_rows * layout.row_bytes if compressed else sink.pool.size

    def append(self, source: Any, spans: list[tuple[int, int]], copy: Copy = copy_bytes) -> None:
        """Append rows given as bytes.

        Parameters
        ----------
        source
            Bytes, or anything that *copy* can copy into a slab.
        spans
            Start and count of the bytes to append, together whole rows.
        """
        rows = sum(count for _, count in spans) // self.layout.row_bytes
        if rows > self.rows_left:
            raise ValueError(f"{self.name} has room for {self.rows_left} rows, not for {rows}")
        self.rows_left -= rows
        for start, count in spans:
            self._append(source, start, count, copy)

    def finish(self) -> None:
        """Append padding and index, and pass the last slab to the writer."""
        if self.rows_left:
            raise ValueError(f"{self.name} lacks {self.rows_left} rows")
        if padding := self.layout.padding(self.shard):
            self._append(np.zeros(padding, dtype=np.uint8), 0, padding, copy_bytes)
        if self.codec is None:
            footer = np.frombuffer(self.layout.footer(self.shard), dtype=np.uint8)
            self._append(footer, 0, len(footer), copy_bytes)
        if self._slab is not None and self._slab.filled:
            self._submit()
        self._sink.submit(self._sink.close, self)

    def discard(self) -> None:
        """Abandon the file: return its slab to the pool, and remove what was written."""
        if self._slab is not None:
            self._sink.pool.return_slab(self._slab)
            self._slab = None
        self._sink.submit(self._sink.discard, [self])

    def _append(self, source: Any, start: int, count: int, copy: Copy) -> None:
        stop = start + count
        while start < stop:
            slab = self._slab
            if slab is None:
                slab = self._slab = self._sink.pool.take_slab(self._sink.check)
            part = min(self._capacity - slab.filled, stop - start)
            copy(slab, slab.filled, source, start, part)
            slab.filled += part
            start += part
            if slab.filled == self._capacity:
                self._submit()

    def _submit(self) -> None:
        self._sink.submit(self._sink.write, self, self._slab)
        self._slab = None


def check_finite(file: ShardFile, rows: np.ndarray) -> None:
    """Raise NonFinite if *rows*, the next bytes of the file, contain NaN or infinity."""
    at = first_nonfinite(rows, file.dtype)
    if at is None:
        return
    width = file.dtype.itemsize
    row, inside = divmod(file.checked + at * width, file.layout.row_bytes)
    value = float(rows.view(file.dtype)[at])
    raise NonFinite(file.array, file.layer, file.layout.rows(file.shard).start + row, inside // width, value)
