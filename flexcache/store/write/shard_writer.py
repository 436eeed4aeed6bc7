"""Write shards to a disk in one thread, which checks, hashes and writes slabs, and commits the files of a unit.

A unit becomes visible in one step: its files are flushed and renamed, then their folders are flushed, and only then is
its ledger record written.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flexcache.store.format.shard import index_bytes
from flexcache.store.storage.atomic_files import commit_files
from flexcache.store.storage.disk_errors import disk_error
from flexcache.store.write.shard_file import ShardFile, WriterThread, check_slab
from flexcache.store.write.slabs import PAGE, Slab, SlabPool
from flexcache.store.write.worker import Worker

OPEN_FILES = 8192


class Writer(WriterThread):
    """Writer thread for files in the folder of its worker."""

    def __init__(self, worker: Worker, pool: SlabPool) -> None:
        self.root: Path = worker.root
        self.folder = worker.folder
        _allow_open_files(OPEN_FILES)
        self.direct = direct_works(self.folder)
        self._open: set[ShardFile] = set()
        super().__init__(pool)

    def stop(self) -> None:
        """End the thread and close its files; the worker removes its folder."""
        super().stop()
        for file in self._open:
            os.close(file.handle)
        self._open.clear()

    # Jobs, which run in the thread

    def write(self, file: ShardFile, slab: Slab) -> None:
        """Check, hash and write one slab."""
        content = check_slab(file, slab)
        if file.handle < 0:
            file.handle = self._create(file)
            self._open.add(file)
        if file.codec is None:
            file.hasher.update(content.data)
            reach = -(-slab.filled // PAGE) * PAGE if self.direct else slab.filled
            self._write_all(file, slab.array[:reach], file.size)
            file.size += slab.filled
        else:
            self._append_buffered(file, file.codec.encode(content))
            file.lengths.append(file.size - sum(file.lengths))
        self.pool.return_slab(slab)

    def close(self, file: ShardFile) -> None:
        """Complete a file: write the index of a compressed one, truncate a direct one to its length."""
        if file.codec is not None:
            n_chunks = file.layout.shard_rows // file.layout.chunk_rows
            self._append_buffered(file, index_bytes(file.lengths, n_chunks))
        elif self.direct:
            os.ftruncate(file.handle, file.size)

    def put_in_place(self, files: Sequence[ShardFile]) -> None:
        """Flush and rename the files of a unit, in phases so that each phase costs one journal flush."""
        for file in files:
            os.fsync(file.handle)
            os.close(file.handle)
            self._open.discard(file)
        commit_files(self.root, ((file.temporary, file.name) for file in files))

    def discard(self, files: Sequence[ShardFile]) -> None:
        """Remove the files of an abandoned unit."""
        for file in files:
            if file in self._open:
                os.close(file.handle)
                self._open.discard(file)
                file.temporary.unlink(missing_ok=True)

    def _append_buffered(self, file: ShardFile, content: bytes) -> None:
        file.hasher.update(content)
        self._write_all(file, np.frombuffer(content, dtype=np.uint8), file.size)
        file.size += len(content)

    def _create(self, file: ShardFile) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        if self.direct and file.codec is None:
            flags |= os.O_DIRECT
        return os.open(file.temporary, flags, 0o666)

    def _write_all(self, file: ShardFile, content: np.ndarray, offset: int) -> None:
        view = content.data
        while len(view):
            count = os.pwrite(file.handle, view, offset)
            view = view[count:]
            offset += count
            self.written += count


def _allow_open_files(count: int) -> None:
    """Raise the soft limit of open files to *count* if possible, since a unit has one open file per site and layer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def direct_works(folder: Path) -> bool:
    """Return True if files in a folder can bypass the page cache (O_DIRECT)."""
    probe = folder / "probe"
    slab = np.frombuffer(memoryview(bytearray(2 * PAGE)), dtype=np.uint8)
    start = -slab.ctypes.data % PAGE
    try:
        handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o666)
    except (OSError, AttributeError):
        probe.unlink(missing_ok=True)
        return False
    try:
        return os.pwrite(handle, slab[start : start + PAGE].data, 0) == PAGE
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise disk_error(error, folder) from error
    finally:
        os.close(handle)
        probe.unlink(missing_ok=True)
