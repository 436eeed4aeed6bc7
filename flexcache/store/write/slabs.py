"""Pool page-aligned buffers of bounded memory, which are filled, written and reused."""

from __future__ import annotations

import mmap
import queue
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from flexcache.errors import CaptureError
from flexcache.store.storage.backend import disk_path
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.multipart_upload import PART_BYTES

PAGE = 4096
LARGEST_SLAB = 1 << 20
SMALLEST_SLAB = 64 << 10


class Slab:
    """One buffer: its bytes, the number of filled bytes, and events of copies that must end before it is written."""

    def __init__(self, array: np.ndarray, owner: object = None) -> None:
        self.array = array
        self.owner = owner
        self.filled = 0
        self.fences: list[Any] = []

    def wait_for_copies(self) -> None:
        """Wait for all copies into the slab."""
        for fence in self.fences:
            fence.synchronize()
        self.fences.clear()


def anonymous_slab(size: int) -> Slab:
    """Return a page-aligned slab of ordinary memory."""
    return Slab(np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8))


class SlabPool:
    """At most *count* slabs of *size* bytes, allocated when first needed.

    `take_slab` may be called from one thread and `return_slab` from another.

    Attributes
    ----------
    waited : float
        Seconds for which `take_slab` has waited: the time for which writing delayed the forward.
    """

    def __init__(self, size: int, count: int, allocate: Callable[[int], Slab] = anonymous_slab) -> None:
        if size % PAGE:
            raise ValueError(f"a slab is whole pages of {PAGE} bytes, not {size} bytes")
        self.size = size
        self.count = count
        self.waited = 0.0
        self._made = 0
        self._allocate = allocate
        self._free: queue.SimpleQueue[Slab] = queue.SimpleQueue()

    def take_slab(self, check: Callable[[], None] = lambda: None) -> Slab:
        """Return an empty slab, waiting if all are in use; *check* may end the wait by raising an error."""
        try:
            return self._free.get_nowait()
        except queue.Empty:
            if self._made < self.count:
                self._made += 1
                return self._allocate(self.size)
        began = time.perf_counter()
        try:
            while True:
                check()
                try:
                    return self._free.get(timeout=0.1)
                except queue.Empty:
                    continue
        finally:
            self.waited += time.perf_counter() - began

    def return_slab(self, slab: Slab) -> None:
        """Make a slab available again once no copy into it is under way: that of an abandoned unit may be."""
        slab.wait_for_copies()
        slab.filled = 0
        self._free.put(slab)


def size_slabs(root: StoreLocation, files: int, buffer_bytes: int, largest: int, chunk: int | None) -> tuple[int, int]:
    """Return the bytes of a slab and the number of slabs, for *files* that fill one each while others are written.

    On object storage a slab is a part of an upload; where shards are compressed, it is one inner chunk.

    Parameters
    ----------
    largest, chunk
        Bytes of the largest shard, and of the largest inner chunk, None if shards are not compressed.

    Raises
    ------
    CaptureError
        The buffer is too small.
    """
    local, reserved = disk_path(root) is not None, 0
    if chunk is not None:
        size = chunk
        reserved = 0 if local else files * (PART_BYTES + chunk)  # for chunks that wait until they fill a part
    elif not local:
        size = min(PART_BYTES, largest)
    else:
        size = min(LARGEST_SLAB, max(SMALLEST_SLAB, 1 << (largest - 1).bit_length()))
        while size > SMALLEST_SLAB and 2 * files * size > buffer_bytes:
            size //= 2
    size = -(-size // PAGE) * PAGE
    if (buffer_bytes - reserved) // size < files + 2:
        raise CaptureError(
            "the buffer is too small for so many sites and layers",
            expected=f"at least {(files + 2) * size + reserved:,} bytes for {files} open shards",
            found=f"{buffer_bytes:,} bytes",
            remedy="raise buffer_bytes, or capture fewer layers",
        )
    return size, (buffer_bytes - reserved) // size
