"""Fill one shard: copy rows into slabs, and pass full slabs to the thread that writes them."""

from __future__ import annotations

import queue
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numcodecs.zstd import Zstd

from flexcache.array_spec import DTYPES, ArraySpec
from flexcache.store.format.ledger import FileRecord
from flexcache.store.format.shard import ShardLayout, shard_name
from flexcache.store.storage.disk_errors import disk_error
from flexcache.store.storage.location import StoreLocation
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


class ShardFile:
    """One shard that is being filled; rows are appended in order, at most as many as the layout has."""

    def __init__(
        self,
        writer: WriterThread,
        array: ArraySpec,
        layer: int | None,
        layout: ShardLayout,
        shard: int,
        compressed: bool,
    ) -> None:
        self.name, self.layout, self.shard = shard_name(array.name, layer, shard), layout, shard
        self.dtype, self.array, self.layer = DTYPES[array.dtype], array.name, layer
        self.codec = Zstd(level=ZSTD_LEVEL) if compressed else None
        self.rows_left = len(layout.rows(shard))
        self.temporary = writer.folder / f"{uuid.uuid4().hex}"
        self.handle = -1
        self.checked = 0  # bytes of rows that went through the writer
        self.size = 0  # bytes of the file so far
        self.hasher = xxhash.xxh3_128()
        self.lengths: list[int] = []  # of compressed inner chunks
        self._writer = writer
        self._slab: Slab | None = None
        self._capacity = layout.chunk_rows * layout.row_bytes if compressed else writer.pool.size

    def append(self, source: Any, spans: list[tuple[int, int]], copy: Copy = copy_bytes) -> None:
        """Append whole rows: *spans* of (start, count) bytes of a source that *copy* can copy into a slab."""
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
        self._writer.submit(self._writer.close, self)

    def end_batch(self) -> None:
        """Tell that the rows of a batch are complete; only a `VirtualShard` needs it."""

    def discard(self) -> None:
        """Abandon the file: return its slab to the pool, and remove what was written."""
        if self._slab is not None:
            self._writer.pool.return_slab(self._slab)
            self._slab = None
        self._writer.submit(self._writer.discard, [self])

    def _append(self, source: Any, start: int, count: int, copy: Copy) -> None:
        stop = start + count
        while start < stop:
            slab = self._slab
            if slab is None:
                slab = self._slab = self._writer.pool.take_slab(self._writer.check)
            part = min(self._capacity - slab.filled, stop - start)
            copy(slab, slab.filled, source, start, part)
            slab.filled += part
            start += part
            if slab.filled == self._capacity:
                self._submit()

    def _submit(self) -> None:
        self._writer.submit(self._writer.write, self, self._slab)
        self._slab = None


class VirtualShard(ShardFile):
    """One shard of a virtual layer that is being filled: its rows are checked and hashed, and not written.

    Attributes
    ----------
    digests : list of str
        XXH3-128 in hex of the rows of each batch, complete once the jobs of the writer are done.
    """

    def __init__(self, writer: WriterThread, array: ArraySpec, layer: int | None, layout: ShardLayout, shard: int):
        super().__init__(writer, array, layer, layout, shard, compressed=False)
        self.digests: list[str] = []

    def end_batch(self) -> None:
        """End the digest of a batch."""
        if self._slab is not None:
            self._submit()
        self._writer.submit(self._end_digest)

    def add_existing(self, rows: int, digests: Sequence[str]) -> None:
        """Add the digests of *rows* that an existing store has."""
        self.rows_left -= rows
        self.checked += rows * self.layout.row_bytes
        self.digests += digests

    def finish(self) -> None:
        """Check that all rows are there."""
        if self.rows_left:
            raise ValueError(f"{self.name} lacks {self.rows_left} rows")

    def discard(self) -> None:
        """Abandon the shard: return its slab to the pool."""
        if self._slab is not None:
            self._writer.pool.return_slab(self._slab)
            self._slab = None

    def _submit(self) -> None:
        self._writer.submit(self._writer.hash_rows, self, self._slab)
        self._slab = None

    def _end_digest(self) -> None:
        self.digests.append(self.hasher.hexdigest())
        self.hasher.reset()


