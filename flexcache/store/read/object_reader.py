"""Read rows of a store on object storage, by byte ranges that are fetched several at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from flexcache.store.format.shard import shard_name
from flexcache.store.read.shard_reader import RowReader
from flexcache.store.storage.backend import disk_path, storage_of
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.object_path import PIECE_BYTES, PIECES, Span

GAP_BYTES = 128 << 10
"""Rows at most this many bytes apart are fetched by one request, with the bytes between them."""
RUNS = 64
"""Requests for scattered rows that are sent at the same time."""


class RangeReader(RowReader):
    """Reads rows of one array by requests for ranges of its shards; any number of threads may use one reader.

    At most 32 MiB are held at a time in addition to the result. The length of a shard is requested once.
    """

    mapped = False

    def _gather_shard(
        self, layer: int | None, shard: int, rows: np.ndarray, out: np.ndarray, places: np.ndarray
    ) -> None:
        if self.foreign is not None:
            super()._gather_shard(layer, shard, rows, out, places)
            return
        self._check_once(layer, shard)
        width = self.layout.row_bytes
        wanted, back = np.unique(rows - shard * self.layout.shard_rows, return_inverse=True)
        order = np.argsort(back, kind="stable")  # places of `out` in the order of the rows that go there
        ends = np.searchsorted(back[order], np.arange(len(wanted) + 1))
        for group in _batches(_runs(wanted, width), wanted, width):
            spans = [(int(wanted[low]) * width, (int(wanted[high - 1]) + 1) * width) for low, high in group]
            for (low, high), (start, _), part in zip(group, spans, self._fetch(layer, shard, spans), strict=True):
                held = np.frombuffer(part, self.dtype).reshape(-1, self.array.features)
                chosen = order[ends[low] : ends[high]]
                out[places[chosen]] = held[wanted[back[chosen]] - start // width]

    def _scan_shard(self, layer: int | None, shard: int, first: int, out: np.ndarray) -> None:
        if self.foreign is not None:
            super()._scan_shard(layer, shard, first, out)
            return
        self._check_once(layer, shard)
        width = self.layout.row_bytes
        step = max(1, PIECE_BYTES // width)
        starts = list(range(0, len(out), step))
        for number in range(0, len(starts), PIECES):
            some = [(begin, min(begin + step, len(out))) for begin in starts[number : number + PIECES]]
            spans = [((first + begin) * width, (first + end) * width) for begin, end in some]
            for (begin, end), part in zip(some, self._fetch(layer, shard, spans), strict=True):
                dtype = self._bits if out.dtype == self._bits else self.dtype
                out[begin:end] = np.frombuffer(part, dtype).reshape(-1, self.array.features)

    def _fetch(self, layer: int | None, shard: int, spans: list[Span]) -> list[bytes]:
        return storage_of(self.root).read_ranges(shard_name(self.array.name, layer, shard), spans)

    @cached_property
    def _checked(self) -> set[tuple[int | None, int]]:
        return set()

    def _check_once(self, layer: int | None, shard: int) -> None:
        if (layer, shard) not in self._checked:
            self._check_size(self.path(layer, shard), shard)
            self._checked.add((layer, shard))


def _runs(rows: np.ndarray, width: int) -> Iterator[tuple[int, int]]:
    """Yield runs of sorted rows, as first index and the one after the last, that one request fetches."""
    low = 0
    for high in range(1, len(rows) + 1):
        last = high == len(rows)
        if (
            last
            or (rows[high] - rows[high - 1] - 1) * width > GAP_BYTES
            or (rows[high] - rows[low]) * width >= PIECE_BYTES
        ):
            yield low, high
            low = high


def _batches(runs: Iterator[tuple[int, int]], rows: np.ndarray, width: int) -> Iterator[list[tuple[int, int]]]:
    """Yield as many runs as are fetched at once: 64, or fewer that have 32 MiB together."""
    group: list[tuple[int, int]] = []
    held = 0
    for low, high in runs:
        count = int(rows[high - 1] - rows[low] + 1) * width
        if group and (len(group) == RUNS or held + count > PIECES * PIECE_BYTES):
            yield group
            group, held = [], 0
        group.append((low, high))
        held += count
    if group:
        yield group


def reader_class(root: StoreLocation) -> type[RowReader]:
    """Return the class of row readers for a store at *root*."""
    return RangeReader if disk_path(root) is None else RowReader
