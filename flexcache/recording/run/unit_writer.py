"""The intake: takes the rows of a unit's batches into the shards that are open, checked and in order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flexcache.errors import CaptureError, SiteError, nearest
from flexcache.recording.forward.batch import Batch
from flexcache.recording.forward.batch_rows import rows_of
from flexcache.recording.run.existing_rows import ExistingRows
from flexcache.recording.run.run_stats import RunStats
from flexcache.spec import DTYPES
from flexcache.store.format.int8 import is_scale, scale_name
from flexcache.store.format.shard import ShardLayout, shard_name
from flexcache.store.read.selection import ArrayKey
from flexcache.store.read.store import Store
from flexcache.store.write.backends import slabs_for
from flexcache.store.write.range_error import place, range_error
from flexcache.store.write.row_encoding import EncodedRows, Unstorable, encode_rows
from flexcache.store.write.shard_file import Copy, NonFinite, ShardFile, copy_bytes
from flexcache.store.write.shard_writer import WriterThread


class UnitWriter:
    """The open shards of one unit, and what may be put into them.

    Parameters
    ----------
    keys
        The sites and layers that this process writes; all by default.
    stats
        Where the time for copying rows is noted.

    Attributes
    ----------
    keys : list of (str, int or None)
        Without the scales of int8, which come with their rows.
    batch : Batch or None
        The one whose rows are taken.
    """

    def __init__(self, store: Store, keys: Sequence[ArrayKey] | None, stats: RunStats) -> None:
        self._store, self._tally = store, stats
        arrays = store.arrays
        every = [(name, layer) for name, array in arrays.items() for layer in array.slices]
        self.keys: list[ArrayKey] = [key for key in (every if keys is None else keys) if not is_scale(key[0], arrays)]
        scales = [(scale_name(name), layer) for name, layer in self.keys if arrays[name].dtype == "int8"]
        self._writes: list[ArrayKey] = self.keys + scales
        self._layouts = {
            name: ShardLayout(store.n_rows, store.shard_rows, array.row_bytes) for name, array in arrays.items()
        }
        self._files: dict[ArrayKey, ShardFile] = {}
        self.batch: Batch | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of everything that this process writes."""
        return sum(self._store.arrays[name].row_bytes for name, _ in self._writes)

    def slabs(self, buffer_bytes: int) -> tuple[int, int]:
        """Return the bytes of a slab and their number, see `flexcache.store.write.backends.slabs_for`."""
        layouts, count = self._layouts.values(), max(1, len(self._writes))
        chunk = max(a.chunk_rows * a.row_bytes for a in layouts) if self._store.compressed else None
        return slabs_for(self._store.path, count, buffer_bytes, max(a.file_bytes(0) for a in layouts), chunk)

    # The shards of a unit

    def open(self, unit: int, writer: WriterThread) -> None:
        """Begin the shards of a unit."""
        self._files = {(name, layer): self._open(name, layer, unit, writer) for name, layer in self._writes}

    def carry(self, carried: ExistingRows, unit: int) -> None:
        """Begin them with the rows that a growing store has."""
        for key, file in self._files.items():
            for content, n_rows in carried.blocks(key, unit):
                self.guard(file.append, content, [(0, n_rows * file.layout.row_bytes)])

    def finish(self) -> list[ShardFile]:
        """Complete the shards, and hand them over."""
        files = list(self._files.values())
        for file in files:
            self.guard(file.finish)
        self._files = {}
        return files

    def discard(self) -> None:
        """Give the shards up."""
        for file in self._files.values():
            file.discard()
        self.clear()

    def clear(self) -> None:
        """Forget shards and batch."""
        self._files, self.batch = {}, None

    def guard(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call what may find a value that is not finite, and say where that is.

        Raises
        ------
        RangeError
        """
        try:
            return call(*arguments)
        except NonFinite as error:
            raise range_error(self._store, error.array, error.layer, error.row, error.feature, error.value) from None

    # Rows

    def current(self) -> Batch:
        """Return the batch whose rows are taken.

        Raises
        ------
        CaptureError
            There is none.
        """
        if self.batch is None:
            raise CaptureError(
                "there is no batch to put rows for", remedy="put rows inside the loop over recorder.batches()"
            )
        return self.batch

    def put(self, site: str, layer: int | None, values: Any, rows: Any) -> None:
        """Take rows; see `Recorder.put`."""
        file = self._file(site, layer)
        first, count = _span(rows)
        self._check_rows(file, first, count, values.shape)
        self._take(file, encode_rows, values)

    def record(self, site: str, layer: int | None, values: Any) -> None:
        """Take the kept rows of padded activations; see `Recorder.record`."""
        file = self._file(site, layer)
        batch = self.current()
        features = self._store.arrays[site].features
        shape = tuple(values.shape)
        if shape[:2] != batch.shape or math.prod(shape[2:]) != features:
            raise CaptureError(
                f"activations of {place(site, layer)} have the wrong shape",
                expected=f"({batch.shape[0]}, {batch.shape[1]}, {features}) for (sequences, longest, features)",
                found=str(shape),
            )
        self._take(file, rows_of, batch, values)

    def append(self, site: str, layer: int | None, content: Any, n_rows: int, copy: Copy) -> None:
        """Take bytes; see `Recorder.append`."""
        file = self._file(site, layer)
        self.guard(file.append, content, [(0, n_rows * file.layout.row_bytes)], copy)

    def check_whole(self, batch: Batch) -> None:
        """Refuse a batch of which rows are missing.

        Raises
        ------
        CaptureError
        """
        for file in self._files.values():
            if _next_row(file) != batch.rows.stop:
                raise CaptureError(
                    f"rows of {place(file.array, file.layer)} are missing",
                    where=f"unit {batch.unit}, batch {batch.index}",
                    expected=f"rows up to {batch.rows.stop}",
                    found=f"rows up to {_next_row(file)}",
                    remedy="put every site and layer of the plan before the next batch",
                )

    # Private

    def _open(self, name: str, layer: int | None, unit: int, writer: WriterThread) -> ShardFile:
        dtype = DTYPES[self._store.arrays[name].dtype]
        shard = shard_name(name, layer, unit)
        return ShardFile(writer, shard, self._layouts[name], unit, dtype, name, layer, self._store.compressed)

    def _take(self, file: ShardFile, convert: Callable[..., list[EncodedRows]], *arguments: Any) -> None:
        began = time.perf_counter()
        try:
            pieces = convert(*arguments, file.dtype)
        except Unstorable as error:
            row = _next_row(file) + error.row
            raise range_error(self._store, file.array, file.layer, row, error.feature, error.value) from None
        for target, (content, spans) in zip(self._with_scales(file), pieces, strict=True):
            self.guard(target.append, content, spans, copy_bytes)
        self._tally.copying += time.perf_counter() - began

    def _with_scales(self, file: ShardFile) -> list[ShardFile]:
        scaled = file.dtype == np.int8
        return [file, self._files[scale_name(file.array), file.layer]] if scaled else [file]

    def _file(self, site: str, layer: int | None) -> ShardFile:
        try:
            return self._files[(site, layer)]
        except KeyError:
            self.current()
            if site not in self._store.arrays:
                raise SiteError(f"the plan has no site {site!r}", remedy=nearest(site, self._store.sites)) from None
            raise SiteError(
                f"the plan has no layer {layer} of {site}",
                expected=f"one of {list(self._store.arrays[site].slices)}",
            ) from None

    def _check_rows(self, file: ShardFile, first: int, count: int, shape: tuple[int, ...]) -> None:
        batch = self.current()
        features = self._store.arrays[file.array].features
        expected_first = _next_row(file)
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


def _next_row(file: ShardFile) -> int:
    return file.layout.rows(file.shard).stop - file.rows_left


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