class WriterThread(ABC):
    """One thread that processes slabs in the order in which they were filled, and other jobs between them.

    Attributes
    ----------
    busy, cpu : float
        Seconds for which the thread has worked, and of the processor.
    written : int
        Bytes written so far.
    direct : bool
        True if files bypass the page cache (O_DIRECT), which takes 3–4 times less CPU time.
    """

    root: StoreLocation
    folder: Path
    direct: bool

    def __init__(self, pool: SlabPool) -> None:
        self.pool = pool
        self.busy = 0.0
        self.cpu = 0.0
        self.written = 0
        self._failure: BaseException | None = None
        self._jobs: queue.SimpleQueue[tuple[Callable[..., None], tuple] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="flexcache-writer", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[..., None], *arguments: Any) -> None:
        """Queue a job; jobs run one after the other, and none runs once one has failed."""
        self.check()
        self._jobs.put((job, arguments))

    def check(self) -> None:
        """Raise the error of the thread, if there is one."""
        if self._failure is not None:
            raise self._failure

    def drain(self) -> None:
        """Return when all queued jobs are done; raise the error of one that failed."""
        done = threading.Event()
        self._jobs.put((done.set, ()))
        while not done.wait(timeout=0.1):
            self.check()
            if not self._thread.is_alive():
                break
        self.check()

    def stop(self) -> None:
        """End the thread."""
        self._jobs.put(None)
        self._thread.join()

    def commit_shards(self, files: Sequence[ShardFile]) -> dict[str, FileRecord]:
        """Wait until the files of a unit are written, commit them, and return their ledger records.

        CaptureError if the disk refused a write, NonFinite if a value was NaN or infinite.
        """
        self.submit(self.put_in_place, files)
        self.drain()
        return {file.name: FileRecord(file.size, file.hasher.hexdigest()) for file in files}

    def fail(self, error: BaseException) -> None:
        """Run no further job; `submit`, `check` and `drain` raise *error* from now on."""
        self._failure = disk_error(error, self.root) if isinstance(error, OSError) else error

    def hash_rows(self, file: VirtualShard, slab: Slab) -> None:
        """Check and hash one slab of a virtual shard, and return it to the pool."""
        file.hasher.update(check_slab(file, slab).data)
        self.pool.return_slab(slab)

    @abstractmethod
    def write(self, file: ShardFile, slab: Slab) -> None:
        """Check, hash and write one slab of a file, and return it to the pool."""

    @abstractmethod
    def close(self, file: ShardFile) -> None:
        """Complete a file."""

    @abstractmethod
    def put_in_place(self, files: Sequence[ShardFile]) -> None:
        """Make the files of a unit appear under their names."""

    @abstractmethod
    def discard(self, files: Sequence[ShardFile]) -> None:
        """Remove abandoned files."""

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, arguments = job
            if self._failure is not None:
                continue
            began, cpu = time.perf_counter(), time.thread_time()
            try:
                function(*arguments)
            except BaseException as error:
                self.fail(error)
            self.busy += time.perf_counter() - began
            self.cpu += time.thread_time() - cpu


def check_slab(file: ShardFile, slab: Slab) -> np.ndarray:
    """Return the content of a slab once it is complete; raise NonFinite if its rows contain NaN or infinity."""
    slab.wait_for_copies()
    content = slab.array[: slab.filled]
    rows = content[: max(0, file.layout.row_span(file.shard) - file.checked)]
    at = first_nonfinite(rows, file.dtype)
    if at is not None:
        width = file.dtype.itemsize
        row, inside = divmod(file.checked + at * width, file.layout.row_bytes)
        value = float(rows.view(file.dtype)[at])
        raise NonFinite(file.array, file.layer, file.layout.rows(file.shard).start + row, inside // width, value)
    file.checked += len(rows)
    return content
