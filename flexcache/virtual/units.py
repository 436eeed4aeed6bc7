"""The batches of a store's units, with the digests of their virtual rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import numpy as np

from flexcache.errors import DamagedError
from flexcache.recording.forward.batch import Batch
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.store.format.ledger import UnitRecord
from flexcache.store.format.shard import shard_name
from flexcache.store.read.open_store import OpenStore
from flexcache.virtual.plan import Starts

UNITS = 16
"""Units whose batches stay in memory."""


@dataclass(frozen=True)
class Unit:
    """The record of a unit, and its batches in the order of the digests."""

    record: UnitRecord
    batches: Sequence[Batch]
    first: int

    def span(self, number: int) -> slice:
        """Return the rows of a batch, as numbers in the unit."""
        rows = self.batches[number].rows
        return slice(rows.start - self.first, rows.stop - self.first)

    def digests(self, name: str, layer: int | None) -> tuple[str, ...]:
        """Return the digests of the batches of a virtual layer; raise DamagedError if the record lacks them."""
        found = self.record.virtual.get(shard_name(name, layer, self.record.unit), ())
        if len(found) != len(self.batches):
            raise DamagedError(
                "the ledger lacks digests of virtual rows",
                where=f"unit {self.record.unit}, {name} of layer {layer}",
                expected=f"{len(self.batches)} digests, one for each batch",
                found=str(len(found)),
                remedy="run flexcache verify to see what else is damaged",
            )
        return found

    def divide_rows(self, rows: np.ndarray) -> dict[int, np.ndarray]:
        """Return the batches that have some rows, each with those rows; all are ascending numbers in the unit."""
        ends = np.array([batch.rows.stop - self.first for batch in self.batches])
        owner = np.searchsorted(ends, rows, side="right")
        numbers, starts = np.unique(owner, return_index=True)
        return dict(zip(numbers.tolist(), np.split(rows, starts[1:]), strict=True))

    def whole_batches(self, rows: np.ndarray) -> np.ndarray:
        """Return all rows of the batches that have some of *rows*."""
        return ranges_of([self.span(number) for number in self.divide_rows(np.unique(rows))])

    def kept_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows to keep where *rows* are wanted: those of whole batches, unless most would be of no use."""
        whole = self.whole_batches(rows)
        return whole if len(whole) <= 2 * len(rows) else rows

    def sequence_rows(self, number: int) -> range | None:
        """Return the rows of all tokens of a batch, from which it can start; None if some tokens are no rows.

        The first and the last document of a batch may have rows in the units before and after.
        """
        batch = self.batches[number]
        kept = [one.kept_positions for one in batch.sequences if isinstance(one.kept_positions, slice)]
        if batch.mean or len(kept) < len(batch.sequences):
            return None
        before, after = kept[0].start, len(batch.tokens[-1]) - kept[-1].stop
        found = range(batch.rows.start - before, batch.rows.stop + after)
        return found if len(found) == batch.n_tokens else None

    def crosses(self, number: int) -> bool:
        """Return True if tokens of a batch are rows of another unit."""
        return self.sequence_rows(number) != self.batches[number].rows


def possible_starts(store: OpenStore, unit: Unit, number: int, starts: Starts) -> Starts:
    """Return the starts on disk that a batch can run from: all, or none."""
    rows = unit.sequence_rows(number)
    if rows is None or not store.committed[[rows.start // store.shard_rows, (rows.stop - 1) // store.shard_rows]].all():
        return {}
    return starts


def ranges_of(spans: Sequence[slice]) -> np.ndarray:
    """Return the numbers of some spans, one after the other."""
    return np.concatenate([np.arange(span.start, span.stop) for span in spans] or [np.zeros(0, np.int64)])


class Units:
    """The committed units of a store; those that were used last stay in memory."""

    def __init__(self, store: OpenStore) -> None:
        self._ledger, self._rows = store.ledger, store.shard_rows
        self._reader = BatchReader(store.path)
        self._lock = Lock()
        self._cached = lru_cache(maxsize=UNITS)(self._read)

    def read(self, number: int) -> Unit:
        """Return a committed unit; any number of threads may call it."""
        with self._lock:
            return self._cached(number)

    def _read(self, number: int) -> Unit:
        record = self._ledger.read_record(number)
        return Unit(record, self._reader.read_unit(number, record.batch_tokens), number * self._rows)
