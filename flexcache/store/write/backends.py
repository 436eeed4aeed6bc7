"""Choose the worker, claims and writer for a store in a folder or on object storage."""

from __future__ import annotations

from typing import Any

from flexcache.store.storage.backend import disk_path
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.multipart_upload import PART_BYTES
from flexcache.store.write.claims import Claiming, Claims
from flexcache.store.write.object_worker import ObjectClaims, ObjectWorker
from flexcache.store.write.object_writer import ObjectWriter
from flexcache.store.write.shard_writer import Writer, WriterThread
from flexcache.store.write.slabs import SlabPool, size_slabs
from flexcache.store.write.worker import HEARTBEAT_TIMEOUT, Worker

AnyWorker = Worker | ObjectWorker


def start_work(
    root: StoreLocation, conditions: dict[str, Any] | None = None, heartbeat_timeout: float = HEARTBEAT_TIMEOUT
) -> AnyWorker:
    """Start this process as a worker on the store at *root*."""
    kind = ObjectWorker if disk_path(root) is None else Worker
    return kind(root, conditions, heartbeat_timeout)  # type: ignore[arg-type]


def claims_of(worker: AnyWorker) -> Claiming:
    """Return the claims of a worker, at first none."""
    return ObjectClaims(worker) if isinstance(worker, ObjectWorker) else Claims(worker)


def writer_of(worker: AnyWorker, pool: SlabPool) -> WriterThread:
    """Start the writer of a worker."""
    return ObjectWriter(worker, pool) if isinstance(worker, ObjectWorker) else Writer(worker, pool)


def slabs_for(root: StoreLocation, files: int, buffer_bytes: int, largest: int, chunk: int | None) -> tuple[int, int]:
    """Return the bytes of a slab and their number, see `flexcache.store.write.slabs.size_slabs`.

    On object storage a slab is a part of an upload.

    Parameters
    ----------
    files
        Number of files that are open at the same time.
    largest
        Bytes of the largest shard.
    chunk
        Bytes of the largest inner chunk if shards are compressed, where a slab is one chunk; otherwise None.

    Raises
    ------
    CaptureError
        The buffer is too small.
    """
    if disk_path(root) is not None:
        return size_slabs(files, buffer_bytes, largest=largest, exact=chunk)
    if chunk is None:
        return size_slabs(files, buffer_bytes, exact=min(PART_BYTES, largest))
    return size_slabs(files, buffer_bytes, exact=chunk, reserved=files * (PART_BYTES + chunk))
