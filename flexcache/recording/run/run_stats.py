"""Timing and throughput of one run, kept in the run log of the store."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

from flexcache.errors import UnreachableError
from flexcache.store.storage.atomic_files import json_bytes
from flexcache.store.storage.backend import storage_of
from flexcache.store.storage.location import StoreLocation


@dataclass
class RunStats:
    """Timing and throughput counters of one run: what this process committed, and the tokens that it ran.

    *forward* is seconds in forwards, of which *copying* rows in hooks and *waiting* for the disk are parts; *writing*
    those in the writer thread; *claiming* and *committing* are between forwards.
    """

    began: float = field(default_factory=time.perf_counter)
    units: int = 0
    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    forward: float = 0.0
    copying: float = 0.0
    waiting: float = 0.0
    writing: float = 0.0
    claiming: float = 0.0
    committing: float = 0.0

    def add_unit(self, rows: int, size: int) -> None:
        """Count a unit of so many rows and bytes that this process committed."""
        self.units += 1
        self.rows += rows
        self.bytes += size

    def write_log(self, root: StoreLocation, error: BaseException | None, direct: bool) -> None:
        """Write the run log of a store, which is no part of its content.

        If the run failed with *error*, a failure to write the log is ignored.
        """
        seconds = time.perf_counter() - self.began
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        outcome = "finished" if error is None else f"{type(error).__name__}: {error}".splitlines()[0]
        figures = {name: round(value, 3) for name, value in vars(self).items() if name != "began"}
        try:
            (root / "runs").mkdir(exist_ok=True)
            log = {
                "host": socket.gethostname(),
                "outcome": outcome,
                "seconds": round(seconds, 3),
                "direct_io": direct,
                **figures,
            }
            storage_of(root / "runs").write_bytes(f"{stamp}-{os.getpid()}.json", json_bytes(log))
        except (OSError, UnreachableError):
            if error is None:
                raise
