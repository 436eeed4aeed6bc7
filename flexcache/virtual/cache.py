"""A scratch cache of recomputed rows on disk: bounded in bytes, and shared by the processes of a machine."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flexcache.errors import StoreError
from flexcache.store.format.shard import ShardLayout

OPEN_SHARDS = 128
SHARE = 0.8
"""Share of a cache that rows which are recomputed ahead may fill."""
PAGE = mmap.PAGESIZE
MANY = 512
"""Buffers that one call of the system writes."""


class CachedShard:
    """The file of one shard of a virtual layer: its rows as in a shard on disk, then a byte for each row that is there.

    A byte is set after the row was written, so that any number of processes may write the same rows. The file stays
    readable after another process has removed it.
    """

    def __init__(self, path: Path, layout: ShardLayout, shard: int, bits: np.dtype) -> None:
        self.path = path
        self._tail, count = layout.file_bytes(shard), len(layout.rows(shard))
        self._row_bytes = layout.row_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self.handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        size = self._tail + count
        if os.fstat(self.handle).st_size != size:
            os.ftruncate(self.handle, size)
        mapped = mmap.mmap(self.handle, size, access=mmap.ACCESS_READ)
        self.rows = np.frombuffer(mapped, bits, count * layout.row_bytes // bits.itemsize).reshape(count, -1)
        self._there = np.frombuffer(mapped, np.bool_, count, self._tail)

    def __del__(self) -> None:
        if (handle := getattr(self, "handle", None)) is not None:
            os.close(handle)

    def has(self, rows: np.ndarray | slice) -> bool:
        """Return True if all of some rows are there; *rows* are numbers in the shard."""
        return bool(self._there[rows].all())

    def lacking(self, rows: np.ndarray) -> np.ndarray:
        """Return those of some rows that are not there."""
        return rows[~self._there[rows]]

    def write(self, start: int, pieces: Collection[Any]) -> None:
        """Write consecutive rows from row *start* on, as buffers of bytes."""
        at, first = 0, start * self._row_bytes
        buffers = [memoryview(piece).cast("B") for piece in pieces]
        for number in range(0, len(buffers), MANY):
            some = buffers[number : number + MANY]
            wanted = sum(map(len, some))
            if os.pwritev(self.handle, some, first + at) != wanted:  # a full disk writes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            at += wanted
        count = at // self._row_bytes
        os.pwrite(self.handle, b"\1" * count, self._tail + start)


class RowCache:
    """The files of recomputed shards in a folder, of at most *most_bytes* together; the least recently used go first.

    Files are found by name in any process, so processes share a folder. A file that is removed while it is read stays
    readable. The folder is used until the machine starts again: what was written is not forced to the disk.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._open: OrderedDict[Path, CachedShard] = OrderedDict()
        self._lock = threading.Lock()
        self._written = most_bytes  # unknown: count at the first write

    def shard(
        self, name: str, layout: ShardLayout, shard: int, bits: np.dtype, *, create: bool = True
    ) -> CachedShard | None:
        """Return the file of a shard by its name; None if it is not there and is not to be made."""
        path = self.folder / name
        with self._lock:
            found = self._open.get(path)
            if found is not None:
                if path.exists():
                    self._open.move_to_end(path)
                    return found
                del self._open[path]  # another process has removed it
        if not create and not path.exists():
            return None
        opened = CachedShard(path, layout, shard, bits)
        with self._lock:
            self._open[path] = opened
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return opened

    def make_room(self, count: int, held: Collection[Path]) -> None:
        """Remove the least recently used files, except those that are *held*, so that *count* bytes can be written."""
        with self._lock:
            self._written += count
            if self._written <= self.most_bytes:
                return
            files = sorted(self._files(), key=lambda file: file[1])
            total = count + sum(size for _, _, size in files)
            for path, _, size in files:
                if total <= self.most_bytes:
                    break
                if path not in held:
                    path.unlink(missing_ok=True)
                    self._open.pop(path, None)
                    total -= size
            self._written = total

    def touch(self, shard: CachedShard) -> None:
        """Note that a shard was used now."""
        try:
            os.utime(shard.path)
        except OSError:  # removed meanwhile
            return

    @property
    def used_bytes(self) -> int:
        """Bytes of the files on disk."""
        return sum(size for _, _, size in self._files())

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            self._open.clear()

    def _files(self) -> Iterator[tuple[Path, int, int]]:
        """Yield path, time of last use and bytes on disk of each file."""
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = Path(folder, name)
                try:
                    status = path.stat()
                except OSError:
                    continue
                yield path, status.st_mtime_ns, status.st_blocks * 512


def file_bytes(rows: np.ndarray, row_bytes: int) -> int:
    """Return the bytes on disk that rows of a shard take at most, in whole pages."""
    runs = 1 + int(np.count_nonzero(np.diff(rows) != 1))
    return len(rows) * row_bytes + 2 * PAGE * (runs + 1)


def full_disk(folder: Path, error: OSError) -> StoreError:
    """Return the error for a cache that cannot be written."""
    return StoreError(
        "recomputed rows cannot be written to the cache",
        where=str(folder),
        found=str(error),
        remedy="attach with a folder on another disk, cache=…, or with a smaller bound, cache_bytes=…",
    )
