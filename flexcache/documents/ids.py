"""Ids of documents: the check that no two are equal, and the error for an invalid one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import xxhash

from flexcache.errors import DocumentsError


class SeenIds:
    """The ids seen so far, as sorted runs of 64-bit hashes, each at most half as long as the one before.

    Memory is 16 bytes a document.

    >>> ids = SeenIds()
    >>> ids.add_ids(pa.array(["a", "b"]), 0)
    >>> ids.add_ids(pa.array(["a"]), 2)
    Traceback (most recent call last):
    ...
    flexcache.errors.DocumentsError: two documents have the id 'a'...
    """

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []  # sorted hashes, and their documents

    def add_ids(self, names: pa.Array, start: int) -> None:
        """Add the ids of documents from *start* on; raise DocumentsError for an id that occurred before."""
        texts = names.cast(pa.binary()).to_pylist()
        hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, texts), np.uint64, len(texts))
        order = np.argsort(hashes, kind="stable")
        run = hashes[order], order.astype(np.int64) + start
        twice = np.flatnonzero(run[0][1:] == run[0][:-1])
        if len(twice):
            first = min(twice, key=lambda i: run[1][i + 1])
            raise self._error(texts[run[1][first + 1] - start], run[1][first], run[1][first + 1])
        for known, documents in self._runs:
            at = np.searchsorted(known, run[0])
            again = np.flatnonzero(known[np.minimum(at, len(known) - 1)] == run[0])
            if len(again):
                raise self._error(texts[run[1][again[0]] - start], documents[at[again[0]]], run[1][again[0]])
        while self._runs and len(self._runs[-1][0]) < 2 * len(run[0]):
            known, documents = self._runs.pop()
            both = np.concatenate([known, run[0]])
            order = np.argsort(both, kind="stable")
            run = both[order], np.concatenate([documents, run[1]])[order]
        self._runs.append(run)

    @staticmethod
    def _error(name: bytes, first: int, second: int) -> DocumentsError:
        return DocumentsError(
            f"two documents have the id {name.decode()!r}",
            where=f"documents {first} and {second}",
            expected="a different id for each document",
            remedy="make the ids unique, or give flexcache.open_documents(…, unique_ids=False)",
        )


def invalid_id(found: str, where: str | None) -> DocumentsError:
    """Return the error for an id that is neither text nor a whole number."""
    return DocumentsError(
        "an id that is neither text nor a whole number", where=where, expected="text or a whole number", found=found
    )
