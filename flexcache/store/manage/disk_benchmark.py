"""Measure the write rate of a disk."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from pathlib import Path

from flexcache.store.storage.disk_errors import clear_errors
from flexcache.store.write.shard_writer import direct_works

BLOCK = 4 << 20


def write_rate(folder: Path, amount: int = 256 << 20) -> float:
    """Return the bytes per second that a disk can write, by a temporary file of *amount* bytes in *folder*.

    The file is written like a shard: in large blocks, bypassing the page cache if possible, and flushed. CaptureError
    if the disk refuses a write.
    """
    blocks = max(1, amount // BLOCK)
    with clear_errors(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".flexcache-rate-") as place:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct_works(Path(place)) else 0)
        with mmap.mmap(-1, BLOCK) as block:  # page-aligned
            block.write(os.urandom(BLOCK))
            began = time.perf_counter()
            handle = os.open(Path(place) / "rate", flags, 0o600)
            try:
                for _ in range(blocks):
                    os.write(handle, block)
                os.fsync(handle)
            finally:
                os.close(handle)
        return blocks * BLOCK / (time.perf_counter() - began)
