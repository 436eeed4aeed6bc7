"""The recorder: hands out the planned batches of units that are not committed yet, and takes their activations."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from flexcache.errors import CaptureError, MismatchError, RangeError, SiteError, nearest
from flexcache.recorder.batch import Batch, BatchReader
from flexcache.recorder.rows import Unstorable, pieces, stored
from flexcache.spec import DTYPES
from flexcache.store.files import write_json
from flexcache.store.ledger import FileRecord, UnitRecord
from flexcache.store.reader import shard_name
from flexcache.store.shard import ShardLayout
from flexcache.store.slabs import PAGE, Slab, SlabPool, anonymous_slab
from flexcache.store.store import Store
from flexcache.store.writer import Copy, NonFinite, ShardFile, Writer, copy_bytes

LARGEST_SLAB = 4 << 20
SMALLEST_SLAB = 64 << 10
DEFAULT_BUFFER = 256 << 20

Key = tuple[str, int | None]


@dataclass
class Tally:
    """Where the time of a recording went, in seconds, and what came of it."""

    began: float = field(default_factory=time.perf_counter)
    units: int = 0
    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    forward: float = 0.0
    copying: float = 0.0
    waiting: float = 0.0
    writing: float = 0.0


class Recorder:
    """Fills a planned store. Use it as a context manager.

    `batches` yields every batch of every unit that the ledger lacks; between two batches, `put` takes the rows of
    each site and layer. Any forward can stand between them: hooks on a torch model, vLLM, nnsight, numpy. A unit
    is committed once all of its rows are there; leaving the context early loses at most the units under way.

        with flexcache.Recorder("run.zarr") as recorder:
            for batch in recorder.batches():
                recorder.put("resid_post", layer=12, rows=batch.rows, values=my_forward(batch))

    One thread uses a recorder; a second one, inside, writes.

    Parameters
    ----------
    path
        A store that `flexcache.plan`, `Recorder.create` or an earlier capture made.
    fingerprint
        What the bits of the forward depend on. Units of another fingerprint in the same store are refused unless
        *allow_mixed*; the ledger says which unit had which.
    buffer_bytes
        Bound on the memory for rows on their way to the disk.
    allocate
        Makes the slabs; ordinary page-aligned memory by default.

    Raises
    ------
    MismatchError
        The store has units of another fingerprint.
    CaptureError
        The buffer is too small for the number of sites and layers.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fingerprint: dict[str, Any] | None = None,
        buffer_bytes: int = DEFAULT_BUFFER,
        allow_mixed: bool = False,
        allocate: Callable[[int], Slab] = anonymous_slab,
        on_commit: Callable[[int, int], None] = lambda rows, size: None,
    ) -> None:
        self.store = Store(path)
        self.fingerprint = {} if fingerprint is None else fingerprint
        self.tally = Tally()
        self._on_commit = on_commit
        self._layouts = {
            name: ShardLayout(self.store.n_rows, self.store.shard_rows, array.row_bytes)
            for name, array in self.store.arrays.items()
        }
        self._keys: list[Key] = [(name, s) for name, a in self.store.arrays.items() for s in a.slices]
        self._batches = BatchReader(self.store.path, mean=self.store.spec.get("rows") == "mean")
        self._check_fingerprint(allow_mixed)
        self._pool = SlabPool(*self._slabs(buffer_bytes), allocate)
        self._writer: Writer | None = None
        self._files: dict[Key, ShardFile] = {}
        self._batch: Batch | None = None

    # The loop

    def __enter__(self) -> Self:
        self._writer = Writer(self.store.path, self._pool)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._writer is not None
        try:
            if kind is None or issubclass(kind, KeyboardInterrupt):
                self._guard(self._writer.drain)
        finally:
            self._writer.stop()
            self._files.clear()
            self.tally.waiting, self.tally.writing = self._pool.waited, self._writer.busy
            self._write_run(error)
            self.store.refresh()

    def pending(self) -> list[int]:
        """Return the units that are not committed, in order."""
        self.store.refresh()
        return sorted(set(range(self.store.n_units)) - set(self.store.committed_units.tolist()))

    def unit_rows(self, unit: int) -> range:
        """Return the rows of a unit."""
        start = unit * self.store.shard_rows
        return range(start, min(start + self.store.shard_rows, self.store.n_rows))

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
        return self._batches.largest()

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of all pending units; each must be `put` for every site and layer before the next.

        Raises
        ------
        CaptureError
            Rows of a batch are missing when the next one is asked for, or the disk refused a write.
        RangeError
            A value is not finite or does not fit the storage dtype; named with site, layer, document and value.
        """
        if self._writer is None:
            raise CaptureError("the recorder is not open", remedy="use it as: with Recorder(path) as recorder: …")
        for unit in self.pending():
            batches = self._batches.unit(unit)
            self._files = {key: self._open(key, unit) for key in self._keys}
            for batch in batches:
                self._batch = batch
                began = time.perf_counter()
                yield batch
                self.tally.forward += time.perf_counter() - began
                self.tally.tokens += batch.n_tokens
                self._check_put(batch)
            self._batch = None
            self._commit(unit)

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
        self._store(file, values, count)

    def record(self, site: str, layer: int | None, values: Any) -> None:
        """Take padded activations of the current batch, shape (sequences, longest, …): its kept rows are copied."""
        file = self._file(site, layer)
        batch = self.current()
        features = self.store.arrays[site].features
        shape = tuple(values.shape)
        if shape[:2] != batch.shape or math.prod(shape[2:]) != features:
            raise CaptureError(
                f"activations of {_place(site, layer)} have the wrong shape",
                expected=f"({batch.shape[0]}, {batch.shape[1]}, {features}) for (sequences, longest, features)",
                found=str(shape),
            )
        for piece in pieces(batch, values, file.dtype):
            self._store(file, piece, len(piece))

    def append(self, site: str, layer: int | None, content: Any, n_rows: int, copy: Copy) -> None:
        """Take rows that are bytes in the storage dtype already, by a copy of the caller's (from another device)."""
        file = self._file(site, layer)
        self._guard(file.append, content, n_rows, copy)

    # Private

    def _store(self, file: ShardFile, values: Any, count: int) -> None:
        began = time.perf_counter()
        try:
            content = stored(values, file.dtype)
        except Unstorable as error:
            row = self._next_row(file) + error.row
            raise self._range_error(file.array, file.layer, row, error.feature, error.value) from None
        self._guard(file.append, content, count, copy_bytes)
        self.tally.copying += time.perf_counter() - began

    def _guard(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except NonFinite as error:
            raise self._range_error(error.array, error.layer, error.row, error.feature, error.value) from None

    def _range_error(self, array: str, layer: int | None, row: int, feature: int, value: float) -> RangeError:
        documents = self.store.documents
        line = int(np.searchsorted(documents.column("row_start").to_numpy(), row, side="right")) - 1
        dtype = self.store.arrays[array].dtype
        finite = math.isfinite(value)
        at = int(self.store.coordinates["position"].values[row])
        return RangeError(
            f"{_place(array, layer)} has a value that {'overflows ' + dtype if finite else 'is not finite'}",
            where=f"document {documents.column('id')[line].as_py()!r}, "
            + (f"token {at}, " if at >= 0 else "")
            + f"row {row}, feature {feature}",
            expected=f"a finite value of magnitude at most {_largest(dtype):.6g}",
            found=f"{value:.6g}",
            remedy="store this site as bfloat16 or float32"
            if finite
            else "look at the document and the model: this value is wrong in the forward itself, or a wider"
            " compute dtype is needed",
        )

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
                f"rows of {_place(file.array, file.layer)} come in the wrong order",
                expected=f"rows from {expected_first}, at most up to {batch.rows.stop}",
                found=f"rows {first} … {first + count}",
                remedy="put the rows of a batch once, in the order of batch.rows",
            )
        if not shape or shape[0] != count or math.prod(shape[1:]) != features:
            raise CaptureError(
                f"values of {_place(file.array, file.layer)} have the wrong shape",
                expected=f"({count}, {features}) for (rows, features)",
                found=str(tuple(shape)),
                remedy="batch.kept(activations) drops the padding",
            )

    def _check_put(self, batch: Batch) -> None:
        for file in self._files.values():
            if self._next_row(file) != batch.rows.stop:
                raise CaptureError(
                    f"rows of {_place(file.array, file.layer)} are missing",
                    where=f"unit {batch.unit}, batch {batch.index}",
                    expected=f"rows up to {batch.rows.stop}",
                    found=f"rows up to {self._next_row(file)}",
                    remedy="put every site and layer of the plan before the next batch",
                )

    def _open(self, key: Key, unit: int) -> ShardFile:
        assert self._writer is not None
        name, layer = key
        return ShardFile(
            self._writer,
            shard_name(name, layer, unit),
            self._layouts[name],
            unit,
            DTYPES[self.store.arrays[name].dtype],
            name,
            layer,
            self.store.compressed,
        )

    def _commit(self, unit: int) -> None:
        assert self._writer is not None
        files = list(self._files.values())
        for file in files:
            self._guard(file.finish)
        rows = self.unit_rows(unit)

        def record(written: dict[str, FileRecord]) -> None:
            self.store.ledger.commit(
                UnitRecord(
                    unit,
                    (rows.start, rows.stop),
                    int(self.store.spec["batch_tokens"]),
                    self.fingerprint,
                    written,
                )
            )
            size = sum(file.size for file in written.values())
            self.tally.units += 1
            self.tally.rows += len(rows)
            self.tally.bytes += size
            self._on_commit(len(rows), size)

        self._guard(self._writer.submit, self._writer.commit, files, record)

    def _slabs(self, buffer_bytes: int) -> tuple[int, int]:
        """Return the bytes of a slab and their number: every open shard fills one while others are written."""
        files = len(self._keys)
        if self.store.compressed:  # a slab is one inner chunk
            widest = max(layout.chunk_rows * layout.row_bytes for layout in self._layouts.values())
            size = -(-widest // PAGE) * PAGE
        else:
            widest = max(layout.file_bytes(0) for layout in self._layouts.values())
            size = min(LARGEST_SLAB, max(SMALLEST_SLAB, 1 << (widest - 1).bit_length()))
            while size > SMALLEST_SLAB and 2 * files * size > buffer_bytes:
                size //= 2
        count = buffer_bytes // size
        if count < files + 2:
            raise CaptureError(
                "the buffer is too small for so many sites and layers",
                expected=f"at least {(files + 2) * size / 1e6:.0f} MB for {files} open shards",
                found=f"{buffer_bytes / 1e6:.0f} MB",
                remedy="raise buffer_bytes (buffer_mb), or capture fewer layers",
            )
        return size, count

    def _check_fingerprint(self, allow_mixed: bool) -> None:
        units = self.store.ledger.units()
        if not units or allow_mixed:
            return
        earlier = self.store.ledger.read(units[-1]).fingerprint
        if earlier != self.fingerprint:
            different = [
                f"{name}: {earlier.get(name)} before, {self.fingerprint.get(name)} now"
                for name in sorted({*earlier, *self.fingerprint})
                if earlier.get(name) != self.fingerprint.get(name)
            ]
            raise MismatchError(
                "the store was begun under other conditions, which may change the bits of activations",
                where=str(self.store.path),
                found="; ".join(different),
                remedy="go on under the same conditions, or allow mixing (allow_mixed=True, --allow-mixed): the"
                " ledger records which unit had which",
            )

    def _write_run(self, error: BaseException | None) -> None:
        seconds = time.perf_counter() - self.tally.began
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        outcome = "complete" if error is None else f"{type(error).__name__}: {error}".splitlines()[0]
        try:
            folder = self.store.path / "runs"
            folder.mkdir(exist_ok=True)
            write_json(
                folder / f"{stamp}-{os.getpid()}.json",
                {
                    "host": socket.gethostname(),
                    "outcome": outcome,
                    "seconds": round(seconds, 3),
                    "direct_io": self._writer.direct if self._writer else None,
                    **{k: round(v, 3) for k, v in vars(self.tally).items() if k != "began"},
                },
            )
        except OSError:
            if error is None:
                raise


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


def _place(site: str, layer: int | None) -> str:
    return site if layer is None else f"{site} of layer {layer}"


def _largest(dtype: str) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(DTYPES[dtype]).max)
