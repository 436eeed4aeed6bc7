"""A process at work on a store: its heartbeat, its claims and its writer thread."""

from __future__ import annotations

import time
from typing import Any

from flexcache.errors import CaptureError
from flexcache.recording.run.fingerprint import check_alike
from flexcache.recording.run.pending_units import PendingUnits
from flexcache.recording.run.run_stats import RunStats
from flexcache.store.storage.disk_errors import clear_errors
from flexcache.store.storage.location import StoreLocation
from flexcache.store.write.backends import AnyWorker, claims_of, start_work, writer_of
from flexcache.store.write.claims import Claiming
from flexcache.store.write.shard_writer import WriterThread
from flexcache.store.write.slabs import SlabPool


class WorkSession:
    """The worker of a recorder, once it is open; a new one each time that others took the last for gone.

    Raises
    ------
    CaptureError
        From every method: it is not open, or the disk refuses.
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
        self._opened: tuple[AnyWorker, Claiming, WriterThread] | None = None

    def open(self) -> None:
        """Start the heartbeat and the writer thread."""
        with clear_errors(self._path):
            worker = start_work(self._path, self._fingerprint, self._heartbeat_timeout)
            try:
                writer = writer_of(worker, self._pool)
            except BaseException:
                worker.close()
                raise
        self._opened = worker, claims_of(worker), writer

    def close(self) -> None:
        """Stop the writer thread and the heartbeat, and release all claims."""
        worker, claims, writer = self._require_open()
        writer.stop()
        self._stats.writing += writer.busy
        self._opened = None
        try:
            with clear_errors(self._path):
                claims.close(finished=self._pending.none_left)
                worker.sweep()
        finally:
            worker.close()

    def reopen_if_lost(self) -> None:
        """Start again if others took this process for gone."""
        if self.lost:
            self.close()
            self.open()

    @property
    def worker(self) -> AnyWorker:
        """The heartbeat and the folder of files in progress."""
        return self._require_open()[0]

    @property
    def writer(self) -> WriterThread:
        """The thread that writes files."""
        return self._require_open()[2]

    @property
    def lost(self) -> bool:
        """True if others took this process for gone, and removed its files and claims."""
        return self.worker.lost

    @property
    def writes_directly(self) -> bool:
        """True if it is open and its files bypass the page cache."""
        return self._opened is not None and self.writer.direct

    def check_others(self) -> None:
        """Raise MismatchError if another process is at work on the store under other conditions."""
        for other in self._require_open()[1].others():
            check_alike(self._path, other.get("conditions", {}), self._fingerprint, "another process captures")

    def claim_unit(self) -> int | None:
        """Claim a pending unit on which no living process works, and return it; None if there is none."""
        began = time.perf_counter()
        self.reopen_if_lost()
        worker, claims, _ = self._require_open()
        found = None
        with clear_errors(self._path):
            worker.sweep()
            self._pending.refresh_if_due()
            while found is None and (name := claims.take_claim(self._pending)) is not None:
                if self._pending.is_committed(int(name)):
                    claims.release(name)
                else:
                    found = int(name)
        self._stats.claiming += time.perf_counter() - began
        return found

    def holds_claim(self, unit: int) -> bool:
        """Return True if this process still has the claim on a unit."""
        return self._require_open()[1].holds(unit)

    def release_claim(self, unit: int) -> None:
        """Release the claim on a unit."""
        claims = self._require_open()[1]
        with clear_errors(self._path):
            claims.release(unit)

    def _require_open(self) -> tuple[AnyWorker, Claiming, WriterThread]:
        if self._opened is None:
            raise CaptureError("the recorder is not open", remedy="use it as: with Recorder(path) as recorder: …")
        return self._opened
