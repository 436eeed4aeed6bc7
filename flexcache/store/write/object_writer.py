"""Write shards to object storage: parts are sent as they are filled, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from flexcache.store.format.shard import index_bytes
from flexcache.store.storage.multipart_upload import PART_BYTES, Upload, begin_upload
from flexcache.store.storage.object_path import ObjectPath
from flexcache.store.write.object_worker import ObjectWorker
from flexcache.store.write.shard_file import ShardFile, WriterThread, check_slab
from flexcache.store.write.slabs import Slab, SlabPool

LANES = 8
"""Parts that are sent at the same time, each with its slab."""


class ObjectWriter(WriterThread):
    """One thread checks and hashes slabs in the order in which they were filled, and eight threads send them.

    A slab returns to the pool when it has arrived, so the pool bounds the memory. Compressed chunks wait until they
    fill a part, which is bounded as well: 5 MiB for each open file.
    """

    direct = False

    def __init__(self, worker: ObjectWorker, pool: SlabPool) -> None:
        self.root: ObjectPath = worker.root
        self.folder = worker.folder
        self._lanes = [ThreadPoolExecutor(1, f"flexcache-upload-{number}") for number in range(LANES)]
        self._next = 0
        self._sending: dict[ShardFile, _Sending] = {}
        super().__init__(pool)

    def stop(self) -> None:
        """End the threads, and abort uploads that were not completed."""
        super().stop()
        for lane in self._lanes:
            lane.shutdown(cancel_futures=True)
        for sending in self._sending.values():
            sending.upload.abort()
        self._sending.clear()

    # Jobs, which run in the thread.

    def write(self, file: ShardFile, slab: Slab) -> None:
        """Check, hash and send one slab."""
        content = check_slab(file, slab)
        sending = self._sending.get(file)
        if sending is None:
            sending = self._sending[file] = _Sending(begin_upload(self.root / file.name))
        if file.codec is None:
            file.hasher.update(content.data)
            file.size += len(content)
            self._send(sending, content.data, lambda: self.pool.return_slab(slab))
            return
        encoded = bytes(file.codec.encode(content))
        self.pool.return_slab(slab)
        file.lengths.append(len(encoded))
        self._collect(file, sending, encoded)

    def close(self, file: ShardFile) -> None:
        """Send the last part of a compressed file, with its index."""
        if file.codec is None:
            return
        sending = self._sending[file]
        self._collect(file, sending, index_bytes(file.lengths, file.layout.shard_rows // file.layout.chunk_rows))
        self._send(sending, bytes(sending.waiting), lambda: None)
        sending.waiting.clear()

    def put_in_place(self, files: Sequence[ShardFile]) -> None:
        """Wait for the parts of a unit's files, and complete their uploads."""
        for file in files:
            for sent in self._sending[file].sent:
                sent.result()
        done = [self._lane().submit(self._sending[file].upload.complete) for file in files]
        for file, completed in zip(files, done, strict=True):
            completed.result()
            del self._sending[file]

    def discard(self, files: Sequence[ShardFile]) -> None:
        """Abort the uploads of an abandoned unit."""
        for file in files:
            if (sending := self._sending.pop(file, None)) is not None:
                for sent in sending.sent:
                    sent.exception()
                sending.upload.abort()

    def _collect(self, file: ShardFile, sending: _Sending, content: bytes) -> None:
        file.hasher.update(content)
        file.size += len(content)
        sending.waiting += content
        if len(sending.waiting) >= PART_BYTES:
            self._send(sending, bytes(sending.waiting), lambda: None)
            sending.waiting.clear()

    def _send(self, sending: _Sending, content: bytes | memoryview, then: Callable[[], None]) -> None:
        number = len(sending.sent)
        if sending.lane is None or not sending.upload.ordered:
            sending.lane = self._lane()
        sending.sent.append(sending.lane.submit(self._put, sending.upload, number, content, then))

    def _put(self, upload: Upload, number: int, content: bytes | memoryview, then: Callable[[], None]) -> None:
        try:
            upload.put(number, content)
            self.written += len(content)
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            then()

    def _lane(self) -> ThreadPoolExecutor:
        self._next = (self._next + 1) % LANES
        return self._lanes[self._next]


class _Sending:
    """A file whose parts are being sent."""

    def __init__(self, upload: Upload) -> None:
        self.upload = upload
        self.lane: ThreadPoolExecutor | None = None
        self.sent: list[Future[Any]] = []
        self.waiting = bytearray()
