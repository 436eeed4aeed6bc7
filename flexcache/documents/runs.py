"""Runs of consecutive documents, spread over a corpus: a part that stands for the whole, without reading it all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from flexcache.documents.parquet_files import ParquetSource
from flexcache.documents.sources import Near, Source

if TYPE_CHECKING:
    from flexcache.documents.documents import Documents

RUNS = 64


def spread(count: int, size: int, seed: int = 0) -> list[range]:
    """Return up to 64 runs of as many documents each, about *size* together, one at random in each part of *count*.

    >>> spread(10, 20)
    [range(0, 10)]
    >>> [len(run) for run in spread(10**9, 128)] == [2] * 64
    True
    """
    if count <= size:
        return [range(count)]
    runs = min(RUNS, size)
    length = size // runs
    edges = np.linspace(0, count, runs + 1).astype(np.int64)
    starts = np.random.default_rng(seed).integers(edges[:-1], edges[1:] - length + 1)
    return [range(start, start + length) for start in starts.tolist()]


class Part:
    """Some runs of a corpus, sorted and apart, as a corpus of their own."""

    def __init__(self, documents: Documents, runs: Sequence[range]) -> None:
        self._documents, self._runs = documents, runs

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the documents of the runs in corpus order; ids are not compared."""
        return self._documents.runs(self._runs)

    def describe(self) -> dict[str, Any]:
        """Return what identifies the whole corpus."""
        return self._documents.describe()


def near(source: Source, columns: list[str], rows: int, runs: Sequence[range]) -> Iterator[Near]:
    """Yield (index of the first document, where, batch) of what lies in the runs; reading ends after the last.

    Of Parquet, row groups without any are not decoded; other files are read up to there.
    """
    parts = source.groups(columns, rows, runs) if isinstance(source, ParquetSource) else _all(source, columns, rows)
    for first, where, batch in parts:
        if first >= runs[-1].stop:
            return
        for run in runs:
            low, high = max(run.start, first), min(run.stop, first + batch.num_rows)
            if low < high:
                yield low, where, batch.slice(low - first, high - low)


def _all(source: Source, columns: list[str], rows: int) -> Iterator[Near]:
    first = 0
    for where, batch in source.read(columns, rows):
        yield first, where, batch
        first += batch.num_rows
