"""Write the rows of a unit's batches into its open shards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from flexcache.errors import CaptureError, SiteError, nearest
from flexcache.recording.forward.batch import STATES_REMEDY, Batch
from flexcache.recording.run.existing_rows import ExistingRows
from flexcache.recording.run.row_transfer import Rows, RowTransfer
from flexcache.recording.run.run_stats import RunStats
from flexcache.store.format.int8 import is_scale, outlier_count, scale_name
from flexcache.store.format.ledger import UnitContent
from flexcache.store.format.shard import ShardLayout
from flexcache.store.read.selection import ArrayKey, captured_keys
from flexcache.store.read.store import Store
from flexcache.store.write.range_error import locating_values, place
from flexcache.store.write.row_encoding import encode_rows
from flexcache.store.write.shard_file import Copy, ShardFile, VirtualShard, WriterThread, copy_bytes
from flexcache.store.write.slabs import size_slabs


class UnitWriter:
    """The open shards of one unit: takes the rows of its batches, checked and in order.

    Parameters
    ----------
    keys
        The sites and layers that this process writes; all by default. The scales of int8 come with their rows.
    transfer
        Copies the rows of padded activations into slabs.
    stats
        Counts seconds and tokens.

    Attributes
    ----------
    unit : int or None
        The unit whose shards are open.
    rows_done : int
        Rows of the unit whose batches are filled.
    """

    def __init__(self, store: Store, keys: Sequence[ArrayKey] | None, transfer: RowTransfer, stats: RunStats) -> None:
        self._transfer, self._stats = transfer, stats
        self.follow(store)
        arrays = store.arrays
        given = captured_keys(arrays.values()) if keys is None else keys
        self.keys: list[ArrayKey] = [key for key in given if not is_scale(key[0], arrays)]
        scales = [(scale_name(name), layer) for name, layer in self.keys if arrays[name].dtype == "int8"]
        self._writes: list[ArrayKey] = self.keys + scales
        self._shards: dict[ArrayKey, ShardFile] = {}
        self._batch: Batch | None = None
        self.unit: int | None = None
        self.rows_done = 0

    def follow(self, store: Store) -> None:
        """Write the units of a store, whose plan may have grown since the units before."""
        self._store = store
        self._layouts = {
            name: ShardLayout(store.n_rows, store.shard_rows, array.row_bytes) for name, array in store.arrays.items()
        }

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of everything that this process writes."""
        arrays = self._store.arrays
        return sum(arrays[name].row_bytes for name, layer in self._writes if layer not in arrays[name].virtual)

    def slab_sizes(self, buffer_bytes: int) -> tuple[int, int]:
        """Return the bytes of a slab and the number of slabs, see `flexcache.store.write.slabs.size_slabs`."""
        layouts, count = self._layouts.values(), max(1, len(self._writes))
        chunk = max(a.chunk_rows * a.row_bytes for a in layouts) if self._store.compressed else None
        return size_slabs(self._store.path, count, buffer_bytes, max(a.file_bytes(0) for a in layouts), chunk)

    # The shards of a unit

    @property
    def unit_rows(self) -> range:
        """The rows of the open unit."""
        assert self.unit is not None
        start = self.unit * self._store.shard_rows
        return range(start, min(start + self._store.shard_rows, self._store.n_rows))

    def open_unit(self, unit: int, writer: WriterThread) -> None:
        """Open the shards of a unit."""
        self._shards = {key: self._open_shard(key, unit, writer) for key in self._writes}
        self.unit, self.rows_done = unit, 0

    def copy_existing_rows(self, existing: ExistingRows) -> None:
        """Begin the shards with the rows of the store that is extended."""
        assert self.unit is not None
        for key, file in self._shards.items():
            if isinstance(file, VirtualShard):
                file.add_existing(existing.rows_in(self.unit), existing.digests(key, self.unit))
                continue
            for content, n_rows in existing.read_blocks(key, self.unit):
                with locating_values(self._store):
                    file.append(content, [(0, n_rows * file.layout.row_bytes)])
        self.rows_done = existing.rows_in(self.unit)

    def place_shards(self, writer: WriterThread) -> UnitContent:
        """Finish the shards and move them into place, flushed; return their records for the ledger."""
        began = time.perf_counter()
        with locating_values(self._store):
            for file in self._shards.values():
                file.finish()
            shards, self._shards = list(self._shards.values()), {}
            files = writer.commit_shards([file for file in shards if not isinstance(file, VirtualShard)])
        self._stats.committing += time.perf_counter() - began
        virtual = {file.name: tuple(file.digests) for file in shards if isinstance(file, VirtualShard)}
        return UnitContent(files, virtual)

    def close_unit(self) -> None:
        """Forget a unit whose shards are in place."""
        self.unit, self.rows_done = None, 0

    def discard_shards(self) -> None:
        """Remove what was written of the unit."""
        for file in self._shards.values():
            file.discard()
        self.clear()

    def clear(self) -> None:
        """Forget shards, batch and unit."""
        self._shards, self._batch = {}, None
        self.close_unit()

    # Rows

    @contextmanager
    def fill_batch(self, batch: Batch) -> Iterator[None]:
        """Accept the rows of a batch of the unit; raise CaptureError on exit if some are missing."""
        self._batch = batch
        began = time.perf_counter()
        yield
        self._stats.forward += time.perf_counter() - began
        self._stats.tokens += batch.n_tokens
        self._check_filled(batch)
        for file in self._shards.values():
            file.end_batch()
        self._batch = None
        self.rows_done += len(batch.rows)

    def put_rows(self, site: str, layer: int | None, values: Any, rows: Any) -> None:
        """Store rows; see `Recorder.put`."""
        file = self._shard(site, layer)
        first, count = _span(rows)
        self._check_rows(file, first, count, values.shape)
        self._append(file, copy_bytes, encode_rows, values)

    def put_padded(self, site: str, layer: int | None, values: Any) -> None:
        """Store the kept rows of padded activations; see `Recorder.record`."""
        file = self._shard(site, layer)
        batch = self._current_batch()
        features = self._store.arrays[site].features
        shape = tuple(values.shape)
        if shape[:2] != batch.shape or math.prod(shape[2:]) != features:
            raise CaptureError(
                f"activations of {place(site, layer)} have the wrong shape",
                expected=f"({batch.shape[0]}, {batch.shape[1]}, {features}) for (sequences, longest, features)",
                found=str(shape),
                remedy=STATES_REMEDY if shape[:2] != batch.shape else None,
            )
        self._append(file, self._transfer.copy, self._transfer.rows_of, batch, values)

    # Private

    def _open_shard(self, key: ArrayKey, unit: int, writer: WriterThread) -> ShardFile:
        name, layer = key
        array, layout = self._store.arrays[name], self._layouts[name]
        if layer in array.virtual:
            return VirtualShard(writer, array, layer, layout, unit)
        return ShardFile(writer, array, layer, layout, unit, self._store.compressed)

    def _current_batch(self) -> Batch:
        if self._batch is None:
            raise CaptureError(
                "there is no batch to put rows for", remedy="put rows inside the loop over recorder.batches()"
            )
        return self._batch

    def _check_filled(self, batch: Batch) -> None:
        for file in self._shards.values():
            if _next_row(file) != batch.rows.stop:
                raise CaptureError(
                    f"rows of {place(file.array, file.layer)} are missing",
                    where=f"unit {batch.unit}, batch {batch.index}",
                    expected=f"rows up to {batch.rows.stop}",
                    found=f"rows up to {_next_row(file)}",
                    remedy="put every site and layer of the plan before the next batch",
                )

    def _append(self, file: ShardFile, copy: Copy, convert: Callable[..., Sequence[Rows]], *arguments: Any) -> None:
        began = time.perf_counter()
        scaled = file.dtype == np.int8
        targets = [file, self._shards[scale_name(file.array), file.layer]] if scaled else [file]
        outliers = outlier_count(file.array, self._store.arrays)
        with locating_values(self._store, file.array, file.layer, _next_row(file)):
            for target, (content, spans) in zip(targets, convert(*arguments, file.dtype, outliers), strict=True):
                target.append(content, spans, copy)
        self._stats.copying += time.perf_counter() - began

    def _shard(self, site: str, layer: int | None) -> ShardFile:
        try:
            return self._shards[(site, layer)]
        except KeyError:
            self._current_batch()
            if site not in self._store.arrays:
                raise SiteError(f"the plan has no site {site!r}", remedy=nearest(site, self._store.sites)) from None
            raise SiteError(
                f"the plan has no layer {layer} of {site}",
                expected=f"one of {list(self._store.arrays[site].captured)}",
            ) from None

    def _check_rows(self, file: ShardFile, first: int, count: int, shape: tuple[int, ...]) -> None:
        batch = self._current_batch()
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
                remedy=f"batch.kept(activations) drops the padding; {STATES_REMEDY}",
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
