"""Transfer the files of one unit between stores unchanged: verified on the way, and committed together."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import xxhash

from flexcache.store.format.ledger import FileRecord, check_file, damaged_file, measure_file
from flexcache.store.storage.atomic_files import commit_files
from flexcache.store.storage.backend import disk_path, storage_of
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.multipart_upload import PART_BYTES, Upload, begin_upload
from flexcache.store.storage.object_path import ObjectPath
from flexcache.store.write.object_worker import ObjectWorker
from flexcache.store.write.worker import Worker

AT_ONCE = 8
"""Parts that are uploaded at the same time."""
_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Errors that another way of copying would not avoid."""


def start_transfer(worker: Worker) -> FileTransfer:
    """Return a transfer of files to the store of a worker."""
    return UploadTransfer(worker.root) if isinstance(worker, ObjectWorker) else FileTransfer(worker)


class FileTransfer:
    """Files of a unit on their way to a store: copied into the folder of a worker, flushed, and renamed."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._copied: dict[str, tuple[Path, FileRecord]] = {}

    def add_file(self, source: StoreLocation, name: str, record: FileRecord) -> None:
        """Transfer one file under a temporary name; raise DamagedError if its bytes are not those of *record*."""
        temporary = self._worker.folder / uuid.uuid4().hex
        copy_verified(source, temporary, record)
        self._copied[name] = temporary, record

    def commit_all(self) -> dict[str, FileRecord]:
        """Make all files appear under their names, flushed, and return their records."""
        for temporary, _ in self._copied.values():
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        commit_files(self._worker.root, ((temporary, name) for name, (temporary, _) in self._copied.items()))
        return {name: record for name, (_, record) in self._copied.items()}

    def close(self) -> None:
        """Discard what has not been committed; the files are removed with the folder of the worker."""


class UploadTransfer(FileTransfer):
    """Files that are uploaded to object storage in parts, eight at a time, and completed together."""

    def __init__(self, root: ObjectPath) -> None:
        self._root = root
        self._threads = ThreadPoolExecutor(AT_ONCE, "flexcache-upload")
        self._open: dict[str, tuple[Upload, FileRecord]] = {}

    def add_file(self, source: StoreLocation, name: str, record: FileRecord) -> None:
        """Upload one file; it does not appear before `commit_all`."""
        upload = begin_upload(self._root / name)
        self._open[name] = upload, record
        hasher, sent, size = xxhash.xxh3_128(), list[Future[None]](), 0
        try:
            for number, part in enumerate(_parts(source)):
                hasher.update(part)
                size += len(part)
                behind = number - (1 if upload.ordered else AT_ONCE)
                if behind >= 0:
                    sent[behind].result()
                sent.append(self._threads.submit(upload.put, number, part))
            for put in sent:
                put.result()
        except FileNotFoundError as error:
            raise damaged_file(source, record, None) from error
        found = FileRecord(size, hasher.hexdigest())
        if found != record:
            raise damaged_file(source, record, found)

    def commit_all(self) -> dict[str, FileRecord]:
        """Complete the uploads."""
        for completed in [self._threads.submit(upload.complete) for upload, _ in self._open.values()]:
            completed.result()
        records = {name: record for name, (_, record) in self._open.items()}
        self._open.clear()
        return records

    def close(self) -> None:
        """Abort the uploads that have not been completed."""
        self._threads.shutdown(cancel_futures=True)
        for upload, _ in self._open.values():
            upload.abort()
        self._open.clear()


def copy_verified(source: StoreLocation, target: Path, record: FileRecord) -> None:
    """Copy a file, by reference if the file system can, and check the bytes of the copy.

    DamagedError if the file is missing, or its bytes are not those of *record*.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _clone(source, target)
    except FileNotFoundError as error:
        raise damaged_file(source, record, None) from error
    found = measure_file(target)
    if found != record:
        check_file(source, record)
        raise damaged_file(
            target, record, found, "the copy failed: check the disk of the target, then run the same command again"
        )


def _clone(source: StoreLocation, target: Path) -> None:
    path = disk_path(source)
    if path is None:
        with target.open("wb") as write:
            write.writelines(storage_of(source.parent).read_blocks(source.name))
        return
    with path.open("rb") as read, target.open("wb") as write:
        left = os.fstat(read.fileno()).st_size
        try:
            while left:
                count = os.copy_file_range(read.fileno(), write.fileno(), left)
                if not count:
                    break
                left -= count
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno in _FATAL:
                raise
            read.seek(0)
            write.seek(0)
            write.truncate()
            shutil.copyfileobj(read, write, 1 << 20)


def _parts(source: StoreLocation) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces of the size of an upload part."""
    waiting = bytearray()
    for block in storage_of(source.parent).read_blocks(source.name):
        waiting += block
        while len(waiting) >= PART_BYTES:
            yield bytes(waiting[:PART_BYTES])
            del waiting[:PART_BYTES]
    if waiting:
        yield bytes(waiting)
