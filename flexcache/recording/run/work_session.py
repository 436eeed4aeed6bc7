"""A process at work on a store: its heartbeat, its claims and its writer thread."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from flexcache.errors import CaptureError
from flexcache.recording.run.fingerprint import check_alike
from flexcache.recording.run.pending_units import PendingUnits
from flexcache.recording.run.run_stats import RunStats
from flexcache.store.storage.disk_errors import clear_errors
from flexcache.store.storage.location import StoreLocation
from flexcache.store.write.claims import Claiming
from flexcache.store.write.election import start_writer, working
from flexcache.store.write.shard_file import WriterThread
from flexcache.store.write.slabs import SlabPool
from flexcache.store.write.worker import Worker


class WorkSession:
    """The worker of a recorder, once it is open; a new one each time that others took the last for gone.

    Every method raises CaptureError if it is not open, or the disk refuses.
    """

    def __init__(
        self,
        path: StoreLocation,
        fingerprint: dict[str, Any],
        heartbeat_timeout: float,
        pool: SlabPool,
        pending: PendingUnits,
        stats: RunStats,
    ) -> None:
        self._path, self._fingerprint, self._heartbeat_timeout = path, fingerprint, heartbeat_timeout
        self._pool, self._pending, self._stats = pool, pending, stats
        self._opened: tuple[Worker, Claiming, WriterThread] | None = None

    def open(self) -> None:
        """Start the heartbeat and the writer thread."""
        at_work = working(self._path, lambda: self._pending.none_left, self._heartbeat_timeout, self._fingerprint)
        with clear_errors(self._path), ExitStack() as stack:
            worker, claims = stack.enter_context(at_work)
            writer = start_writer(worker, self._pool)
            stack.callback(self._stop, writer)
            self._opened, self._closing = (worker, claims, writer), stack.pop_all()

    def close(self) -> None:
        """Stop the writer thread and the heartbeat, and release all claims."""
        self._require_open()
        self._opened = None
        with clear_errors(self._path):
            self._closing.close()

    def _stop(self, writer: WriterThread) -> None:
        writer.stop()
        self._stats.writing += writer.busy

    def reopen_if_lost(self) -> None:
        """Start again if others took this process for gone."""
        if self.worker.lost:
            self.close()
            self.open()

    @property
    def worker(self) -> Worker:
        """The heartbeat and the folder of files in progress."""
        return self._require_open()[0]

    @property
    def claims(self) -> Claiming:
        """The claims on units."""
        return self._require_open()[1]

    @property
    def writer(self) -> WriterThread:
        """The thread that writes files."""
        return self._require_open()[2]

    @property
    def writes_directly(self) -> bool:
        """True if it is open and its files bypass the page cache."""
        return self._opened is not None and self.writer.direct

    def check_others(self) -> None:
        """Raise MismatchError if another process is at work on the store under other conditions."""
        for other in self.claims.others():
            check_alike(self._path, other.get("conditions", {}), self._fingerprint, "another process captures")

    def claim_unit(self, only: int | None = None) -> int | None:
        """Claim a pending unit, or *only* that one, on which no living process works, and return it; None without."""
        began = time.perf_counter()
        self.reopen_if_lost()
        found = None
        with clear_errors(self._path):
            self.worker.sweep()
            self._pending.refresh_if_due()
            wanted = self._pending if only is None else [] if self._pending.is_committed(only) else [only]
            while found is None and (name := self.claims.take_claim(wanted)) is not None:
                if self._pending.is_committed(int(name)):
                    self.claims.release(name)
                    wanted = self._pending if only is None else []
                else:
                    found = int(name)
        self._stats.claiming += time.perf_counter() - began
        return found

    def release_claim(self, unit: int) -> None:
        """Release the claim on a unit."""
        with clear_errors(self._path):
            self.claims.release(unit)

    def _require_open(self) -> tuple[Worker, Claiming, WriterThread]:
        if self._opened is None:
            raise CaptureError("the recorder is not open", remedy="use it as: with Recorder(path) as recorder: …")
        return self._opened
