"""The recorder: hands out the planned batches of units that are not committed yet, and takes their activations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np

from flexcache.errors import CaptureError, SiteError, nearest
from flexcache.recorder.batch import Batch, BatchReader
from flexcache.recorder.carried import Carried
from flexcache.recorder.fingerprint import check_alike, check_fingerprint
from flexcache.recorder.range_error import place, range_error
from flexcache.recorder.remaining import Remaining
from flexcache.recorder.rows import FLOAT32, Unstorable, as_int8, rows_of, stored
from flexcache.recorder.tally import Tally
from flexcache.spec import DTYPES
from flexcache.store.description import largest_batch
from flexcache.store.filling import AnyClaims, AnyWorker, claims_of, slabs_for, start_work, writer_of
from flexcache.store.int8 import is_scale, scale_name
from flexcache.store.ledger import FileRecord, UnitRecord
from flexcache.store.place import Place
from flexcache.store.reader import shard_name
from flexcache.store.shard import ShardLayout
from flexcache.store.shard_file import Copy, NonFinite, ShardFile, copy_bytes
from flexcache.store.slabs import Slab, SlabPool, anonymous_slab
from flexcache.store.store import Store
from flexcache.store.worker import PATIENCE
from flexcache.store.writer import WriterThread, clear_errors

DEFAULT_BUFFER = 256 << 20
POLL = 0.2
"""Seconds between two looks at a store whose remaining units other processes have."""

Key = tuple[str, int | None]
Converted = tuple[np.ndarray, list[tuple[int, int]]]


class Recorder:
    """Fills a planned store, alone or beside others. Use it as a context manager.

    `batches` yields every batch of every unit that is not committed and that no other process works on; between two
    batches, `put` takes the rows of each site and layer. Any forward can stand between them: hooks on a torch model,
    vLLM, nnsight, numpy. A unit is committed once all of its rows are there; what is left early is at most one unit.

        with flexcache.Recorder("run.zarr") as recorder:
            for batch in recorder.batches():
                recorder.put("resid_post", layer=12, rows=batch.rows, values=my_forward(batch))

    Any number of processes on any number of machines may do this to one store at the same time; see
    `flexcache.store.claims`. One thread uses a recorder; two more, inside, write and tell others that it is alive.

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
    patience
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
        keys: Sequence[Key] | None = None,
        carried: Carried | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self.store = Store(path)
        self.fingerprint = {} if fingerprint is None else fingerprint
        self._remaining = Remaining(self.store)
        self.tally = Tally()
        planned = int(self.store.spec["batch_tokens"])
        self.batch_tokens = planned if batch_tokens is None else min(planned, batch_tokens)
        self.on_wait: Callable[[int], None] = lambda units: None
        self.on_complete: Callable[[], None] = lambda: None
        self.on_start: Callable[[], None] = lambda: None
        self._allow_mixed = allow_mixed
        self._layouts = {
            name: ShardLayout(self.store.n_rows, self.store.shard_rows, array.row_bytes)
            for name, array in self.store.arrays.items()
        }
        everything = [(name, layer) for name, array in self.store.arrays.items() for layer in array.slices]
        arrays = self.store.arrays
        self.keys: list[Key] = [k for k in (everything if keys is None else keys) if not is_scale(k[0], arrays)]
        scales = [(scale_name(name), layer) for name, layer in self.keys if arrays[name].dtype == "int8"]
        self._writes: list[Key] = self.keys + scales
        self._batches = BatchReader(self.store.path, mean=self.store.spec.get("rows") == "mean")
        check_fingerprint(self.store, self.fingerprint, allow_mixed)
        self._pool = SlabPool(*self._slabs(buffer_bytes), allocate)
        self._carried = carried
        self._patience = patience
        self._worker: AnyWorker | None = None
        self._claims: AnyClaims | None = None
        self._writer: WriterThread | None = None
        self._files: dict[Key, ShardFile] = {}
        self._unit: int | None = None
        self._batch: Batch | None = None
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
        self._files.clear()
        self._unit = self._batch = None
        self.tally.waiting = self._pool.waited
        with clear_errors(self.store.path):
            self.tally.write(self.store.path, error, direct)
        if error is None and self.store.complete:
            self.on_complete()

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
        arrays = self.store.arrays
        return (self.tally.rows + self._filled) * sum(arrays[name].row_bytes for name, _ in self._writes)

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
        if self._batch is None:
            raise CaptureError(
                "there is no batch to put rows for", remedy="put rows inside the loop over recorder.batches()"
            )
        return self._batch

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
        while True:
            unit = self.claim()
            if unit is not None:
                yield unit
            elif left := len(self.pending()):
                self.on_wait(left)
                time.sleep(POLL)
            else:
                return

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
        self.tally.claiming += time.perf_counter() - began
        return unit

    def begin(self, unit: int) -> list[Batch]:
        """Open the files of a unit, and return its batches under the budget of tokens."""
        self._open_for_units()
        self._files = {key: self._open(key, unit) for key in self._writes}
        self._unit, self._filled = unit, 0
        batches = self._batches.unit(unit, self.batch_tokens)
        return batches if self._carried is None else self._carry(self._carried, unit, batches)

    @contextmanager
    def filling(self, batch: Batch) -> Iterator[None]:
        """Take the rows of a batch of the unit that was begun; on leaving, all of them must be there."""
        self._batch = batch
        began = time.perf_counter()
        yield
        self.tally.forward += time.perf_counter() - began
        self.tally.tokens += batch.n_tokens
        self._check_put(batch)
        self._batch = None
        self._filled += len(batch.rows)

    def place(self) -> dict[str, FileRecord] | None:
        """Finish the files of the unit and put them in place, flushed; return what the ledger says of them.

        None where others took this process for gone and removed its files: the unit is given up, for them to finish.
        """
        worker, _, writer = self._open_for_units()
        files = list(self._files.values())
        began = time.perf_counter()
        if worker.lost:
            self.abandon()
            return None
        for file in files:
            self._guard(file.finish)
        placed: list[dict[str, FileRecord]] = []
        self._guard(lambda: placed.append(writer.place(files)))
        self._files = {}
        self.tally.committing += time.perf_counter() - began
        return placed[0]

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
            self.tally.units += 1
            self.tally.rows += len(rows)
            self.tally.bytes += sum(file.size for file in written.values())
        with clear_errors(self.store.path):
            claims.release(unit)
        self._remaining.mark(unit)
        self._unit, self._filled = None, 0
        self.tally.committing += time.perf_counter() - began
        return True

    def leave(self) -> None:
        """Close a unit whose record another process of the group writes."""
        self._unit, self._filled = None, 0
        self._remaining.look()

    def abandon(self) -> None:
        """Give up the unit that was begun: nothing of it is kept, and anyone may claim it."""
        worker, claims, _ = self._open_for_units()
        for file in self._files.values():
            file.discard()
        self._files = {}
        if self._unit is not None:
            with clear_errors(self.store.path):
                claims.release(self._unit)
        self._unit = self._batch = None
        self._filled = 0
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
        file = self._file(site, layer)
        first, count = _span(rows)
        self._check_rows(file, first, count, values.shape)
        self._store(file, _one_span, values)

    def record(self, site: str, layer: int | None, values: Any) -> None:
        """Take padded activations of the current batch, shape (sequences, longest, …): its kept rows are copied."""
        file = self._file(site, layer)
        batch = self.current()
        features = self.store.arrays[site].features
        shape = tuple(values.shape)
        if shape[:2] != batch.shape or math.prod(shape[2:]) != features:
            raise CaptureError(
                f"activations of {place(site, layer)} have the wrong shape",
                expected=f"({batch.shape[0]}, {batch.shape[1]}, {features}) for (sequences, longest, features)",
                found=str(shape),
            )
        self._store(file, rows_of, batch, values)

    def append(self, site: str, layer: int | None, content: Any, n_rows: int, copy: Copy) -> None:
        """Take rows that are bytes in the storage dtype already, by a copy of the caller's (from another device)."""
        file = self._file(site, layer)
        self._guard(file.append, content, [(0, n_rows * file.layout.row_bytes)], copy)

    # Private

    def _claim(self) -> int | None:
        if self._open_for_units()[0].lost:
            self._stop()
            self._start()
        worker, claims, _ = self._open_for_units()
        worker.sweep()
        self._remaining.look()
        while (name := claims.take(self._remaining)) is not None:
            if not self._remaining.has(int(name)):
                return int(name)
            claims.release(name)
        return None

    def _carry(self, carried: Carried, unit: int, batches: list[Batch]) -> list[Batch]:
        """Begin the files of a unit with the rows that are there, and return the batches of the others."""
        for key, file in self._files.items():
            for content, n_rows in carried.blocks(key, unit):
                self._guard(file.append, content, [(0, n_rows * file.layout.row_bytes)])
        self._filled = carried.rows(unit)
        return [batch for batch in batches if batch.rows.start >= carried.stop]

    def _conditions(self, unit: int) -> dict[str, Any]:
        carried = self._carried
        return self.fingerprint if carried is None else carried.fingerprint(unit, self.fingerprint, self.batch_tokens)

    def _start(self) -> None:
        with clear_errors(self.store.path):
            worker = start_work(self.store.path, self.fingerprint, self._patience)
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
        self.tally.writing += writer.busy
        self._worker = self._claims = self._writer = None
        try:
            with clear_errors(self.store.path):
                claims.close(finished=self.store.complete)
                worker.sweep()
        finally:
            worker.close()

    def _open_for_units(self) -> tuple[AnyWorker, AnyClaims, WriterThread]:
        if self._worker is None or self._claims is None or self._writer is None:
            raise CaptureError("the recorder is not open", remedy="use it as: with Recorder(path) as recorder: …")
        return self._worker, self._claims, self._writer

    def _store(self, file: ShardFile, convert: Callable[..., Converted], *arguments: Any) -> None:
        began = time.perf_counter()
        coarse = file.dtype == np.int8
        try:
            content, spans = convert(*arguments, FLOAT32 if coarse else file.dtype)
            parts = [(file, content, spans)] if not coarse else self._quantized(file, content, spans)
        except Unstorable as error:
            row = self._next_row(file) + error.row
            raise range_error(self.store, file.array, file.layer, row, error.feature, error.value) from None
        for target, part, places in parts:
            self._guard(target.append, part, places, copy_bytes)
        self.tally.copying += time.perf_counter() - began

    def _quantized(
        self, file: ShardFile, content: np.ndarray, spans: list[tuple[int, int]]
    ) -> list[tuple[ShardFile, np.ndarray, list[tuple[int, int]]]]:
        """Return float32 rows, given as bytes, for the file of int8 and that of its scales."""
        scales = self._files[scale_name(file.array), file.layer]
        values, scale = as_int8(np.concatenate([content[start : start + n] for start, n in spans]), file.layout)
        return [(file, values, [(0, len(values))]), (scales, scale, [(0, len(scale))])]

    def _guard(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except NonFinite as error:
            raise range_error(self.store, error.array, error.layer, error.row, error.feature, error.value) from None

    def _file(self, site: str, layer: int | None) -> ShardFile:
        try:
            return self._files[(site, layer)]
        except KeyError:
            self.current()
            if site not in self.store.arrays:
                raise SiteError(f"the plan has no site {site!r}", remedy=nearest(site, self.store.sites)) from None
            raise SiteError(
                f"the plan has no layer {layer} of {site}",
                expected=f"one of {list(self.store.arrays[site].slices)}",
            ) from None

    def _next_row(self, file: ShardFile) -> int:
        return file.layout.rows(file.shard).stop - file.rows_left

    def _check_rows(self, file: ShardFile, first: int, count: int, shape: tuple[int, ...]) -> None:
        batch = self.current()
        features = self.store.arrays[file.array].features
        expected_first = self._next_row(file)
        if first != expected_first or first + count > batch.rows.stop:
            raise CaptureError(
                f"rows of {place(file.array, file.layer)} come in the wrong order",
                expected=f"rows from {expected_first}, at most up to {batch.rows.stop}",
                found=f"rows {first} … {first + count}",
                remedy="put the rows of a batch once, in the order of batch.rows",
            )
        if not shape or shape[0] != count or math.prod(shape[1:]) != features:
            raise CaptureError(
                f"values of {place(file.array, file.layer)} have the wrong shape",
                expected=f"({count}, {features}) for (rows, features)",
                found=str(tuple(shape)),
                remedy="batch.kept(activations) drops the padding",
            )

    def _check_put(self, batch: Batch) -> None:
        for file in self._files.values():
            if self._next_row(file) != batch.rows.stop:
                raise CaptureError(
                    f"rows of {place(file.array, file.layer)} are missing",
                    where=f"unit {batch.unit}, batch {batch.index}",
                    expected=f"rows up to {batch.rows.stop}",
                    found=f"rows up to {self._next_row(file)}",
                    remedy="put every site and layer of the plan before the next batch",
                )

    def _open(self, key: Key, unit: int) -> ShardFile:
        name, layer = key
        return ShardFile(
            self._open_for_units()[2],
            shard_name(name, layer, unit),
            self._layouts[name],
            unit,
            DTYPES[self.store.arrays[name].dtype],
            name,
            layer,
            self.store.compressed,
        )

    def _slabs(self, buffer_bytes: int) -> tuple[int, int]:
        layouts, count = self._layouts.values(), max(1, len(self._writes))
        chunk = max(a.chunk_rows * a.row_bytes for a in layouts) if self.store.compressed else None
        return slabs_for(self.store.path, count, buffer_bytes, max(a.file_bytes(0) for a in layouts), chunk)


def _one_span(values: Any, dtype: np.dtype) -> Converted:
    content = stored(values, dtype)
    return content, [(0, len(content))]


def _span(rows: Any) -> tuple[int, int]:
    if isinstance(rows, range) and rows.step == 1:
        return rows.start, len(rows)
    if isinstance(rows, slice) and rows.step in (None, 1) and rows.start is not None and rows.stop is not None:
        return int(rows.start), int(rows.stop) - int(rows.start)
    numbers = np.asarray(rows)
    if numbers.ndim == 1 and len(numbers) and np.array_equal(numbers, np.arange(numbers[0], numbers[0] + len(numbers))):
        return int(numbers[0]), len(numbers)
    raise CaptureError(
        "rows are not consecutive",
        expected="batch.rows, or a part of it from its front",
        found=str(rows)[:200],
    )
