"""The recorder: hands out the planned batches of units that are not committed yet, and takes their activations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from flexcache.errors import CaptureError
from flexcache.recording.forward.batch import Batch, BatchReader
from flexcache.recording.run.existing_rows import ExistingRows
from flexcache.recording.run.fingerprint import check_alike, check_fingerprint
from flexcache.recording.run.pending_units import PendingUnits
from flexcache.recording.run.run_stats import RunStats
from flexcache.recording.run.unit_writer import UnitWriter
from flexcache.store.format.ledger import FileRecord, UnitRecord
from flexcache.store.format.metadata import largest_batch
from flexcache.store.read.selection import ArrayKey
from flexcache.store.read.store import Store
from flexcache.store.storage.disk_errors import clear_errors
from flexcache.store.storage.location import Place
from flexcache.store.write.backends import AnyWorker, claims_of, start_work, writer_of
from flexcache.store.write.claims import Claiming
from flexcache.store.write.election import claim_until_done
from flexcache.store.write.shard_file import Copy
from flexcache.store.write.shard_writer import WriterThread
from flexcache.store.write.slabs import Slab, SlabPool, anonymous_slab
from flexcache.store.write.worker import HEARTBEAT_TIMEOUT

DEFAULT_BUFFER = 256 << 20


class Recorder:
    """Fills a planned store, alone or beside others. Use it as a context manager.

    `batches` yields every batch of every unit that is not committed and that no other process works on; between two
    batches, `put` takes the rows of each site and layer. Any forward can stand between them: hooks on a torch model,
    vLLM, nnsight, numpy. A unit is committed once all of its rows are there; what is left early is at most one unit.

        with flexcache.Recorder("run.zarr") as recorder:
            for batch in recorder.batches():
                recorder.put("resid_post", layer=12, rows=batch.rows, values=my_forward(batch))

    Any number of processes on any number of machines may do this to one store at the same time; see
    `flexcache.store.write.claims`. One thread uses a recorder; two threads inside write files and keep its heartbeat.

    Parameters
    ----------
    path
        A store that `flexcache.record`, `flexcache.capture` or an earlier recorder made.
    fingerprint
        What the bits of the forward depend on. Units of another fingerprint in the same store are refused unless
        *allow_mixed*; the ledger says which unit had which.
    buffer_bytes
        Bound on the memory for rows on their way to the disk.
    allocate
        Makes the slabs; ordinary page-aligned memory by default.
    batch_tokens
        Most tokens of a forward, padding included, where it is to be less than the plan's; the ledger records it.
    keys
        The sites and layers that this process writes, where others of its group write the rest; all by default.
    carried
        The rows of a store that grows into this one.
    heartbeat_timeout
        Seconds without a sign of life after which another process counts as gone.

    Attributes
    ----------
    on_wait : callable
        Called with the number of units that are left while other processes have all of them.
    on_start : callable
        Called when other processes can see that this one is at work.
    on_complete : callable
        Called when it is closed and the store is complete.

    Raises
    ------
    MismatchError
        The store has units of another fingerprint.
    CaptureError
        The buffer is too small for the number of sites and layers.
    """

    def __init__(
        self,
        path: str | Place,
        *,
        fingerprint: dict[str, Any] | None = None,
        buffer_bytes: int = DEFAULT_BUFFER,
        allow_mixed: bool = False,
        allocate: Callable[[int], Slab] = anonymous_slab,
        batch_tokens: int | None = None,
        keys: Sequence[ArrayKey] | None = None,
        carried: ExistingRows | None = None,
        heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
    ) -> None:
        self.store = Store(path)
        self.fingerprint = {} if fingerprint is None else fingerprint
        self._remaining = PendingUnits(self.store)
        self.stats = RunStats()
        planned = int(self.store.spec["batch_tokens"])
        self.batch_tokens = planned if batch_tokens is None else min(planned, batch_tokens)
        self.on_wait: Callable[[int], None] = lambda units: None
        self.on_complete: Callable[[], None] = lambda: None
        self.on_start: Callable[[], None] = lambda: None
        self._allow_mixed = allow_mixed
        self._intake = UnitWriter(self.store, keys, self.stats)
        self._batches = BatchReader(self.store.path, mean=self.store.spec.get("rows") == "mean")
        check_fingerprint(self.store, self.fingerprint, allow_mixed)
        self._pool = SlabPool(*self._intake.slabs(buffer_bytes), allocate)
        self._carried = carried
        self._heartbeat_timeout = heartbeat_timeout
        self._worker: AnyWorker | None = None
        self._claims: Claiming | None = None
        self._writer: WriterThread | None = None
        self._unit: int | None = None
        self._filled = 0

    # The loop

    def __enter__(self) -> Self:
        self._start()
        try:
            self.on_start()
            self._check_others()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.store.refresh()
        direct = self._writer is not None and self._writer.direct
        self._stop()
        self._intake.clear()
        self._unit = None
        self.stats.waiting = self._pool.waited
        with clear_errors(self.store.path):
            self.stats.write(self.store.path, error, direct)
        if error is None and self.store.complete:
            self.on_complete()

    @property
    def keys(self) -> list[ArrayKey]:
        """The sites and layers that this process writes, without the scales of int8, which come with their rows."""
        return self._intake.keys

    def pending(self) -> list[int]:
        """Return the units that are not committed, in order.

        Where the ledger is so long that listing it takes time, what others committed in the last seconds may be among
        them, unless few are left.
        """
        return self._remaining.units()

    def unit_rows(self, unit: int) -> range:
        """Return the rows of a unit."""
        start = unit * self.store.shard_rows
        return range(start, min(start + self.store.shard_rows, self.store.n_rows))

    @property
    def done(self) -> int:
        """Rows that are committed, by whomever, as far as this process has seen; and those of its own unit so far."""
        return self._remaining.rows_done + self._filled

    @property
    def written(self) -> int:
        """Bytes of rows that this process has put so far, those of units that it had to give up aside."""
        return (self.stats.rows + self._filled) * self._intake.row_bytes

    @property
    def waited(self) -> float:
        """Seconds for which the disk has held up the forward so far."""
        return self._pool.waited

    def current(self) -> Batch:
        """Return the batch that was yielded last.

        Raises
        ------
        CaptureError
            There is none.
        """
        return self._intake.current()

    def largest(self) -> Batch:
        """Return the largest batch of the plan, to try a forward before anything is written."""
        smaller = self.batch_tokens < int(self.store.spec["batch_tokens"])
        return self._batches.largest(self.batch_tokens if smaller else None, largest_batch(self.store.plan))

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of all pending units; each must be `put` for every site and layer before the next.

        Where other processes have all units that are left, this waits for them, and takes over those of processes that
        end without finishing. So when it ends, the store is complete.

        Raises
        ------
        CaptureError
            Rows of a batch are missing when the next one is asked for, or the disk refused a write.
        RangeError
            A value is not finite or does not fit the storage dtype; named with site, layer, document and value.
        MismatchError
            Another process committed a unit of another fingerprint meanwhile.
        """
        for unit in self.units():
            for batch in self.begin(unit):
                with self.filling(batch):
                    yield batch
            self.commit()

    # The loop in parts, for who computes a unit together with others, or again

    def units(self) -> Iterator[int]:
        """Yield units that were claimed, each to be begun and committed, or abandoned, until the store is complete."""
        return claim_until_done(self.claim, lambda: len(self.pending()), lambda left: self.on_wait(left))

    def claim(self) -> int | None:
        """Claim a unit, and return its number: not committed, and no living process works on it. None if there is none.

        Raises
        ------
        CaptureError
            The disk refuses.
        """
        began = time.perf_counter()
        with clear_errors(self.store.path):
            unit = self._claim()
        self.stats.claiming += time.perf_counter() - began
        return unit

    def begin(self, unit: int) -> list[Batch]:
        """Open the files of a unit, and return its batches under the budget of tokens."""
        self._intake.open(unit, self._open_for_units()[2])
        self._unit, self._filled = unit, 0
        batches = self._batches.unit(unit, self.batch_tokens)
        if self._carried is None:
            return batches
        self._intake.carry(self._carried, unit)
        self._filled = self._carried.rows(unit)
        return [batch for batch in batches if batch.rows.start >= self._carried.stop]

    @contextmanager
    def filling(self, batch: Batch) -> Iterator[None]:
        """Take the rows of a batch of the unit that was begun; on leaving, all of them must be there."""
        self._intake.batch = batch
        began = time.perf_counter()
        yield
        self.stats.forward += time.perf_counter() - began
        self.stats.tokens += batch.n_tokens
        self._intake.check_whole(batch)
        self._intake.batch = None
        self._filled += len(batch.rows)

    def place(self) -> dict[str, FileRecord] | None:
        """Finish the files of the unit and put them in place, flushed; return what the ledger says of them.

        None where others took this process for gone and removed its files: the unit is given up, for them to finish.
        """
        worker, _, writer = self._open_for_units()
        began = time.perf_counter()
        if worker.lost:
            self.abandon()
            return None
        placed: dict[str, FileRecord] = self._intake.guard(writer.commit_shards, self._intake.finish())
        self.stats.committing += time.perf_counter() - began
        return placed

    def commit(self, files: dict[str, FileRecord] | None = None) -> bool:
        """Write the ledger record of the unit that was begun, with the files of all of its writers; its own by default.

        Returns
        -------
        False where the unit had to be given up, see `place`, or another process has taken it over meanwhile.
        """
        unit = self._unit
        assert unit is not None
        _, claims, _ = self._open_for_units()
        if not claims.holds(unit):
            self.abandon()
            return False
        written = self.place() if files is None else files
        if written is None:
            return False
        began = time.perf_counter()
        if self._remaining.look():
            check_fingerprint(self.store, self.fingerprint, self._allow_mixed)
        if not self.store.ledger.has(unit):
            rows = self.unit_rows(unit)
            with clear_errors(self.store.path):
                self.store.ledger.commit(
                    UnitRecord(unit, (rows.start, rows.stop), self.batch_tokens, self._conditions(unit), written)
                )
            self.stats.units += 1
            self.stats.rows += len(rows)
            self.stats.bytes += sum(file.size for file in written.values())
        with clear_errors(self.store.path):
            claims.release(unit)
        self._remaining.mark(unit)
        self._unit, self._filled = None, 0
        self.stats.committing += time.perf_counter() - began
        return True

    def leave(self) -> None:
        """Close a unit whose record another process of the group writes."""
        self._unit, self._filled = None, 0
        self._remaining.look()

    def abandon(self) -> None:
        """Give up the unit that was begun: nothing of it is kept, and anyone may claim it."""
        worker, claims, _ = self._open_for_units()
        self._intake.discard()
        if self._unit is not None:
            with clear_errors(self.store.path):
                claims.release(self._unit)
        self._unit, self._filled = None, 0
        if worker.lost:
            self._stop()
            self._start()

    # Taking rows

    def put(self, site: str, values: Any, *, rows: range | slice | Any, layer: int | None = None) -> None:
        """Take the rows of one site and layer.

        Parameters
        ----------
        values
            numpy array or torch tensor of shape (rows, features), copied before the call returns; feature dims
            beyond one are flattened. `Batch.kept` makes it from padded activations.
        rows
            The row numbers, as `Batch.rows` gives them; several puts may share a batch, in order.
        """
        self._intake.put(site, layer, values, rows)

    def record(self, site: str, layer: int | None, values: Any) -> None:
        """Take padded activations of the current batch, shape (sequences, longest, …): its kept rows are copied."""
        self._intake.record(site, layer, values)

    def append(self, site: str, layer: int | None, content: Any, n_rows: int, copy: Copy) -> None:
        """Take rows that are bytes in the storage dtype already, by a copy of the caller's (from another device)."""
        self._intake.append(site, layer, content, n_rows, copy)

    # Private

    def _claim(self) -> int | None:
        if self._open_for_units()[0].lost:
            self._stop()
            self._start()
        worker, claims, _ = self._open_for_units()
        worker.sweep()
        self._remaining.look()
        while (name := claims.take_claim(self._remaining)) is not None:
            if not self._remaining.has(int(name)):
                return int(name)
            claims.release(name)
        return None

    def _conditions(self, unit: int) -> dict[str, Any]:
        carried = self._carried
        return self.fingerprint if carried is None else carried.fingerprint(unit, self.fingerprint, self.batch_tokens)

    def _start(self) -> None:
        with clear_errors(self.store.path):
            worker = start_work(self.store.path, self.fingerprint, self._heartbeat_timeout)
            try:
                self._writer = writer_of(worker, self._pool)
            except BaseException:
                worker.close()
                raise
        self._worker, self._claims = worker, claims_of(worker)

    def _check_others(self) -> None:
        if not self._allow_mixed:
            for other in self._open_for_units()[1].others():
                check_alike(self.store.path, other.get("conditions", {}), self.fingerprint, "another process captures")

    def _stop(self) -> None:
        worker, claims, writer = self._open_for_units()
        writer.stop()
        self.stats.writing += writer.busy
        self._worker = self._claims = self._writer = None
        try:
            with clear_errors(self.store.path):
                claims.close(finished=self.store.complete)
                worker.sweep()
        finally:
            worker.close()

    def _open_for_units(self) -> tuple[AnyWorker, Claiming, WriterThread]:
        if self._worker is None or self._claims is None or self._writer is None:
            raise CaptureError("the recorder is not open", remedy="use it as: with Recorder(path) as recorder: …")
        return self._worker, self._claims, self._writer
