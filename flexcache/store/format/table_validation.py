"""Validate the row numbers in the tables of a store, which may come from an untrusted source."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from flexcache.store.format.schema import DOCUMENTS

NUMBERS = ("row_start", "n_rows")
OF_DOCUMENTS = ("n_tokens",)


def check_lines(name: str, table: pa.Table, n_rows: int) -> pa.Table:
    """Return the lines of a table that belong to the first *n_rows* rows; an extension may have added lines.

    Raises
    ------
    ValueError
        A column is missing, of another type, or exceeds the number of rows.
    """
    columns = (*NUMBERS, *(OF_DOCUMENTS if name == DOCUMENTS else ()))
    missing = {*columns, *(("id",) if name == DOCUMENTS else ())} - set(table.column_names)
    if missing:
        raise ValueError(f"it has no column {', '.join(sorted(missing))}")
    for column in columns:
        kind = table.column(column).type
        if not pa.types.is_integer(kind) or table.column(column).null_count:
            raise ValueError(f"column {column} is {kind}, or has nulls, but must hold integers")
    starts = table.column("row_start").to_numpy()
    if len(starts) and starts[-1] >= n_rows:
        table = table.slice(0, int(np.searchsorted(starts, n_rows)))
    for column in NUMBERS:
        values = table.column(column).to_numpy()
        if len(values) and not (values.min() >= 0 and values.max() <= n_rows):
            raise ValueError(f"column {column} exceeds the {n_rows} rows")
    starts, counts = (table.column(column).to_numpy() for column in NUMBERS)
    if (starts + counts > n_rows).any():
        raise ValueError(f"a line exceeds the {n_rows} rows")
    return table
