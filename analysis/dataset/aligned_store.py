"""Read one store by the rows, documents and labels of another that holds the same tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexcache.errors import AnalysisError
from flexcache.store.read.row_alignment import matching_rows
from flexcache.store.read.store import Store

NAMED = 3
"""Documents that an error names."""


@dataclass(frozen=True, eq=False)
class AlignedStore:
    """The activations of *values* under the row numbers, documents and labels of *store*; made by `align_stores`.

    ::

        same = align_stores(store, other)
        same.read("resid_post", 8, rows=[5]) - store.read("resid_post", 8, rows=[5])

    Attributes
    ----------
    store : Store
        Gives documents, labels, coordinates and settings.
    values : Store
        Gives sites, layers, activations and the record of their model.
    rows : ndarray of shape (store.n_rows,), or None
        The row of *values* for each row of *store*, -1 if it is not committed; None if the numbers are equal.
    """

    store: Store
    values: Store
    rows: NDArray[np.int64] | None = field(repr=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is unpickled
            raise AttributeError(name)
        own = ("sites", "arrays", "layers", "provenance", "ledger", "committed_units")
        return getattr(self.values if name in own else self.store, name)

    def find_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of `values` for rows of `store`, -1 for rows that are not committed."""
        return rows if self.rows is None else self.rows[rows]

    def read(self, site: str, layer: int | None = None, rows: Any = slice(None)) -> NDArray[Any]:
        """Return rows of *values* as float32, (rows, features), for rows of *store*."""
        chosen = np.arange(self.store.n_rows)[rows] if isinstance(rows, slice) else np.asarray(rows)
        return self.values.read(site, layer, self.find_rows(chosen))


def align_stores(store: Store, other: Store) -> AlignedStore:
    """Align two stores that hold the same tokens of the same documents, in any order.

    ::

        same = align_stores(flexcache.open("float32.zarr"), flexcache.open("int8.zarr"))

    Documents are matched by their ids, and rows by their positions.

    Raises
    ------
    AnalysisError
        A document, position or token is in one of the stores only, or one has means of documents; the error says which.
    """
    kinds = [one.spec.rows == "mean" for one in (store, other)]
    if kinds[0] != kinds[1]:
        raise _difference(store, other, [f"rows: {one.spec.rows}" for one in (store, other)])
    match = matching_rows(other, store)
    missing = match < 0
    if missing.any() or other.n_rows != store.n_rows:
        names = [set(one.documents["id"].to_pylist()) for one in (store, other)]
        alone = [sorted(map(str, a - b)) for a, b in (names, names[::-1])]
        if any(alone):
            raise _difference(store, other, [_count_documents(found) for found in alone])
        counts = [f"{one.n_rows:,} rows, {one.spec.rows} of each document" for one in (store, other)]
        if missing.any():
            row = int(missing.argmax())
            document = store.documents["id"][int(store.coordinates["document"].values[row])].as_py()
            counts[0] += f"; position {store.coordinates['position'].values[row]} of {document!r} is only there"
        raise _difference(store, other, counts)
    committed = np.isin(match // other.shard_rows, other.committed_units)
    if not committed.any():
        raise AnalysisError(
            "there is no row that both have committed",
            where=f"{store.path} and {other.path}",
            remedy="complete the capture",
        )
    if committed.all() and (match == np.arange(len(match))).all():
        return AlignedStore(store, other, None)
    return AlignedStore(store, other, np.where(committed, match, -1))


def _difference(store: Store, other: Store, found: list[str]) -> AnalysisError:
    return AnalysisError(
        "the stores hold other rows",
        where=f"{store.path} and {other.path}",
        expected="the same documents, and the same tokens of each",
        found=f"{found[0]} in the first; {found[1]} in the second",
        remedy="capture both from the same documents with the same rows, tokenizer and max_length",
    )


def _count_documents(alone: list[str]) -> str:
    if not alone:
        return "no documents that only it has"
    more = ", …" if len(alone) > NAMED else ""
    return f"{len(alone):,} documents that only it has ({', '.join(alone[:NAMED])}{more})"
