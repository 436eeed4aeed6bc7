"""Resolve which rows of each document a probe reads."""

from __future__ import annotations

from typing import get_args

import numpy as np
from numpy.typing import NDArray

from analysis.dataset.readable import Readable, Rows, RowWord
from flexcache.errors import AnalysisError, nearest


def row_offsets(store: Readable, rows: Rows, n_rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the offset of the row of each document, (documents,); −1 if it has no such token, 0 if all are read."""
    if rows == "last":
        return n_rows - 1
    if isinstance(rows, str):
        return np.zeros(len(n_rows), np.int64)
    position = np.asarray(store.coordinates["position"].values)  # type: ignore[attr-defined]
    table = store.documents
    wanted = rows + (table["n_tokens"].to_numpy().astype(np.int64) if rows < 0 else 0)
    start = table["row_start"].to_numpy().astype(np.int64)
    first = np.where(n_rows > 0, position[np.minimum(start, len(position) - 1)], 0)
    at = wanted - first  # the rows of a document are consecutive tokens
    return np.where((at >= 0) & (at < n_rows), at, -1)


def choose_rows(store: Readable, rows: Rows | None) -> Rows:
    """Return *rows*, or their default for the rows that the store holds.

    Raises
    ------
    AnalysisError
        The store does not hold such rows.
    """
    stored: str = store.spec.rows
    if rows is None:
        return stored if stored in ("last", "first", "mean") else "last"  # type: ignore[return-value]
    if isinstance(rows, int) and not isinstance(rows, bool) and stored == "all":
        return rows
    if rows not in get_args(RowWord):
        raise AnalysisError(f"rows cannot be {rows!r}", remedy=nearest(str(rows), get_args(RowWord)))
    one = stored in ("last", "first", "mean")
    if one and rows not in (stored, "all"):
        raise AnalysisError(
            f"the store does not hold the {rows} of each document",
            expected=f"rows={stored!r}, as captured",
            found=f"rows={rows!r}",
            remedy=f'leave rows out, or capture again with rows: all or rows: "{rows}"',
        )
    return stored if one else rows  # type: ignore[return-value]
