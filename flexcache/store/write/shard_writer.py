"""Write shards in one thread, which checks, hashes and writes slabs, and commits the files of a unit.

A unit becomes visible in one step: its files are flushed and renamed, then their folders are flushed, and only then is
its ledger record written.
"""

from __future__ import annotations

import errno
import os
import queue
import resource
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexcache.store.format.ledger import FileRecord
from flexcache.store.format.shard import index_bytes
from flexcache.store.storage.atomic_files import commit_files
from flexcache.store.storage.disk_errors import disk_error
from flexcache.store.storage.location import StoreLocation
from flexcache.store.write.shard_file import ShardFile, check_finite
from flexcache.store.write.slabs import PAGE, Slab, SlabPool
from flexcache.store.write.worker import Worker

OPEN_FILES = 8192


class WriterThread(ABC):
    """One thread that processes slabs in the order in which they were filled, and other jobs between them.

    Attributes
    ----------
    busy : float
        Seconds for which the thread has worked.
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
        """Return when all queued jobs are done.

        Raises
        ------
        CaptureError
            The disk refused a write.
        NonFinite
            A value was NaN or infinite.
        """
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

        Raises
        ------
        CaptureError
            The disk refused a write.
        NonFinite
            A value was NaN or infinite.
        """
        self.submit(self.put_in_place, files)
        self.drain()
        return {file.name: FileRecord(file.size, file.hasher.hexdigest()) for file in files}

    def fail(self, error: BaseException) -> None:
        """Run no further job; `submit`, `check` and `drain` raise *error* from now on."""
        self._failure = disk_error(error, self.root) if isinstance(error, OSError) else error

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


def checked(file: ShardFile, slab: Slab) -> np.ndarray:
    """Return the content of a slab once it is complete; raise NonFinite if its rows contain NaN or infinity."""
    slab.wait_for_copies()
    content = slab.array[: slab.filled]
    rows = content[: max(0, file.layout.row_span(file.shard) - file.checked)]
    check_finite(file, rows)
    file.checked += len(rows)
    return content


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
        content = checked(file, slab)
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
