"""Files of one unit that come from another store as they are: checked on their way, and put in place together."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import xxhash

from flexcache.errors import DamagedError
from flexcache.store.format.ledger import FileRecord
from flexcache.store.manage.derive import copy_verified
from flexcache.store.storage.atomic_files import blocks, fsync_folder
from flexcache.store.storage.location import Place
from flexcache.store.storage.multipart_upload import PART_BYTES, Upload, begin_upload
from flexcache.store.storage.object_path import RemotePath
from flexcache.store.write.backends import AnyWorker
from flexcache.store.write.object_worker import RemoteWorker
from flexcache.store.write.worker import Worker

AT_ONCE = 8
"""Parts on their way to object storage."""


class FileTransfer(Protocol):
    """The files of a unit on their way."""

    def take(self, source: Place, name: str, record: FileRecord) -> None:
        """Bring one file, and check that its bytes are those of the record.

        Raises
        ------
        DamagedError
        """

    def settle(self) -> dict[str, FileRecord]:
        """Put all of them in place, and return their records."""

    def close(self) -> None:
        """Give up what has not been put in place."""


def arrivals_of(worker: AnyWorker) -> FileTransfer:
    """Return what brings files to the store of a worker."""
    return Uploads(worker.root) if isinstance(worker, RemoteWorker) else Copies(worker)


class Copies:
    """Files that are copied into a folder, flushed, and renamed to their places."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._copied: dict[str, tuple[Path, FileRecord]] = {}

    def take(self, source: Place, name: str, record: FileRecord) -> None:
        """Copy a file beside its place."""
        temporary = self._worker.folder / uuid.uuid4().hex
        copy_verified(source, temporary, record)
        self._copied[name] = temporary, record

    def settle(self) -> dict[str, FileRecord]:
        """Flush files, rename them to their places, and flush the folders."""
        root = self._worker.root
        for temporary, _ in self._copied.values():
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        folders: dict[Path, None] = {}
        for name, (temporary, _) in self._copied.items():
            place = root / name
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(place)
            folders.update(dict.fromkeys(parent for parent in place.parents if root in parent.parents))
        for folder in folders:
            fsync_folder(folder)
        return {name: record for name, (_, record) in self._copied.items()}

    def close(self) -> None:
        """Do nothing: files in progress go with the folder of the worker."""


class Uploads:
    """Files that are sent to object storage in parts, eight at a time, and completed together."""

    def __init__(self, root: RemotePath) -> None:
        self._root = root
        self._threads = ThreadPoolExecutor(AT_ONCE, "flexcache-upload")
        self._open: dict[str, tuple[Upload, FileRecord]] = {}

    def take(self, source: Place, name: str, record: FileRecord) -> None:
        """Send a file, and keep it from appearing where its bytes are not those of the record."""
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
            raise DamagedError(
                "a file of the store is missing", where=str(source), remedy="run flexcache verify to see what else is"
            ) from error
        if size != record.size or hasher.hexdigest() != record.xxh3_128:
            raise DamagedError(
                "a file has other bytes than were written",
                where=str(source),
                expected=f"{record.size} bytes with XXH3-128 {record.xxh3_128}",
                found=f"{size} bytes with XXH3-128 {hasher.hexdigest()}",
                remedy="run flexcache verify on the source; a damaged unit can be recomputed by the capture",
            )

    def settle(self) -> dict[str, FileRecord]:
        """Complete the uploads."""
        for completed in [self._threads.submit(upload.complete) for upload, _ in self._open.values()]:
            completed.result()
        records = {name: record for name, (_, record) in self._open.items()}
        self._open.clear()
        return records

    def close(self) -> None:
        """Abort what has not been completed."""
        self._threads.shutdown(cancel_futures=True)
        for upload, _ in self._open.values():
            upload.abort()
        self._open.clear()


def _parts(source: Place) -> Iterator[bytes]:
    """Yield the bytes of a file in parts of an upload."""
    waiting = bytearray()
    for block in blocks(source):
        waiting += block
        while len(waiting) >= PART_BYTES:
            yield bytes(waiting[:PART_BYTES])
            del waiting[:PART_BYTES]
    if waiting:
        yield bytes(waiting)
