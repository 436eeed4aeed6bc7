"""The recorder: yields the planned batches of units that are not committed yet, and stores their activations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from flexcache.errors import CaptureError
from flexcache.recording.forward.batch import Batch
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.recording.run.existing_rows import ExistingRows
from flexcache.recording.run.fingerprint import check_fingerprint
from flexcache.recording.run.pending_units import PendingUnits
from flexcache.recording.run.row_transfer import RowTransfer
from flexcache.recording.run.run_stats import RunStats
from flexcache.recording.run.unit_writer import UnitWriter
from flexcache.recording.run.work_session import WorkSession
from flexcache.recording.run_options import DEFAULT_BUFFER
from flexcache.store.format.ledger import UnitContent, UnitRecord
from flexcache.store.format.metadata import largest_batch
from flexcache.store.format.schema import GROWING, read_attributes
from flexcache.store.read.selection import ArrayKey
from flexcache.store.read.store import Store
from flexcache.store.storage.disk_errors import clear_errors
from flexcache.store.storage.location import StoreLocation
from flexcache.store.write.election import claim_until_done
from flexcache.store.write.slabs import SlabPool
from flexcache.store.write.worker import HEARTBEAT_TIMEOUT


class Recorder:
    """Fills a planned store, alone or together with other processes. Use it as a context manager.

    `batches` yields every batch of every unit that is not committed and that no other process works on; between two
    batches, `put` stores the rows of each site and layer. The forward may be anything: hooks on a torch model, vLLM,
    nnsight, numpy. A unit is committed once all of its rows are there; an interrupted run loses at most one unit.

        with flexcache.Recorder("run.zarr") as recorder:
            for batch in recorder.batches():
                recorder.put("resid_post", layer=12, rows=batch.rows, values=my_forward(batch))

    Any number of processes on any number of machines may fill one store at the same time; see
    `flexcache.store.write.claims`. A recorder is for one thread; it starts threads that write files and keep its
    heartbeat.

    Parameters
    ----------
    path
        A store that `flexcache.record`, `flexcache.capture` or an earlier recorder made.
    fingerprint
        What the bits of the forward depend on. A store with units of another fingerprint is refused unless
        *allow_mixed*; the ledger records the fingerprint of each unit.
    buffer_bytes
        Bound on the memory for rows on their way to the disk.
    transfer
        Copies rows from the device of a model; by default from the memory of the host.
    batch_tokens
        Most tokens of a forward, padding included, if that is to be less than in the plan; the ledger records it.
    keys
        The sites and layers that this process writes, where others of its group write the rest; all by default.
    existing
        The rows of the store that is extended into this one. If layers are virtual, its units are run in the batches
        that they were run in, since digests are those of batches.
    heartbeat_timeout
        Seconds without a heartbeat after which another process counts as gone.
    on_start
        Called when other processes can see that this one is at work.
    on_wait
        Called by `batches` with the number of pending units while other processes have all of them.
    on_complete
        Called when the recorder is closed and the store is complete.

    Raises
    ------
    MismatchError
        The store has units of another fingerprint.
    CaptureError
        The buffer is too small for the number of sites and layers.
    """

    def __init__(
        self,
        path: str | StoreLocation,
        *,
        fingerprint: dict[str, Any] | None = None,
        buffer_bytes: int = DEFAULT_BUFFER,
        allow_mixed: bool = False,
        transfer: RowTransfer | None = None,
        batch_tokens: int | None = None,
        keys: Sequence[ArrayKey] | None = None,
        existing: ExistingRows | None = None,
        heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
        on_start: Callable[[], None] = lambda: None,
        on_wait: Callable[[int], None] = lambda units: None,
        on_complete: Callable[[], None] = lambda: None,
    ) -> None:
        self.store = Store(path)
        self.fingerprint = {} if fingerprint is None else fingerprint
        self.stats = RunStats()
        self._planned_tokens = self.store.spec.batch_tokens
        self._batch_tokens = self._planned_tokens if batch_tokens is None else min(self._planned_tokens, batch_tokens)
        self._unit_tokens = self._batch_tokens
        self._on_start, self._on_wait, self._on_complete = on_start, on_wait, on_complete
        self._allow_mixed = allow_mixed
        self._existing = existing
        self._check_plan: Callable[[], None] | None = None
        self._pending = PendingUnits(self.store)
        transfer = transfer or RowTransfer()
        self.unit_writer = UnitWriter(self.store, keys, transfer, self.stats)
        self._reader = BatchReader(self.store.path)
        check_fingerprint(self.store, self.fingerprint, allow_mixed)
        self._pool = SlabPool(*self.unit_writer.slab_sizes(buffer_bytes), transfer.allocate)
        self._session = WorkSession(
            self.store.path, self.fingerprint, heartbeat_timeout, self._pool, self._pending, self.stats
        )

    def __enter__(self) -> Self:
        self._session.open()
        try:
            self._on_start()
            if not self._allow_mixed:
                self._session.check_others()
        except BaseException:
            self._session.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pending.refresh()
        direct = self._session.writes_directly
        self._session.close()
        self.unit_writer.clear()
        self.stats.waiting = self._pool.waited
        with clear_errors(self.store.path):
            self.stats.write_log(self.store.path, error, direct)
        if error is None and self.store.complete:
            self._on_complete()

    @property
    def keys(self) -> list[ArrayKey]:
        """The sites and layers that this process writes, without the scales of int8, which come with their rows."""
        return self.unit_writer.keys

    @property
    def batch_tokens(self) -> int:
        """Most tokens of a forward, padding included."""
        return self._batch_tokens

    def lower_batch_tokens(self, batch_tokens: int) -> None:
        """Bound the batches of the next units by fewer tokens."""
        self._batch_tokens = min(self._batch_tokens, batch_tokens)

    def follow_plan(self, check: Callable[[], None]) -> None:
        """Wait for units that are not planned yet; *check* raises the error of the process or thread that plans."""
        self._check_plan = check

    @property
    def growing(self) -> bool:
        """True if this recorder waits for units that are not planned yet."""
        return self._check_plan is not None and self.store.growing

    def pending(self) -> list[int]:
        """Return the units that are not committed, in order; of a long ledger, as of the last listing."""
        return self._pending.list_units()

    @property
    def rows_done(self) -> int:
        """Rows of the store that are committed, as far as this process knows, plus those of its own unit so far."""
        return self._pending.rows_done + self.unit_writer.rows_done

    @property
    def bytes_put(self) -> int:
        """Bytes of rows that this process has put so far, without units that it had to abandon."""
        return (self.stats.rows + self.unit_writer.rows_done) * self.unit_writer.row_bytes

    @property
    def seconds_stalled(self) -> float:
        """Seconds for which the disk has held up the forward so far."""
        return self._pool.waited

    def largest_batch(self) -> Batch:
        """Return the largest batch of the plan, to try a forward before anything is written."""
        smaller = self._batch_tokens < self._planned_tokens
        return self._reader.read_largest(self._batch_tokens if smaller else None, largest_batch(self.store.plan))

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of all pending units; each must be `put` for every site and layer before the next.

        Where other processes have all pending units, this waits for them, and takes over those of processes that end
        without finishing. So the store is complete when it ends.

        Raises
        ------
        CaptureError
            Rows of a batch are missing when the next one is asked for, or the disk refused a write.
        RangeError
            A value is not finite or does not fit the storage dtype; named with site, layer, document and value.
        MismatchError
            Another process committed a unit of another fingerprint meanwhile.
        """
        for unit in self.claim_units():
            for batch in self.begin_unit(unit):
                with self.unit_writer.fill_batch(batch):
                    yield batch
            self.commit_unit()

    def put(self, site: str, values: Any, *, rows: range | slice | Any, layer: int | None = None) -> None:
        """Store the rows of one site and layer.

        Parameters
        ----------
        values
            numpy array or torch tensor of shape (rows, features), copied before the call returns; feature dims
            beyond one are flattened. `Batch.kept` makes it from padded activations.
        rows
            The row numbers, as in `Batch.rows`; several puts may share a batch, in order.
        """
        self.unit_writer.put_rows(site, layer, values, rows)

    def record(self, site: str, layer: int | None, values: Any) -> None:
        """Store the kept rows of padded activations of the current batch, shape (sequences, longest, …)."""
        self.unit_writer.put_padded(site, layer, values)

    # Units one by one, for processes that compute a unit together

    def claim_units(self) -> Iterator[int]:
        """Return claimed units one by one, each to be begun and committed or abandoned, until the store is complete."""
        return claim_until_done(self.claim_unit, lambda: len(self.pending()) + self.growing, self._on_wait)

    def claim_unit(self, only: int | None = None) -> int | None:
        """Claim a pending unit, or *only* that one, on which no living process works; return None if there is none."""
        if self.growing and self._check_plan is not None:
            self._check_plan()
        found = self._session.claim_unit(only)
        if found is None and self.growing and self._read_plan():
            found = self._session.claim_unit(only)
        return found

    def _read_plan(self) -> bool:
        """Read the plan of the store again, between two units; return True if it has grown."""
        plan = read_attributes(self.store.path)["plan"]
        if GROWING in plan and int(plan["rows"]) <= self.store.n_rows:
            return False
        self.store = Store(self.store.path)
        self._reader = BatchReader(self.store.path)
        self._pending.follow(self.store)
        self.unit_writer.follow(self.store)
        return True

    def begin_unit(self, unit: int) -> list[Batch]:
        """Open the shards of a unit, and return its batches within the budget of tokens."""
        self._unit_tokens = self._tokens_of(unit)
        self.unit_writer.open_unit(unit, self._session.writer)
        batches = self._reader.read_unit(unit, self._unit_tokens)
        if self._existing is None:
            return batches
        self.unit_writer.copy_existing_rows(self._existing)
        return [batch for batch in batches if batch.rows.start >= self._existing.stop]

    def place_files(self) -> UnitContent | None:
        """Finish the shards of the unit and move them into place, flushed; return their records for the ledger.

        Returns None, and abandons the unit, if others took this process for gone and removed its files.
        """
        writer = self._session.writer
        if self._session.worker.lost:
            self.abandon_unit()
            return None
        return self.unit_writer.place_shards(writer)

    def commit_unit(self, content: UnitContent | None = None) -> bool:
        """Write the ledger record of the unit, with the *content* of all its writers, by default of this process.

        Returns False if the unit was abandoned, because others took this process for gone or took the unit over.
        """
        unit = self.unit_writer.unit
        assert unit is not None
        if not self._session.claims.holds(unit):
            self.abandon_unit()
            return False
        written = self.place_files() if content is None else content
        if written is None:
            return False
        began = time.perf_counter()
        if self._pending.refresh_if_due():
            check_fingerprint(self.store, self.fingerprint, self._allow_mixed)
        if not self.store.ledger.has(unit):
            rows = self.unit_writer.unit_rows
            fingerprint = self.fingerprint
            if self._existing is not None:
                fingerprint = self._existing.combine_fingerprints(unit, fingerprint, self._unit_tokens)
            with clear_errors(self.store.path):
                span = (rows.start, rows.stop)
                self.store.ledger.commit(
                    UnitRecord(unit, span, self._unit_tokens, fingerprint, written.files, written.virtual)
                )
            self.stats.add_unit(len(rows), sum(file.size for file in written.files.values()))
        self._session.release_claim(unit)
        self._pending.mark_committed(unit)
        self.unit_writer.close_unit()
        self.stats.committing += time.perf_counter() - began
        return True

    def leave_unit(self) -> None:
        """Close a unit whose ledger record another process of the group writes."""
        self.unit_writer.close_unit()
        self._pending.refresh_if_due()

    def abandon_unit(self) -> None:
        """Discard what was written of the unit, and release the claim on it."""
        unit = self.unit_writer.unit
        self.unit_writer.discard_shards()
        if unit is not None:
            self._session.release_claim(unit)
        self._session.reopen_if_lost()

    # Private

    def _tokens_of(self, unit: int) -> int:
        """Return the budget of a unit: that of this run, or that of an existing unit with virtual layers."""
        virtual = any(array.virtual for array in self.store.arrays.values())
        extended = None if self._existing is None else self._existing.store
        if extended is None or not virtual or not extended.ledger.has(unit):
            return self._batch_tokens
        before = extended.ledger.read_record(unit).batch_tokens
        if before > self._batch_tokens:
            raise CaptureError(
                "a unit with virtual layers is extended in the batches that it was captured in",
                where=f"{extended.path}, unit {unit}",
                expected=f"batches of {before} tokens",
                found=f"at most {self._batch_tokens} tokens",
                remedy="raise batch_tokens to that number, on a device with the memory for it",
            )
        return before
